import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import sweep_recipes
from jobs.cli import main
from jobs.sweep import costs_of, format_costs
from jobs.sweep_recipes import SWEEPS
from pipelines.sweeps.config import SweepConfig, trials_of
from pipelines.sweeps.costs import memory_of, work_of
from pipelines.sweeps.records import TrialRecord, claim_sweep, write_record
from pipelines.sweeps.report import study_of, to_json
from vitok.config import parse_json, to_dict
from vitok.variants import SIZES


@pytest.mark.parametrize("name", SWEEPS)
def test_every_study_says_what_it_takes_and_survives_writing(name: str) -> None:
    sweep = SWEEPS[name]()
    assert parse_json(SweepConfig, json.dumps(to_dict(sweep)), name) == sweep
    costs = costs_of(sweep)
    trials = trials_of(sweep)
    assert [cost.name for cost in costs] == [trial.name for trial in trials]
    assert 4 <= len(costs) <= 32
    for cost, trial in zip(costs, trials, strict=True):
        run = trial.settings.run
        assert cost.num_workers == run.num_workers
        assert cost.memory_gb == memory_of(trial.settings, run.num_workers).total / 1e9
        hours = work_of(trial.settings).flops / sweep.worker_flops / 3600
        assert cost.worker_hours == pytest.approx(hours)
        if sweep.worker_memory_gb:
            assert cost.memory_gb < sweep.worker_memory_gb
    text = format_costs(sweep, costs)
    total = sum(cost.worker_hours for cost in costs)
    assert f"\n{len(costs)} trials, {total:,.3g} " in text
    assert all(cost.name in text for cost in costs)


def test_decoder_study_is_the_papers_grid_and_gives_large_decoders_more_workers() -> None:
    trials = trials_of(SWEEPS["decoder-scale"]())
    models = [t.settings.model for t in trials]
    seen = {(m.decoder_width, m.encoder_depth, m.latent_channels) for m in models}
    widths = [width for width, _, _ in SIZES.values()]
    assert seen == {(w, d, c) for w in widths for d in (4, 8) for c in (64, 32, 16)}
    assert {t.settings.model.compression_ratio for t in trials} == {12, 24, 48}
    workers = {t.settings.model.decoder_width: t.settings.run.num_workers for t in trials}
    assert workers[768] == workers[1024] < workers[1728] < workers[3072]


def test_patch_study_keeps_the_latent_values_of_an_image_where_it_changes_the_patch() -> None:
    totals: dict[int, set[int]] = {}
    for trial in trials_of(SWEEPS["patch-channels"]()):
        model, (stage,) = trial.settings.model, trial.settings.stages
        (tokens,) = stage.token_budgets
        assert tokens * model.patch_size**2 == 256 * 256, "the same images"
        totals.setdefault(tokens * model.latent_channels, set()).add(model.patch_size)
    assert totals == {total: {8, 16, 32} for total in (4096, 8192, 16384)}


def test_loss_study_has_the_rows_of_the_ablation() -> None:
    losses = [t.settings.loss for t in trials_of(SWEEPS["loss-ablation"]())]
    assert [(loss.ssim, loss.dino, loss.lpips) for loss in losses] == [
        (0.0, 0.0, 0.0),
        (0.1, 0.0, 0.0),
        (0.1, 0.0, 1.0),
        (0.1, 250.0, 0.0),
        (0.1, 500.0, 0.0),
        (0.1, 1000.0, 0.0),
        (0.1, 500.0, 1.0),
    ]


def test_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "quickstart", "--dry-run", "--progress", "flops"]) == 0
    out = capsys.readouterr().out
    assert "4 trials, " in out and "worker hours" in out
    assert list(tmp_path.iterdir()) == []


def test_wrong_studies_are_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def complaint(*arguments: str, status: int = 1) -> str:
        assert main(["sweep", *arguments]) == status
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "quickstart", "--scheduler", "pbt"])
    reason = " ".join(capsys.readouterr().err.split())
    assert "population-based training copies weights from one trial to another" in reason
    assert "did you mean 'quickstart'?" in complaint("quickstrat", status=2)
    assert "data.manifest is empty" in complaint("quickstart")
    assert "holds no sweep" in complaint("report", "nowhere")
    searched = ["--search", "optuna", "--num-trials", "2"]
    recipe = sweep_recipes.learning_rate()
    monkeypatch.setitem(SWEEPS, "small", lambda: replace(recipe, num_trials=2))
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "optuna.samplers", None)
    assert "search='optuna' needs optuna" in complaint("small", *searched)
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_sweep_is_printed_as_markdown_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = SWEEPS["quickstart"]()
    run = replace(sweep.base.run, storage=str(tmp_path))
    sweep = replace(sweep, base=replace(sweep.base, run=run))
    claim_sweep(sweep)
    for index, trial in enumerate(trials_of(sweep)[:2]):
        results = {"eval_psnr": 20.0 + index, "eval_ssim": 0.5}
        record = replace(TrialRecord.of(trial), state="finished", results=results)
        write_record(sweep.folder, record)
    arguments = ["sweep", "report", sweep.name, "--storage", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 trials: 2 finished. The best by eval_psnr: " in out
    assert out.endswith(f"report: {tmp_path}/{sweep.name}/report\n")
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(json.dumps(to_json(study_of(sweep.folder))))
    assert [row["metrics"]["eval_psnr"] for row in document["trials"]] == [21.0, 20.0]
