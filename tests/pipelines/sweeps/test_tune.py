"""Ray Tune with its own scheduler, searcher and processes; the trials in them train nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.sweep import prepare_sweep, run_sweep
from pipelines.sweeps import search as sweep_search
from pipelines.sweeps.config import Axis, SweepConfig
from pipelines.sweeps.records import TrialRecord
from pipelines.tracking import TrackingConfig, tracking_uri

TIMEOUT_S = 120


def without_training(course: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """Return run_trial with something else in the place of its training.

    Args:
        course: is given the settings, and two functions. `report(step, psnr)` reports a checkpoint
            as a training does; `wait(condition)` waits for it.
    """

    def run(given: dict[str, Any], sweep: SweepConfig, tracking: TrackingConfig) -> dict[str, Any]:
        import time

        from pipelines.sweeps import trial as sweep_trial
        from pipelines.tracking import open_run

        def wait(condition: Callable[[], Any]) -> None:
            deadline = time.monotonic() + TIMEOUT_S
            while not condition():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing in {TIMEOUT_S} s")
                time.sleep(0.02)

        def train(settings: AutoencoderTraining, callbacks: list[Any]) -> None:
            run = settings.run

            def report(step: int, psnr: float) -> None:
                metrics = {"eval_psnr": psnr, "cursor": {"step": step}}
                latest = {"checkpoint_dir_name": "none", "metrics": metrics}
                text = json.dumps({"latest_checkpoint_result": latest})
                run.folder.write_text("checkpoint_manager_snapshot.json", text)
                tracker.log_metrics({"eval_psnr": psnr}, step)
                callbacks[0].after_report(None, [metrics], None)

            with open_run(run.folder, run.name, run.tracking, run.storage, settings) as tracker:
                course(settings, report, wait)

        sweep_trial.run_training = train  # in this process alone
        return sweep_trial.run_trial(given, sweep, tracking)

    return run


def small(training: AutoencoderTraining, **changes: Any) -> SweepConfig:
    run = replace(training.run, evaluate_every=2)
    given = {"name": "study", "base": replace(training, run=run), "latency": False}
    return SweepConfig(**(given | changes))


def test_two_trials_run_at_the_same_time_and_asha_gives_the_room_of_the_worse_to_a_third(
    ray_cluster: None, tiny_training: AutoencoderTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of four cores each takes one for its workers and one that reads: two at a time.
    sweep = small(
        tiny_training, points=("seed=1", "seed=2", "seed=3"), scheduler="asha", first_rung=0.25
    )
    notes = Path(sweep.base.run.storage)

    def course(settings: AutoencoderTraining, report: Any, wait: Any) -> None:
        from pipelines.sweeps.records import read_records

        def record(seed: int) -> TrialRecord:
            return read_records(sweep.folder)[f"seed_{seed}"]

        (notes / f"runs-{settings.seed}").touch()
        if settings.seed == 3:
            report(2, 40.0)
        elif settings.seed == 2:
            wait((notes / "runs-1").exists)
            wait(lambda: record(1).reports)
            report(2, 20.0)
            wait(lambda: False)  # a training that is stopped goes on until its end
        else:
            wait((notes / "runs-2").exists)
            report(2, 30.0)
            wait((notes / "runs-3").exists)
            assert record(2).state == "stopped", "there was no room for the third before"
            report(4, 31.0)
        report(6, 10.0 * settings.seed)

    monkeypatch.setattr("pipelines.sweep.run_trial", without_training(course))
    records = {record.name: record for record in run_sweep(prepare_sweep(sweep))}
    assert {name: record.state for name, record in records.items()} == {
        "seed_1": "finished",
        "seed_2": "stopped",
        "seed_3": "finished",
    }
    assert records["seed_2"].reason == "asha let others go on"
    assert {name: [r.step for r in record.reports] for name, record in records.items()} == {
        "seed_1": [2, 4],
        "seed_2": [2],
        "seed_3": [2],
    }
    assert records["seed_3"].results == {"eval_psnr": 30.0}
    client = MlflowClient(tracking_uri(sweep.base.run.tracking, sweep.base.run.storage))
    runs = {name: client.get_run(record.mlflow_run) for name, record in records.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["seed_2"].data.tags["state"] == "stopped"
    assert runs["seed_2"].data.metrics["final_eval_psnr"] == 20.0


def test_optuna_draws_trials_for_ray_tune_learns_from_each_and_goes_on_where_it_was(
    ray_cluster: None, tiny_training: AutoencoderTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    sweep = small(
        tiny_training,
        axes=(Axis(field="optim.lr", low=1e-4, high=1e-2, log=True),),
        search="optuna",
        num_trials=3,
    )

    def course(settings: AutoencoderTraining, report: Any, wait: Any) -> None:
        report(6, 1000 * settings.optim.lr)

    told: list[float | None] = []
    tell = sweep_search.OptunaDraws.tell

    def listen(self: Any, trial_id: str, score: float | None) -> None:
        told.append(score)
        tell(self, trial_id, score)

    monkeypatch.setattr(sweep_search.OptunaDraws, "tell", listen)
    monkeypatch.setattr("pipelines.sweep.run_trial", without_training(course))
    records = run_sweep(prepare_sweep(replace(sweep, num_trials=2)))
    assert [record.state for record in records] == ["finished"] * 2
    records = run_sweep(prepare_sweep(sweep))
    assert [record.starts for record in records] == [1, 1, 1], "nothing ran again"
    rates = [float(record.values["optim.lr"]) for record in records]
    assert len(set(rates)) == 3
    assert sorted(told) == sorted(record.results["eval_psnr"] for record in records)
    assert sorted(told) == pytest.approx([1000 * rate for rate in sorted(rates)])
