import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.corpus import Manifest
from pipelines.generation import judge as judging
from pipelines.generation.judge import (
    Judging,
    choose_reference,
    judge,
    labels_of,
    real_images,
    sampled_images,
)
from pipelines.reading.shards import write_shards
from vitok.frechet import FeatureMoments, Gaussian, frechet_distance


class Colours:
    """Mean and spread of every colour as features."""

    digest = "c" * 64

    def __call__(self, images: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat([x.mean((1, 2)), x.std((1, 2))]) for x in images])


def write_samples(folder: Path, count: int = 30) -> list[np.ndarray]:
    """Write a set as `vitok generate` does."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (16, 24, 3), dtype=np.uint8) for _ in range(count)]
    samples = []
    for number, pixels in enumerate(pictures):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG")
        samples.append(
            {"__key__": f"{number:012d}", "png": stream.getvalue(), "cls": number, "json": {}}
        )
    write_shards(samples, folder, "samples", 12)
    return pictures


def test_reference_holds_every_class_and_each_sample_once() -> None:
    rng = np.random.default_rng(1)
    # Most classes are rare: any 60 of the samples would leave many of them out.
    labels = np.where(rng.random(2000) < 0.97, 0, rng.integers(1, 41, 2000))
    classes = set(labels.tolist())
    chosen = choose_reference(labels, 60, seed=3)
    assert len(set(chosen.tolist())) == 60
    assert set(labels[chosen].tolist()) == classes and 30 < len(classes) < 60
    assert np.array_equal(chosen, choose_reference(labels, 60, seed=3))
    assert not np.array_equal(chosen, choose_reference(labels, 60, seed=4))
    assert sorted(choose_reference(labels, 10**6, seed=3).tolist()) == list(range(2000))
    # The first of them are not the rare classes alone: they stand for all.
    assert (labels[chosen[:30]] == 0).sum() > 3


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    pictures = write_samples(tmp_path)
    found = [image for batch in sampled_images(str(tmp_path)) for image in batch]
    assert len(found) == 30
    for image, pixels in zip(found, pictures, strict=True):
        expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(image, expected)


def test_a_set_is_judged_against_the_real_images(
    tmp_path: Path, sample_manifests: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_samples(tmp_path / "samples")
    network = Colours()
    monkeypatch.setattr(judging.InceptionFeatures, "load", lambda *_, **__: network)
    settings = Judging(
        samples=str(tmp_path / "samples"),
        reference=str(sample_manifests[0]),
        inception="anywhere",
        num_reference=40,
        num_neighbours_of=25,
        square=32,
        out=str(tmp_path / "judged"),
    )
    quality = judge(settings)["gfid"]

    manifest = Manifest.load(sample_manifests[0])
    chosen = choose_reference(labels_of(manifest), 40, seed=0)
    real = [image for batch in real_images(manifest, chosen, 32) for image in batch]
    assert len(real) == 40 and {image.shape for image in real} == {(3, 32, 32)}
    reference = FeatureMoments.of([network(real)]).gaussian(network.digest)
    generated = [torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 for p in pictures]
    expected = FeatureMoments.of([network(generated)]).gaussian()
    assert quality.frechet == pytest.approx(frechet_distance(expected, reference), rel=1e-4)
    assert quality.num_images == 30 and quality.precision is not None
    written = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert written["results"]["gfid"]["frechet"] == quality.frechet
    kept = Gaussian.load(tmp_path / "judged" / "reference-gfid.npz")
    assert kept.count == 40 and np.allclose(kept.mean, reference.mean)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "inception and dino are both empty; give one of them"),
        ({"inception": "file", "num_reference": 1}, "num_reference=1 and square=256"),
    ],
)
def test_settings_that_judge_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judging(samples="here", reference="there", **values)
