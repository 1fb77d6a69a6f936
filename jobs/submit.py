"""`vitok submit`: a command of this command line, run as a job on a Ray cluster."""

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

import cluster
from jobs import remote
from jobs.packages import Package, describe_left_out, pack_working_tree
from pipelines.tracker.credentials import credential_in, names_a_credential
from vitok.config import config, flatten

ROOT = Path(__file__).parents[1]
RAY_JOB_FILE = Path(cluster.__file__).parent / "kubernetes" / "rayjob.yaml"
# Ray gives a job that is stopped 3 s, a training needs the time of a step and a checkpoint. The
# pods of cluster/kubernetes and the nodes of cluster/aws.yaml have as long.
STOP_WAIT_S = 600

_ELSEWHERE = (
    "everyone who can see the cluster's dashboard can read it; give the nodes the credential "
    "instead (a role or profile of AWS, a Kubernetes secret, MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD in their environment)"
)


@config
class Submission:
    """Run a command on a Ray cluster: `vitok submit COMMAND RECIPE [--field value ...]`.

    COMMAND is train, flow, joint, generate, sweep, encode or evaluate, with its own arguments. The
    job gets what git tracks of this working tree, and its log is followed; Ctrl-C leaves it
    running. The same run name, given again, goes on where that run stopped.

    Attributes:
        address: the cluster's job server, http://HEAD:8265; by default as RAY_ADDRESS says.
        env: NAME=VALUE for the job's environment, or NAME for the value it has here; give it once
            for each variable. Credentials are refused: anyone can read them there.
        package: send the working tree; without it the job runs what the nodes have installed.
        detach: submit, print the job's name, and leave.
        dry_run: print what would be submitted, also as a RayJob for Kubernetes, and leave.
    """

    address: str = ""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    package: bool = True
    detach: bool = False
    dry_run: bool = False


def submit(arguments: Sequence[str], commands: dict[str, Callable[[Sequence[str]], Any]]) -> None:
    """Submit a command line as a job.

    Args:
        arguments: a command, what it takes, and anywhere among them the options of a Submission.
        commands: what can be submitted; each gives the config that a command line asks for.

    Raises:
        ValueError: there is no such command, or the job would fail or tell a secret.
        RuntimeError: the job failed, or another job is at work on this run.
    """
    options, rest = tyro.cli(
        Submission, args=arguments, prog="vitok submit", return_unknown_args=True
    )
    command, *fields = rest or [""]
    if command not in commands:
        raise ValueError(
            f"vitok submit takes one of {', '.join(commands)} and its arguments"
            + (f", not {command!r}" if command else "")
        )
    settings = commands[command](fields)
    run = _run_name(settings)
    variables = _environment(options.env)
    for given in fields:
        if found := credential_in(given):
            raise ValueError(f"an argument of {command} holds {found}: {_ELSEWHERE}")
    with tempfile.TemporaryDirectory() as folder:
        package = None
        if options.package:
            package = pack_working_tree(ROOT, Path(folder) / "tree.zip", _max_package_bytes())
            print(_describe_package(package))
        _check_locations(settings, package)
        program = "vitok" if package is None else "python -m jobs.cli"
        # The shell that Ray starts makes room for it, so that signals reach it alone.
        entrypoint = f"exec {program} {shlex.join([command, *fields])}"
        metadata = {remote.RUN_KEY: run, remote.COMMAND_KEY: command}
        if package is not None:
            metadata[remote.REVISION_KEY] = package.revision
        runtime_env: dict[str, Any] = {"env_vars": variables}
        if options.dry_run:
            _print_plan(run, entrypoint, runtime_env, package)
            return
        client = remote.connect(options.address)
        if job := remote.job_at_work(client, command, run):
            raise RuntimeError(
                f"job {job} is at work on the run {run!r}; wait for it, end it with `vitok jobs "
                f"stop {job}`, or choose another name"
            )
        if package is not None:
            runtime_env["working_dir"] = str(package.path)
        job = client.submit_job(
            entrypoint=entrypoint,
            runtime_env=runtime_env,
            metadata=metadata,
            submission_id=f"{run}-{time.strftime('%Y%m%d-%H%M%S')}",
        )
    print(f"job: {job}", flush=True)
    if options.detach:
        print(f"follow it with: vitok jobs logs {job} --follow")
        return
    remote.follow(client, job)
    print(f"job {job} succeeded")


def ray_job(run: str, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Return the RayJob of a submission, for `kubectl apply`.

    Its pods run the code of their image: a RayJob has nothing else that holds a working tree.
    """
    document = yaml.safe_load(RAY_JOB_FILE.read_text())
    document["metadata"]["name"] = _kubernetes_name(run)
    document["spec"]["entrypoint"] = entrypoint
    document["spec"]["runtimeEnvYAML"] = yaml.safe_dump(runtime_env)
    return yaml.safe_dump(document, sort_keys=False)


def _kubernetes_name(run: str) -> str:
    """Return a run's name in lower case letters, digits and hyphens, as Kubernetes asks for."""
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in run.lower())
    return f"vitok-{letters}"[:47].strip("-")  # KubeRay adds to it, and takes 47


def _run_name(settings: Any) -> str:
    """Return what a second submission of the same work has in common with the first."""
    if hasattr(settings, "run"):
        return str(settings.run.name)
    if hasattr(settings, "name"):
        return str(settings.name)
    return str(settings.out).rstrip("/").rpartition("/")[2]


def _environment(given: Sequence[str]) -> dict[str, str]:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator:
            if name not in os.environ:
                raise ValueError(f"env={item}: there is no such variable here; give {item}=VALUE")
            value = os.environ[name]
        if names_a_credential(name):
            raise ValueError(f"env={name} is the name of a credential: {_ELSEWHERE}")
        if found := credential_in(value):
            raise ValueError(f"env={name} holds {found}: {_ELSEWHERE}")
        variables[name] = value
    return variables


def _check_locations(settings: Any, package: Package | None) -> None:
    """Refuse places that are on this machine only.

    Raises:
        ValueError: names the field, its value, and what to give instead.
    """
    fields = flatten(settings)
    for name, value in fields.items():
        if name != "out" and not name.endswith("run.storage"):
            continue
        if "://" not in value and not Path(value).is_absolute():
            raise ValueError(
                f"{name}={value} would lie in the job's copy of the working tree, which is deleted "
                "with it; give an s3:// prefix, or the full path of a folder that all nodes share"
            )
    sent = set(package.files) if package else set()
    for name, value in fields.items():
        if not isinstance(value, str) or not value or Path(value).is_absolute() or "://" in value:
            continue
        path = Path(value).as_posix()
        is_sent = path in sent or any(file.startswith(f"{path}/") for file in sent)
        if "/" in value and Path(value).exists() and not is_sent:
            raise ValueError(
                f"{name}={value} is on this machine only: git does not track it, so the job would "
                "not find it; give an s3:// URI, or the full path of a folder that all nodes share"
            )


def _max_package_bytes() -> int:
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return int(GCS_STORAGE_MAX_SIZE)


def _describe_package(package: Package) -> str:
    lines = [
        f"package: {len(package.files)} files, {package.num_bytes / 2**20:.2f} MiB, of commit "
        f"{package.revision}{' and changes since' if package.revision.endswith('+') else ''}"
    ]
    if left_out := describe_left_out(package):
        lines.append(left_out)
    return "\n".join(lines)


def _print_plan(
    run: str, entrypoint: str, runtime_env: dict[str, Any], package: Package | None
) -> None:
    shown = dict(runtime_env)
    if package is not None:
        shown["working_dir"] = f"gcs://(an archive of {len(package.files)} files)"
    installed = entrypoint.replace("python -m jobs.cli", "vitok")
    print(f"entry point: {entrypoint}\n")
    print(f"runtime environment:\n{yaml.safe_dump(shown)}")
    print("# as a RayJob, on the code that its image holds: save it, then kubectl apply -f FILE")
    print("---")
    print(ray_job(run, installed.removeprefix("exec "), runtime_env), end="")
