"""Sweeps: Ray Tune decides which trials run, and every trial is a training run of its own.

What is done and what is left is read from the run folders and the records, never from Ray Tune's
own state: a sweep that was killed is a new sweep without the trials that have ended.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from tqdm import tqdm

from pipelines.autoencoder_training import located, plan_of
from pipelines.failures import Preempted, root_cause
from pipelines.sweeps.config import SweepConfig, rungs_of, trials_of
from pipelines.sweeps.evaluation import evaluate_trials, located_evaluation
from pipelines.sweeps.mlflow import log_report, result_metrics
from pipelines.sweeps.records import (
    ENDED,
    Report,
    State,
    TrialRecord,
    claim_sweep,
    read_records,
    write_record,
)
from pipelines.sweeps.report import write_report
from pipelines.sweeps.search import Trials, draws_of
from pipelines.sweeps.trial import LATENCY, REASON, RESULTS, STATE, run_trial
from pipelines.tracking import Tracker, open_run, tracker_of, tracking_uri
from pipelines.train_autoencoder import prepare


def run_sweep(sweep: SweepConfig) -> list[TrialRecord]:
    """Run a sweep on the connected Ray cluster, or go on with the one of this name.

    Args:
        sweep: as `prepare_sweep` returned it.

    Returns:
        the records of all its trials.

    Raises:
        RuntimeError: a trial does not fit on the cluster; no trial came to its end; finished ones
            could not be evaluated.
    """
    tracking = sweep.base.run.tracking
    storage = sweep.base.run.storage
    with open_run(sweep.folder, sweep.name, tracking, storage, sweep) as tracker:
        tracker.set_tags({"sweep": sweep.name, "metric": sweep.metric, "mode": sweep.mode})
        child = replace(tracking, uri=tracking_uri(tracking, storage), parent_run=tracker.run_id)
        left = Trials(sweep, child)
        if left.total:
            _tune(sweep, left)
        failed: dict[str, str] = {}
        if sweep.is_evaluated:
            write_report(sweep.folder)  # an evaluation may take hours
            failed = evaluate_trials(sweep, tracker)
        write_report(sweep.folder)
        log_report(sweep.folder, tracker)
        if failed:
            listed = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise RuntimeError(
                f"trials of the sweep {sweep.name} could not be evaluated, start it again to try "
                f"once more: {listed}"
            )
    records = list(read_records(sweep.folder).values())
    if not any(record.state in ("finished", "stopped") for record in records):
        reasons = "; ".join(f"{record.name}: {record.reason}" for record in records)
        raise RuntimeError(f"no trial of the sweep {sweep.name} came to its end: {reasons}")
    return records


def prepare_sweep(sweep: SweepConfig) -> SweepConfig:
    """Check what can be checked before anything starts, and claim the sweep's folder.

    Returns:
        the config to run, with absolute locations.

    Raises:
        ImportError: optuna is asked for, and not installed.
        FileNotFoundError, ValueError: as for a training; two trials are the same; what an
            evaluation needs is not there.
    """
    sweep = replace(sweep, base=located(sweep.base))
    sweep = replace(sweep, evaluation=located_evaluation(sweep))
    tracking_uri(sweep.base.run.tracking, sweep.base.run.storage)
    draws_of(sweep, [])
    trials = trials_of(sweep)
    for trial in trials:
        prepare(trial.settings)
    if not trials:
        plan_of(sweep.base)
    claim_sweep(sweep)
    return sweep


def _tune(sweep: SweepConfig, trials: Trials) -> None:
    """Let Ray Tune run the trials that are left."""
    # A few bytes of memory: the workers ask for what they need themselves, and what is free for
    # them is for `Trials` to say.
    driver = tune.with_resources(
        tune.with_parameters(run_trial, sweep=sweep, tracking=trials.tracking),
        tune.PlacementGroupFactory([{"memory": 1}]),
    )
    # No tables and files of Ray Tune's own; a trial's last word, how it ended, has no metric.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    tuner = tune.Tuner(
        driver,
        tune_config=tune.TuneConfig(
            search_alg=trials,
            scheduler=_scheduler(sweep, trials),
            num_samples=-1,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=sweep.folder.child("tune").uri,
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            callbacks=[_Recorder(trials)],
            verbose=0,
        ),
    )
    with _ending_on_sigterm() as told:
        tuner.fit()
    if not trials.is_done:
        _note_interruption(trials)
    if told.is_set():
        raise Preempted(
            f"stopped by SIGTERM; {trials.ended} trials have ended, start the sweep again to go on"
        )
    if not trials.is_done:
        raise KeyboardInterrupt


def _note_interruption(trials: Trials) -> None:
    """Tell MLflow of trials whose processes ended without a word."""
    for trial in trials.running:
        if tracker := tracker_of(trial.settings.run.folder):
            tracker.set_status("KILLED")
            tracker.close()


@contextmanager
def _ending_on_sigterm() -> Iterator[threading.Event]:
    """Let SIGTERM end Ray Tune's loop, which ends for SIGUSR1; tells whether it came."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def end(*_: object) -> None:
        told.set()
        signal.raise_signal(signal.SIGUSR1)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    signal.signal(signal.SIGUSR1, lambda *_: None)  # until Ray Tune listens
    signal.signal(signal.SIGTERM, end)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _scheduler(sweep: SweepConfig, trials: Trials) -> TrialScheduler:
    """Return the scheduler, which knows what trials of an earlier start reported."""
    if sweep.scheduler == "none":
        return FIFOScheduler()
    first, end = rungs_of(sweep, trials.known)
    scheduler = ASHAScheduler(
        time_attr=sweep.progress,
        metric=sweep.metric,
        mode=sweep.mode,
        grace_period=first,
        max_t=end,
        reduction_factor=sweep.reduction,
        stop_last_trials=False,
    )
    for record in trials.records.values():
        if record.state in ENDED:
            earlier = _EarlierTrial(record.name)
            scheduler.on_trial_add(None, earlier)
            for report in record.reports:
                scheduler.on_trial_result(None, earlier, _result_of(report))
    return scheduler


class _EarlierTrial:
    """What the scheduler looks at in a trial that ended before this start."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _result_of(report: Report) -> dict[str, Any]:
    return {"step": report.step, "images": report.images, "flops": report.flops} | report.metrics


class _Recorder(tune.Callback):
    """Keeps records, tags of MLflow runs and a progress bar, in the driver."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._folder = trials.sweep.folder
        self._bar: Any = None

    def setup(self, *args: Any, **info: Any) -> None:
        """Begin the bar; not before, as Ray Tune pickles its callbacks first."""
        self._bar = tqdm(total=self._trials.total, desc="sweep", unit="trial", mininterval=1.0)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write that a trial begins, or goes on."""
        known = self._trials.trial(trial.trial_id)
        record = TrialRecord.of(known)
        if before := self._trials.records.get(known.name):
            record = replace(record, starts=before.starts, reports=before.reports)
        self._write(replace(record, state="running", starts=record.starts + 1))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Write down what a trial reports."""
        record = self._record(trial)
        if STATE in result:
            self._write(
                replace(
                    record,
                    state=result[STATE],
                    reason=result[REASON],
                    latency_ms=result.get(LATENCY),
                    results=dict(result[RESULTS]),
                )
            )
        elif "step" in result:
            report = Report(
                step=result["step"],
                images=result["images"],
                flops=result["flops"],
                metrics=dict(result["metrics"]),
            )
            # A trial that was restarted repeats what came after its checkpoint.
            before = tuple(r for r in record.reports if r.step < report.step)
            self._write(replace(record, reports=(*before, report)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write how a trial ended; without a word of its own, the scheduler stopped it."""
        self._end(trial, "stopped", "asha let others go on")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write that a trial's own process was lost too often."""
        error = trial.get_error()
        reason = root_cause(error) if error else "its process was lost"
        self._end(trial, "failed", reason.splitlines()[-1])

    def _end(self, trial: Any, state: State, reason: str) -> None:
        record = self._record(trial)
        if record.state == "running":
            record = replace(record, state=state, reason=reason)
        run = self._trials.trial(trial.trial_id).settings.run
        if tracker := tracker_of(run.folder):
            record = replace(record, mlflow_run=tracker.run_id)
            _log_end(tracker, record, self._trials.sweep)
        self._write(record)
        line = f"{record.name}: {record.state}{_score(record, self._trials.sweep)}"
        self._bar.write(line, file=sys.stderr)
        self._bar.update()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Put the bar away."""
        self._bar.close()

    def _record(self, trial: Any) -> TrialRecord:
        return self._trials.records[self._trials.trial(trial.trial_id).name]

    def _write(self, record: TrialRecord) -> None:
        self._trials.records[record.name] = record
        write_record(self._folder, record)


def _score(record: TrialRecord, sweep: SweepConfig) -> str:
    if record.state in ("finished", "stopped") and sweep.metric in record.latest:
        return f", {sweep.metric} {record.latest[sweep.metric]:.4g}"
    return f" ({record.reason})" if record.reason else ""


def _log_end(tracker: Tracker, record: TrialRecord, sweep: SweepConfig) -> None:
    """Add to a trial's MLflow run what its compare view shows and filters by."""
    values = {f"trial.{field}": value for field, value in record.values.items()}
    tags = {"sweep": sweep.name, "trial": record.name, "state": record.state}
    tracker.set_tags(tags | values | {"reason": record.reason} if record.reason else tags | values)
    done = record.steps if record.results else (record.reports[-1].step if record.reports else 0)
    name = "decoder_parameters"
    if tracker.last_step(name) < done:
        tracker.log_metrics(result_metrics(record), done)
    if record.state == "stopped":  # its own process had no time to say so
        tracker.set_status("FINISHED")
    elif record.state == "failed":
        tracker.set_status("FAILED")
    tracker.close()
