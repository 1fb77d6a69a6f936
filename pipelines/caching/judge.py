"""Whether latents of a cache decode to the images that they are of."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.caching.manifest import read_index
from pipelines.corpus import Manifest, read_samples
from pipelines.latents import LatentCache, LatentRow
from pipelines.reading.decode import decode_rgb
from pipelines.reconstruction import ImageResult, judge
from vitok.autoencoder import Autoencoder
from vitok.images import Latent, to_tensor


def decode_row(model: Autoencoder, row: LatentRow) -> Tensor:
    """Decode one cached latent to an image [3, height, width] in [-1, 1]."""
    latent = Latent(
        tokens=row.latent.float(), image_size=row.image_size, patch_size=model.config.patch_size
    )
    return model.decode(latent)[0]


def judge_latents(
    cache: LatentCache, model: Autoencoder, manifest: str, num_images: int
) -> list[ImageResult]:
    """Decode latents spread over a cache, and compare them with the images of the corpus.

    Args:
        manifest: folder of the corpus that was encoded.

    Raises:
        ValueError: the cache is of another corpus, or of other shards.
    """
    source = Manifest.load(manifest)
    units = read_index(cache.folder, cache.manifest).to_pylist()
    chosen = np.unique(np.linspace(0, len(cache) - 1, num_images).round().astype(int))
    results = []
    for index in chosen.tolist():
        row = cache[index]
        unit = units[int(np.searchsorted(cache.first_sample, index, side="right")) - 1]
        image = _image_of(source, unit["shard_digest"], unit["start"], unit["stop"], row, cache)
        results.append(
            judge(row.key, image, decode_row(model, row).cpu(), cache.identity.patch_size)
        )
    return results


def _image_of(
    source: Manifest, shard_digest: str, start: int, stop: int, row: LatentRow, cache: LatentCache
) -> Tensor:
    """Return what was encoded of a row, [3, height, width] in [-1, 1]."""
    shards: Sequence[int] = np.flatnonzero(source.shard_digests == shard_digest).tolist()
    if not shards:
        raise ValueError(
            f"{source.path} has no shard of the digest {shard_digest[:12]}, of which "
            f"{cache.location} is; give the manifest that was encoded"
        )
    first = int(source.first_sample[shards[0]])
    records = source.records(np.arange(first + start, first + stop))
    found = records.take(np.flatnonzero(records.key == row.key).tolist())
    transform = cache.identity.transforms[row.transform]
    (view,) = transform.views(found, cache.identity.patch_size, row.flipped)
    (data,) = read_samples(source, found)
    pixels = to_tensor(decode_rgb(data, crop=view.crop, size=view.size))
    return torch.flip(pixels, [2]) if view.flip else pixels
