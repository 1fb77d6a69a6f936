"""A sweep whose driver, a trial of which, and a trial's memory are lost; and what is left of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient

from pipelines.runs import next_step
from pipelines.sweep import prepare_sweep, run_sweep
from pipelines.sweeps.config import SweepConfig
from pipelines.sweeps.report import study_of, to_json
from pipelines.sweeps.trial import run_trial
from pipelines.tracking import TrackingConfig, tracking_uri
from tests.conftest import make_tiny_training
from tests.pipelines.recorded_runs import REPOSITORY, ended
from vitok.config import write_config

TIMEOUT_S = 240
DRIVER = """
import sys
from pathlib import Path
from cluster.local import ray_session
from pipelines.sweep import prepare_sweep, run_sweep
from pipelines.sweeps.config import SweepConfig
from vitok.config import read_config
with ray_session():
    run_sweep(prepare_sweep(read_config(Path(sys.argv[1]), SweepConfig)))
"""
GOOD, DIVERGES, TOO_LARGE = "seed_1", "lr_1e30", "decoder_width_16777216"


def killed_once(marker: Path) -> Callable[..., dict[str, Any]]:
    """Return run_trial with a process that is killed, once, as soon as the good one has trained."""

    def run(given: dict[str, Any], sweep: SweepConfig, tracking: TrackingConfig) -> dict[str, Any]:
        import signal
        import threading

        def kill(before: int) -> None:
            while next_step(folder) <= before < 6:
                time.sleep(0.02)
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

        folder = sweep.folder.child(GOOD)
        is_victim = given["trial"] == GOOD and not marker.exists()
        if is_victim:
            threading.Thread(target=kill, args=(next_step(folder),), daemon=True).start()
        result = run_trial(given, sweep, tracking)
        while is_victim:
            time.sleep(0.02)
        return result

    return run


@pytest.fixture(scope="module")
def study(
    ray_cluster: None,
    sample_manifests: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A sweep whose driver is killed, which goes on, and of which a trial is killed."""
    folder = tmp_path_factory.mktemp("sweep")
    training = make_tiny_training(sample_manifests, folder)
    run = replace(training.run, num_workers=1, max_failures=0)
    # The cluster has room for two: the good one begins when one of the others has ended.
    sweep = SweepConfig(
        name="study",
        base=replace(training, run=run),
        points=("optim.lr=1e30", "model.decoder_width=16777216", "seed=1"),
    )
    good = sweep.folder.child(GOOD)
    log = folder / "driver.log"
    write_config(folder / "sweep.json", sweep)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "sweep.json")],
        cwd=REPOSITORY,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    with ended(driver):
        deadline = time.monotonic() + TIMEOUT_S
        while next_step(good) < 2:
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no checkpoint in {TIMEOUT_S} s"
            time.sleep(0.02)
    live = to_json(study_of(sweep.folder))

    marker = folder / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.sweep.run_trial", killed_once(marker))
        records = run_sweep(prepare_sweep(sweep))
    return SimpleNamespace(
        sweep=sweep,
        records={record.name: record for record in records},
        live=live,
        killed=marker.read_text(),
    )


def test_every_trial_ends_as_it_deserves_and_the_sweep_goes_on(study: SimpleNamespace) -> None:
    assert {name: record.state for name, record in study.records.items()} == {
        GOOD: "finished",
        DIVERGES: "diverged",
        TOO_LARGE: "out of memory",
    }
    assert "the gradient's norm is" in study.records[DIVERGES].reason
    assert "can't allocate memory" in study.records[TOO_LARGE].reason
    good = study.records[GOOD]
    assert int(study.killed) > 0
    assert good.starts == 3, "killed with its driver, killed by itself, and at last to its end"
    assert good.results["eval_psnr"] > 5
    assert good.latency_ms > 0
    assert [report.step for report in good.reports] in ([2, 4], [4], [2], [])


def test_trial_is_one_mlflow_run_below_the_sweeps_with_every_step_once(
    study: SimpleNamespace,
) -> None:
    sweep = study.sweep
    run = sweep.base.run
    client = MlflowClient(tracking_uri(run.tracking, run.storage))
    experiment = client.get_experiment_by_name(run.tracking.experiment)
    found = client.search_runs([experiment.experiment_id])
    runs = {r.info.run_name: r for r in found}
    assert sorted(r.info.run_name for r in found) == sorted(["study", *study.records])
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

    plots = {"quality.png", "pareto_psnr.png", "pareto_ssim.png", "progress.png"}
    assert {"report.json", "report.md", "trials.csv"} | plots <= artifacts("report")
    assert artifacts(f"best/{GOOD}") == {"config.json", "reconstructions.png"}
    logged = client.download_artifacts(parent.info.run_id, "report/report.json")
    assert json.loads(Path(logged).read_text()) == to_json(study_of(sweep.folder))


def test_live_report_of_what_has_ended_is_that_of_the_finished_sweep(
    study: SimpleNamespace,
) -> None:
    finished = to_json(study_of(study.sweep.folder))
    assert study.live["states"]["running"] >= 1
    assert finished["states"] == {"diverged": 1, "finished": 1, "out of memory": 1}
    rows = {row["name"]: row for row in finished["trials"]}
    done = [row for row in study.live["trials"] if row["state"] != "running"]
    assert done, "the good one began when another had ended"
    for row in done:
        assert row == rows[row["name"]]
        assert row["starts"] == 1, "a trial that has ended does not run again"


def test_finished_sweep_starts_nothing_again(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sweep._tune", None)  # would fail if it were called
    assert {r.name: r for r in run_sweep(prepare_sweep(study.sweep))} == study.records
