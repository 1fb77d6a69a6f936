import json
import logging
import socket
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.tracking import Tracker, TrackingConfig, open_run, tracking_uri
from vitok.config import config
from vitok.storage import Folder


@config
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@config
class Settings:
    inner: Inner = Inner()
    stages: tuple[Inner, ...] = (Inner(), Inner(rate=2.0))
    text: str = "x" * 7000  # longer than MLflow takes


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; MLflow takes seconds to make its database, so the tests share one."""
    return tmp_path_factory.mktemp("runs")


def use_run(storage: Path, name: str, metrics: dict[str, float], step: int) -> str:
    """Open the run of a name, record metrics, and return the run's id."""
    folder = Folder.of(str(storage), name)
    with open_run(folder, name, TrackingConfig(), str(storage), Settings()) as tracker:
        tracker.log_metrics(metrics, step)
        return tracker.run_id


def record_of(storage: Path, run_id: str) -> Run:
    return MlflowClient(tracking_uri(TrackingConfig(), str(storage))).get_run(run_id)


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

    def away(*_: object, **__: object) -> None:
        raise MlflowException("API request failed: connection refused")

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

    assert [file.path for file in client.list_artifacts(run_id, "texts")] == ["texts/one.txt"]
    assert [file.path for file in client.list_artifacts(run_id, "single")] == ["single/one.txt"]
    images = [file.path for file in client.list_artifacts(run_id, "images")]
    (original,) = [path for path in images if path.endswith(".png")]
    assert "sheet" in original
    assert "step+5+" in original
    local = client.download_artifacts(run_id, original, str(tmp_path))
    assert np.array_equal(np.asarray(Image.open(local)), picture)
    assert record_of(storage, run_id).data.tags["export"] == "there"


def test_server_that_is_away_costs_a_warning_and_no_exception(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tracker = Tracker(f"http://127.0.0.1:{port}", "0123456789abcdef")
    file = tmp_path / "file"
    file.write_text("x")
    calls = [
        lambda: tracker.log_metrics({"loss": 1.0}, step=1),
        lambda: tracker.log_image(np.zeros((2, 2, 3), dtype=np.uint8), "sheet", step=1),
        lambda: tracker.log_files(file, "files"),
        lambda: tracker.set_tags({"a": "b"}),
        lambda: tracker.last_step("loss"),
    ]
    for number, call in enumerate(calls, start=1):
        with caplog.at_level(logging.WARNING, logger="pipelines.tracking"):
            result = call()
        warnings = [r for r in caplog.records if r.name == "pipelines.tracking"]
        assert len(warnings) == number
        assert "MLflow could not be reached" in warnings[-1].getMessage()
    assert result == -1, "last_step of a server that is away"


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
