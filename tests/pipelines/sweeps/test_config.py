import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.worker import ExtractorConfig
from pipelines.plan import DataConfig, Stage
from pipelines.runs import RunConfig
from pipelines.sweeps.config import Axis, SweepConfig, make_trial, same_study, trial_name, trials_of
from pipelines.sweeps.costs import memory_of, work_of
from pipelines.sweeps.records import TrialRecord, claim_sweep, read_sweep, write_record
from vitok.config import parse_json, to_dict
from vitok.flops import training_flops
from vitok.variants import AutoencoderConfig

BASE = AutoencoderTraining(
    model=AutoencoderConfig.from_name("Bd4-B/16x64"),
    data=DataConfig(manifest="/m", row_tokens=8192),
    stages=(
        Stage(steps=900, images_per_step=100, token_budgets=(256,)),
        Stage(steps=100, images_per_step=50, token_budgets=(256, 1024)),
    ),
    run=RunConfig(name="base", storage="/runs"),
)
JUDGED = EvaluationConfig(square=(256,), networks=ExtractorConfig(inception="/inception.pt"))


def sweep(**changes: object) -> SweepConfig:
    given = {"name": "study", "base": BASE, "axes": (Axis(field="optim.lr", values=("1e-3",)),)}
    return SweepConfig(**(given | changes))


def test_grid_has_every_combination_once_and_each_is_its_own_run() -> None:
    study = sweep(
        axes=(
            Axis(field="model", values=("Bd4-B/16x64", "Ld4-L/32x256", "v1/S-L/16x16")),
            Axis(field="optim.lr", values=("1e-3", "3e-4")),
        )
    )
    trials = trials_of(study)
    assert [trial.name for trial in trials[:3]] == [
        "Bd4-B_16x64-lr_1e-3",
        "Bd4-B_16x64-lr_3e-4",
        "Ld4-L_32x256-lr_1e-3",
    ]
    seen = {(t.settings.model, t.settings.optim.lr) for t in trials}
    models = ("Bd4-B/16x64", "Ld4-L/32x256", "v1/S-L/16x16")
    expected = {(AutoencoderConfig.from_name(m), lr) for m in models for lr in (1e-3, 3e-4)}
    assert seen == expected
    for trial in trials:
        assert trial.settings.run.folder.uri == f"/runs/study/{trial.name}"
        assert replace(trial.settings, model=BASE.model, optim=BASE.optim, run=BASE.run) == BASE


def test_points_set_several_fields_each_and_a_models_name_leaves_its_other_fields_alone() -> None:
    base = replace(BASE, model=replace(BASE.model, latent="kl", layer_scale=0.5))
    points = ("model=Ld4-L/16x32 model.decoder_depth=6", "stages.1.token_budgets=[64,128] seed=7")
    first, second = trials_of(sweep(base=base, axes=(), points=points))
    expected = AutoencoderConfig.from_name("Ld4-Ld6/16x32")
    assert first.settings.model == replace(expected, latent="kl", layer_scale=0.5)
    assert second.settings.stages[1].token_budgets == (64, 128)
    assert second.settings.seed == 7
    assert second.name == "token_budgets_64_128-seed_7"


def test_random_draws_depend_on_the_seed_alone_and_lie_in_their_ranges() -> None:
    axes = (
        Axis(field="optim.lr", low=1e-4, high=1e-2, log=True),
        Axis(field="optim.weight_decay", low=0.0, high=0.2),
        Axis(field="optim.algorithm", values=("adamw", "muon")),
    )
    study = sweep(axes=axes, search="random", num_trials=60)
    trials = trials_of(study)
    assert [t.name for t in trials] == [t.name for t in trials_of(study)]
    assert trials[0].name != trials_of(replace(study, seed=1))[0].name
    rates = [t.settings.optim.lr for t in trials]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    # Half of them lie below the middle of the logarithms; of even numbers a tenth would.
    assert 18 <= sum(rate < 1e-3 for rate in rates) <= 42
    assert {t.settings.optim.algorithm for t in trials} == {"adamw", "muon"}
    # More trials begin with the same.
    more = trials_of(replace(study, num_trials=70))
    assert [t.name for t in more[:60]] == [t.name for t in trials]
    few = sweep(axes=axes[2:], search="random", num_trials=50)
    assert len(trials_of(few)) == 2, "there are no more"


def test_equal_work_gives_trials_the_flops_of_the_base_and_equal_data_its_images() -> None:
    axes = (Axis(field="model", values=("Bd4-B/16x64", "Ld4-L/16x64", "Gd4-G/16x64")),)
    work = [work_of(t.settings) for t in trials_of(sweep(axes=axes))]
    assert {w.images for w in work} == {work_of(BASE).images} == {95_000}
    assert work[0].flops < work[1].flops / 2 < work[2].flops / 4
    equal = [work_of(t.settings) for t in trials_of(sweep(axes=axes, progress="flops"))]
    for w in equal:
        assert w.flops == pytest.approx(work_of(BASE).flops, rel=0.02)
    assert equal[0].images > 2 * equal[1].images > 4 * equal[2].images


def test_work_of_a_training_is_that_of_its_images() -> None:
    whole = 900 * 100 * training_flops(BASE.model, [256])
    whole += 100 * 25 * training_flops(BASE.model, [256, 1024])
    assert work_of(BASE).flops == pytest.approx(whole)
    half = work_of(BASE, 950)
    assert half.images == 92_500
    assert half.flops == pytest.approx(whole - 50 * 25 * training_flops(BASE.model, [256, 1024]))
    frozen = replace(BASE, start="weights", freeze="encoder")
    encoder = training_flops(BASE.model, [256], "encoder")
    assert work_of(BASE, 1).flops - work_of(frozen, 1).flops == pytest.approx(100 * encoder * 2 / 3)


def test_larger_trials_take_the_workers_that_their_memory_and_time_ask_for() -> None:
    axes = (Axis(field="model", values=("Bd4-B/16x64", "Td4-T/16x64")),)
    base = replace(BASE, run=replace(BASE.run, num_workers=2))
    study = sweep(base=base, axes=axes, worker_memory_gb=90.0)
    small, large = (t.settings for t in trials_of(study))
    assert small.run.num_workers == 2 < large.run.num_workers
    assert memory_of(large, large.run.num_workers).total <= 81e9
    assert memory_of(large, large.run.num_workers // 2).total > 81e9
    with pytest.raises(ValueError, match=r"trial Td4-T_16x64 takes \d+ GB on each of 4 workers"):
        trials_of(replace(study, max_workers=4))

    hours = work_of(large).flops / 1e14 / 3600
    longer = sweep(base=base, axes=axes, max_hours=hours / 10, worker_flops=1e14)
    assert [t.settings.run.num_workers for t in trials_of(longer)] == [2, 16]
    assert trials_of(replace(longer, max_workers=4))[1].settings.run.num_workers == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scheduler": "pbt"}, "population-based training copies weights from one trial to"),
        ({"axes": ()}, "give either axes or points"),
        ({"points": ("seed=1",)}, "give either axes or points"),
        ({"search": "random"}, "needs num_trials=0"),
        ({"axes": (Axis(field="optim.lr", low=1, high=2),)}, "optim.lr has a range"),
        ({"name": "a/b"}, "must be a plain name"),
        ({"scheduler": "asha"}, "base.run.checkpoint_every=1000 must be a multiple"),
        (
            {"evaluation": replace(JUDGED, subjects=("jpeg",))},
            "subjects=.* must be empty: they are",
        ),
        ({"evaluation": replace(JUDGED, longest_side=(512,))}, "square 256, longest side 512; tri"),
        ({"evaluation": JUDGED}, "has networks and no images; set evaluation.data or"),
        ({"metric": "eval_rfid"}, "comes from an evaluation; set evaluation.networks.inception"),
        (
            {
                "metric": "eval_rfid",
                "evaluation": replace(JUDGED, data="/held-out"),
                "search": "optuna",
                "num_trials": 2,
            },
            "is not known before all trials have ended",
        ),
        ({"axes": (), "points": ("lr",)}, "'lr' is no FIELD=VALUE"),
        ({"axes": (), "points": ("optim.lrr=1",)}, "no field 'optim.lrr'; did you mean optim.lr?"),
        ({"axes": (), "points": ("optim=1",)}, "'optim' is a group of fields; name one of algori"),
        (
            {"axes": (), "points": ("optim.lr=much",)},
            "trial lr_much is no .*optim.lr: Input",
        ),
        ({"axes": (), "points": ("model=Xd4-B/16x64",)}, "there is no size X"),
        ({"axes": (), "points": ("seed=1", "seed=1")}, "more than one trial seed_1"),
    ],
)
def test_study_that_cannot_be_run_is_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trials_of(sweep(**changes))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"low": 2.0, "high": 1.0}, "give either values"),
        ({"values": ("1",), "high": 1.0}, "give either values"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low=0.0 must be positive with log"),
    ],
)
def test_axis_without_sense_is_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Axis(field="optim.lr", **values)


def test_names_are_short_and_differ_where_values_do() -> None:
    values = {f"group{i}.field{i}": "x" * 20 for i in range(10)}
    long = trial_name(values)
    assert len(long) == 100
    assert trial_name(dict(values)) == long
    assert trial_name(values | {"group9.field9": "y"}) != long
    assert trial_name({"a.depth": "1", "b.depth": "2"}) == "a.depth_1-b.depth_2"


def test_sweep_may_grow_but_not_compare_something_else(tmp_path: Path) -> None:
    base = replace(BASE, run=replace(BASE.run, storage=str(tmp_path)))
    study = sweep(base=base)
    claim_sweep(study)
    assert read_sweep(study.folder) == study
    assert parse_json(SweepConfig, json.dumps(to_dict(study)), "text") == study
    claim_sweep(replace(study, metric="loss"))  # nothing has begun
    claim_sweep(study)
    write_record(study.folder, TrialRecord.of(trials_of(study)[0]))
    grown = replace(study, axes=(Axis(field="optim.lr", values=("1e-3", "1e-4")),))
    claim_sweep(grown)
    claim_sweep(replace(grown, base=replace(base, run=replace(base.run, num_workers=1))))
    with pytest.raises(ValueError, match="compares something else .*base.seed: 0 -> 3"):
        claim_sweep(replace(grown, base=replace(base, seed=3)))
    assert same_study(study, replace(study, mode="min")) == ["mode: 'max' -> 'min'"]


def test_figures_of_an_evaluation_are_not_mixed_with_those_of_another(tmp_path: Path) -> None:
    judged = replace(JUDGED, data="/held-out")
    base = replace(BASE, run=replace(BASE.run, storage=str(tmp_path)))
    study = sweep(base=base, evaluation=judged)
    record = replace(TrialRecord.of(trials_of(study)[0]), state="finished")
    claim_sweep(study)
    write_record(study.folder, record)
    larger = replace(study, evaluation=replace(judged, square=(512,)))
    claim_sweep(larger)  # nothing has been evaluated
    write_record(study.folder, replace(record, results={"eval_rfid": 1.0}))
    claim_sweep(replace(larger, evaluation=replace(larger.evaluation, num_workers=4)))
    with pytest.raises(ValueError, match=r"evaluation\.square: \[512\] -> \[256\]"):
        claim_sweep(study)


def test_record_counts_a_trial_and_survives_writing(tmp_path: Path) -> None:
    base = replace(BASE, run=replace(BASE.run, storage=str(tmp_path)))
    trial = make_trial(sweep(base=base), {"model": "Ld4-L/32x128", "optim.lr": "1e-3"})
    record = TrialRecord.of(trial)
    assert record.compression_ratio == 24
    assert record.decoder_parameters == pytest.approx(306e6, rel=0.02)
    assert record.encoder_parameters == pytest.approx(54e6, rel=0.02)
    assert record.flops_256p == 64 * trial.settings.model.flops_per_token(64)
    assert (record.steps, record.images) == (1000, 95_000)
    assert math.isclose(record.training_flops, work_of(trial.settings).flops)
    assert parse_json(TrialRecord, json.dumps(to_dict(record)), "text") == record
