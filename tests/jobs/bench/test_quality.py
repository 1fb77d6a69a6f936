import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.bench import quality
from jobs.bench.photographs import Crops, decode_photographs, sample_patches
from jobs.bench.quality import (
    QualityRecipe,
    measure_quality,
    pca_figures,
    squared_error_step,
    ten_minutes_on_two_cores,
)
from jobs.cli import main
from pipelines.corpus import Manifest
from pipelines.reconstruction import evaluation_rows, judge
from tests.conftest import tiny_model
from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.optim import OptimConfig
from vitok.packed import unpack_images
from vitok.patches import pad_to_patch, patchify, unpatchify
from vitok.variants import AutoencoderConfig

SHAPE = {"width": 32, "heads": 2, "encoder-depth": 1, "decoder-depth": 1}


@pytest.fixture(scope="module")
def shards(sample_manifests: tuple[Path, Path]) -> dict[str, str]:
    folder = sample_manifests[0].parent / "shards"
    return {
        "train": str(folder / "train-000000.tar"),
        "eval": str(folder / "eval-000000.tar"),
    }


def test_quality_benchmark_trains_two_steps_on_two_workers_and_ends_with_its_figures_as_json(
    capsys: pytest.CaptureFixture[str],
    shards: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = replace(ten_minutes_on_two_cores(), compile=False)  # two steps are sooner done so
    monkeypatch.setattr(quality, "ten_minutes_on_two_cores", lambda: eager)
    sizes = [text for name, n in SHAPE.items() for text in (f"--{name}", str(n))]
    data = ["--train-shards", shards["train"], "--eval-shards", shards["eval"]]
    picture = tmp_path / "sheet.png"
    limits = ["--max-steps", "2", "--workers", "2", "--picture", str(picture)]
    assert main(["bench", "quality", *sizes, *data, *limits, "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    figures = json.loads(out[0])
    assert figures["benchmark"] == "quality"
    assert figures["steps"] == 2
    assert (figures["train_images"], figures["eval_images"]) == (60, 5)
    assert figures["skipped_images"] == 0
    row_tokens = ten_minutes_on_two_cores().row_tokens
    assert 0.5 * 4 * row_tokens < figures["tokens"] <= 4 * row_tokens
    assert 10 < figures["psnr"] < figures["pca_psnr"] < 50
    assert 0 < figures["ssim"] < 1
    assert figures["tokens_per_s"] > 0
    assert figures["cores_used"] > 0
    assert 0 < figures["squared_error"] < 1
    assert 0 < figures["start_s"] < figures["train_s"]
    with Image.open(picture) as sheet:
        assert sheet.width >= 1400


def test_pca_reference_is_the_best_linear_code_of_that_many_channels(
    sample_manifests: tuple[Path, Path],
) -> None:
    train, held_out = sample_manifests
    model = AutoencoderConfig(patch_size=16, latent_channels=12)
    photographs, _ = decode_photographs(Manifest.load(train), 16, 64)
    patches = sample_patches(photographs, 16).double().numpy()
    mean = patches.mean(0)
    kept = np.linalg.svd(patches - mean, full_matrices=False)[2][:12]
    results = []
    for row in evaluation_rows(
        Manifest.load(held_out), patch_size=16, token_budget=64, row_tokens=256
    ):
        for image in unpack_images(row.to_packed(torch.device("cpu"))[0], 16):
            tokens = patchify(pad_to_patch(image, 16), 16)[0].double().numpy()
            coded = torch.from_numpy((tokens - mean) @ kept.T @ kept + mean).float()
            results.append(judge("", image, unpatchify(coded, tuple(image.shape[1:]), 16), 16))
    found = pca_figures(train, held_out, model, 64)
    assert len(results) == 5
    assert found["pca_psnr"] == pytest.approx(np.mean([r.metrics.psnr for r in results]), abs=1e-3)
    assert found["pca_ssim"] == pytest.approx(np.mean([r.metrics.ssim for r in results]), abs=1e-4)


def photographs_of_one_colour(count: int) -> list[np.ndarray]:
    """Make images of which every pixel says which one it is, in several sizes."""
    sides = [(40, 70), (64, 64), (16, 120)]
    return [np.full((*sides[i % 3], 3), i + 1, np.uint8) for i in range(count)]


def test_crops_use_every_photograph_once_before_any_again() -> None:
    crops = Crops(photographs_of_one_colour(24), 16, 64, seed=0, rank=0)
    seen: list[int] = []
    while len(seen) < 48:
        row = crops.row(side=2)
        starts = np.cumsum([0, *row.image_tokens])[:-1]
        seen += [int(row.tokens[start, 0]) for start in starts]
        assert row.num_tokens <= 64
        assert (row.image_size <= 32).all()
    assert sorted(seen[:24]) == sorted(seen[24:48]) == list(range(1, 25))
    assert seen[:24] != seen[24:48]


def test_crops_are_pieces_of_the_photograph_and_may_be_mirrored() -> None:
    rng = np.random.default_rng(1)
    photograph = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
    crops = Crops([photograph], 16, 16, seed=0, rank=0)
    pieces = {
        mirrored[top : top + 32, left : left + 32].tobytes(): flip
        for flip, mirrored in enumerate((photograph, photograph[:, ::-1]))
        for top in range(49)
        for left in range(69)
    }
    flips, places = set(), set()
    for _ in range(10):
        packed, _ = crops.row(side=2).to_packed(torch.device("cpu"))
        for image in unpack_images(packed, 16):
            pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            flips.add(pieces[pixels.tobytes()])
            places.add(pixels.tobytes())
    assert flips == {0, 1}
    assert len(places) > 30


def test_ranks_draw_different_crops_and_a_seed_the_same() -> None:
    def first(seed: int, rank: int) -> np.ndarray:
        crops = Crops(photographs_of_one_colour(24), 16, 64, seed=seed, rank=rank)
        return np.asarray(crops.row(side=2).tokens)

    assert np.array_equal(first(0, 0), first(0, 0))
    assert not np.array_equal(first(0, 0), first(0, 1))
    assert not np.array_equal(first(0, 0), first(1, 0))


def test_the_loss_is_the_squared_error_of_each_image_summed_over_the_row() -> None:
    model = Autoencoder(tiny_model(AutoencoderConfig(patch_size=16, latent_channels=16)))
    start_at_random(model, seed=0)
    row = Crops(photographs_of_one_colour(6), 16, 64, seed=0, rank=0).row(side=None)
    packed, _ = row.to_packed(torch.device("cpu"))
    outputs = model(packed).pixels.tokens.split([*row.image_tokens, 64 - row.num_tokens])
    targets = packed.tokens.split([*row.image_tokens, 64 - row.num_tokens])
    expected = sum(
        float((a - b).square().mean().detach())
        for a, b in zip(outputs[:-1], targets[:-1], strict=True)
    )
    assert len(row.keys) > 1
    found = squared_error_step(model, row, torch.device("cpu"))["loss"]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_what_is_evaluated_is_never_trained_on(shards: dict[str, str]) -> None:
    def measure(train: list[str], held_out: list[str], minutes: float = 1) -> None:
        measure_quality(
            model=AutoencoderConfig(latent_channels=16),
            recipe=ten_minutes_on_two_cores(),
            train_shards=train,
            eval_shards=held_out,
            minutes=minutes,
            max_steps=1,
            num_workers=1,
            picture="",
            quiet=True,
        )

    with pytest.raises(ValueError, match="a shard of eval_shards is among train_shards"):
        measure([shards["train"], shards["eval"]], [shards["eval"]])
    with pytest.raises(ValueError, match="train_shards and eval_shards go together"):
        measure([shards["train"]], [])
    with pytest.raises(ValueError, match="minutes=0 must be positive"):
        measure([shards["train"]], [shards["eval"]], minutes=0)


def test_a_row_must_hold_an_image() -> None:
    with pytest.raises(ValueError, match="row_tokens=200 must hold a whole image of 256 tokens"):
        QualityRecipe(optim=OptimConfig(), row_tokens=200)
