"""Small runs in a folder of their own, and what MLflow holds of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from pipelines.tracking import TrackingConfig, open_run, tracking_uri
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


def use_run(storage: Path, name: str, metrics: dict[str, float], step: int) -> str:
    """Open the run of a name, record metrics, and return the run's id."""
    folder = Folder.of(str(storage), name)
    with open_run(folder, name, TrackingConfig(), str(storage), Settings()) as tracker:
        tracker.log_metrics(metrics, step)
        return tracker.run_id


def record_of(storage: Path, run_id: str) -> Run:
    return MlflowClient(tracking_uri(TrackingConfig(), str(storage))).get_run(run_id)


def uri_of(storage: Path) -> str:
    return tracking_uri(TrackingConfig(), str(storage))


def points_of(storage: Path, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Return every recorded (step, value) of a metric, in the order of their times."""
    points = MlflowClient(uri_of(storage)).get_metric_history(run_id, metric)
    ordered = sorted(points, key=lambda point: (point.timestamp, point.step))
    return [(point.step, point.value) for point in ordered]


def images_of(storage: Path, run_id: str) -> list[str]:
    """Return the originals that were logged, without MLflow's own thumbnails."""
    files = MlflowClient(uri_of(storage)).list_artifacts(run_id, "images")
    return [file.path for file in files if file.path.endswith(".png")]


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def run_script(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def run_killed(script: str, *arguments: str) -> None:
    """Run Python code that kills its own process."""
    result = run_script(script, *arguments)
    assert result.returncode == -signal.SIGKILL, result.stderr
