"""How good generated images are: Fréchet distance, Inception Score, precision and recall."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitok.features import FeatureExtractor
from vitok.frechet import FeatureMoments, Gaussian, few_samples, frechet_distance

# Distances of so many pairs are held at a time, in float64.
_BLOCK_PAIRS = 2**24


@dataclass(frozen=True)
class SampleQuality:
    """How good a set of generated images is.

    Attributes:
        num_images: generated images.
        frechet: distance to the reference: gFID, or gFDD, after the network.
        inception_score, inception_score_std: mean and deviation over splits; None for a network
            without classes.
        precision, recall: None without the features of reference images.
        warning: why the distance means little; empty if it does mean something.
    """

    num_images: int
    frechet: float
    inception_score: float | None
    inception_score_std: float | None
    precision: float | None
    recall: float | None
    warning: str


def judge_samples(
    batches: Iterable[Sequence[Tensor]],
    extractor: FeatureExtractor,
    reference: Gaussian,
    reference_features: Tensor | None = None,
) -> SampleQuality:
    """Judge generated images against the statistics of real ones.

    Holds the features of all images, 8 KB each with Inception-v3, not the images.

    Args:
        batches: generated images [3, H, W] in [-1, 1], as they come.
        reference: of real images, by the same network; `Gaussian.load` reads it.
        reference_features: [N, D] of real images, for precision and recall; 10,000 are usual.

    Raises:
        ValueError: there are fewer than two images, or the reference is of another network.
    """
    found = [extractor(batch) for batch in batches]
    if not found:
        raise ValueError("there are no images to judge; give at least 2")
    features = torch.cat(found)
    moments = FeatureMoments.of([features])
    distance = frechet_distance(moments.gaussian(extractor.digest), reference)
    score = deviation = precision = recall = None
    if probabilities := getattr(extractor, "probabilities", None):
        score, deviation = inception_score(probabilities(features))
    if reference_features is not None:
        precision, recall = precision_recall(features, reference_features)
    counts = [count for count in (moments.count, reference.count) if count]
    return SampleQuality(
        num_images=moments.count,
        frechet=distance,
        inception_score=score,
        inception_score_std=deviation,
        precision=precision,
        recall=recall,
        warning=few_samples(min(counts), features.shape[1]),
    )


def inception_score(probabilities: Tensor, num_splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp(E KL(p(y|x) || p(y))).

    Salimans et al., arXiv 1606.03498. The splits are runs of images in the order given, cut where
    their code cuts; the score of one split is smaller the fewer images it has.

    Args:
        probabilities: [N, classes], rows that add up to 1.
        num_splits: at most N.

    Raises:
        ValueError: fewer images than splits.
    """
    if not 1 <= num_splits <= len(probabilities):
        raise ValueError(
            f"{num_splits=} must be from 1 to the number of images, {len(probabilities)}"
        )
    scores = []
    count = len(probabilities)
    for split in range(num_splits):
        part = probabilities[split * count // num_splits : (split + 1) * count // num_splits]
        part = part.double()
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0, keepdim=True))
        scores.append(divergence.sum(1).mean().exp())
    score = torch.stack(scores)
    return score.mean().item(), score.std(correction=0).item()


def precision_recall(
    generated: Tensor, reference: Tensor, num_neighbours: int = 3
) -> tuple[float, float]:
    """Return the share of generated images among the real ones, and the other way round.

    Kynkäänniemi et al., arXiv 1904.06991: an image lies in the manifold of a set if, for some
    image of the set, it is no farther than that one's k-th nearest neighbour in the set. Distances
    are in float64, on the device of the features; the cost is quadratic in the images.

    Args:
        generated, reference: features [N, D] and [M, D].
        num_neighbours: k; 3 in the paper.

    Raises:
        ValueError: a set has no k neighbours, or the features are of different networks.
    """
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of {generated.shape[1]} and {reference.shape[1]} numbers are of different "
            "networks"
        )
    fewest = min(len(generated), len(reference))
    if not 1 <= num_neighbours < fewest:
        raise ValueError(f"{num_neighbours=} must be from 1 to {fewest - 1}: a set has {fewest}")
    # Distances lose least where the features are small.
    center = reference.double().mean(0)
    generated, reference = generated.double() - center, reference.double() - center
    precision = _share_inside(generated, reference, _radii(reference, num_neighbours))
    recall = _share_inside(reference, generated, _radii(generated, num_neighbours))
    return precision, recall


def _radii(features: Tensor, num_neighbours: int) -> Tensor:
    """Return [N], the distance of each image to its k-th nearest neighbour."""
    # The nearest is the image itself.
    return torch.cat(
        [
            torch.cdist(block, features).kthvalue(num_neighbours + 1, dim=1).values
            for block in _blocks(features, len(features))
        ]
    )


def _share_inside(features: Tensor, others: Tensor, radii: Tensor) -> float:
    inside = sum(
        int((torch.cdist(block, others) <= radii).any(dim=1).sum())
        for block in _blocks(features, len(others))
    )
    return inside / len(features)


def _blocks(features: Tensor, num_others: int) -> Sequence[Tensor]:
    return features.split(max(1, _BLOCK_PAIRS // num_others))
