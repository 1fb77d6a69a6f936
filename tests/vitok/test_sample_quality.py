import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vitok.frechet import FeatureMoments, frechet_distance
from vitok.sample_quality import inception_score, judge_samples, precision_recall


class MeanColours:
    """Features of an image: the mean of each channel, and of each half of it."""

    digest = "c" * 64

    def __call__(self, images: list[Tensor]) -> Tensor:
        return torch.stack(
            [torch.cat([x.mean((1, 2)), x[:, : x.shape[1] // 2].mean((1, 2))]) for x in images]
        )


def images(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 8, 8, generator=generator) * 2 - 1 for _ in range(count)]


def plain_inception_score(probabilities: np.ndarray) -> float:
    marginal = probabilities.mean(0)
    divergences = [
        sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True) if p > 0)
        for row in probabilities
    ]
    return math.exp(sum(divergences) / len(divergences))


def test_inception_score_follows_its_definition_in_every_split() -> None:
    probabilities = torch.randn(60, 7).mul(2).softmax(1)
    probabilities[3] = torch.nn.functional.one_hot(torch.tensor(2), 7)  # zeros
    mean, deviation = inception_score(probabilities, num_splits=4)
    expected = [plain_inception_score(part) for part in probabilities.numpy().reshape(4, 15, 7)]
    assert mean == pytest.approx(np.mean(expected), rel=1e-6)
    assert deviation == pytest.approx(np.std(expected), rel=1e-5)


def test_inception_score_is_1_for_one_answer_and_the_classes_for_all_of_them() -> None:
    assert inception_score(torch.full((20, 5), 0.2), 2) == pytest.approx((1, 0), abs=1e-6)
    certain = torch.eye(5).repeat(4, 1)
    assert inception_score(certain, 2) == pytest.approx((5, 0), abs=1e-6)
    with pytest.raises(ValueError, match="num_splits=10 must be from 1 to the number of images, 3"):
        inception_score(torch.eye(3))


def plain_share_inside(points: np.ndarray, others: np.ndarray, k: int) -> float:
    """Follow the definition point by point."""
    inside = 0
    for point in points:
        for other in others:
            radius = sorted(np.linalg.norm(others - other, axis=1))[k]
            if np.linalg.norm(point - other) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_follow_their_definition(k: int) -> None:
    generated, reference = torch.randn(40, 3) * 0.7 + 0.5, torch.randn(55, 3)
    precision, recall = precision_recall(generated, reference, num_neighbours=k)
    assert precision == plain_share_inside(generated.numpy(), reference.numpy(), k)
    assert recall == plain_share_inside(reference.numpy(), generated.numpy(), k)
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision != recall


def test_precision_and_recall_of_sets_that_are_equal_or_apart() -> None:
    points = torch.randn(30, 4)
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)
    half = torch.cat([points[:15], points[:15] + 50])
    assert precision_recall(half, points)[0] == 0.5
    with pytest.raises(ValueError, match="num_neighbours=3 must be from 1 to 2: a set has 3"):
        precision_recall(points[:3], points)
    with pytest.raises(ValueError, match="features of 4 and 3 numbers"):
        precision_recall(points, points[:, :3])


def test_samples_are_judged_against_statistics_as_they_come() -> None:
    extractor = MeanColours()
    real, generated = images(50, 0), [x * 0.5 for x in images(40, 1)]
    reference = FeatureMoments.of([extractor(real)]).gaussian(extractor.digest)
    batches = iter([generated[:15], generated[15:16], generated[16:]])
    found = judge_samples(batches, extractor, reference, extractor(real))
    moments = FeatureMoments.of([extractor(generated)]).gaussian()
    assert found.frechet == frechet_distance(moments, reference) > 0
    assert found.num_images == 40
    assert (found.precision, found.recall) == precision_recall(
        extractor(generated), extractor(real)
    )
    assert found.inception_score is None, "these features belong to no classes"
    assert found.warning.startswith("40 images for 6 features")
    with pytest.raises(ValueError, match="no images to judge"):
        judge_samples([], extractor, reference)
