"""A sweep whose driver, a trial of which, and a trial's memory are lost; and what is left of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.tune.schedulers import ASHAScheduler

from pipelines.costs import work_of
from pipelines.failures import is_out_of_memory
from pipelines.runs import next_step
from pipelines.sweep import _scheduler, prepare_sweep, run_sweep
from pipelines.sweep_config import Axis, SweepConfig, rungs_of, trials_of
from pipelines.sweep_records import Report, TrialRecord, read_records, write_record
from pipelines.sweep_report import study_of, to_json
from pipelines.sweep_search import Trials
from pipelines.tracking import TrackingConfig, tracking_uri
from pipelines.train_autoencoder import AutoencoderTraining
from tests.conftest import make_tiny_training
from tests.pipelines.recorded_runs import REPOSITORY
from vitok.config import write_config

TIMEOUT_S = 240
DRIVER = """
import sys
from pathlib import Path
from cluster.local import ray_session
from pipelines.sweep import prepare_sweep, run_sweep
from pipelines.sweep_config import SweepConfig
from vitok.config import read_config
with ray_session():
    run_sweep(prepare_sweep(read_config(Path(sys.argv[1]), SweepConfig)))
"""
GOOD, DIVERGES, TOO_LARGE = "seed_1", "lr_1e30", "decoder_width_16777216"


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"nothing in {TIMEOUT_S} s"
        time.sleep(0.02)


def sweep_of(training: AutoencoderTraining, **changes: object) -> SweepConfig:
    run = replace(training.run, num_workers=1, max_failures=0, mfu=False)
    points = ("seed=1", "optim.lr=1e30", "model.decoder_width=16777216")
    given = {"name": "study", "base": replace(training, run=run), "points": points}
    return SweepConfig(**(given | changes))


@pytest.fixture(scope="module")
def study(
    ray_cluster: None,
    sample_manifests: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A sweep whose driver is killed, which goes on, and of which a trial is killed."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = sweep_of(make_tiny_training(sample_manifests, folder))
    good = sweep.folder.child(GOOD)
    write_config(folder / "sweep.json", sweep)
    with (folder / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder / "sweep.json")],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            },
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(lambda: next_step(good) >= 2 or driver.poll() is not None)
            assert driver.poll() is None, (folder / "driver.log").read_text()
        finally:
            driver.kill()
            driver.wait()
    after_kill = study_of(sweep.folder)

    saved = next_step(good)
    killed: list[int] = []

    def kill_trial() -> None:
        """Kill the processes of trials when the good one has come further."""
        old = {process.pid for process in trial_processes()}
        wait_for(lambda: {p.pid for p in trial_processes()} - old)
        wait_for(lambda: read_records(sweep.folder)[GOOD].starts == 2)
        wait_for(lambda: next_step(good) > saved or next_step(good) == 6)
        for process in trial_processes():
            killed.append(process.pid)
            process.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_trial, daemon=True)
    thread.start()
    records = run_sweep(prepare_sweep(sweep))
    thread.join(TIMEOUT_S)
    return SimpleNamespace(
        sweep=sweep,
        records={record.name: record for record in records},
        after_kill=after_kill,
        killed=killed,
    )


def trial_processes() -> list[psutil.Process]:
    """The processes in which Ray Tune runs trials; all Ray processes are this one's children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_every_trial_ends_as_it_deserves_and_the_sweep_goes_on(study: SimpleNamespace) -> None:
    assert {name: record.state for name, record in study.records.items()} == {
        GOOD: "finished",
        DIVERGES: "diverged",
        TOO_LARGE: "out of memory",
    }
    assert "the gradient's norm is" in study.records[DIVERGES].reason
    assert "can't allocate memory" in study.records[TOO_LARGE].reason
    assert len(study.killed) >= 1
    assert study.records[GOOD].starts >= 3, "killed with its driver, and by itself"
    assert study.records[GOOD].results["eval_psnr"] > 5
    assert study.records[GOOD].latency_ms > 0
    assert [r.step for r in study.records[GOOD].reports] in ([2, 4], [4], [2], [])


def test_trial_is_one_mlflow_run_below_the_sweeps_with_every_step_once(
    study: SimpleNamespace,
) -> None:
    sweep = study.sweep
    run = sweep.base.run
    client = MlflowClient(tracking_uri(run.tracking, run.storage))
    experiment = client.get_experiment_by_name(run.tracking.experiment)
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"study", GOOD, DIVERGES, TOO_LARGE}, "one each, however often it began"
    parent = runs["study"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_trial"] == GOOD
    assert parent.data.tags["best_run"] == runs[GOOD].info.run_id
    for name, record in study.records.items():
        child = runs[name]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["state"] == record.state
        assert child.data.metrics["decoder_parameters"] == record.decoder_parameters
    assert runs[GOOD].data.params["seed"] == "1"
    assert runs[GOOD].data.tags["trial.seed"] == "1"
    statuses = {name: runs[name].info.status for name in study.records}
    assert statuses == {GOOD: "FINISHED", DIVERGES: "FAILED", TOO_LARGE: "FAILED"}
    losses = client.get_metric_history(runs[GOOD].info.run_id, "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6]

    def artifacts(folder: str) -> set[str]:
        found = client.list_artifacts(parent.info.run_id, folder)
        return {Path(file.path).name for file in found}

    assert {"report.json", "report.md", "trials.csv", "quality.png"} <= artifacts("report")
    assert artifacts(f"best/{GOOD}") == {"config.json", "reconstructions.png"}
    logged = client.download_artifacts(parent.info.run_id, "report/report.json")
    assert json.loads(Path(logged).read_text()) == to_json(study_of(sweep.folder))


def test_live_sweep_has_the_report_of_what_is_there(study: SimpleNamespace) -> None:
    live, finished = to_json(study.after_kill), to_json(study_of(study.sweep.folder))
    assert live["states"].get("running") == 1
    assert finished["states"] == {"diverged": 1, "finished": 1, "out of memory": 1}
    rows = {row["name"]: row for row in finished["trials"]}
    for row in live["trials"]:
        if row["state"] != "running":
            assert row == rows[row["name"]], "an ended trial does not change"


def test_finished_sweep_starts_nothing_again(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sweep._tune", None)  # would fail if it were called
    assert {r.name: r for r in run_sweep(prepare_sweep(study.sweep))} == study.records


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
