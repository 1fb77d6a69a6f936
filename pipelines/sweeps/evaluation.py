"""rFID and rFDD of a sweep's trials: one evaluation of all that are finished, when none runs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipelines.evaluate import EvaluationResult, evaluate
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.data import open_images
from pipelines.evaluation.report import log_results, write_results
from pipelines.evaluation.worker import load_extractors
from pipelines.reading.shards import local_folder
from pipelines.sweeps.config import EVALUATED, SweepConfig
from pipelines.sweeps.mlflow import result_metrics
from pipelines.sweeps.records import TrialRecord, read_records, write_record
from pipelines.tracking import Tracker, tracker_of
from vitok.pretrained import EXPORT
from vitok.storage import Folder, absolute_if_local

EVALUATION_FOLDER = "evaluation"


def located_evaluation(sweep: SweepConfig) -> EvaluationConfig:
    """Return a sweep's evaluation with absolute locations, after a look at what it needs.

    It comes days after the start: what is missing should be known before.

    Raises:
        FileNotFoundError: a network or the images are not there.
        ValueError: a network is another one.
    """
    evaluation = sweep.evaluation
    if not sweep.is_evaluated:
        return evaluation
    evaluation = replace(
        evaluation,
        data=absolute_if_local(evaluation.data or sweep.base.data.eval_manifest),
        networks=evaluation.networks.absolute(),
    )
    load_extractors(evaluation.networks)
    with _place(sweep) as out:
        open_images(evaluation.data, out / "data")
    return evaluation


def evaluate_trials(sweep: SweepConfig, tracker: Tracker) -> dict[str, str]:
    """Evaluate the finished trials that have not been, and keep their figures.

    Args:
        sweep: as `prepare_sweep` returned it.
        tracker: of the sweep's MLflow run, which gets the evaluation's files.

    Returns:
        why trials could not be evaluated, by their names.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `evaluate`.
    """
    waiting = {r.name: r for r in read_records(sweep.folder).values() if _is_left(sweep, r)}
    if not waiting:
        return {}
    with _place(sweep) as out:
        settings = replace(
            sweep.evaluation, subjects=tuple(_subject(sweep, n) for n in waiting), out=str(out)
        )

        def save(found: EvaluationResult) -> None:
            write_results(settings, found, out)
            for score in found.scores:
                if score.subject in waiting:
                    figures = {"eval_rfid": score.rfid, "eval_rfdd": score.rfdd}
                    known = {name: value for name, value in figures.items() if value is not None}
                    _keep(sweep.folder, waiting.pop(score.subject), known)

        result = evaluate(settings, save)
        log_results(tracker, out, EVALUATION_FOLDER)
    return result.failed


def _is_left(sweep: SweepConfig, record: TrialRecord) -> bool:
    networks = sweep.evaluation.networks
    wanted = {metric for metric, network in EVALUATED.items() if getattr(networks, network)}
    return record.state == "finished" and not wanted <= record.results.keys()


def _subject(sweep: SweepConfig, trial: str) -> str:
    export = sweep.folder.child(trial).child(EXPORT)
    return f"{export.uri},name={trial},dtype={sweep.base.run.compute_dtype}"


def _keep(sweep: Folder, record: TrialRecord, figures: dict[str, float]) -> None:
    """Add figures to a trial's MLflow run, then to its record: so they are in both."""
    record = replace(record, results=record.results | figures)
    if tracker := tracker_of(sweep.child(record.name)):
        tracker.log_metrics(result_metrics(record), record.steps)
        tracker.close()
    write_record(sweep, record)


@contextmanager
def _place(sweep: SweepConfig) -> Iterator[Path]:
    """Give the local folder in which a sweep's evaluation lies, or from which it is uploaded."""
    folder = sweep.folder.child(EVALUATION_FOLDER)
    if folder.is_local:
        yield local_folder(folder.uri)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        if any(Path(scratch).iterdir()):
            folder.upload(Path(scratch))
