import asyncio
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jobs import remote, submit
from jobs.cli import COMMANDS, main
from jobs.configs import SUBMITTED
from jobs.recipes import TRAINING
from pipelines.failures import Preempted

HERE = ["train", "quickstart", "--run.storage", "/shared/runs", "--run.name", "mine"]


class JobServer:
    """What a job server answers, without one; `connections` are logs that break or end."""

    def __init__(self, *connections: list[str | Exception], status: str = "SUCCEEDED") -> None:
        self.connections = list(connections)
        self.final_status = status
        self.submitted: list[dict[str, Any]] = []
        self.jobs: list[Any] = []

    def submit_job(self, **request: Any) -> str:
        self.submitted.append(request)
        return str(request["submission_id"])

    def list_jobs(self) -> list[Any]:
        return self.jobs

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for chunk in self.connections.pop(0):
            await asyncio.sleep(0)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def get_job_info(self, job: str) -> Any:
        return details(job, "RUNNING" if self.connections else self.final_status)


def details(job: str, status: str, **metadata: str) -> Any:
    from ray.job_submission import JobStatus

    return SimpleNamespace(
        submission_id=job, status=JobStatus(status), metadata=metadata, message="exit code 1"
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> JobServer:
    server = JobServer(["step 1\n", "step 2\n"])
    monkeypatch.setattr(remote, "connect", lambda address: server)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return server


def test_a_job_is_the_command_with_the_working_tree_and_its_log_is_shown(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *HERE, "--env", "NCCL_DEBUG=INFO", "--optim.lr", "3e-4"]) == 0
    (request,) = server.submitted
    assert request["entrypoint"] == (
        "exec python -m jobs.cli train quickstart --run.storage /shared/runs --run.name mine "
        "--optim.lr 3e-4"
    )
    environment = request["runtime_env"]
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "NCCL_DEBUG": "INFO"}
    assert environment["working_dir"].endswith(".zip")
    assert request["metadata"]["run"] == "mine"
    assert request["submission_id"].startswith("mine-")
    out = capsys.readouterr().out
    assert "step 1\nstep 2\n" in out
    assert "succeeded" in out


def test_a_detached_job_is_not_followed_and_an_installed_one_sends_no_tree(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--detach", "--no-package", *HERE]) == 0
    (request,) = server.submitted
    assert request["entrypoint"].startswith("exec vitok train quickstart ")
    assert "working_dir" not in request["runtime_env"]
    out = capsys.readouterr().out
    assert "step 1" not in out
    assert f"vitok jobs logs {request['submission_id']} --follow" in out


def test_a_second_job_on_a_run_is_refused_while_the_first_is_at_work(server: JobServer) -> None:
    """Two drivers of one run would write over each other's checkpoints."""
    server.jobs = [details("mine-1", "RUNNING", command="train", run="mine")]
    with pytest.raises(RuntimeError, match="mine-1 is at work on the run 'mine'"):
        submit.submit(HERE, SUBMITTED)
    assert not server.submitted
    server.jobs = [
        details("mine-1", "FAILED", command="train", run="mine"),
        details("x", "RUNNING", command="train", run="other"),
        details("y", "RUNNING", command="evaluate", run="mine"),
    ]
    submit.submit([*HERE, "--detach"], SUBMITTED)
    assert len(server.submitted) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", "AWS_SECRET_ACCESS_KEY=x"], "AWS_SECRET_ACCESS_KEY is the name of a credential"),
        (["--env", "OPTION=hf_" + "aB3d" * 8], "OPTION holds an access key"),
        (["--env", "NO_SUCH_VARIABLE_HERE"], "no such variable"),
        (["--loss.dino-weights", "https://me:pw@host/x"], "argument of train holds a URL with"),
        (["--run.storage", "runs"], "run.storage=runs would lie in the job's copy"),
    ],
)
def test_what_would_fail_or_tell_a_secret_is_refused_before_anything_is_sent(
    server: JobServer, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["submit", *HERE, *arguments]) == 1
    out = capsys.readouterr()
    assert said in out.err
    assert "hf_a" not in out.err + out.out
    assert ":pw@" not in out.err + out.out
    assert not server.submitted


def test_input_that_is_on_this_machine_only_is_refused(
    server: JobServer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifests" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data\.manifest=manifests/mine is on this machine only"):
        submit.submit([*HERE, "--data.manifest", "manifests/mine"], SUBMITTED)
    submit.submit([*HERE, "--data.manifest", "s3://bucket/mine", "--detach"], SUBMITTED)
    assert len(server.submitted) == 1


@pytest.mark.parametrize(
    ("command", "arguments", "run", "field"),
    [
        ("flow", ["--run.name", "mine", "--run.storage"], "mine", "run.storage"),
        ("sweep", ["--name", "mine", "--base.run.storage"], "mine", "base.run.storage"),
        ("encode", ["--manifest", "s3://b/m", "--model", "s3://b/w", "--out"], "r", "out"),
        ("evaluate", ["--out"], "r", "out"),
        ("generate", ["--model", "s3://b/w", "--out"], "r", "out"),
    ],
)
def test_every_command_has_a_name_and_a_place_that_outlives_the_job(
    server: JobServer, command: str, arguments: list[str], run: str, field: str
) -> None:
    line = [command, *recipe_of(command), *arguments]
    with pytest.raises(ValueError, match=rf"^{field}=here would lie in the job's copy"):
        submit.submit([*line, "here", "--detach"], SUBMITTED)
    assert not server.submitted
    submit.submit([*line, "/shared/r", "--detach"], SUBMITTED)
    assert server.submitted[0]["metadata"]["run"] == run


def recipe_of(command: str) -> list[str]:
    from jobs.encoding import ENCODING
    from jobs.evaluations import EVALUATIONS
    from jobs.flow_recipes import FLOWS
    from jobs.sweep_recipes import SWEEPS

    tables = {"flow": FLOWS, "sweep": SWEEPS, "encode": ENCODING, "evaluate": EVALUATIONS}
    if command not in tables:
        return []
    return [next(name for name in tables[command] if "quickstart" in name)]


def test_only_commands_that_run_on_a_cluster_can_be_submitted() -> None:
    assert {"train", "flow", "sweep", "encode", "evaluate"} <= set(SUBMITTED)
    assert set(SUBMITTED) <= set(COMMANDS)
    with pytest.raises(ValueError, match="one of train, .*, evaluate"):
        submit.submit(["bench", "train"], SUBMITTED)


def test_a_dry_run_sends_nothing_and_prints_a_ray_job_that_runs_the_same(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *HERE, "--dry-run"]) == 0
    assert not server.submitted
    printed, _, document = capsys.readouterr().out.partition("---\n")
    assert "exec python -m jobs.cli train quickstart" in printed
    job = yaml.safe_load(document)
    assert job["metadata"]["name"] == "vitok-mine"
    assert job["spec"]["entrypoint"] == " ".join(["vitok", *HERE])
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "600"
    }
    template = yaml.safe_load(submit.RAY_JOB_FILE.read_text())
    assert job["spec"]["rayClusterSpec"] == template["spec"]["rayClusterSpec"]


def test_every_recipe_has_a_name_that_kubernetes_takes() -> None:
    names = [submit._kubernetes_name(name) for name in (*TRAINING, "Mine_2.5 (new)", "x" * 90)]
    for name in names:
        assert len(name) <= 47
        assert name.strip("-") == name
        assert all(c.islower() or c.isdigit() or c == "-" for c in name)


def test_a_broken_connection_repeats_no_line_and_loses_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    lines = [f"line {i}\n" for i in range(6)]
    text = "".join(lines)
    server = JobServer(
        [*lines[:2], RuntimeError("closed")],
        [text[:20], RuntimeError("closed")],
        [text[:3], text[3:]],
    )
    remote.follow(server, "job")
    assert capsys.readouterr().out == text


def test_a_server_that_stays_away_ends_the_command_and_not_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    server = JobServer(*[[ConnectionRefusedError("refused")] for _ in range(20)])
    with pytest.raises(ConnectionError, match=r"\(refused\), the job may go on"):
        remote.follow(server, "job")
    assert len(server.connections) == 15


def test_a_job_that_failed_or_was_stopped_ends_the_command_so(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="job j failed: exit code 1"):
        remote.follow(JobServer(["x"], status="FAILED"), "j")
    with pytest.raises(Preempted, match="submit it again"):
        remote.follow(JobServer(["x"], status="STOPPED"), "j")


def test_a_job_that_is_not_there_names_the_nearest(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(job: str) -> Any:
        raise RuntimeError("Request failed with status code 404: no such job.")

    server.jobs = [details("mine-20310504-030201", "RUNNING", run="mine")]
    monkeypatch.setattr(server, "get_job_info", missing)
    with pytest.raises(ValueError, match="did you mean 'mine-20310504-030201'"):
        remote.status("mine-20310504-030202")
    with pytest.raises(ValueError, match="vitok jobs ls"):
        remote.stop("zzz")


def test_ctrl_c_leaves_the_job_running_and_says_how_to_end_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "_print_log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remote.follow(JobServer(), "j")
    assert "vitok jobs stop j" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1; give --address"):
        remote.connect("http://127.0.0.1:1")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")


def test_a_job_server_is_no_address_to_run_a_command_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from cluster.local import ray_session

    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="vitok submit"), ray_session():
        pass
    assert "ray" in sys.modules
