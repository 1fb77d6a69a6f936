import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.spatial
import scipy.special
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
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


def published_inception_scores(logits: np.ndarray, num_splits: int) -> list[float]:
    """Follow improved-gan's model.py and torch-fidelity's metric_isc.py, without their shuffling.

    Split i of N images begins at i N // splits; its score is exp of the mean divergence of the
    images from their mean.
    """
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    bounds = [i * len(logits) // num_splits for i in range(num_splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        log_marginal = np.log(np.exp(part).mean(axis=0))
        divergences = (np.exp(part) * (part - log_marginal)).sum(axis=1)
        scores.append(math.exp(divergences.mean()))
    return scores


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(4, 90),
    classes=st.integers(2, 12),
    num_splits=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_inception_score_is_that_of_the_published_formula(
    count: int, classes: int, num_splits: int, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=(count, classes))
    expected = published_inception_scores(logits, num_splits)
    probabilities = torch.from_numpy(logits).softmax(1)
    mean, deviation = inception_score(probabilities, num_splits)
    assert mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert deviation == pytest.approx(np.std(expected), rel=1e-6, abs=1e-9)


def test_inception_score_is_1_for_one_answer_and_the_classes_for_all_of_them() -> None:
    assert inception_score(torch.full((20, 5), 0.2), 2) == pytest.approx((1, 0), abs=1e-6)
    certain = torch.eye(5).repeat(4, 1)
    assert inception_score(certain, 2) == pytest.approx((5, 0), abs=1e-6)
    with pytest.raises(ValueError, match="num_splits=10 must be from 1 to the number of images, 3"):
        inception_score(torch.eye(3))


def published_share_inside(points: np.ndarray, others: np.ndarray, k: int) -> float:
    """Follow improved-precision-and-recall-metric's precision_recall.py, StyleGAN2-ADA and others.

    The radius of each of the others is the (k + 1)-th smallest of its distances to all of them, the
    first of which is to itself; a point is inside that is no farther from one than its radius.
    """
    radii = np.sort(scipy.spatial.distance.cdist(others, others), axis=1)[:, k]
    return (scipy.spatial.distance.cdist(points, others) <= radii).any(axis=1).mean()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(6, 60), st.integers(6, 60)),
    dim=st.integers(1, 8),
    k=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
@example(sizes=(40, 55), dim=3, k=3, seed=0)
def test_precision_and_recall_are_those_of_the_published_neighbours(
    sizes: tuple[int, int], dim: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    generated = rng.normal(loc=1.0, scale=0.7, size=(sizes[0], dim))
    reference = rng.normal(size=(sizes[1], dim))
    found = precision_recall(torch.from_numpy(generated), torch.from_numpy(reference), k)
    assert found == (
        published_share_inside(generated, reference, k),
        published_share_inside(reference, generated, k),
    )
    if (sizes, dim, k, seed) == ((40, 55), 3, 3, 0):
        assert 0 < found[1] < found[0] < 1


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
