import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.sweeps.config import SweepConfig, trials_of
from pipelines.sweeps.records import Report, TrialRecord, claim_sweep, read_records, write_record
from pipelines.sweeps.report import QUALITIES, error_of, study_of, to_csv, to_json, write_report
from vitok.storage import Folder
from vitok.variants import AutoencoderConfig

EXPONENT, FLOOR = 0.5, 0.004


def psnr_of(parameters: float, ratio: float) -> float:
    """PSNR by a law that the report has to find."""
    error = 0.01 * ratio / 48 * (parameters / 1e6) ** -EXPONENT + FLOOR
    return float(-10 * np.log10(error / 4))


@pytest.fixture
def recorded(tmp_path: Path, tiny_training: AutoencoderTraining) -> Folder:
    """A sweep of 4 decoders at 2 ratios, finished, and one of every other end; without Ray."""
    model = AutoencoderConfig.from_name("Bd4-B/16x64")
    base = replace(
        tiny_training,
        model=model,
        run=replace(tiny_training.run, storage=str(tmp_path)),
    )
    points = [
        f"model.latent_channels={channels} model.decoder_depth={depth}"
        for channels in (64, 16)
        for depth in (2, 4, 8, 16)
    ]
    others = ("stopped", "diverged", "out of memory", "failed", "running")
    points += [f"optim.lr={i + 1}" for i in range(len(others))]
    sweep = SweepConfig(name="study", base=base, points=tuple(points))
    claim_sweep(sweep)
    trials = trials_of(sweep)
    for index, trial in enumerate(trials):
        record = TrialRecord.of(trial)
        psnr = psnr_of(record.decoder_parameters, record.compression_ratio)
        reports = tuple(
            Report(step=s, images=10 * s, flops=1e9 * s, metrics={"eval_psnr": psnr - 5 + s})
            for s in (2, 4)
        )
        record = replace(record, starts=1, reports=reports)
        if index < 8:
            results = {"eval_psnr": psnr, "eval_ssim": 1 - 1 / psnr, "loss": 0.1}
            latency = 2.0 + record.decoder_depth
            record = replace(record, state="finished", results=results, latency_ms=latency)
        else:
            state = others[index - 8]
            reason = "" if state == "running" else f"why {state}"
            record = replace(record, state=state, reason=reason)
        write_record(sweep.folder, record)
    return sweep.folder


def test_table_has_a_row_for_every_trial_the_best_first_and_reasons_for_the_others(
    recorded: Folder,
) -> None:
    study = study_of(recorded)
    assert len(study.records) == 13
    assert [r.state for r in study.records[:8]] == ["finished"] * 8
    scores = [r.results["eval_psnr"] for r in study.records[:8]]
    assert scores == sorted(scores, reverse=True)
    assert study.best == study.records[0].name == "latent_channels_64-decoder_depth_16"
    written = write_report(recorded)
    text = written.read_text("report.md")
    assert text is not None
    states = "1 diverged, 1 failed, 8 finished, 1 out of memory, 1 running, 1 stopped"
    assert f"13 trials: {states}." in text
    assert f"](../{study.best}/export)" in text
    for record in study.records:
        assert f"| {record.name} | {record.state} |" in text
        if record.reason:
            assert f"- {record.name}, {record.state}: {record.reason}" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(study))))
    assert [row["name"] for row in rows] == [r.name for r in study.records]
    assert float(rows[0]["eval_psnr"]) == scores[0]
    assert rows[-1]["model.decoder_depth"] == ""
    assert {row["reason"] for row in rows} >= {"why diverged", "why out of memory"}


def test_fronts_are_those_of_the_finished_trials(recorded: Folder) -> None:
    fronts = {(f.quality.field, f.cost.field): f.trials for f in study_of(recorded).fronts}
    assert len(fronts) == 2 * 4, "PSNR and SSIM against four costs"
    # At r = 12 every larger decoder is better, and better than any decoder of its size at r = 48.
    at_12 = [f"latent_channels_64-decoder_depth_{depth}" for depth in (2, 4, 8, 16)]
    for cost in ("decoder_parameters", "flops_256p", "latency_ms"):
        assert set(at_12) <= set(fronts["eval_psnr", cost])
    best_at_48 = "latent_channels_16-decoder_depth_16"
    assert set(fronts["eval_psnr", "compression_ratio"]) == {at_12[-1], best_at_48}


def test_law_of_each_ratio_is_found_again(recorded: Folder) -> None:
    laws = {law.series: law for law in study_of(recorded).laws if law.quality.field == "eval_psnr"}
    assert set(laws) == {"r = 12, encoder 4", "r = 48, encoder 4"}
    assert all(law.law.num_points == 4 for law in laws.values())
    for law in laws.values():
        assert law.law.exponent == pytest.approx(EXPONENT, rel=0.01)
        assert law.law.constant == pytest.approx(FLOOR, rel=0.01)


def test_errors_are_those_that_the_qualities_stand_for() -> None:
    psnr, ssim, rfid, _ = QUALITIES
    mse = 0.01
    assert error_of(psnr, 10 * np.log10(4 / mse))[0] == pytest.approx(mse)
    assert error_of(ssim, 0.9)[0] == pytest.approx(0.1)
    assert error_of(rfid, 0.7)[0] == 0.7


def test_report_is_the_same_files_for_the_same_records_and_every_plot_shows_something(
    recorded: Folder,
) -> None:
    written = write_report(recorded)
    names = written.names()
    pictures = ["pareto_psnr.png", "pareto_ssim.png", "progress.png", "quality.png", "scaling.png"]
    assert names == sorted([*pictures, "report.json", "report.md", "trials.csv"])
    before = {name: written.read_bytes(name) for name in names}
    for name in pictures:
        with Image.open(io.BytesIO(before[name])) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("RGB")).std() > 10, f"{name} is one colour"
        assert f"![{name}]({name})" in before["report.md"].decode()
    write_report(recorded)
    assert {name: written.read_bytes(name) for name in names} == before
    document = json.loads(before["report.json"])
    assert document == json.loads(json.dumps(to_json(study_of(recorded))))
    assert document["best"] == "latent_channels_64-decoder_depth_16"
    assert len(document["trials"]) == 13
    by_state = {row["state"]: row for row in document["trials"]}
    assert by_state["stopped"]["steps_done"] == 4 and by_state["finished"]["steps_done"] == 6


def test_sweep_that_has_only_begun_has_a_report_too(recorded: Folder) -> None:
    place = recorded.child("trials")
    for record in read_records(recorded).values():
        Path(place.uri, f"{record.name}.json").unlink()
        if record.state == "running":
            write_record(recorded, record)
    written = write_report(recorded)
    study = study_of(recorded)
    assert (study.best, study.fronts, study.laws) == ("", [], [])
    assert "1 trials: 1 running." in written.read_text("report.md")
    assert "progress.png" in written.read_text("report.md")


def test_report_of_no_sweep_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no sweep .* give the name of one"):
        study_of(Folder.of(str(tmp_path)))
