"""What a plan orders and ingest reads: samples of one kind, and the uses of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus import SampleRecords
from pipelines.reading.decode import UnreadableImage
from vitok.patches import grid_size, num_tokens


@dataclasses.dataclass(frozen=True)
class SampleView:
    """One use of one sample.

    Attributes:
        sample_id: number in the manifest.
        epoch: how often the corpus was used before.
        crop: (top, left, height, width) in pixels of the image.
        size: (height, width) that the crop is resized to.
        tile_position: two numbers in [0, 1), where in the image the loss looks closely.
        flip: left and right are exchanged.
        adm: the crop is the centre square, made as decode_adm_square makes it.
    """

    sample_id: int
    epoch: int
    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    tile_position: tuple[float, float]
    flip: bool = False
    adm: bool = False

    def num_tokens(self, patch_size: int) -> int:
        """Patches that the resized crop has."""
        return num_tokens(*self.size, patch_size)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The embedded texts of some samples, padded to one length.

    Attributes:
        values: [n, K, D], bits of the embeddings; 0 behind the end of a text. A tensor where it
            lies on a device already.
        num_tokens: [n] int64, tokens of each text; 0 for none.
    """

    values: NDArray[Any] | torch.Tensor
    num_tokens: NDArray[np.int64]

    def in_slots(self, places: Sequence[int], num_slots: int) -> "Texts":
        """Return the texts at some places in the first slots of a row; the others have none."""
        found = np.asarray(self.values)
        values = np.zeros((num_slots, *found.shape[1:]), found.dtype)
        num_tokens = np.zeros(num_slots, np.int64)
        values[: len(places)] = found[places]
        num_tokens[: len(places)] = self.num_tokens[places]
        return Texts(values, num_tokens)


class Samples(Protocol):
    """Numbered samples of one kind, and how they become tokens.

    Images (pipelines.mixture.Corpus) are read as bytes and decoded; latents of images
    (pipelines.caching.latent_corpus.LatentCorpus) are tokens already.

    Attributes:
        resizes: a sample can be used at another size than that of its record.
    """

    resizes: bool

    @property
    def num_samples(self) -> int:
        """How many there are."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of what the order of the samples follows from."""

    @property
    def location(self) -> str:
        """Where they lie, for messages."""

    def order(
        self, start: int, count: int, *, chunk_samples: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (epoch, sample) at places start to start + count of the endless stream."""

    def epochs(self, num_images: int) -> dict[str, float]:
        """Return how often each source was used after so many samples, by its name."""

    def records(self, sample_ids: NDArray[np.int64]) -> SampleRecords:
        """Return the records of samples, in the order given."""

    def uri(self, shard: int) -> str:
        """Return where a shard lies."""

    def read(self, records: SampleRecords) -> Sequence[Any]:
        """Read the samples of records, in their order."""

    @property
    def text_bytes(self) -> int:
        """Bytes that a row holds for the text of a sample; 0 without texts."""

    def texts(self, records: SampleRecords) -> Texts | None:
        """Read the texts of records, in their order; None for samples without texts."""

    def show(
        self, sample: Any, views: Sequence[SampleView]
    ) -> dict[SampleView, NDArray[Any] | UnreadableImage]:
        """Turn what was read of a sample into what its views see of it."""

    def token_format(self, patch_size: int) -> tuple[int, np.dtype[Any]]:
        """Return how many values a token has in a row, and their type."""

    def write(self, shown: NDArray[Any], tokens: NDArray[Any], patch_size: int) -> None:
        """Put what a view sees into its place [N, D] in a row of zeros."""


def write_patches(pixels: NDArray[np.uint8], patches: NDArray[np.uint8], patch_size: int) -> None:
    """Cut an image into its place in a row: `patchify` without a copy in between.

    Args:
        pixels: [H, W, 3].
        patches: [N, 3P^2], where the patches go; beyond the image's edges they become zero.
    """
    height, width, channels = pixels.shape
    rows, columns = grid_size(height, width, patch_size)
    if (height, width) != (rows * patch_size, columns * patch_size):
        whole = np.zeros((rows * patch_size, columns * patch_size, channels), dtype=np.uint8)
        whole[:height, :width] = pixels
        pixels = whole
    grid = pixels.reshape(rows, patch_size, columns, patch_size, channels)
    place = patches.reshape(rows, columns, channels, patch_size, patch_size)
    assert np.shares_memory(place, patches), "a copy would be filled, and dropped"
    place[...] = grid.transpose(0, 2, 4, 1, 3)
