"""One logical run is one MLflow run, however often its processes restart or the server goes away.

What is logged goes to a spool on the local disk, and from there a thread sends it: logging costs
the training a line in a file. While the server is away the spool grows; when it answers again, all
is sent in the order it came. Points that the server has already are not written a second time.

MLflow takes two seconds to import, so it is imported where a run is really written to: in the
driver and on rank 0, not in every worker.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.failures import Preempted
from pipelines.tracker.credentials import credential_in
from pipelines.tracker.import_mlflow import import_mlflow
from pipelines.tracker.outbox import Outbox
from pipelines.tracker.server_run import ServerRun, bound_waiting, brief
from pipelines.tracker.spool import ARTIFACTS, RECORDS, copy_into, fill, unsent
from pipelines.tracker.system_metrics import sampled
from vitok.config import config, flatten
from vitok.storage import Folder

_RUN_FILE = "mlflow.json"
_SPOOL_FOLDER = "unsent"
_PARAMS_PER_CALL = 100  # MLflow's limit for one batch
_PARAM_LENGTH = 6000

logger = logging.getLogger(__name__)


@config
class TrackingConfig:
    """Where a run is recorded.

    Attributes:
        uri: MLflow tracking server; empty takes the variable MLFLOW_TRACKING_URI, and where that is
            not set a SQLite file in the run's storage.
        experiment: MLflow experiment.
        upload_weights: also store the exported weights as an artifact of the run.
        registered_model: name in MLflow's model registry of which the uploaded weights become a
            version; empty registers nothing.
        parent_run: id of the MLflow run below which a new run is shown; empty for none.
    """

    uri: str = ""
    experiment: str = "vitok"
    upload_weights: bool = False
    registered_model: str = ""
    parent_run: str = ""

    def __post_init__(self) -> None:
        _refuse_credential("tracking.uri", self.uri)
        if self.registered_model and not self.upload_weights:
            raise ValueError(
                f"registered_model={self.registered_model!r} needs the weights in MLflow; set "
                "upload_weights too"
            )


def tracking_uri(tracking: TrackingConfig, storage: str) -> str:
    """Return the tracking server of runs that are stored under `storage`.

    Raises:
        ValueError: there is neither a server nor a local folder for a SQLite file, or the server's
            URI holds a credential.
    """
    if tracking.uri:
        return tracking.uri
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        _refuse_credential("MLFLOW_TRACKING_URI", uri)
        return uri
    if "://" in storage:
        raise ValueError(
            f"runs stored in {storage} need an MLflow server: set tracking.uri or "
            "MLFLOW_TRACKING_URI, for instance to http://HOST:5000"
        )
    return local_tracking_uri(storage)


def local_tracking_uri(storage: str) -> str:
    """Return the SQLite file of the runs in a local folder that have no tracking server."""
    return f"sqlite:///{Path(storage).expanduser().absolute()}/mlflow.db"


def _refuse_credential(name: str, uri: str) -> None:
    """Refuse what would be written into the run's folder, its parameters and its log."""
    if found := credential_in(uri):
        raise ValueError(
            f"{name} holds {found}, and is written beside checkpoints and into MLflow; leave it "
            "out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


class Tracker:
    """Writes to one MLflow run. A server that is away costs a warning, never the training.

    Logging returns at once; `flush` and `close` wait. What a killed writer left in the spool is
    sent by the next tracker of the run that finds it there.

    Args:
        uri: tracking server.
        run_id: an existing run.
        spool: local folder for what waits to be sent; empty takes one for temporary files.
        max_spool_bytes: of what waits; images give way first, then files, metrics last.
        back_off_s: a server that did not answer is left alone for so long.
        also: is given metrics and their step too.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        spool: str = "",
        *,
        max_spool_bytes: int = 512 * 2**20,
        back_off_s: float = 30.0,
        also: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self.uri = uri
        self._also = also
        self.run_id = run_id
        self.spool = spool or f"{tempfile.gettempdir()}/vitok-unsent-{os.getuid()}"
        self._server = ServerRun(uri, run_id)
        self._outbox = Outbox(self._server, Path(self.spool) / run_id, max_spool_bytes, back_off_s)

    def last_step(self, metric: str) -> int:
        """Return the last step at which a metric was recorded, -1 for none.

        What waits to be sent counts. A server that is away is taken for one that has nothing; a
        step that is logged again for that reason is found there before it is written.
        """
        # First the spools: an entry that leaves them in the meantime is on the server.
        waiting = [*unsent(self._outbox.run_folder), *self._outbox.waiting(RECORDS)]
        found = [e["step"] for e in waiting if metric in e.get("metrics", ())]
        if self._outbox.may_ask():
            with self._outbox.noting_failure():
                found.append(self._server.last_steps().get(metric, -1))
        return max(found, default=-1)

    def latest_metrics(self) -> dict[str, float]:
        """Return the newest value of every metric; what a server that is away has, is missing."""
        self.flush()
        latest: dict[str, float] = {}
        waiting = self._outbox.waiting(RECORDS)
        if self._outbox.may_ask():
            with self._outbox.noting_failure():
                latest |= self._server.latest_metrics()
        for entry in waiting:
            latest |= entry.get("metrics", {})
        return latest

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics at a step; all of them or, after a kill, none."""
        if metrics:
            values = {name: float(value) for name, value in metrics.items()}
            self._outbox.add(RECORDS, {"kind": "metrics", "metrics": values, "step": int(step)})
            if self._also is not None:
                self._also(values, int(step))

    def log_image(self, image: NDArray[np.uint8], name: str, step: int) -> None:
        """Record an image [height, width, 3] at a step."""
        entry = {"kind": "image", "name": name, "step": int(step)}

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, image)

        try:
            entry["file"] = fill(self._outbox.spool(), write)
        except OSError as error:
            logger.warning("image %s of step %d is not recorded: %s", name, step, error)
            return
        self._outbox.add(ARTIFACTS, entry, file_bytes=image.nbytes)

    def log_files(self, path: Path, name: str) -> None:
        """Record a file or the files of a folder as artifacts under `name`.

        Sent at once where the server answers: a copy of weights would take the spool's room.
        """
        if not path.exists():
            logger.warning("%s is not recorded: there is no such file or folder", path)
            return
        self.flush()
        if self._outbox.may_ask(ARTIFACTS) and not self._outbox.waiting(ARTIFACTS):
            with self._outbox.noting_failure(ARTIFACTS):
                self._server.send_files(path, name)
                return
        try:
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            num_bytes = sum(file.stat().st_size for file in files)
            if num_bytes > (room := self._outbox.spool().room()):
                raise OSError(f"{num_bytes} bytes exceed the spool's room of {room}")
            entry = {"kind": "files", "name": name, "file": copy_into(self._outbox.spool(), path)}
        except OSError as error:
            logger.warning("%s is not recorded, log it again when MLflow is back: %s", path, error)
            return
        self._outbox.add(ARTIFACTS, entry, file_bytes=num_bytes)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        texts = {tag: str(value) for tag, value in tags.items()}
        self._outbox.add(RECORDS, {"kind": "tags", "tags": texts})

    def set_status(self, status: str) -> None:
        """Set the run's status: RUNNING, FINISHED, FAILED or KILLED."""
        self._outbox.add(RECORDS, {"kind": "status", "status": status})

    def register_model(
        self, name: str, source_uri: str, step: int, tags: dict[str, str], description: str = ""
    ) -> None:
        """Register exported weights as a version of a model, once for the run and the step.

        Args:
            name: of the model in MLflow's registry; made where it is new.
            source_uri: `runs:/RUN_ID/weights` for artifacts of the run, or where else they lie. A
                server refuses a local path outside the run's artifacts.
            tags: of the version, for instance the model's config.
        """
        entry = {
            "kind": "model",
            "name": name,
            "source": source_uri,
            "step": int(step),
            "tags": {tag: str(value) for tag, value in tags.items()},
            "description": description,
        }
        self._outbox.add(ARTIFACTS, entry)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until all is sent, or the server turns out to be away."""
        self._outbox.flush(timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """Try once more to send what waits, also of killed writers, and stop the thread.

        What could not be sent stays in the spool, for the next tracker of the run there.
        """
        self._outbox.close(timeout_s)


def tracker_of(folder: Folder) -> Tracker | None:
    """Return a Tracker of the run that a folder remembers, to add to it; None if it has not begun.

    The run's status stays.
    """
    note = json.loads(folder.read_text(_RUN_FILE) or "{}")
    return Tracker(note["uri"], note["run_id"], _spool_of(folder)) if note else None


def _spool_of(folder: Folder) -> str:
    return folder.child(_SPOOL_FOLDER).uri if folder.is_local else ""


@contextmanager
def open_run(
    folder: Folder, name: str, tracking: TrackingConfig, storage: str, settings: Any
) -> Iterator[Tracker]:
    """Start the run of a folder, or continue it, and end it with the status it deserves.

    System metrics of this machine are recorded while it is open. A run that the folder knows is
    continued also when its server is away.

    Args:
        folder: remembers the run's id, so that a restart finds it; where it is local, what could
            not be sent waits there.
        settings: the config whose fields become the run's parameters.

    Raises:
        ConnectionError: the run is new and the server does not take it.
    """
    # Importing MLflow sets the level of its logger, whatever was set before.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = tracking_uri(tracking, storage)
    note = json.loads(folder.read_text(_RUN_FILE) or "{}")
    run_id = note.get("run_id") if note.get("uri") == uri else None
    if run_id is None:
        run_id = _start_run(uri, name, tracking, storage, settings)
        folder.write_text(_RUN_FILE, json.dumps({"uri": uri, "run_id": run_id}))
    tracker = Tracker(uri, run_id, _spool_of(folder))
    tracker.set_tags({"run_folder": folder.uri})
    tracker.set_status("RUNNING")
    status = "FAILED"
    try:
        with sampled(tracker.log_metrics, uri, run_id, node_id=""):
            yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, Preempted):
        status = "KILLED"
        raise
    finally:
        tracker.set_status(status)
        tracker.close()


def run_around(location: Folder) -> Folder | None:
    """Return the folder of the recorded run that something is of: its own, or the one around it.

    A run's export and its checkpoints lie in its folder.
    """
    around = Folder(location.uri.rpartition("/")[0])
    return next((folder for folder in (location, around) if folder.exists(_RUN_FILE)), None)


def _start_run(uri: str, name: str, tracking: TrackingConfig, storage: str, settings: Any) -> str:
    import_mlflow()
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    bound_waiting()
    params = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in flatten(settings).items()]
    try:
        client = MlflowClient(uri)
        experiment_id = _experiment(client, uri, tracking.experiment, storage)
        tags = {"mlflow.parentRunId": tracking.parent_run} if tracking.parent_run else {}
        run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
        for start in range(0, len(params), _PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
    except MlflowException as error:
        raise ConnectionError(
            f"run {name} is new and MLflow at {uri} does not take it; start the server, or set "
            f"tracking.uri to one that runs ({brief(error)})"
        ) from error
    return run_id


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


def metric_history(folder: Folder, metric: str) -> list[tuple[int, float]]:
    """Return every recorded (step, value) of a metric of the run in a folder, in step order."""
    import_mlflow()
    from mlflow.tracking import MlflowClient

    note = json.loads(folder.read_text(_RUN_FILE) or "{}")
    points = MlflowClient(note["uri"]).get_metric_history(note["run_id"], metric)
    return sorted((point.step, point.value) for point in points)


@contextmanager
def system_metrics(uri: str, run_id: str, node_id: str, spool: str = "") -> Iterator[None]:
    """Record processor, memory, disk, network and GPUs of this machine while it is open.

    Called by one process of each node. Never fails what runs inside.

    Args:
        node_id: tells machines apart: `system/NODE_ID/cpu_utilization_percentage`.
        spool: as the Tracker takes it.
    """
    tracker = Tracker(uri, run_id, spool)
    try:
        with sampled(tracker.log_metrics, uri, run_id, node_id):
            yield
    finally:
        tracker.close()
