"""Generated sets against real images: gFID, gFDD, Inception Score, precision and recall."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.corpus import Manifest, build_manifest
from pipelines.ingest import decode_views
from pipelines.mixture import Corpus
from pipelines.order import hash_of
from pipelines.reading.decode import UnreadableImage
from pipelines.whole_images import Transform
from vitok.config import config, to_dict
from vitok.features import DinoFeatures, FeatureExtractor, InceptionFeatures
from vitok.frechet import FeatureMoments, Gaussian
from vitok.sample_quality import SampleQuality, judge_samples

_BATCH_IMAGES = 64
_NO_PATCH = 1  # squares and whole images have no patches to be cut to


@config
class Judging:
    """How a set of samples is judged.

    Attributes:
        samples: folder or `s3://` prefix of shards, as `vitok generate` writes them.
        reference: manifest of real images, such as that of ImageNet-22k's training set.
        inception: TorchScript Inception-v3, a file or URL, for gFID and Inception Score; empty for
            none.
        inception_digest: sha256 (hex) of that file, if it is another than the field's.
        dino: folder or repository of DINOv3, for gFDD; empty for none.
        num_reference: real images; every class is there at least once, if they are enough.
        num_neighbours_of: real images whose features precision and recall look at; 0 for neither.
        square: pixels a side of the real images' centre crops, made as ADM's; that of the samples.
        seed: of the choice of real images.
        out: folder of the results, and of the statistics of the real images.
    """

    samples: str
    reference: str
    inception: str = ""
    inception_digest: str = ""
    dino: str = ""
    num_reference: int = 100_000
    num_neighbours_of: int = 10_000
    square: int = 256
    seed: int = 0
    out: str = "judged"

    def __post_init__(self) -> None:
        if not (self.inception or self.dino):
            raise ValueError("inception and dino are both empty; give one of them to judge with")
        if min(self.num_reference, self.square) < 2 or self.num_neighbours_of < 0:
            raise ValueError(
                f"num_reference={self.num_reference} and square={self.square} must be at least 2, "
                f"num_neighbours_of={self.num_neighbours_of} at least 0"
            )


def judge(settings: Judging) -> dict[str, SampleQuality]:
    """Judge a set by every network that was given, in this process; writes OUT/results.json.

    Returns:
        "gfid" and "gfdd", as far as their networks are there.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks: dict[str, FeatureExtractor] = {}
    if settings.inception:
        networks["gfid"] = InceptionFeatures.load(
            settings.inception, settings.inception_digest, device
        )
    if settings.dino:
        networks["gfdd"] = DinoFeatures.load(settings.dino, device, option="dino")
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, SampleQuality] = {}
    manifest = Manifest.load(settings.reference)
    for name, network in networks.items():
        reference, features = describe_reference(manifest, network, settings)
        reference.save(out / f"reference-{name}.npz")
        found[name] = judge_samples(sampled_images(settings.samples), network, reference, features)
    document = {
        "settings": to_dict(settings),
        "results": {name: asdict(quality) for name, quality in found.items()},
    }
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    return found


def describe_reference(
    manifest: Manifest, network: FeatureExtractor, settings: Judging
) -> tuple[Gaussian, Tensor | None]:
    """Return the statistics of the real images, and the features of some of them."""
    chosen = choose_reference(labels_of(manifest), settings.num_reference, settings.seed)
    moments: FeatureMoments | None = None
    kept: list[Tensor] = []
    for images in real_images(manifest, chosen, settings.square):
        features = network(images)
        moments = moments or FeatureMoments(features.shape[1])
        moments.add(features)
        if sum(map(len, kept)) < settings.num_neighbours_of:
            kept.append(features)
    if moments is None:
        raise ValueError(f"{manifest.path}: none of the images is readable; check its shards")
    some = torch.cat(kept)[: settings.num_neighbours_of] if kept else None
    return moments.gaussian(network.digest), some


def choose_reference(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose samples for a reference set: one of every class, then any.

    Args:
        labels: class of every sample of a corpus.

    Returns:
        numbers of at most `count` different samples, in the keyed order of the choice, so that
        the first ones stand for all; fewer classes only if there are more of them than `count`.
    """
    order = np.argsort(hash_of(seed, np.arange(len(labels))), kind="stable")
    _, first = np.unique(labels[order], return_index=True)
    is_first = np.zeros(len(order), dtype=bool)
    is_first[first] = True
    chosen = np.concatenate([order[is_first], order[~is_first]])[:count]
    # Of a class's only sample and the others alike, whoever comes first by key.
    return chosen[np.argsort(hash_of(seed + 1, chosen), kind="stable")]


def labels_of(manifest: Manifest, chunk: int = 2**16) -> NDArray[np.int64]:
    """Return the class of every sample of a manifest."""
    parts = [
        manifest.records(np.arange(start, min(start + chunk, manifest.num_samples))).label
        for start in range(0, manifest.num_samples, chunk)
    ]
    return np.concatenate(parts)


def real_images(
    manifest: Manifest, sample_ids: NDArray[np.int64], square: int
) -> Iterator[list[Tensor]]:
    """Yield ADM's centre crops [3, H, W] in [-1, 1]; unreadable images are left out."""
    yield from _images(manifest, sample_ids, square)


def sampled_images(location: str) -> Iterator[list[Tensor]]:
    """Yield the images of shards [3, H, W] in [-1, 1], as they are.

    Raises:
        FileNotFoundError: there are no shards.
    """
    with tempfile.TemporaryDirectory(prefix="vitok-samples-") as scratch:
        manifest = build_manifest([location], Path(scratch) / "manifest")
        yield from _images(manifest, np.arange(manifest.num_samples), None)


def _images(
    manifest: Manifest, sample_ids: Sequence[int] | NDArray[np.int64], square: int | None
) -> Iterator[list[Tensor]]:
    corpus = Corpus.of(manifest)
    for start in range(0, len(sample_ids), _BATCH_IMAGES):
        records = manifest.records(np.asarray(sample_ids[start : start + _BATCH_IMAGES]))
        longest = int(max(records.height.max(), records.width.max()))
        transform = (
            Transform(square=square, adm=True) if square else Transform(longest_side=longest)
        )
        views = transform.views(records, _NO_PATCH)
        shown = decode_views(corpus, records, views)
        pixels = [shown[view] for view in views]
        readable = [one for one in pixels if not isinstance(one, UnreadableImage)]
        if readable:
            yield [
                torch.from_numpy(one.copy()).permute(2, 0, 1).float() / 127.5 - 1
                for one in readable
            ]
