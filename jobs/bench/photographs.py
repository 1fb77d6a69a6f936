"""Photographs in memory: decoded once, then cropped at random into packed rows."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.corpus import Manifest
from pipelines.ingest import pack_pixels
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.reading.decode import UnreadableImage, decode_rgb
from pipelines.whole_images import Transform
from vitok.patches import num_tokens, patchify

_PCA_PATCHES = 16_384
_MAX_IMAGES = 4096  # that a process keeps, at 200 kB each


def decode_photographs(
    manifest: Manifest, patch_size: int, token_budget: int
) -> tuple[list[NDArray[np.uint8]], int]:
    """Decode images once, at the size at which they are evaluated.

    Returns:
        uint8 [height, width, 3] of the first images, and how many of them were unreadable.
    """
    count = min(manifest.num_samples, _MAX_IMAGES)
    records = manifest.records(np.arange(count))
    photographs: list[NDArray[np.uint8]] = []
    views = Transform(token_budget=token_budget).views(records, patch_size)
    for view, encoded in zip(views, Corpus.of(manifest).read(records), strict=True):
        try:
            photographs.append(decode_rgb(encoded, size=view.size))
        except UnreadableImage:
            continue
    return photographs, count - len(photographs)


def sample_patches(photographs: Sequence[NDArray[np.uint8]], patch_size: int) -> Tensor:
    """Return about _PCA_PATCHES patches [N, 3P^2] in [-1, 1], spread over the photographs.

    Raises:
        ValueError: all photographs are smaller than a patch.
    """
    each = max(1, _PCA_PATCHES // len(photographs))
    rng = np.random.default_rng(0)
    found = []
    for pixels in photographs:
        rows, columns = (side // patch_size for side in pixels.shape[:2])
        if not rows * columns:
            continue  # no whole patch
        whole = pixels[: rows * patch_size, : columns * patch_size].transpose(2, 0, 1)
        patches, _ = patchify(torch.from_numpy(np.ascontiguousarray(whole)), patch_size)
        found.append(patches[torch.from_numpy(rng.permutation(len(patches))[:each])])
    if not found:
        raise ValueError(
            f"none of the {len(photographs)} photographs has {patch_size} pixels a side; give "
            "larger ones"
        )
    return torch.cat(found).float() / 127.5 - 1.0


class Crops:
    """Packed rows of random crops of photographs in memory, mirrored or not.

    Every photograph is used once before any is used again. Ranks draw from streams of their own.
    """

    def __init__(
        self,
        photographs: Sequence[NDArray[np.uint8]],
        patch_size: int,
        row_tokens: int,
        *,
        seed: int,
        rank: int,
    ) -> None:
        self._photographs = photographs
        self._patch_size = patch_size
        self._row_tokens = row_tokens
        self._rng = np.random.default_rng((seed, rank))
        self._order = self._shuffled()
        self._left_over: NDArray[np.uint8] | None = None

    def row(self, side: int | None) -> PackedRow:
        """Fill a row with crops of at most `side` x `side` patches, whole images if None."""
        crops: list[NDArray[np.uint8]] = []
        free = self._row_tokens
        while True:
            crop = self._crop(side) if self._left_over is None else self._left_over
            length = num_tokens(*crop.shape[:2], self._patch_size)
            # What does not fit is the first of the next row.
            self._left_over = crop if length > free else None
            if length > free:
                break
            crops.append(crop)
            free -= length
            if not free:
                break
        return pack_pixels(
            crops,
            np.zeros((self._row_tokens, 3 * self._patch_size**2), np.uint8),
            patch_size=self._patch_size,
            max_images=len(crops),
            max_seqlen=max(num_tokens(*crop.shape[:2], self._patch_size) for crop in crops),
        )

    def _shuffled(self) -> Iterator[int]:
        while True:
            yield from self._rng.permutation(len(self._photographs)).tolist()

    def _crop(self, side: int | None) -> NDArray[np.uint8]:
        pixels = self._photographs[next(self._order)]
        if side is not None:
            most = side * self._patch_size
            top, left = (
                int(self._rng.integers(max(0, length - most) + 1)) for length in pixels.shape[:2]
            )
            pixels = pixels[top : top + most, left : left + most]
        return pixels[:, ::-1] if self._rng.integers(2) else pixels
