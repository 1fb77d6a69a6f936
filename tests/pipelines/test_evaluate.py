import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.decode import UnreadableImage, decode_rgb
from pipelines.evaluate import EvaluationConfig, evaluate_model, reconstruct_image
from pipelines.reconstruction import Pictured, comparison, contact_sheet, evaluation_rows
from pipelines.train_autoencoder import load_autoencoder
from vitok.metrics import constant_patches, psnr, ssim
from vitok.packed import pack_images, unpack_images
from vitok.patches import fit_to_budget

BUDGET = 48


@pytest.fixture
def settings(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> EvaluationConfig:
    return EvaluationConfig(
        model=str(tiny_weights),
        manifest=str(sample_manifests[0]),
        out=str(tmp_path / "evaluation"),
        token_budget=BUDGET,
        row_tokens=3 * BUDGET,
        max_images=11,
        num_pictures=4,
    )


def decoded(data: bytes, token_budget: int) -> torch.Tensor:
    """Return a whole image [3, H, W] in [-1, 1] as the size rule wants it."""
    height, width = decode_rgb(data).shape[:2]
    size = fit_to_budget(height, width, patch_size=16, token_budget=token_budget)
    return torch.from_numpy(decode_rgb(data, size=size)).permute(2, 0, 1) / 127.5 - 1


def test_results_equal_those_of_each_image_alone(settings: EvaluationConfig) -> None:
    summary = evaluate_model(settings)
    document = json.loads((Path(settings.out) / "results.json").read_text())
    source = Manifest.load(settings.manifest)
    records = source.records(np.arange(settings.max_images))
    by_key = {image["key"]: image for image in document["images"]}
    assert sorted(by_key) == sorted(records.key.tolist())
    assert len(document["images"]) == 11, "every image once"

    model = load_autoencoder(settings.model)
    expected_psnr = []
    for key, data in zip(records.key, read_samples(source, records), strict=True):
        image = decoded(data, BUDGET)
        with torch.no_grad():
            (output,) = unpack_images(model(pack_images([image], patch_size=16)).pixels, 16)
        found = by_key[key]
        assert (found["height"], found["width"]) == image.shape[1:]
        assert found["num_tokens"] == -(-image.shape[1] // 16) * -(-image.shape[2] // 16)
        assert found["psnr"] == pytest.approx(psnr(output, image), abs=1e-3)
        assert found["ssim"] == pytest.approx(ssim(output, image), abs=1e-4)
        baseline = psnr(constant_patches(image, 16), image)
        assert found["baseline_psnr"] == pytest.approx(baseline, abs=1e-3)
        expected_psnr.append(found["psnr"])
    assert len(set(expected_psnr)) == 11
    assert summary["eval_psnr"] == pytest.approx(sum(expected_psnr) / 11)
    assert summary["eval_images"] == 11
    assert document["means"] == summary
    assert document["settings"]["token_budget"] == BUDGET
    assert document["skipped"] == []


def test_picture_shows_the_first_images(settings: EvaluationConfig) -> None:
    evaluate_model(settings)
    with Image.open(Path(settings.out) / "reconstructions.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    source = Manifest.load(settings.manifest)
    rows = evaluation_rows(
        source, patch_size=16, token_budget=BUDGET, row_tokens=3 * BUDGET, max_images=11
    )
    keys = [key for row in rows for key in row.keys][:4]
    records = source.records(np.arange(11)).take(
        [source.records(np.arange(11)).key.tolist().index(key) for key in keys]
    )
    for data in read_samples(source, records):
        image = ((decoded(data, BUDGET) + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
        assert _contains(sheet, image)


def _contains(sheet: np.ndarray, image: np.ndarray) -> bool:
    height, width = image.shape[:2]
    corners = np.argwhere((sheet == image[0, 0]).all(axis=-1))
    return any(
        np.array_equal(sheet[top : top + height, left : left + width], image)
        for top, left in corners
    )


def test_whole_images_keep_their_aspect_ratio_within_the_budget(
    sample_manifests: tuple[Path, Path],
) -> None:
    source = Manifest.load(sample_manifests[0])
    records = source.records(np.arange(source.num_samples))
    native = {
        key: (int(height), int(width))
        for key, height, width in zip(records.key, records.height, records.width, strict=True)
    }
    for budget in (30, 400):
        rows = evaluation_rows(source, patch_size=16, token_budget=budget, row_tokens=budget * 2)
        assert sorted(key for row in rows for key in row.keys) == sorted(native)
        shrunk = 0
        for row in rows:
            for key, size in zip(row.keys, row.image_size.tolist(), strict=False):
                height, width = native[key]
                assert -(-size[0] // 16) * -(-size[1] // 16) <= budget
                assert abs(size[0] - height * size[1] / width) <= 1 + height / width
                if size != [height, width]:
                    shrunk += 1
                    assert size[0] <= height
                    assert size[1] <= width
                    assert -(-height // 16) * -(-width // 16) > budget, "only what is too large"
        assert shrunk == len(native) if budget == 30 else 0 < shrunk < len(native)


def test_unreadable_images_are_listed_and_the_others_judged(
    settings: EvaluationConfig, tmp_path: Path
) -> None:
    source = Manifest.load(settings.manifest)
    images = read_samples(source, source.records(np.arange(5)))
    samples = [
        {"__key__": f"k{i}", "jpg": data[: len(data) // 2] if i == 2 else data}
        for i, data in enumerate(images)
    ]
    shards = write_shards(samples, tmp_path / "shards", "damaged", 5)
    manifest = build_manifest(shards, tmp_path / "manifest")
    damaged = EvaluationConfig(
        model=settings.model, manifest=str(manifest.path), out=settings.out, token_budget=BUDGET
    )
    assert evaluate_model(damaged)["eval_images"] == 4
    document = json.loads((Path(settings.out) / "results.json").read_text())
    ((shard, key, reason),) = document["skipped"]
    assert (shard, key) == (shards[0], "k2")
    assert "truncated" in reason
    assert sorted(image["key"] for image in document["images"]) == ["k0", "k1", "k3", "k4"]

    alone = write_shards([samples[2]], tmp_path / "alone", "damaged", 1)
    nothing = build_manifest(alone, tmp_path / "nothing")
    with pytest.raises(ValueError, match="no held-out image is readable"):
        evaluate_model(
            EvaluationConfig(model=settings.model, manifest=str(nothing.path), out=settings.out)
        )


def constant(height: int, width: int, value: float) -> Pictured:
    image = torch.full((3, height, width), value)
    return Pictured(f"{height}x{width}", image, image)


def test_comparison_is_original_reconstruction_and_amplified_error() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(3, 20, 30, generator=generator) * 2 - 1
    wrong = (source + 0.1).clone()
    wrong[:, 0, 0] = 5.0  # beyond white
    strip = comparison(source, wrong)
    assert strip.shape == (20, 3 * 30 + 2 * 4, 3)
    assert strip.dtype == np.uint8
    original, gap, reconstruction, gap2, error = np.split(strip, [30, 34, 64, 68], axis=1)

    def to_bytes(values: torch.Tensor) -> np.ndarray:
        return (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    assert np.array_equal(original, to_bytes((source + 1) / 2))
    assert np.array_equal(reconstruction, to_bytes((wrong + 1) / 2))
    assert (gap == 255).all()
    assert (gap2 == 255).all()
    expected = to_bytes((source - wrong.clamp(-1, 1)).abs() / 2 * 4)
    assert np.array_equal(error, expected)
    inside = (source + 0.1 < 1).all(dim=0).numpy()
    inside[0, 0] = False
    assert abs(int(error[inside].min()) - 51) <= 1, "0.1 of 2, four times brighter"
    assert (comparison(source, source)[:, 68:] == 0).all()


def test_contact_sheet_shows_every_picture_once_without_overlap() -> None:
    sizes = [(40, 100), (200, 60), (90, 90), (16, 16), (300, 700), (40, 100), (64, 333), (1, 1)]
    # Different grays, none of them that of the paper or of the error maps.
    pictures = [
        constant(height, width, index / 10 - 0.5) for index, (height, width) in enumerate(sizes)
    ]
    sheet = contact_sheet(pictures)
    painted = np.zeros(sheet.shape[:2], dtype=int)
    for picture in pictures:
        height, width = picture.source.shape[1:]
        gray = round((float(picture.source[0, 0, 0]) + 1) / 2 * 255)
        found = np.argwhere((sheet == gray).all(axis=-1))
        top, left = found.min(axis=0)
        bottom, right = found.max(axis=0) + 1
        assert (bottom - top, right - left) == (height, 2 * width + 4), picture.key
        assert len(found) == 2 * height * width, "original and reconstruction, all of both"
        black = sheet[top:bottom, right + 4 : right + 4 + width]
        assert black.shape == (height, width, 3)
        assert not black.any()
        painted[top:bottom, left : right + 4 + width] += 1
    assert painted.max() == 1
    assert (sheet[painted == 0] == 255).all(), "the rest is paper"


def test_sheet_grows_with_a_picture_wider_than_itself() -> None:
    sheet = contact_sheet([constant(10, 900, 0.0)])
    assert sheet.shape[1] >= 3 * 900
    assert (sheet == 128).all(axis=-1).sum() == 2 * 10 * 900


def test_one_file_is_reconstructed_at_its_own_aspect_ratio(
    tiny_weights: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "photo.png"
    pixels = rng.integers(0, 255, (70, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    model = load_autoencoder(str(tiny_weights))
    result, picture, seconds = reconstruct_image(model, file)
    assert seconds > 0
    assert (result.height, result.width, result.num_tokens) == (70, 150, 50)
    source = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(picture.source, source)
    with torch.no_grad():
        (expected,) = unpack_images(model(pack_images([source], patch_size=16)).pixels, 16)
    torch.testing.assert_close(picture.reconstruction, expected.clamp(-1, 1))
    assert result.psnr == pytest.approx(psnr(expected, source))
    shrunk, *_ = reconstruct_image(model, file, resolution=50)
    assert 10 <= shrunk.num_tokens <= 16
    assert shrunk.width / shrunk.height == pytest.approx(150 / 70, rel=0.05)
    file.write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"photo\.png: not an image with an intact header"):
        reconstruct_image(model, file)
