"""One logical run is one MLflow run, however often its processes restart.

MLflow takes two seconds to import, so it is imported where a run is really written to: in the
driver and on rank 0, not in every worker.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitok.config import config, flatten
from vitok.storage import Folder

_RUN_FILE = "mlflow.json"
_PARAMS_PER_CALL = 100  # MLflow's limit for one batch
_PARAM_LENGTH = 6000

logger = logging.getLogger(__name__)


@config
class TrackingConfig:
    """Where a run is recorded.

    Attributes:
        uri: MLflow tracking server; empty takes a SQLite file in the run's storage.
        experiment: MLflow experiment.
        upload_weights: also store the exported weights as an artifact of the run.
    """

    uri: str = ""
    experiment: str = "vitok"
    upload_weights: bool = False


def tracking_uri(tracking: TrackingConfig, storage: str) -> str:
    """Return the tracking server of runs that are stored under `storage`.

    Raises:
        ValueError: there is neither a server nor a local folder for a SQLite file.
    """
    if tracking.uri:
        return tracking.uri
    if "://" in storage:
        raise ValueError(
            f"runs stored in {storage} need an MLflow server: set tracking.uri, for instance to "
            "http://HOST:5000"
        )
    return f"sqlite:///{Path(storage).expanduser().absolute()}/mlflow.db"


class Tracker:
    """Writes to one MLflow run. A server that is away costs a warning, never the training.

    Args:
        uri: tracking server.
        run_id: an existing run.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        from mlflow.tracking import MlflowClient

        _bound_waiting()
        self.uri = uri
        self.run_id = run_id
        self._client = MlflowClient(uri)

    def last_step(self, metric: str) -> int:
        """Return the last step at which a metric was recorded, -1 for none."""
        with _survive():
            history = self._client.get_metric_history(self.run_id, metric)
            return max((point.step for point in history), default=-1)
        return -1

    def latest_metrics(self) -> dict[str, float]:
        """Return the newest value of every metric."""
        return dict(self._client.get_run(self.run_id).data.metrics)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with _survive():
            self._client.log_batch(self.run_id, metrics=points)

    def log_image(self, image: NDArray[np.uint8], name: str, step: int) -> None:
        """Record an image [height, width, 3] at a step."""
        with _survive():
            self._client.log_image(self.run_id, image, key=name, step=step, synchronous=True)

    def log_files(self, path: Path, name: str) -> None:
        """Record a file or the files of a folder as artifacts under `name`."""
        with _survive():
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), name)
            else:
                self._client.log_artifact(self.run_id, str(path), name)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        with _survive():
            for name, value in tags.items():
                self._client.set_tag(self.run_id, name, value)


@contextmanager
def open_run(
    folder: Folder, name: str, tracking: TrackingConfig, storage: str, settings: Any
) -> Iterator[Tracker]:
    """Start the run of a folder, or continue it, and end it with the status it deserves.

    System metrics of this machine are recorded while it is open.

    Args:
        folder: remembers the run's id, so that a restart finds it.
        settings: the config whose fields become the run's parameters.
    """
    import mlflow
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    _bound_waiting()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri(tracking, storage)
    client = MlflowClient(uri)
    note = json.loads(folder.read_text(_RUN_FILE) or "{}")
    run_id = note.get("run_id") if note.get("uri") == uri else None
    if run_id is None:
        experiment_id = _experiment(client, uri, tracking.experiment, storage)
        run_id = client.create_run(experiment_id, run_name=name).info.run_id
        params = [
            Param(key, str(value)[:_PARAM_LENGTH]) for key, value in flatten(settings).items()
        ]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
        folder.write_text(_RUN_FILE, json.dumps({"uri": uri, "run_id": run_id}))
    mlflow.set_tracking_uri(uri)
    with _survive():
        client.set_tag(run_id, "run_folder", folder.uri)
        mlflow.start_run(run_id=run_id, log_system_metrics=True)
    status = "FAILED"
    try:
        yield Tracker(uri, run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with _survive():
            mlflow.end_run(status)


def _experiment(client: Any, uri: str, name: str, storage: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    local = uri.startswith("sqlite:")
    artifacts = Path(storage).expanduser().absolute() / "artifacts" if local else None
    # MLflow's interface opens on language-model evaluation unless the experiment says what it is.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    location = artifacts.as_uri() if artifacts else None
    return str(client.create_experiment(name, artifact_location=location, tags=tags))


def _bound_waiting() -> None:
    """Give a server that is away seconds, not the minutes that MLflow's own retries take."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


@contextmanager
def _survive() -> Iterator[None]:
    """Turn a failing tracking server into a warning."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        logger.warning("MLflow could not be reached, the record has a gap here: %s", error)
