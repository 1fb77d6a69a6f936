import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import stack as stack_module
from cluster.services import Service, check_port, end, free_ports, marked, start
from cluster.stack import STATE_FILE, StackConfig, StackState, describe
from jobs.cli import main
from pipelines.runs import next_step
from pipelines.tracking import metric_history
from vitok.config import read_config
from vitok.storage import Folder

ROOT = Path(__file__).parents[2]
PASSWORD = "not-for-" + "everybody"
STEPS = 12


def postgres_programs() -> Path:
    """Return the folder of Debian's PostgreSQL, whose programs are on nobody's path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    return found[-1].parent


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """A PostgreSQL server that asks for a password; gives its URL with it."""
    pytest.importorskip("psycopg", reason="no driver: pip install psycopg[binary]")
    programs = postgres_programs()
    # It refuses to run as root, and must reach its folder as somebody else.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True, user=user).strip())
    (port,) = free_ports("127.0.0.1", 1)
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD)
    shutil.copy(secret, folder / "secret")
    (folder / "secret").chmod(0o644)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, user=user, cwd="/")

    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "mlflow", "-A", "md5", "--pwfile", f"{folder}/secret")
    run("pg_ctl", "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start")
    try:
        yield f"postgresql://mlflow:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


class Machine:
    """Command lines on a machine of their own home, with what the stack says to set."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = ("RAY_", "MLFLOW_", "AWS_")
        self.variables = {n: v for n, v in os.environ.items() if not n.startswith(kept)}
        self.variables |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def vitok(self, *arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        done = subprocess.run(
            command, env=self.variables, cwd=self.home, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr if status else done.stdout


@pytest.fixture
def stack(
    tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Machine, StackState]]:
    machine = Machine(tmp_path)
    names = ("ray", "dashboard", "metrics", "mlflow", "store")
    ports = zip(names, free_ports("127.0.0.1", len(names)), strict=True)
    options = [word for name, port in ports for word in (f"--{name}-port", str(port))]
    machine.variables["MLFLOW_BACKEND_STORE_URI"] = postgres
    said = machine.vitok("cluster", "up", "--folder", "stack", "--num-cpus", "3", *options)
    del machine.variables["MLFLOW_BACKEND_STORE_URI"]
    state = read_config(tmp_path / "stack" / STATE_FILE, StackState)
    try:
        # What it says to set is what a user sets.
        for line in re.findall(r"^  export (.*)$", said, re.M):
            machine.variables |= dict(word.split("=", 1) for word in line.split())
        assert machine.variables["RAY_ADDRESS"] == state.ray_address
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, machine.variables[name])
        yield machine, state
        ended = machine.vitok("cluster", "down", "--folder", "stack")
        assert re.search(r"ended \d\d+ processes", ended)
        assert marked(state.marker) == []
        assert not Path(state.ray_folder).exists()
        for _, port in zip(names, options[1::2], strict=True):
            check_port("127.0.0.1", int(port), "port")  # free again
    finally:
        end(state.services, state.marker)
        shutil.rmtree(state.ray_folder, ignore_errors=True)


def training(manifests: tuple[Path, Path]) -> list[str]:
    """A quickstart that takes seconds, and goes to the store of the stack."""
    fields = {
        "run.name": "submitted",
        "run.storage": "s3://vitok/runs",
        "data.manifest": str(manifests[0]),
        "data.eval-manifest": str(manifests[1]),
        "data.row-tokens": "128",
        "run.num-workers": "1",
        "run.log-every": "1",
        "run.evaluate-every": str(STEPS),
        "run.checkpoint-every": "2",
        "stages.0.steps": str(STEPS - 1),
        "stages.0.images-per-step": "10",
        "stages.0.token-budgets": "16",
        "stages.0.rows-per-step": "0",
        "stages.1.steps": "1",
        "stages.1.images-per-step": "6",
        "stages.1.token-budgets": "36",
        "stages.1.rows-per-step": "0",
        "loss.ssim-tile": "32",
    }
    return ["train", "quickstart", *(w for k, v in fields.items() for w in (f"--{k}", v))]


def wait_for(condition: Any, timeout_s: float, what: str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.3)
    return found


def drivers(state: StackState) -> list[psutil.Process]:
    """Return the processes of jobs' commands."""
    found = []
    for process in marked(state.marker):
        with suppress(psutil.Error):
            if "jobs.cli" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run_metrics(state: StackState) -> str:
    with suppress(OSError), urllib.request.urlopen(state.metrics, timeout=5) as answer:
        text = answer.read().decode()
        return text if "ray_vitok_loss{" in text else ""
    return ""


# Starts all servers and two jobs: three minutes.
def test_a_submitted_training_is_killed_and_resubmitted_and_everything_can_be_read_back(
    stack: tuple[Machine, StackState], postgres: str, sample_manifests: tuple[Path, Path]
) -> None:
    import psycopg
    from mlflow.tracking import MlflowClient

    machine, state = stack
    health = json.loads(machine.vitok("cluster", "status", "--folder", "stack", "--json"))
    assert health["services"] == dict.fromkeys(("store", "mlflow", "ray"), "healthy")

    # The first job is killed as a machine that goes down kills it, once there is a checkpoint.
    command = training(sample_manifests)
    said = machine.vitok("submit", "--detach", *command)
    first = re.search(r"^job: (\S+)$", said, re.M)[1]
    assert f"{first} is at work on the run" in machine.vitok("submit", *command, status=1)
    folder = Folder("s3://vitok/runs/submitted")
    wait_for(lambda: drivers(state), 60, "driver")
    wait_for(lambda: next_step(folder) or not drivers(state), 150, "checkpoint")
    for driver in drivers(state):
        driver.send_signal(signal.SIGKILL)
    assert 0 < next_step(folder) < STEPS, machine.vitok("jobs", "logs", first)
    wait_for(lambda: "FAILED" in machine.vitok("jobs", "status", first), 60, "end of the first job")
    assert "did you mean" in machine.vitok("jobs", "logs", first + "x", status=1)

    # The second one goes on, and is followed to its end.
    done = next_step(folder)
    said = machine.vitok("submit", "--detach", *command)
    second = re.search(r"^job: (\S+)$", said, re.M)[1]
    scraped = wait_for(lambda: run_metrics(state), 150, "metrics for Prometheus")
    said += machine.vitok("jobs", "logs", second, "--follow")
    assert f"| {done}/{STEPS} [" in said, "the bar begins where the first job was"
    assert "weights: s3://vitok/runs/submitted/export" in said
    listed = json.loads(machine.vitok("jobs", "ls", "--json"))
    assert [(job["job"], job["run"], job["status"]) for job in listed] == [
        (second, "submitted", "SUCCEEDED"),
        (first, "submitted", "FAILED"),
    ]

    # A node that goes says so, and waits until nothing works on it: now that is at once.
    command = [sys.executable, "-m", "cluster.leave", "--deadline-s", "60"]
    variables = machine.variables | {"RAY_AUTH_MODE": "token"}  # as nodes of a cluster have it
    left = subprocess.run(
        command, env=variables, cwd=machine.home, capture_output=True, text=True, timeout=55
    )
    assert left.returncode == 0, left.stderr
    assert "leaves the cluster" in left.stdout

    # MLflow has one run, every step once, artifacts that came through it to the store.
    client = MlflowClient(state.mlflow)
    (experiment,) = [e for e in client.search_experiments() if e.name == "vitok"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED", said
    losses = metric_history(folder, "loss")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    weights = [file.path for file in client.list_artifacts(run.info.run_id, "weights")]
    assert "weights/decoder.safetensors" in weights
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    artifacts = Folder(f"s3://vitok/mlflow/{experiment.experiment_id}/{run.info.run_id}/artifacts")
    assert "decoder.safetensors" in artifacts.child("weights").names()
    assert "decoder.safetensors" in folder.child("export").names()

    # PostgreSQL has it all.
    with psycopg.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT value FROM metrics WHERE key = 'loss' ORDER BY step")
        assert [value for (value,) in cursor] == [value for _, value in losses]

    # Dashboards draw what runs record; nothing that others can read holds the password.
    dashboard = (ROOT / "cluster" / "monitoring" / "vitok.json").read_text()
    drawn = set(re.findall(r"ray_vitok_(\w+)", dashboard)) - {"step"}
    assert drawn <= set(run.data.metrics)
    assert 'run="submitted"' in scraped
    config = folder.read_text("config.json")
    state_text = (machine.home / "stack" / STATE_FILE).read_text()
    logs = "".join(file.read_text() for file in (machine.home / "stack").glob("*.log"))
    for text in (config, state_text, logs, said, str(run.data.params), describe(state)):
        assert PASSWORD not in text
    assert "***" in state_text
    token = machine.home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{state.dashboard}/api/jobs/")


def sleeper(marker: str, log: Path) -> Service:
    """A server that starts another process, which survives it."""
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    environment = os.environ | {"VITOK_STACK": marker}
    return start("sleeper", [sys.executable, "-c", script], environment, "http://127.0.0.1:1", log)


def test_ending_a_stack_ends_what_its_servers_left_and_no_other(tmp_path: Path) -> None:
    mine, others = (sleeper(marker, tmp_path / marker) for marker in ("mine", "others"))
    wait_for(lambda: len(marked("mine")) == len(marked("others")) == 2, 20, "processes")
    psutil.Process(mine.pid).kill()  # its child is nobody's now
    psutil.Process(mine.pid).wait(5)
    assert not mine.is_alive()
    try:
        assert end([mine], "mine") == 1
        assert marked("mine") == []
        assert len(marked("others")) == 2
        assert others.is_alive() and not others.is_healthy()
        # A process that has got the number of one that is gone is another process.
        stale = Service(**{**vars(others), "started": others.started - 100})
        assert not stale.is_alive()
        assert end([stale], "nobody") == 0
        assert len(marked("others")) == 2
    finally:
        end([others], "others")


def test_a_port_that_is_taken_is_named_with_its_option() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} is taken.*--mlflow-port"):
            check_port("127.0.0.1", port, "mlflow-port")


def test_what_lets_others_in_says_what_it_risks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop_here(settings: StackConfig, folder: Path) -> None:
        raise RuntimeError(f"would listen on {settings.host}")

    monkeypatch.setattr(stack_module, "start_stack", stop_here)
    ports = [
        word
        for name, port in zip(
            ("ray", "dashboard", "metrics", "mlflow"), free_ports("0.0.0.0", 4), strict=True
        )
        for word in (f"--{name}-port", str(port))
    ]
    folder = ["--folder", str(tmp_path / "stack")]
    assert main(["cluster", "up", *folder, *ports]) == 1
    assert "warning" not in capsys.readouterr().err
    assert main(["cluster", "up", "--host", "0.0.0.0", *folder, *ports]) == 1
    said = capsys.readouterr().err
    assert "listening on 0.0.0.0, not on loopback alone" in said and "firewall" in said

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert stack_module.token_mode() == "disabled"
    assert "runs code as" in capsys.readouterr().err
