"""ServerRun: an MLflow run as its server has it."""

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.tracker.import_mlflow import import_mlflow
from pipelines.tracker.spool import Entry, Spool

_POINTS_PER_CALL = 1000  # MLflow's limit for one batch
_STEP_TAG = "step"

# Answers that say of a request that it will never be accepted.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST"}
# Answers of a server that has no model registry, or keeps this run out of it.
_NO_REGISTRY = _REFUSALS | {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "NOT_FOUND",
    "NOT_IMPLEMENTED",
    "PERMISSION_DENIED",
}

logger = logging.getLogger(__name__)


class ServerRun:
    """A run as its server has it. What it has already is not written to it again."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._refused: set[str] = set()
        self.forget()

    @cached_property
    def client(self) -> Any:
        """Return MLflow's client."""
        import_mlflow()
        from mlflow.tracking import MlflowClient

        bound_waiting()
        return MlflowClient(self.uri)

    def forget(self) -> None:
        """Ask the server anew what it has, before the next point is written."""
        self._last_steps: dict[str, int] | None = None
        self._steps: dict[str, set[int]] = {}
        self._image_paths: list[str] | None = None

    def last_steps(self) -> dict[str, int]:
        """Return the last step of every metric."""
        # The protocol's message holds the steps; the object's own fields do not.
        metrics = self.client.get_run(self.run_id).data.to_proto().metrics
        return {metric.key: metric.step for metric in metrics}

    def latest_metrics(self) -> dict[str, float]:
        """Return the newest value of every metric."""
        return dict(self.client.get_run(self.run_id).data.metrics)

    def send_metrics(self, entries: list[Entry]) -> None:
        """Write the points of entries that the server does not have."""
        import_mlflow()
        from mlflow.entities import Metric

        points: dict[tuple[str, int], Metric] = {}
        for entry in entries:
            for name, value in entry["metrics"].items():
                key = (name, entry["step"])
                if key not in points and self._is_new(*key):
                    points[key] = Metric(name, value, entry["time_ms"], entry["step"])
        fresh = list(points.values())
        for start in range(0, len(fresh), _POINTS_PER_CALL):
            self._log(fresh[start : start + _POINTS_PER_CALL])

    def _is_new(self, name: str, step: int) -> bool:
        if self._last_steps is None:
            self._last_steps = self.last_steps()
        # Whole histories are long: they are fetched only for a step that may be among them.
        if step <= self._last_steps.get(name, step - 1):
            if name not in self._steps:
                history = self.client.get_metric_history(self.run_id, name)
                self._steps[name] = {point.step for point in history}
            if step in self._steps[name]:
                return False
        self._last_steps[name] = max(step, self._last_steps.get(name, step))
        if name in self._steps:
            self._steps[name].add(step)
        return True

    def _log(self, points: list[Any]) -> None:
        """Write points; where the server refuses one, only that one is missing."""
        try:
            self.client.log_batch(self.run_id, metrics=points)
        except Exception as error:
            if not is_refusal(error, "metrics"):
                raise
            if len(points) == 1:
                name = points[0].key
                if name not in self._refused:  # it would be said at every step
                    logger.warning("MLflow refuses metric %s: %s", name, brief(error))
                self._refused.add(name)
                return
            half = len(points) // 2
            self._log(points[:half])
            self._log(points[half:])

    def send(self, entry: Entry, spool: Spool) -> None:
        """Write what is no metric."""
        if entry["kind"] == "tags":
            for name, value in entry["tags"].items():
                self.client.set_tag(self.run_id, name, value)
        elif entry["kind"] == "status":
            self._set_status(entry["status"], entry["time_ms"])
        elif entry["kind"] == "model":
            self._register(entry)
        elif not (path := spool.file_of(entry)).exists():
            pass  # dropped for lack of room, and counted there
        elif entry["kind"] == "files":
            self.client.log_artifacts(self.run_id, str(path), entry["name"])
        else:
            self._send_image(entry, path)

    def _set_status(self, status: str, time_ms: int) -> None:
        if status != "RUNNING":
            self.client.set_terminated(self.run_id, status, time_ms)
        # Not said of a run that runs: a busy server may carry out a request long after we have
        # given it up, and a short run would then have ended before it began.
        elif self.client.get_run(self.run_id).info.status != status:
            self.client.update_run(self.run_id, status=status)

    def send_files(self, path: Path, name: str) -> None:
        """Write a file or the files of a folder; what is there already is replaced."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), name)
        else:
            self.client.log_artifact(self.run_id, str(path), name)

    def _send_image(self, entry: Entry, path: Path) -> None:
        if self._image_paths is None:
            found = self.client.list_artifacts(self.run_id, "images")
            self._image_paths = [file.path for file in found]
        # MLflow puts the step into the name, and a random part after it.
        prefix = f"images/{entry['name'].replace('/', '~')}+step+{entry['step']}+"
        if any(path.startswith(prefix) for path in self._image_paths):
            return
        self.client.log_image(
            self.run_id,
            np.load(path, allow_pickle=False),
            key=entry["name"],
            step=entry["step"],
            timestamp=entry["time_ms"],
            synchronous=True,
        )
        self._image_paths.append(prefix)

    def _register(self, entry: Entry) -> None:
        import_mlflow()
        from mlflow.exceptions import MlflowException

        name, step = entry["name"], str(entry["step"])
        versions = self.client.search_model_versions(f"name='{name}' and run_id='{self.run_id}'")
        if any(version.tags.get(_STEP_TAG) == step for version in versions):
            return
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self.client.create_model_version(
            name,
            entry["source"],
            self.run_id,
            tags=entry["tags"] | {_STEP_TAG: step},
            description=entry["description"],
            await_creation_for=None,
        )


def is_refusal(error: Exception, kind: str) -> bool:
    """Whether trying again is of no use."""
    code = getattr(error, "error_code", None)
    if kind == "model":
        return code in _NO_REGISTRY
    # MLflow's client itself refuses names of images with a plain ValueError.
    return code in _REFUSALS or type(error) is ValueError


def brief(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0][:300]


def bound_waiting() -> None:
    """Give a server that is away seconds, not the minutes that MLflow's own retries take."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
