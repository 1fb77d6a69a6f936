import queue
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.failures import Diverged, OutOfMemory
from pipelines.sweeps import trial as sweep_trial
from pipelines.sweeps.config import SweepConfig
from pipelines.sweeps.costs import work_of
from pipelines.sweeps.trial import LATENCY, REASON, RESULTS, STATE, run_trial
from pipelines.tracking import TrackingConfig


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is told to Ray Tune, which is not there."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep_trial, "Queue", lambda actor_options: queue.SimpleQueue())
    monkeypatch.setattr(sweep_trial.tune, "report", told.append)
    return told


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Diverged("step 3: the gradient's norm is nan"), "diverged"),
        (OutOfMemory("CUDA out of memory"), "out of memory"),
        (RuntimeError("the cluster has 0 GPUs"), "failed"),
    ],
)
def test_trial_that_fails_is_a_result_with_its_reason_and_does_not_end_the_sweep(
    tiny_training: AutoencoderTraining,
    reported: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    state: str,
) -> None:
    def fail(settings: AutoencoderTraining, callbacks: Any) -> None:
        raise error

    monkeypatch.setattr(sweep_trial, "run_training", fail)
    sweep = SweepConfig(name="study", base=tiny_training, points=("seed=1",))
    given = run_trial({"values": {"seed": "1"}}, sweep, TrackingConfig())
    assert given == {STATE: state, REASON: str(error), LATENCY: None, RESULTS: {}}


def test_trial_is_a_run_below_the_sweeps_and_reports_its_work_but_for_its_last_step(
    tiny_training: AutoencoderTraining,
    reported: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[AutoencoderTraining] = []

    def train(settings: AutoencoderTraining, callbacks: Any) -> SimpleNamespace:
        seen.append(settings)
        for step in (2, 4, 6):
            metrics = {"eval_psnr": float(step), "cursor": {"step": step}, "loss": float("nan")}
            callbacks[0].after_report(None, [metrics], None)
        return SimpleNamespace(uri="export")

    ending = {"eval_psnr": 20.0, "cursor": {"step": 6}, "loss": float("inf")}
    monkeypatch.setattr(sweep_trial, "run_training", train)
    monkeypatch.setattr(sweep_trial, "latest_checkpoint", lambda folder: (folder, ending))
    monkeypatch.setattr(sweep_trial, "_latency_of", lambda settings, export: 7.0)
    sweep = SweepConfig(name="study", base=tiny_training, points=("seed=1",))
    tracking = replace(TrackingConfig(), uri="sqlite:///x.db", parent_run="parent")
    given = run_trial({"values": {"seed": "1"}}, sweep, tracking)
    assert given == {STATE: "finished", REASON: "", LATENCY: 7.0, RESULTS: {"eval_psnr": 20.0}}
    (settings,) = seen
    assert settings.seed == 1
    assert settings.run.folder.uri == f"{sweep.folder.uri}/seed_1"
    assert settings.run.tracking == tracking
    assert [report["step"] for report in reported] == [2, 4], "its end is told by its result"
    for report in reported:
        work = work_of(settings, report["step"])
        assert (report["images"], report["flops"]) == (work.images, work.flops)
        assert report["metrics"] == {"eval_psnr": float(report["step"])}
        assert report["eval_psnr"] == report["step"], "where ASHA looks for it"
