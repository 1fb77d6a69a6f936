"""What MLflow shows of a sweep: metrics of its trials, its report, and what the best ones left."""

import json
import logging
import os
import tempfile
from pathlib import Path

from pipelines.runs import CONFIG_FILE
from pipelines.sweeps.records import TrialRecord
from pipelines.sweeps.report import COSTS, QUALITIES, REPORT_FOLDER, study_of, value_of
from pipelines.tracker.import_mlflow import import_mlflow
from pipelines.tracking import Tracker
from vitok.pretrained import EXPORT
from vitok.storage import Folder

_BEST_FOLDER = "best"

logger = logging.getLogger(__name__)


def result_metrics(record: TrialRecord) -> dict[str, float]:
    """Return what a trial's MLflow run has beyond its training's own metrics."""
    values = {cost.field: value_of(record, cost) for cost in COSTS}
    values |= {"training_flops": record.training_flops}
    values |= {"encoder_parameters": float(record.encoder_parameters)}
    values |= {f"final_{q.field}": record.latest.get(q.field) for q in QUALITIES}
    return {name: value for name, value in values.items() if value is not None}


def log_report(folder: Folder, tracker: Tracker) -> None:
    """Add a written report, and what the best trials left, to the sweep's MLflow run."""
    study = study_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        tracker.log_files(folder.child(REPORT_FOLDER).download(Path(scratch)), REPORT_FOLDER)
    if not study.best:
        return
    for record in study.leaders:
        _log_best(folder.child(record.name), record, tracker)
        if study.sweep.base.run.tracking.upload_weights:
            _log_weights(folder.child(record.name), f"{_BEST_FOLDER}/{record.name}", tracker)
    _log_index(folder, study.leaders, tracker)
    best = study.leaders[0]
    tracker.set_tags(
        {
            "best_trial": best.name,
            "best_run": best.mlflow_run,
            "best_weights": folder.child(best.name).child(EXPORT).uri,
        }
    )
    if tracker.last_step(f"best_{study.sweep.metric}") < len(study.done):
        score = best.results[study.sweep.metric]
        tracker.log_metrics({f"best_{study.sweep.metric}": score}, len(study.done))


def _log_index(folder: Folder, best: list[TrialRecord], tracker: Tracker) -> None:
    """Say which the best trials are now, and where their weights lie."""
    rows = [
        {
            "trial": record.name,
            "weights": folder.child(record.name).child(EXPORT).uri,
            "mlflow_run": record.mlflow_run,
            "results": record.results,
        }
        for record in best
    ]
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "best.json"
        index.write_text(json.dumps(rows, indent=1) + "\n")
        tracker.log_files(index, _BEST_FOLDER)


def _log_weights(run: Folder, place: str, tracker: Tracker) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tracker.log_files(run.child(EXPORT).download(Path(scratch)), f"{place}/weights")


def _log_best(run: Folder, record: TrialRecord, tracker: Tracker) -> None:
    """Copy a trial's config and its last picture to the sweep's MLflow run."""
    import_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    place = f"{_BEST_FOLDER}/{record.name}"
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / CONFIG_FILE
        config.write_bytes(run.read_bytes(CONFIG_FILE))
        tracker.log_files(config, place)
        try:
            client = MlflowClient(tracker.uri)
            files = [file.path for file in client.list_artifacts(record.mlflow_run, "images")]
            pictures = [path for path in files if path.endswith(".png")]
            if pictures:
                newest = max(pictures, key=lambda path: int(path.split("+")[2]))
                picture = Path(client.download_artifacts(record.mlflow_run, newest, scratch))
                tracker.log_files(picture.rename(Path(scratch) / "reconstructions.png"), place)
        except (MlflowException, OSError) as error:
            logger.warning("the pictures of %s are not in the sweep's run: %s", record.name, error)
