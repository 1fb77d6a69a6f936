"""Servers that are not there, or for a while: nothing is lost, and nothing comes twice."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.tracker.outbox import _LAST_PAUSES_S
from pipelines.tracker.spool import unsent
from pipelines.tracking import Tracker, TrackingConfig, open_run
from tests.pipelines.tracked_runs import Settings, run_killed
from vitok.storage import Folder


@pytest.fixture
def away() -> str:
    """Return the address of a server that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_server_that_is_away_is_asked_and_reported_once_in_a_back_off(
    away: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    requests = []
    get_run = MlflowClient.get_run

    def counted(client: MlflowClient, run_id: str) -> Run:
        requests.append(run_id)
        return get_run(client, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", counted)
    monkeypatch.setattr(MlflowClient, "log_artifact", None)  # would fail if it were called
    tracker = Tracker(away, "0123", str(tmp_path / "spool"), back_off_s=1000)
    file = tmp_path / "file"
    file.write_text("x")
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        assert tracker.last_step("loss") == -1
        for step in range(1, 51):
            tracker.log_metrics({"loss": 1 / step, "other": 2.0}, step)
        tracker.log_image(np.zeros((2, 2, 3), dtype=np.uint8), "sheet", step=1)
        tracker.log_files(file, "files")
        tracker.set_tags({"a": "b"})
        tracker.flush()
        assert tracker.last_step("loss") == 50, "what waits counts"
        assert tracker.last_step("unknown") == -1
        assert tracker.latest_metrics() == {"loss": 1 / 50, "other": 2.0}
        assert len(requests) == 1
        (warning,) = [r for r in caplog.records if r.name.startswith("pipelines")]
        assert f"MLflow at {away} could not be reached" in warning.getMessage()
        tracker.close()
    assert len(requests) == 1 + len(_LAST_PAUSES_S), "a few times at the end"
    assert "53 entries of MLflow run 0123 could not be sent" in caplog.records[-1].getMessage()


def test_known_run_goes_on_while_its_server_is_away_and_a_new_one_is_refused(
    away: str, tmp_path: Path
) -> None:
    tracking = TrackingConfig(uri=away)
    folder = Folder.of(str(tmp_path), "known")
    folder.write_text("mlflow.json", json.dumps({"uri": away, "run_id": "0123"}))
    with open_run(folder, "known", tracking, str(tmp_path), Settings()) as tracker:
        assert tracker.run_id == "0123"
        tracker.log_metrics({"loss": 1.0}, 1)
    kinds = [entry["kind"] for entry in unsent(Path(tracker.spool) / "0123")]
    assert kinds == ["tags", "status", "metrics", "status"]
    assert Path(tracker.spool).is_relative_to(folder.uri), "a restart finds it"

    with (
        pytest.raises(ConnectionError, match=r"run fresh is new and MLflow at .*; start the serv"),
        open_run(Folder.of(str(tmp_path), "x"), "fresh", tracking, str(tmp_path), Settings()),
    ):
        pass
    assert not (tmp_path / "x").exists()


class Server:
    """A real MLflow server on loopback that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder = folder
        self._process: subprocess.Popen | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._is_healthy():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not answer in 120 s"
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """Kill it with its children, all in its process group, as a machine that dies does."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


def test_server_that_goes_away_and_comes_back_has_everything_once_and_in_order(
    server: Server, tmp_path: Path
) -> None:
    folder = Folder.of(str(tmp_path), "outage")
    tracking = TrackingConfig(uri=server.uri)
    client = MlflowClient(server.uri)
    (tmp_path / "report.txt").write_text("report")

    def log(tracker: Tracker, *steps: int) -> None:
        for step in steps:
            tracker.log_image(np.full((4, 6, 3), step, dtype=np.uint8), "sheet", step)
            tracker.log_metrics({"loss": float(step), "grad_norm": step / 2}, step)
            tracker.set_tags({f"tag {step}": "set", "newest": str(step)})

    with open_run(folder, "outage", tracking, str(tmp_path), Settings()) as tracker:
        log(tracker, 1, 2, 3)
        tracker.flush()
        assert len(client.get_metric_history(tracker.run_id, "loss")) == 3

    server.stop()
    where = [server.uri, tracker.run_id, tracker.spool]
    with open_run(folder, "outage", tracking, str(tmp_path), Settings()) as tracker:
        log(tracker, 4, 5)
        tracker.log_files(tmp_path / "report.txt", "reports")
        source = f"runs:/{tracker.run_id}/reports"
        tracker.register_model("outage", source, 5, {"width": "32"})
    script = """
import os, signal, sys
import numpy as np
from pipelines.tracking import Tracker
tracker = Tracker(*sys.argv[1:])
assert tracker.last_step("loss") == 5
for step in (6, 7):
    tracker.log_image(np.full((4, 6, 3), step, dtype=np.uint8), "sheet", step)
    tracker.log_metrics({"loss": float(step), "grad_norm": step / 2}, step)
    tracker.set_tags({f"tag {step}": "set", "newest": str(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""
    run_killed(script, *where)
    with open_run(folder, "outage", tracking, str(tmp_path), Settings()) as tracker:
        assert tracker.last_step("loss") == 7, "while the server is away"
        log(tracker, 8)
        # A restart that could not ask the server trains on from a checkpoint before step 2.
        log(tracker, 2, 3)
        server.start()
        log(tracker, 9)

    points = client.get_metric_history(tracker.run_id, "loss")
    assert sorted((p.step, p.value) for p in points) == [(s, float(s)) for s in range(1, 10)]
    assert [p.step for p in sorted(points, key=lambda p: (p.timestamp, p.step))] == [*range(1, 10)]
    others = client.get_metric_history(tracker.run_id, "grad_norm")
    assert sorted((p.step, p.value) for p in others) == [(s, s / 2) for s in range(1, 10)]
    images = [file.path for file in client.list_artifacts(tracker.run_id, "images")]
    originals = sorted(path for path in images if path.endswith(".png"))
    assert [path.split("+")[2] for path in originals] == [str(s) for s in range(1, 10)]
    local = client.download_artifacts(tracker.run_id, originals[5], str(tmp_path))
    assert np.asarray(Image.open(local)).max() == 6, "with its own pixels"
    record = client.get_run(tracker.run_id)
    assert {f"tag {s}" for s in range(1, 10)} <= set(record.data.tags)
    assert record.data.tags["newest"] == "9"
    assert record.info.status == "FINISHED"
    reports = [file.path for file in client.list_artifacts(tracker.run_id, "reports")]
    assert reports == ["reports/report.txt"]
    (version,) = client.search_model_versions("name='outage'")
    assert (version.source, version.tags) == (source, {"width": "32", "step": "5"})
    assert list((Path(tracker.spool) / tracker.run_id).iterdir()) == []
