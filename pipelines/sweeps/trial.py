"""One trial of a sweep: a training in a process that Ray Tune started."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.train
import torch
from ray import tune
from ray.data import DataContext
from ray.util.queue import Queue
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.failures import Diverged, OutOfMemory, root_cause
from pipelines.runs import latest_checkpoint
from pipelines.sweeps.config import SweepConfig, make_trial
from pipelines.sweeps.costs import work_of
from pipelines.sweeps.records import State, finite
from pipelines.tracking import TrackingConfig
from pipelines.train_autoencoder import prepare, run_training
from vitok.storage import Folder

# How Ray Tune is told what came of a trial.
STATE, REASON, LATENCY, RESULTS = "trial_state", "trial_reason", "latency_ms", "results"
_SIDE, _TIMES = 256, 5  # of the image whose reconstruction is timed, in pixels; measurements


def run_trial(
    given: dict[str, Any], sweep: SweepConfig, tracking: TrackingConfig
) -> dict[str, Any]:
    """Train a trial; runs in a process of its own, which Ray Tune starts again if it is lost."""
    trial = make_trial(sweep, given["values"])
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    run = replace(trial.settings.run, tracking=tracking)
    state: State = "finished"
    reason = ""
    latency_ms = None
    try:
        settings = prepare(replace(trial.settings, run=run))
        with _told_to_tune() as reports:
            export = run_training(settings, [_Reports(settings, reports)])
        if sweep.latency:
            latency_ms = _latency_of(settings, export)
    except Diverged as error:
        state, reason = "diverged", root_cause(error)
    except OutOfMemory as error:
        state, reason = "out of memory", root_cause(error)
    except Exception as error:
        state, reason = "failed", root_cause(error)
    latest = latest_checkpoint(run.folder)
    results = finite(latest[1]) if latest and state == "finished" else {}
    return {STATE: state, REASON: reason, LATENCY: latency_ms, RESULTS: results}


@contextmanager
def _told_to_tune() -> Iterator[Queue]:
    """Give a queue for reports; Ray Tune has been told of all of them when the block is left.

    Not by Ray's own TuneReportCallback: the main thread of a trial's process hands its reports on,
    and waits for ever where the trial ends at that moment, for the place that its result has taken.
    """
    reports = Queue(actor_options={"num_cpus": 0})

    def tell() -> None:
        while (report := reports.get()) is not None:
            tune.report(report)

    # Where asha stops the trial, `tune.report` ends this thread, and Ray Tune soon the process.
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield reports
    finally:
        reports.put(None)
        thread.join()


class _Reports(ray.train.UserCallback):
    """Tells of a trial's checkpoints; of its last one the trial itself tells.

    A trial that has come to its end must not be stopped before its weights are exported.
    """

    def __init__(self, settings: AutoencoderTraining, reports: Queue) -> None:
        self._settings = settings
        self._reports = reports
        self._num_steps = sum(stage.steps for stage in settings.stages)

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Report a checkpoint; called in Ray Train's controller."""
        step = int(metrics[0]["cursor"]["step"])
        if step < self._num_steps:
            work = work_of(self._settings, step)
            numbers = finite(metrics[0])
            report = numbers | {"step": step, "images": work.images, "flops": work.flops}
            self._reports.put(report | {"metrics": numbers})


def _latency_of(settings: AutoencoderTraining, export: Folder) -> float:
    """Return the milliseconds in which a worker of a training reconstructs a square image."""
    run = settings.run
    task = ray.remote(_time_reconstruction).options(
        num_cpus=run.cpus_per_worker,
        num_gpus=int(run.use_gpu),
        # Outside what Ray Tune has reserved for the trial's own process, which is next to nothing.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )
    return ray.get(task.remote(export.uri, run.compute_dtype))


def _time_reconstruction(location: str, dtype: str) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_autoencoder(location).to(device, getattr(torch, dtype))
    image = torch.zeros(3, _SIDE, _SIDE)
    seconds = []
    for _ in range(_TIMES + 1):
        start = time.perf_counter()
        model.decode(model.encode(image))[0].cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:])  # the first one also chooses kernels
