"""`vitok doctor`: what is wrong with a machine or a cluster, and what to do about it."""

import json as json_format
import os
import platform
import resource
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from cluster.local import has_token, token_file
from pipelines.tracker.credentials import credential_in, masked, names_a_credential

CONSTRAINTS_FILE = Path(__file__).parents[1] / "constraints.txt"
_CHECKED_PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "pillow", "boto3")
_MIN_OPEN_FILES = 65536
_MAX_CLOCK_SKEW_S = 2.0
_MIN_FREE_DISK_GB = 20.0
_MIN_SHARED_MEMORY_SHARE = 0.3  # of memory: Ray's object store
_MIN_DRIVER = 570  # of CUDA 12.8, the oldest that torch 2.13 is built for
_PROBE_BYTES = 8 * 2**20

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        check: its name.
        level: a note is worth knowing, a problem will stop a job.
        found: what is there.
        remedy: what to do about it; empty where nothing is.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""


def doctor(store: str = "", mlflow: str = "", cluster: bool = False, json: bool = False) -> None:
    """Check this machine, or every node of a cluster, and say what to do about each finding.

    Args:
        store: an `s3://` prefix to reach: a probe of 8 MiB is written there, read and deleted.
        mlflow: a tracking server to reach; by default what MLFLOW_TRACKING_URI says.
        cluster: check all nodes of the cluster that RAY_ADDRESS names, each by itself.
        json: print the findings as JSON.

    Raises:
        RuntimeError: there is a problem; exit status 1.
    """
    findings = {platform.node(): check_machine(store, mlflow)}
    if cluster:
        findings |= check_nodes(store, mlflow)
    if json:
        listed = {node: [asdict(f) for f in found] for node, found in findings.items()}
        print(json_format.dumps(listed))
    else:
        for node, found in findings.items():
            print(f"{node}:")
            for finding in found:
                print(f"  {finding.level:<8} {finding.check:<14} {finding.found}")
                if finding.remedy:
                    print(f"  {'':<8} {'':<14} -> {finding.remedy}")
    problems = [f.check for found in findings.values() for f in found if f.level == "problem"]
    if problems:
        raise RuntimeError(
            f"{len(problems)} problems ({', '.join(dict.fromkeys(problems))}); see the remedies"
        )


def check_machine(store: str, mlflow: str) -> list[Finding]:
    """Run all checks on this machine."""
    tracking = mlflow or os.environ.get("MLFLOW_TRACKING_URI", "")
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_versions,
        check_gpus,
        check_shared_memory,
        check_limits,
        check_disk,
        check_token,
        check_environment,
        lambda: check_store(store),
        lambda: check_mlflow(tracking),
    ]
    findings: list[Finding] = []
    for check in checks:
        findings += check()
    return findings


def check_nodes(store: str, mlflow: str) -> dict[str, list[Finding]]:
    """Run all checks on every node of the cluster that RAY_ADDRESS names."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.local import ray_session

    with ray_session():
        check = ray.remote(num_cpus=0)(check_machine)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = {
            f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})": check.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(store, mlflow)
            for node in nodes
        }
        return {name: ray.get(answer, timeout=300) for name, answer in asked.items()}


def check_versions() -> Iterator[Finding]:
    """Compare what is installed with the constraints file."""
    if not CONSTRAINTS_FILE.is_file():
        yield Finding("versions", "note", "no constraints file here to compare with")
        return
    lines = CONSTRAINTS_FILE.read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    different = []
    for name in _CHECKED_PACKAGES:
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            installed = "missing"
        if installed != pinned[name]:
            different.append(f"{name} {installed}, not {pinned[name]}")
    if different:
        yield Finding(
            "versions",
            "problem",
            "; ".join(different),
            "pip install -c constraints.txt -e ., or an image that was built with this file",
        )
    else:
        listed = ", ".join(f"{name} {pinned[name]}" for name in _CHECKED_PACKAGES[:3])
        yield Finding("versions", "ok", f"{listed}, Python {platform.python_version()}")


def check_gpus() -> Iterator[Finding]:
    """Look for GPUs, a driver that is new enough, and whether torch can use them."""
    import subprocess

    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
        rows = answer.stdout.strip().splitlines() if answer.returncode == 0 else []
    except (FileNotFoundError, subprocess.TimeoutExpired):
        rows = []
    if not rows:
        yield Finding("gpu", "note", "none: recipes need --run.no-use-gpu here")
        return
    driver = rows[0].split(", ")[1]
    if int(driver.partition(".")[0]) < _MIN_DRIVER:
        yield Finding(
            "gpu driver", "problem", driver, f"install driver {_MIN_DRIVER} or newer on the host"
        )
    if not torch.cuda.is_available():
        yield Finding(
            "gpu",
            "problem",
            f"{len(rows)} x {rows[0]}, but torch {torch.__version__} does not see them",
            "a CUDA build of torch (PyPI's), and NVIDIA's container runtime where this is one",
        )
        return
    capability = torch.cuda.get_device_capability()
    float8 = "float8" if capability >= (8, 9) else "no float8"
    yield Finding("gpu", "ok", f"{len(rows)} x {rows[0]}, {float8}")


def check_shared_memory() -> Iterator[Finding]:
    """Compare /dev/shm with what Ray's object store takes."""
    import psutil

    if not os.path.isdir("/dev/shm"):
        return
    memory, shared = psutil.virtual_memory().total, shutil.disk_usage("/dev/shm")
    found = f"{shared.free / 2**30:.1f} GiB free in /dev/shm, {memory / 2**30:.1f} GiB of memory"
    if shared.free < _MIN_SHARED_MEMORY_SHARE * memory:
        yield Finding(
            "shared memory",
            "note",
            found,
            f"give {_MIN_SHARED_MEMORY_SHARE:.0%} of memory: docker --shm-size, an emptyDir with "
            "medium Memory on /dev/shm; Ray otherwise keeps objects on the disk, or fewer of them",
        )
    else:
        yield Finding("shared memory", "ok", found)


def check_limits() -> Iterator[Finding]:
    """Look at the limits that a large cluster reaches."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _MIN_OPEN_FILES:
        yield Finding(
            "open files",
            "note",
            f"at most {files}",
            f"ulimit -n {_MIN_OPEN_FILES} before `ray start`; docker --ulimit nofile",
        )
    else:
        yield Finding("open files", "ok", f"at most {files}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        yield Finding(
            "locked memory",
            "problem",
            f"at most {locked} bytes, with EFA or InfiniBand",
            "ulimit -l unlimited; docker --ulimit memlock=-1",
        )


def check_disk() -> Iterator[Finding]:
    """Look at the room for Ray's logs and what spills out of memory."""
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < _MIN_FREE_DISK_GB:
        yield Finding(
            "disk",
            "problem",
            f"{free_gb:.1f} GB free in {folder}",
            f"free {_MIN_FREE_DISK_GB:.0f} GB, or `ray start --temp-dir` on a larger disk",
        )
    else:
        yield Finding("disk", "ok", f"{free_gb:.0f} GB free in {folder}")


def check_token() -> Iterator[Finding]:
    """Look whether Ray asks for a token, and whether there is one, readable by its owner alone."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    file, is_there = token_file(), has_token()
    if mode == "token" and not is_there:
        yield Finding(
            "token",
            "problem",
            "RAY_AUTH_MODE=token, and there is no token",
            f"copy the cluster's to {file}, or make one with `ray get-auth-token --generate`",
        )
    elif file.is_file() and file.stat().st_mode & 0o077:
        yield Finding(
            "token", "problem", f"others may read {file}", f"chmod 600 {file}, and make a new one"
        )
    elif mode != "token" and not is_there:
        yield Finding(
            "token",
            "note",
            "Ray asks for none: whoever reaches the job server runs code on the cluster",
            "RAY_AUTH_MODE=token on every node and here, unless all is on loopback",
        )
    else:
        yield Finding("token", "ok", "there is one")


def check_environment() -> Iterator[Finding]:
    """Name variables that hold a credential, as everything that runs here can read them."""
    static = [n for n in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN") if os.environ.get(n)]
    if static:
        yield Finding(
            "credentials",
            "note",
            f"{', '.join(static)} in the environment",
            "a role of the instance or of the pod's service account needs none",
        )
    in_urls = [
        name
        for name, value in os.environ.items()
        if not names_a_credential(name) and credential_in(value) is not None
    ]
    if in_urls:
        yield Finding(
            "credentials",
            "note",
            f"{', '.join(sorted(in_urls))} look as if they hold one",
            "keep passwords out of URLs: logs and job descriptions show them",
        )


def check_store(prefix: str) -> Iterator[Finding]:
    """Write, read and delete a probe in an object store; compare its clock with ours."""
    if not prefix:
        yield Finding("store", "note", "not checked; give --store s3://BUCKET/PREFIX")
        return
    from vitok.storage import Folder

    folder = Folder.of(prefix)
    name = f"vitok-doctor-{socket.gethostname()}-{os.getpid()}"
    data = os.urandom(_PROBE_BYTES)
    try:
        began = time.monotonic()
        folder.write_bytes(name, data)
        written = time.monotonic()
        same = folder.read_bytes(name) == data
        read = time.monotonic()
        _delete(folder.uri, name)
    except (OSError, ValueError) as error:
        yield Finding(
            "store",
            "problem",
            f"{folder.uri}: {masked(str(error))[:300]}",
            "credentials from AWS's chain that may write there, AWS_ENDPOINT_URL for a store that "
            "is not AWS, AWS_REGION",
        )
        return
    if not same:
        yield Finding("store", "problem", f"{folder.uri} gives other bytes back", "another store")
        return
    mib = _PROBE_BYTES / 2**20
    yield Finding(
        "store",
        "ok",
        f"{folder.uri}: {mib / (written - began):.0f} MiB/s written, "
        f"{mib / (read - written):.0f} MiB/s read, one connection",
    )
    if endpoint := os.environ.get("AWS_ENDPOINT_URL") or (
        "https://s3.amazonaws.com" if prefix.startswith("s3://") else ""
    ):
        yield from _check_clock(endpoint)


def _delete(uri: str, name: str) -> None:
    import pyarrow.fs

    filesystem, path = pyarrow.fs.FileSystem.from_uri(f"{uri}/{name}")
    filesystem.delete_file(path)


def check_mlflow(uri: str) -> Iterator[Finding]:
    """Ask a tracking server whether it is well; compare its clock with ours."""
    if not uri.startswith(("http://", "https://")):
        yield Finding("mlflow", "note", "not checked; give --mlflow http://HOST:5000")
        return
    try:
        with _opened(f"{uri.rstrip('/')}/version") as answer:
            server = answer.read().decode()[:50]
    except (OSError, ValueError) as error:
        yield Finding(
            "mlflow",
            "problem",
            f"{masked(uri)}: {masked(str(error))[:300]}",
            "start the server, open its port, or set MLFLOW_TRACKING_URI to one that runs; a name "
            "that it does not serve must be added to its --allowed-hosts",
        )
        return
    here = version("mlflow")
    if server != here:
        yield Finding(
            "mlflow",
            "note",
            f"{masked(uri)} is MLflow {server}, this is {here}",
            "the same version on both, as the constraints file has it",
        )
    else:
        yield Finding("mlflow", "ok", f"{masked(uri)} is MLflow {server}")
    yield from _check_clock(uri)


def _check_clock(url: str) -> Iterator[Finding]:
    """Compare the clock with the date that a server sends."""
    try:
        with _opened(url) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    except OSError:
        return
    if not date:
        return
    # A server says whole seconds, cut off.
    skew_s = time.time() - (parsedate_to_datetime(date).timestamp() + 0.5)
    if abs(skew_s) > _MAX_CLOCK_SKEW_S:
        yield Finding(
            "clock",
            "problem" if abs(skew_s) > 300 else "note",
            f"{skew_s:+.1f} s against {masked(url)}",
            "set the clock by NTP (chrony); S3 refuses requests that are 15 minutes off",
        )
    else:
        yield Finding("clock", "ok", f"{skew_s:+.1f} s against {masked(url)}")


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        yield answer
