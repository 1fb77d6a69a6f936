"""Finished trials through the evaluation, and what the best leave in MLflow; without Ray."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from torch import nn

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.evaluate import EvaluationResult, evaluate
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.worker import ExtractorConfig
from pipelines.sweep import prepare_sweep, run_sweep
from pipelines.sweeps import evaluation as sweep_evaluation
from pipelines.sweeps.config import SweepConfig, make_trial
from pipelines.sweeps.records import TrialRecord, read_records, write_record
from pipelines.sweeps.report import study_of
from pipelines.tracking import open_run, tracking_uri
from tests.vitok.random_inception import write_inception
from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.pretrained import save_pretrained

BUDGET = 16


@pytest.fixture
def sweep(tiny_training: AutoencoderTraining, tiny_dino: nn.Module, tmp_path: Path) -> SweepConfig:
    """A sweep of three trials, of which two have finished and one has diverged."""
    file, digest = write_inception(tmp_path / "inception.pt")
    tiny_dino.save_pretrained(tmp_path / "dino")
    networks = ExtractorConfig(
        inception=str(file), inception_digest=digest, dino=str(tmp_path / "dino")
    )
    tracking = replace(tiny_training.run.tracking, upload_weights=True)
    sweep = SweepConfig(
        name="study",
        base=replace(tiny_training, run=replace(tiny_training.run, tracking=tracking)),
        points=("seed=1", "seed=2", "seed=3"),
        evaluation=EvaluationConfig(
            token_budget=(BUDGET,), num_workers=0, use_gpu=False, networks=networks, num_pictures=2
        ),
    )
    finish(sweep, seed=1, psnr=20.0)
    finish(sweep, seed=2, psnr=21.0)
    third = TrialRecord.of(make_trial(sweep, {"seed": "3"}))
    write_record(sweep.folder, replace(third, state="diverged", reason="a gradient is nan"))
    return sweep


def finish(sweep: SweepConfig, seed: int, psnr: float) -> None:
    """Leave what a finished trial leaves: its MLflow run, exported weights and its record."""
    trial = make_trial(sweep, {"seed": str(seed)})
    run, storage = trial.settings.run, sweep.base.run.storage
    tracking = replace(run.tracking, uri=tracking_uri(run.tracking, storage))
    with open_run(run.folder, trial.name, tracking, storage, trial.settings) as tracker:
        model = Autoencoder(trial.settings.model)
        start_at_random(model, seed)
        save_pretrained(run.folder.child("export").uri, model.config, model.state_dict())
    record = replace(
        TrialRecord.of(trial),
        state="finished",
        results={"eval_psnr": psnr},
        mlflow_run=tracker.run_id,
    )
    write_record(sweep.folder, record)


def test_finished_trials_get_their_distances_once_and_the_best_leave_their_weights(
    sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[tuple[str, ...]] = []

    def counting(settings: EvaluationConfig, save: object) -> EvaluationResult:
        evaluated.append(tuple(spec.title for spec in settings.specs()))
        return evaluate(settings, save)

    monkeypatch.setattr(sweep_evaluation, "evaluate", counting)
    records = {record.name: record for record in run_sweep(prepare_sweep(sweep))}
    assert evaluated == [("seed_1", "seed_2")], "the diverged one has no weights"
    assert "eval_rfid" not in records["seed_3"].results
    for name in ("seed_1", "seed_2"):
        alone = evaluate(
            replace(
                sweep.evaluation,
                subjects=(f"{sweep.folder.uri}/{name},dtype=float32",),
                data=sweep.base.data.eval_manifest,
                out=f"{sweep.folder.uri}/alone",
            )
        ).scores[0]
        found = records[name].results
        assert (found["eval_rfid"], found["eval_rfdd"]) == (alone.rfid, alone.rfdd)
        assert found["eval_rfid"] > 0.01 and found["eval_rfdd"] > 0.01
    assert records["seed_1"].results["eval_rfid"] != records["seed_2"].results["eval_rfid"]
    study = study_of(sweep.folder)
    assert {front.quality.field for front in study.fronts} == {
        "eval_psnr",
        "eval_rfid",
        "eval_rfdd",
    }
    assert {"pareto_rfid.png", "pareto_rfdd.png"} <= set(sweep.folder.child("report").names())

    client = MlflowClient(tracking_uri(sweep.base.run.tracking, sweep.base.run.storage))
    metrics = client.get_run(records["seed_2"].mlflow_run).data.metrics
    assert metrics["final_eval_rfid"] == records["seed_2"].results["eval_rfid"]
    experiment = client.get_experiment_by_name("vitok")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "study"]

    def artifacts(folder: str) -> set[str]:
        found = client.list_artifacts(parent.info.run_id, folder)
        return {Path(file.path).name for file in found}

    assert {"results.json", "report.md", "images.parquet", "pictures"} <= artifacts("evaluation")
    weights = f"{sweep.folder.uri}/seed_2/export"
    assert parent.data.tags["best_weights"] == weights
    assert artifacts("best/seed_2/weights") >= {"decoder.safetensors", "encoder.safetensors"}
    index = client.download_artifacts(parent.info.run_id, "best/best.json")
    (best,) = json.loads(Path(index).read_text())
    assert best == {
        "trial": "seed_2",
        "weights": weights,
        "mlflow_run": records["seed_2"].mlflow_run,
        "results": records["seed_2"].results,
    }

    finish(sweep, seed=4, psnr=19.0)
    grown = prepare_sweep(replace(sweep, points=(*sweep.points, "seed=4")))
    again = {record.name: record for record in run_sweep(grown)}
    assert evaluated[1:] == [("seed_4",)], "the others have been"
    assert "eval_rfid" in again.pop("seed_4").results
    assert again == records


def test_trial_that_cannot_be_evaluated_is_named_and_the_others_keep_their_figures(
    sweep: SweepConfig,
) -> None:
    Path(sweep.folder.uri, "seed_1", "export", "decoder.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"could not be evaluated.* seed_1: .*decoder"):
        run_sweep(prepare_sweep(sweep))
    records = read_records(sweep.folder)
    assert "eval_rfid" in records["seed_2"].results
    assert "eval_rfid" not in records["seed_1"].results
    report = sweep.folder.child("report").read_text("report.md") or ""
    assert "rFID" in report and "](../evaluation/report.md)" in report
    assert Path(sweep.folder.uri, "evaluation", "report.md").is_file()


def test_what_an_evaluation_needs_is_missed_before_a_sweep_begins(
    sweep: SweepConfig, tmp_path: Path
) -> None:
    base = replace(sweep.base, run=replace(sweep.base.run, storage=str(tmp_path / "new")))
    networks = replace(sweep.evaluation.networks, inception=str(tmp_path / "nowhere.pt"))
    evaluation = replace(sweep.evaluation, networks=networks)
    with pytest.raises(FileNotFoundError, match="no Inception-v3 at"):
        prepare_sweep(replace(sweep, base=base, evaluation=evaluation))
    evaluation = replace(sweep.evaluation, data=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_sweep(replace(sweep, base=base, evaluation=evaluation))
    assert not (tmp_path / "new").exists()
