import json
import logging
import math
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.tracker.spool import unsent
from pipelines.tracking import Tracker, TrackingConfig, open_run, system_metrics, tracking_uri
from tests.pipelines.tracked_runs import (
    Settings,
    failing,
    images_of,
    points_of,
    record_of,
    run_killed,
    run_script,
    uri_of,
    use_run,
)
from vitok.storage import Folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; MLflow takes seconds to make its database, so the tests share one."""
    return tmp_path_factory.mktemp("runs")


def test_folder_opened_twice_is_one_run(storage: Path) -> None:
    first = use_run(storage, "twice", {"loss": 3.0}, step=1)
    assert record_of(storage, first).info.status == "FINISHED"
    assert use_run(storage, "twice", {"loss": 2.0}, step=2) == first
    assert use_run(storage, "another", {"loss": 1.0}, step=1) != first

    record = record_of(storage, first)
    assert record.info.status == "FINISHED"
    assert record.info.run_name == "twice"
    assert record.data.tags["run_folder"] == f"{storage}/twice"
    client = MlflowClient(tracking_uri(TrackingConfig(), str(storage)))
    points = client.get_metric_history(first, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 3.0), (2, 2.0)]
    experiment = client.get_experiment_by_name("vitok")
    assert experiment.artifact_location == (storage / "artifacts").as_uri()
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(
        run.info.run_name for run in runs if run.info.run_name in ("twice", "another")
    ) == [
        "another",
        "twice",
    ]


def test_run_whose_body_raises_is_failed_until_it_is_continued(storage: Path) -> None:
    folder = Folder.of(str(storage), "failing")
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        open_run(folder, "failing", TrackingConfig(), str(storage), Settings()) as tracker,
    ):
        assert record_of(storage, tracker.run_id).info.status == "RUNNING"
        raise RuntimeError("on purpose")
    assert record_of(storage, tracker.run_id).info.status == "FAILED"
    assert use_run(storage, "failing", {"loss": 1.0}, step=1) == tracker.run_id
    assert record_of(storage, tracker.run_id).info.status == "FINISHED"


def test_interrupted_run_is_killed(storage: Path) -> None:
    folder = Folder.of(str(storage), "interrupted")
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(folder, "interrupted", TrackingConfig(), str(storage), Settings()) as tracker,
    ):
        raise KeyboardInterrupt
    assert record_of(storage, tracker.run_id).info.status == "KILLED"


@pytest.mark.parametrize("failure", [None, ValueError("the real reason")])
def test_server_that_went_away_neither_fails_the_run_nor_hides_its_failure(
    storage: Path, monkeypatch: pytest.MonkeyPatch, failure: ValueError | None
) -> None:
    folder = Folder.of(str(storage), f"left alone {failure}")

    away = failing(MlflowException("API request failed: connection refused"))
    outcome = pytest.raises(ValueError, match="the real reason") if failure else nullcontext()
    with (
        outcome,
        open_run(folder, "left", TrackingConfig(), str(storage), Settings()),
    ):
        monkeypatch.setattr(MlflowClient, "set_terminated", away)
        if failure:
            raise failure
    monkeypatch.undo()
    # The next run of this process is not disturbed.
    assert record_of(storage, use_run(storage, "after", {}, step=1)).info.status == "FINISHED"


def test_every_field_becomes_a_parameter_by_its_dotted_name(storage: Path) -> None:
    params = record_of(storage, use_run(storage, "twice", {}, step=3)).data.params
    text = params.pop("text")
    assert set(text) == {"x"}
    assert 1000 <= len(text) < 7000, "cut to what MLflow takes"
    assert params == {
        "inner.rate": "0.5",
        "inner.sizes": "[1, 2]",
        "stages.0.rate": "0.5",
        "stages.0.sizes": "[1, 2]",
        "stages.1.rate": "2.0",
        "stages.1.sizes": "[1, 2]",
    }


def test_last_step_is_the_highest_that_was_recorded(storage: Path) -> None:
    run_id = use_run(storage, "steps", {"loss": 1.0, "other": 2.0}, step=7)
    tracker = Tracker(tracking_uri(TrackingConfig(), str(storage)), run_id)
    assert tracker.last_step("loss") == 7
    assert tracker.last_step("unknown") == -1
    tracker.log_metrics({"loss": 0.5}, step=12)
    assert tracker.last_step("loss") == 12
    assert tracker.last_step("other") == 7
    latest = tracker.latest_metrics()
    assert (latest["loss"], latest["other"]) == (0.5, 2.0)
    tracker.close()


def test_images_files_and_tags_are_recorded(storage: Path, tmp_path: Path) -> None:
    run_id = use_run(storage, "artifacts", {}, step=0)
    uri = tracking_uri(TrackingConfig(), str(storage))
    tracker, client = Tracker(uri, run_id), MlflowClient(uri)
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    picture[:, 3:] = 200
    tracker.log_image(picture, "sheet", step=5)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_text("1")
    tracker.log_files(tmp_path / "folder", "texts")
    tracker.log_files(tmp_path / "folder" / "one.txt", "single")
    tracker.set_tags({"export": "there"})
    tracker.close()

    assert [file.path for file in client.list_artifacts(run_id, "texts")] == ["texts/one.txt"]
    assert [file.path for file in client.list_artifacts(run_id, "single")] == ["single/one.txt"]
    images = [file.path for file in client.list_artifacts(run_id, "images")]
    (original,) = [path for path in images if path.endswith(".png")]
    assert "sheet" in original
    assert "step+5+" in original
    local = client.download_artifacts(run_id, original, str(tmp_path))
    assert np.array_equal(np.asarray(Image.open(local)), picture)
    assert record_of(storage, run_id).data.tags["export"] == "there"


def test_logging_does_not_wait_for_the_server(
    storage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_id = use_run(storage, "slow server", {}, step=0)
    answers = threading.Event()
    log_batch = MlflowClient.log_batch

    def slow(*arguments: Any, **named: Any) -> None:
        assert answers.wait(60)
        log_batch(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    tracker = Tracker(uri_of(storage), run_id, str(tmp_path))
    for step in range(1, 1001):
        tracker.log_metrics({"loss": float(step)}, step)
    assert tracker.last_step("loss") == 1000
    assert points_of(storage, run_id, "loss") == []
    answers.set()
    tracker.close()
    assert points_of(storage, run_id, "loss") == [(step, float(step)) for step in range(1, 1001)]
    assert list((tmp_path / run_id).iterdir()) == [], "nothing is left of what was sent"


def test_artifact_store_that_is_away_holds_no_metric_back(
    storage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_id = use_run(storage, "no artifact store", {}, step=0)
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_image", failing(RuntimeError("no credentials")))
        tracker = Tracker(uri_of(storage), run_id, str(tmp_path), back_off_s=1000)
        tracker.log_image(picture, "sheet", step=1)
        tracker.log_metrics({"loss": 1.0}, step=1)
        tracker.flush()
        assert points_of(storage, run_id, "loss") == [(1, 1.0)]
    tracker.close()
    assert len(images_of(storage, run_id)) == 1


def test_refused_metric_is_the_only_one_that_is_missing(
    storage: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run_id = use_run(storage, "refused", {}, step=0)
    tracker = Tracker(uri_of(storage), run_id, str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        for step in (1, 2):
            tracker.log_metrics({"a": 1.0, "b?": 2.0, "c": math.nan, "d": 4.0}, step)
        tracker.close()
    for name in ("a", "d"):
        assert [step for step, _ in points_of(storage, run_id, name)] == [1, 2]
    assert all(math.isnan(value) for _, value in points_of(storage, run_id, "c"))
    (warning,) = caplog.records
    assert "MLflow refuses metric b?: Invalid" in warning.getMessage()


def test_metric_is_written_once_at_a_step(storage: Path, tmp_path: Path) -> None:
    run_id = use_run(storage, "once", {"loss": 5.0}, step=5)
    tracker = Tracker(uri_of(storage), run_id, str(tmp_path))
    for step in (5, 6, 6, 3, 7, 3, 5):
        tracker.log_metrics({"loss": float(step), "other": float(step)}, step)
    tracker.close()
    assert sorted(points_of(storage, run_id, "loss")) == [(s, float(s)) for s in (3, 5, 6, 7)]
    assert sorted(points_of(storage, run_id, "other")) == [(s, float(s)) for s in (3, 5, 6, 7)]


KILLED_AFTER_A_WRITE = """
import os, signal, sys
import numpy as np
from mlflow.tracking import MlflowClient
from pipelines.tracking import Tracker

def killed_after(write):
    def write_and_die(*arguments, **named):
        write(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    return write_and_die

kind, *where = sys.argv[1:]
setattr(MlflowClient, kind, killed_after(getattr(MlflowClient, kind)))
tracker = Tracker(*where)
if kind == "log_image":
    tracker.log_image(np.zeros((4, 6, 3), dtype=np.uint8), "sheet", 1)
for step in (1, 2, 3):
    tracker.log_metrics({"loss": float(step), "other": 0.5}, step)
tracker.close()
"""


def test_kill_between_a_write_and_its_acknowledgement_doubles_nothing(
    storage: Path, tmp_path: Path
) -> None:
    run_id = use_run(storage, "killed", {}, step=0)
    where = [uri_of(storage), run_id, str(tmp_path)]
    run_killed(KILLED_AFTER_A_WRITE, "log_batch", *where)
    assert points_of(storage, run_id, "loss"), "it was written"
    assert len(list(unsent(tmp_path / run_id))) == 3, "and not acknowledged"
    tracker = Tracker(*where)
    assert tracker.last_step("loss") == 3
    tracker.log_metrics({"loss": 4.0}, 4)
    tracker.close()
    run_killed(KILLED_AFTER_A_WRITE, "log_image", *where)
    assert len(images_of(storage, run_id)) == 1
    assert (tmp_path / run_id).iterdir()
    Tracker(*where).close()
    assert points_of(storage, run_id, "loss") == [(s, float(s)) for s in (1, 2, 3, 4)]
    assert points_of(storage, run_id, "other") == [(s, 0.5) for s in (1, 2, 3)]
    assert len(images_of(storage, run_id)) == 1
    assert list((tmp_path / run_id).iterdir()) == []


def test_writer_that_is_killed_beside_another_one_doubles_nothing(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = use_run(storage, "beside", {}, step=0)
    where = [uri_of(storage), run_id, str(tmp_path)]
    driver = Tracker(*where)
    driver.log_metrics({"load": 1.0}, 1)  # from now on it knows what the server has
    driver.flush()
    run_killed(KILLED_AFTER_A_WRITE, "log_batch", *where)
    written = {step for step, _ in points_of(storage, run_id, "loss")}
    assert written, "it was written"
    assert list(unsent(tmp_path / run_id)), "and not acknowledged"
    sent: list[int] = []
    log_batch = MlflowClient.log_batch

    def noted(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
        sent.extend(metric.step for metric in metrics if metric.key == "loss")
        log_batch(client, run_id, metrics=metrics)

    monkeypatch.setattr(MlflowClient, "log_batch", noted)
    driver.close()
    # MLflow's own stores drop a point that they have to the millisecond; others may not.
    assert not written & set(sent)
    assert points_of(storage, run_id, "loss") == [(s, float(s)) for s in (1, 2, 3)]
    assert points_of(storage, run_id, "other") == [(s, 0.5) for s in (1, 2, 3)]


GOES_ON = """
import sys
from pipelines.tracking import TrackingConfig, open_run
from vitok.config import config
from vitok.storage import Folder

@config
class Settings:
    pass

storage, name = sys.argv[1:]
folder = Folder.of(storage, name)
with open_run(folder, name, TrackingConfig(), storage, Settings()) as tracker:
    assert "mlflow" not in sys.modules, "as it is where a known run goes on"
    tracker.log_metrics({"loss": 2.0}, 2)
"""


def test_threads_of_a_new_process_that_need_mlflow_at_once_all_get_it(storage: Path) -> None:
    run_id = use_run(storage, "goes on", {"loss": 1.0}, step=1)
    done = run_script(GOES_ON, str(storage), "goes on")
    assert done.returncode == 0, done.stderr
    assert "import" not in done.stderr, done.stderr
    assert points_of(storage, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert record_of(storage, run_id).info.status == "FINISHED"


def test_run_that_runs_is_not_told_so(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    update = MlflowClient.update_run

    def update_run(client: MlflowClient, run_id: str, status: str) -> None:
        told.append(status)
        update(client, run_id, status)

    monkeypatch.setattr(MlflowClient, "update_run", update_run)
    use_run(storage, "told", {"loss": 1.0}, step=1)
    assert told == [], "a new run runs"
    run_id = use_run(storage, "told", {"loss": 2.0}, step=2)
    assert told == ["RUNNING"], "one that had ended is told once"
    assert record_of(storage, run_id).info.status == "FINISHED"


def test_disk_that_is_full_costs_a_warning_and_no_metric(
    storage: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run_id = use_run(storage, "full", {}, step=0)
    (tmp_path / "file").write_text("no folder")
    tracker = Tracker(uri_of(storage), run_id, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_image(np.zeros((4, 6, 3), dtype=np.uint8), "sheet", 1)
        tracker.close()
    assert points_of(storage, run_id, "loss") == [(1, 1.0)]
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == [
        caplog.records[0].getMessage(),
        "image sheet of step 1 is not recorded",
    ]
    assert "metrics wait for MLflow in memory" in caplog.records[0].getMessage()


def test_model_is_registered_once_for_a_run_and_a_step(storage: Path, tmp_path: Path) -> None:
    run_id = use_run(storage, "registered", {}, step=0)
    (tmp_path / "encoder.safetensors").write_text("weights")
    client = MlflowClient(uri_of(storage))
    for step in (8, 8, 9):
        tracker = Tracker(uri_of(storage), run_id, str(tmp_path / "spool"))
        tracker.log_files(tmp_path / "encoder.safetensors", "weights")
        tags = {"model.encoder_width": "32"}
        tracker.register_model("vitok", f"runs:/{run_id}/weights", step, tags, "a tiny one")
        tracker.close()
    found = client.search_model_versions("name='vitok'")
    versions = {int(version.version): version for version in found}
    assert {number: v.tags["step"] for number, v in versions.items()} == {1: "8", 2: "9"}
    assert versions[1].run_id == run_id
    assert versions[1].tags["model.encoder_width"] == "32"
    assert versions[1].description == "a tiny one"
    local = client.download_artifacts(run_id, "weights", str(tmp_path))
    assert (Path(local) / "encoder.safetensors").read_text() == "weights"


def test_server_without_a_model_registry_costs_a_warning(
    storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run_id = use_run(storage, "no registry", {}, step=0)
    error = RestException({"error_code": "ENDPOINT_NOT_FOUND", "message": "no registry here"})
    monkeypatch.setattr(MlflowClient, "search_model_versions", failing(error))
    tracker = Tracker(uri_of(storage), run_id, str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        tracker.register_model("vitok", f"runs:/{run_id}/weights", 1, {})
        tracker.close()
    (warning,) = caplog.records
    assert "no registry here" in warning.getMessage()
    assert list((tmp_path / run_id).iterdir()) == [], "it is not tried again"


def test_system_metrics_of_a_node_are_recorded_under_its_name(
    storage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_id = use_run(storage, "nodes", {}, step=0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    name = "system/node-3/cpu_utilization_percentage"
    for num_points in (2, 4):  # a restart goes on
        deadline = time.monotonic() + 60
        with system_metrics(uri_of(storage), run_id, "node-3", str(tmp_path)):
            while len(points_of(storage, run_id, name)) < num_points:
                assert time.monotonic() < deadline, "no system metrics in 60 s"
                time.sleep(0.1)
    steps = [step for step, _ in points_of(storage, run_id, name)]
    assert steps == sorted(set(steps)), "once a step"
    assert all(0 <= value <= 100 for _, value in points_of(storage, run_id, name))
    names = record_of(storage, run_id).data.metrics
    assert "system/node-3/system_memory_usage_megabytes" in names


def test_system_metrics_that_fail_do_not_fail_the_training(
    storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run_id = use_run(storage, "no sensors", {}, step=0)
    monkeypatch.setattr(
        "mlflow.system_metrics.system_metrics_monitor.CPUMonitor", failing(OSError("no sensors"))
    )
    with (
        caplog.at_level(logging.WARNING, logger="pipelines"),
        system_metrics(uri_of(storage), run_id, "node-3", str(tmp_path)),
    ):
        pass
    assert "no system metrics of node-3 from here on: no sensors" in caplog.text


def test_runs_in_an_object_store_need_a_server(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"s3://bucket/runs need an MLflow server: set tracking\.uri"
    ):
        tracking_uri(TrackingConfig(), "s3://bucket/runs")
    given = TrackingConfig(uri="http://host:5000")
    assert tracking_uri(given, "s3://bucket/runs") == "http://host:5000"
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"


def test_run_moves_to_a_new_record_when_the_server_changes(storage: Path) -> None:
    run_id = use_run(storage, "moved", {"loss": 1.0}, step=1)
    folder = Folder.of(str(storage), "moved")
    note = json.loads(folder.read_text("mlflow.json") or "")
    assert note == {"uri": tracking_uri(TrackingConfig(), str(storage)), "run_id": run_id}
    folder.write_text("mlflow.json", json.dumps(note | {"uri": "http://gone:5000"}))
    assert use_run(storage, "moved", {"loss": 1.0}, step=1) != run_id
