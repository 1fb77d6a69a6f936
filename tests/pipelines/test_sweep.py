"""Which trial of a sweep is next, which is stopped, and what ran out of memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from ray.tune.schedulers import ASHAScheduler

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.failures import is_out_of_memory
from pipelines.sweep import _Recorder, _scheduler
from pipelines.sweeps.config import Axis, SweepConfig, rungs_of, trials_of
from pipelines.sweeps.costs import work_of
from pipelines.sweeps.records import Report, TrialRecord, read_records, write_record
from pipelines.sweeps.search import Trials
from pipelines.tracking import TrackingConfig


def test_trials_are_handed_out_as_the_cluster_has_room(
    tiny_training: AutoencoderTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 7.0})
    base = replace(tiny_training, run=replace(tiny_training.run, cpus_per_worker=1.0))
    values = ("2", "4", "1", "5")
    axes = (Axis(field="run.num_workers", values=values),)
    trials = Trials(SweepConfig(name="s", base=base, axes=axes), TrackingConfig())
    assert trials.total == 4

    def handed(trial_id: str) -> str | None:
        given = trials.suggest(trial_id)
        return given["values"]["run.num_workers"] if isinstance(given, dict) else given

    # Each takes its workers and one core that reads: 3, 5, 2 and 6 of 7.
    assert [handed("a"), handed("b"), handed("c")] == ["2", "1", None]
    trials.on_trial_complete("a")
    assert [handed("d"), handed("e")] == ["4", None]
    trials.on_trial_complete("b")
    trials.on_trial_complete("d")
    assert [handed("f"), handed("g")] == ["5", None]
    assert not trials.is_done
    trials.on_trial_complete("f")
    assert handed("h") == "FINISHED"
    assert trials.is_done

    limited = SweepConfig(name="s", base=base, axes=axes, max_concurrent=1)
    trials = Trials(limited, TrackingConfig())
    assert [handed("a"), handed("b")] == ["2", None]
    too_many = SweepConfig(
        name="s", base=base, axes=(Axis(field="run.num_workers", values=("1", "9")),)
    )
    with pytest.raises(RuntimeError, match="num_workers_9 asks for 10 CPUs, the cluster has 7"):
        Trials(too_many, TrackingConfig())


@pytest.mark.parametrize("progress", ["images", "flops"])
def test_asha_compares_trials_at_equal_work_also_with_those_of_an_earlier_start(
    tiny_training: AutoencoderTraining, progress: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 99.0})
    run = replace(tiny_training.run, checkpoint_every=4, evaluate_every=2)
    stages = tuple(replace(stage, steps=100 * stage.steps) for stage in tiny_training.stages)
    sweep = SweepConfig(
        name="study",
        base=replace(tiny_training, run=run, stages=stages),
        axes=(Axis(field="model.decoder_depth", values=("1", "2", "4", "8")),),
        progress=progress,
        scheduler="asha",
        first_rung=0.25,
    )
    trials = trials_of(sweep)
    for trial, psnr in zip(trials[:3], (20.0, 21.0, 22.0), strict=True):
        work = work_of(trial.settings, 400)
        report = Report(step=400, images=work.images, flops=work.flops, metrics={"eval_psnr": psnr})
        record = replace(TrialRecord.of(trial), state="finished", reports=(report,))
        write_record(sweep.folder, record)
    known = Trials(sweep, TrackingConfig())
    assert [trial.name for trial in known.waiting] == [trials[3].name]
    scheduler = _scheduler(sweep, known)
    assert isinstance(scheduler, ASHAScheduler)
    new = SimpleNamespace(trial_id="new")
    total = getattr(work_of(trials[3].settings), progress)

    def decision(share: float, psnr: float) -> str:
        scheduler.on_trial_add(None, new)
        return scheduler.on_trial_result(None, new, {progress: share * total, "eval_psnr": psnr})

    assert decision(0.2, 1.0) == "CONTINUE", "before the first rung nobody is judged"
    assert decision(0.6, 20.5) == "STOP"
    new.trial_id = "better"
    assert decision(0.6, 21.5) == "CONTINUE"
    first, end = rungs_of(sweep, trials)
    assert 0 < first < end < total


def test_trial_that_failed_keeps_what_it_had_reported_when_it_goes_on(
    tiny_training: AutoencoderTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 7.0})
    sweep = SweepConfig(name="study", base=tiny_training, points=("seed=1",))
    report = Report(step=2, images=20, flops=1e9, metrics={"eval_psnr": 20.0})
    before = replace(TrialRecord.of(trials_of(sweep)[0]), starts=1, reports=(report,))
    write_record(sweep.folder, replace(before, state="failed", reason="its node was lost"))
    trials = Trials(sweep, TrackingConfig())
    assert trials.suggest("a") == {"trial": "seed_1", "values": {"seed": "1"}}
    _Recorder(trials).on_trial_start(0, [], SimpleNamespace(trial_id="a"))
    (after,) = read_records(sweep.folder).values()
    assert after == replace(before, state="running", starts=2)


def test_out_of_memory_is_recognised_in_what_ray_wraps_around_it() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    class WorkerGroupError(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            self.worker_failures = failures

    wrapped = RuntimeError("worker died")
    wrapped._base_exc = OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(WorkerGroupError({0: RuntimeError("peer left"), 3: wrapped}))
    assert is_out_of_memory(MemoryError())
    allocator = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    assert is_out_of_memory(WorkerGroupError({0: RuntimeError(allocator)}))
    assert not is_out_of_memory(WorkerGroupError({0: RuntimeError("peer left")}))
