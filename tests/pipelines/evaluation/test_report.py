import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.evaluate import EvaluationResult, evaluate
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.report import draw_plots, log_to_runs, markdown, write_results
from pipelines.evaluation.worker import EvaluatedImage
from pipelines.plan import Stage
from pipelines.tracking import TrackingConfig, open_run, run_around, tracking_uri
from vitok.frechet import Gaussian
from vitok.storage import Folder


@pytest.fixture(scope="module")
def settings(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path_factory
) -> EvaluationConfig:
    return EvaluationConfig(
        subjects=(f"{tiny_weights},name=tiny", "jpeg,bits_per_pixel=9"),
        data=str(sample_manifests[1]),
        out=str(tmp_path_factory.mktemp("report") / "evaluation"),
        square=(32, 64),
        benchmark="imagenet-256p",
        seed=3,
        num_pictures=4,
        num_workers=0,
        use_gpu=False,
    )


@pytest.fixture(scope="module")
def result(settings: EvaluationConfig) -> EvaluationResult:
    found = evaluate(settings)
    found.images["tiny", "square 64"][1] = EvaluatedImage(
        found.images["tiny", "square 64"][1].key, status="out of memory"
    )
    found.references["square 32", "dino"] = Gaussian(np.zeros(2), np.eye(2), 5, "d" * 64)
    found.failed["other"] = "no weights"
    return found


def test_everything_is_written(settings: EvaluationConfig, result: EvaluationResult) -> None:
    out = Path(settings.out)
    write_results(settings, result, out)
    document = json.loads((out / "results.json").read_text())
    assert document["settings"]["seed"] == 3
    assert document["settings"]["square"] == [32, 64]
    assert document["samples"]["digest"] == result.samples_digest
    keys = (out / "samples.txt").read_text().split()
    assert keys == result.keys == sorted(keys)
    assert len(keys) == document["samples"]["count"] == 5
    assert [(x["subject"], x["resolution"]) for x in document["scores"]] == [
        ("tiny", "square 32"),
        ("tiny", "square 64"),
        ("jpeg", "square 32"),
        ("jpeg", "square 64"),
    ]
    assert document["scores"][0]["psnr"] == result.scores[0].metrics.psnr
    assert document["failed_subjects"] == {"other": "no weights"}
    assert [(x["subject"], x["key"], x["why"]) for x in document["failed_images"]] == [
        ("tiny", keys[1], "out of memory")
    ]
    rows = pq.read_table(out / "images.parquet").to_pylist()
    assert len(rows) == 4 * 5
    for row in rows:
        images = result.images[row["subject"], row["resolution"]]
        (image,) = (image for image in images if image.key == row["key"])
        assert (row["psnr"], row["num_tokens"], row["status"]) == (
            image.metrics and image.metrics.psnr,
            image.num_tokens,
            image.status,
        )
        assert row["bits_per_pixel"] == (9.0 if row["subject"] == "jpeg" else 1.0)
    assert Gaussian.load(out / "statistics" / "dino-square_32.npz").extractor == "d" * 64
    for name in ("psnr_over_r", "rate_distortion", "latency"):
        with Image.open(out / "plots" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5, name
    for name in ("tiny-square_32", "tiny-square_64", "jpeg-square_32", "jpeg-square_64"):
        assert (out / "pictures" / f"{name}.png").is_file()
    with Image.open(out / "reconstructions.png") as sheet:
        found = np.asarray(sheet)
    strip = next(iter(result.pictures["tiny", "square 32"].values()))
    assert any(
        np.array_equal(found[12 : 12 + strip.shape[0], left : left + strip.shape[1]], strip)
        for left in range(found.shape[1] - strip.shape[1])
    )


def test_the_same_list_of_samples_can_be_evaluated_again(
    settings: EvaluationConfig, result: EvaluationResult, tmp_path: Path
) -> None:
    (tmp_path / "samples.txt").write_text("\n".join(result.keys[1:4]) + "\n")
    again = replace(
        settings,
        subjects=settings.subjects[:1],
        square=(32,),
        samples=str(tmp_path / "samples.txt"),
        slice_images=1,
    )
    assert evaluate(again).keys == result.keys[1:4]


def test_published_figures_stand_beside_and_are_marked(
    settings: EvaluationConfig, result: EvaluationResult
) -> None:
    table = markdown(settings, result)
    lines = table.splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {
        (cells[0], cells[1]): dict(zip(header, cells, strict=True))
        for line in lines[2:]
        if line.startswith("|")
        for cells in [[cell.strip() for cell in line[1:-1].split("|")]]
    }
    assert rows["tiny", "square 32"]["PSNR"] == f"{result.scores[0].metrics.psnr:.2f}"
    published = rows["ViTok-v2 5B f16x32 (published)", "imagenet-256p"]
    assert (published["PSNR"], published["SSIM"], published["images"]) == ("31.20", "0.8670", "")
    assert (published["r"], published["bits/pixel"]) == ("24.0", "")
    (shown,) = (line for line in lines if line.startswith("- pictures/jpeg-square_32.png, worst f"))
    worst = min(result.images["jpeg", "square 32"], key=lambda image: image.metrics.psnr)
    assert shown.partition(": ")[2].startswith(f"{worst.key} ({worst.metrics.psnr:.2f} dB), ")
    ours = [name for name, _ in rows if "(published)" not in name]
    assert sorted(set(ours)) == ["jpeg", "tiny"]
    assert "measured by others (arXiv 2605.05331)" in table
    assert "other could not be evaluated: no weights" in table
    lost = f"tiny, square 64: 1 of 5 images failed; the first, {result.keys[1]}: out of memory"
    assert f"- {lost}\n" in table
    assert "left out" not in table
    others = replace(result, left_out=[("a.jpg", "zero bytes"), ("b.jpg", "no image")])
    assert "2 images that cannot be used are left out; the first, a.jpg: zero bytes" in markdown(
        settings, others
    )
    assert "(published)" not in markdown(replace(settings, benchmark=""), result)


def test_plots_are_left_out_where_there_is_nothing_to_draw(
    result: EvaluationResult, tmp_path: Path
) -> None:
    codec = [score for score in result.scores if score.subject == "jpeg"][:1]
    draw_plots(codec, tmp_path / "plots")
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["rate_distortion.png"]


def test_results_are_logged_under_the_run_of_the_model(
    settings: EvaluationConfig, result: EvaluationResult, tmp_path: Path, tiny_weights: Path
) -> None:
    run = Folder.of(str(tmp_path), "mine")
    config = Stage(steps=1, images_per_step=1, token_budgets=(16,))
    with open_run(run, "mine", TrackingConfig(), str(tmp_path), config):
        pass
    export = tmp_path / "mine" / "export"
    export.mkdir()
    assert run_around(Folder.of(str(export))) == run_around(run) == run
    assert run_around(Folder.of(str(tiny_weights))) is None
    out = tmp_path / "evaluation"
    write_results(settings, result, out)
    log_to_runs(replace(settings, subjects=(f"{export},name=tiny", "jpeg")), result, out)

    note = json.loads(run.read_bytes("mlflow.json"))
    client = MlflowClient(tracking_uri(TrackingConfig(), str(tmp_path)))
    logged = client.get_run(note["run_id"])
    assert logged.info.status == "FINISHED", "as it was"
    assert logged.data.metrics["evaluation/square_32/psnr"] == result.scores[0].metrics.psnr
    assert logged.data.metrics["evaluation/square_64/psnr"] == result.scores[1].metrics.psnr
    files = {Path(file.path).name for file in client.list_artifacts(note["run_id"], "evaluation")}
    assert {"results.json", "images.parquet", "report.md", "plots", "pictures"} <= files
