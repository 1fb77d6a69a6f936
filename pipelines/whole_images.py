"""Whole images as packed rows, outside the plan of a training: for evaluation and latent caches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus import SampleRecords
from pipelines.ingest import decode_views, load_rows, pack_pixels
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.packing import pack_best_fit
from pipelines.reading.decode import UnreadableImage
from pipelines.views import SampleView
from vitok.config import UNLESS_EMPTY, config
from vitok.patches import bucket_sizes, centre_crop, fit_to_budget, nearest_bucket, num_tokens


@config
class Transform:
    """How a whole image becomes what an autoencoder sees; one of four sizes is given.

    Attributes:
        token_budget: at most so many patches, aspect kept; smaller images keep their size.
        longest_side: at most so many pixels a side, aspect kept; smaller images keep their size.
        square: the centre of the image, so many pixels a side; smaller images are enlarged.
        bucket: the centre of the image at the nearest of some aspects: sizes of whole patches,
            each about as large as a square of so many pixels a side (vitok.patches.bucket_sizes);
            smaller images are enlarged.
        adm: the square is made as ADM's evaluations make it, pixel by pixel; otherwise it shows the
            same, but is cropped first, then resized once, and large JPEGs are not decoded whole.
    """

    token_budget: int = 0
    longest_side: int = 0
    square: int = 0
    bucket: Annotated[int, UNLESS_EMPTY] = 0
    adm: Annotated[bool, UNLESS_EMPTY] = False

    def __post_init__(self) -> None:
        if self.adm and not self.square:
            raise ValueError("adm=True says how a square is made; give square")
        given = self._sizes()
        if len(given) != 1 or min(given.values()) < 1:
            raise ValueError(
                f"token_budget={self.token_budget}, longest_side={self.longest_side}, "
                f"square={self.square} and bucket={self.bucket}: give one of them, at least 1"
            )

    @property
    def name(self) -> str:
        """What results call it."""
        [(name, size)] = self._sizes().items()
        return f"{name.replace('_', ' ')} {size}"

    def require_patch(self, patch_size: int) -> None:
        """Check that patches fill what is asked for.

        Raises:
            ValueError: the side of a square or bucket is no multiple of the patch: part of the
                image would be padding.
        """
        side = self.square or self.bucket
        if side % patch_size:
            raise ValueError(
                f"{'square' if self.square else 'bucket'}={side} is no multiple of the model's "
                f"patch of {patch_size} pixels; take {max(1, side // patch_size) * patch_size}"
            )

    def max_tokens(self, patch_size: int) -> int:
        """Return the most patches that an image may have."""
        side = self.longest_side or self.square or self.bucket
        return self.token_budget or num_tokens(side, side, patch_size)

    def size(self, height: int, width: int, patch_size: int) -> tuple[int, int]:
        """Return the pixel size (height, width) at which an image is seen."""
        if self.square:
            return self.square, self.square
        if self.bucket:
            return nearest_bucket(height, width, bucket_sizes(self.bucket, patch_size))
        if self.token_budget:
            return fit_to_budget(
                height, width, patch_size=patch_size, token_budget=self.token_budget
            )
        scale = min(1.0, self.longest_side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def view(
        self, sample_id: int, height: int, width: int, patch_size: int, flip: bool = False
    ) -> SampleView:
        """Return what is seen of a sample of height x width pixels; mirrored, if so asked."""
        size = self.size(height, width, patch_size)
        is_cropped = self.square or self.bucket
        return SampleView(
            sample_id=sample_id,
            epoch=0,
            crop=centre_crop(height, width, size) if is_cropped else (0, 0, height, width),
            size=size,
            tile_position=(0.5, 0.5),
            flip=flip,
            adm=self.adm,
        )

    def views(
        self, records: SampleRecords, patch_size: int, flip: bool = False
    ) -> list[SampleView]:
        """Return what is seen of each of some samples; mirrored, if so asked."""
        sizes = zip(
            records.sample_id.tolist(),
            records.height.tolist(),
            records.width.tolist(),
            strict=True,
        )
        return [self.view(*sample, patch_size, flip) for sample in sizes]

    def _sizes(self) -> dict[str, int]:
        sizes = {
            "token_budget": self.token_budget,
            "longest_side": self.longest_side,
            "square": self.square,
            "bucket": self.bucket,
        }
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True)
class PlannedRow:
    """The views that share a row, before anything of them is read; equal ones load alike.

    Attributes:
        records: where their samples lie.
        row_tokens, max_images, max_seqlen: see PackedRow.
    """

    views: tuple[SampleView, ...]
    row_tokens: int
    max_images: int
    max_seqlen: int
    records: SampleRecords = field(compare=False)


def plan_rows(
    records: SampleRecords, views: Sequence[SampleView], *, patch_size: int, row_tokens: int
) -> list[PlannedRow]:
    """Pack views into as few rows as best-fit finds; all rows have one shape.

    Args:
        records: where the samples of the views lie.
        row_tokens: tokens of a row; as many as the largest view has, if that is more.
    """
    packing = pack_views(views, patch_size=patch_size, row_tokens=row_tokens)
    place = {sample_id: i for i, sample_id in enumerate(records.sample_id.tolist())}
    rows = []
    for members in packing.members:
        packed = tuple(views[i] for i in members)
        rows.append(
            PlannedRow(
                views=packed,
                row_tokens=packing.row_tokens,
                max_images=packing.max_images,
                max_seqlen=packing.max_seqlen,
                records=records.take(sorted({place[view.sample_id] for view in packed})),
            )
        )
    return rows


def load_row(corpus: Corpus, row: PlannedRow, patch_size: int) -> PackedRow:
    """Read and decode the samples of a row, and pack them as planned."""
    (loaded,) = load_rows(
        corpus,
        row.records,
        [list(row.views)],
        step=0,
        patch_size=patch_size,
        row_tokens=row.row_tokens,
        max_images=row.max_images,
        max_seqlen=row.max_seqlen,
    )
    return loaded


def iterate_rows(
    corpus: Corpus,
    records: SampleRecords,
    views: Sequence[SampleView],
    *,
    patch_size: int,
    row_tokens: int,
) -> Iterator[PackedRow]:
    """Plan rows as plan_rows does, and load one after another.

    The memory is that of a row, however many views there are; but a row's images lie anywhere among
    them: give neighbours, a few hundred at a time.
    """
    for row in plan_rows(records, views, patch_size=patch_size, row_tokens=row_tokens):
        yield load_row(corpus, row, patch_size)


@dataclass(frozen=True)
class Packing:
    """Which views share a row, and the one shape that all rows have.

    Attributes:
        members: of each row, as places among the views, ascending.
    """

    members: list[list[int]]
    row_tokens: int
    max_images: int
    max_seqlen: int


def pack_views(views: Sequence[SampleView], *, patch_size: int, row_tokens: int) -> Packing:
    """Pack views into as few rows as best-fit finds; see plan_rows."""
    lengths = [view.num_tokens(patch_size) for view in views]
    row_tokens = max(row_tokens, *lengths)
    rows = pack_best_fit(lengths, row_tokens=row_tokens, max_images=len(views))
    rows.sort(key=lambda members: members[0])
    return Packing(
        members=rows,
        row_tokens=row_tokens,
        max_images=max(len(members) for members in rows),
        max_seqlen=max(lengths),
    )


def load_packing(
    corpus: Corpus,
    records: SampleRecords,
    views: Sequence[SampleView],
    packing: Packing,
    *,
    patch_size: int,
) -> tuple[list[PackedRow], NDArray[np.uint8], list[list[int]], dict[int, str]]:
    """Load all rows of a packing at once: every sample is read once, in the order of the shard.

    Returns:
        the rows, without keys; their tokens [R, T, 3P^2], in one piece; the places among the views
        of what is in each; and why views are unreadable, by their places: these leave their slots
        out.
    """
    decoded = decode_views(corpus, records, list(views))
    rows, found = [], []
    unreadable = {
        i: str(error)
        for i, view in enumerate(views)
        if isinstance(error := decoded[view], UnreadableImage)
    }
    # All rows in one array: who sends them on need not copy them together.
    tokens = np.zeros((len(packing.members), packing.row_tokens, 3 * patch_size**2), np.uint8)
    for number, members in enumerate(packing.members):
        readable = {
            i: pixels for i in members if isinstance(pixels := decoded[views[i]], np.ndarray)
        }
        found.append(list(readable))
        rows.append(
            pack_pixels(
                list(readable.values()),
                tokens[number],
                patch_size=patch_size,
                max_images=packing.max_images,
                max_seqlen=packing.max_seqlen,
            )
        )
    return rows, tokens, found, unreadable
