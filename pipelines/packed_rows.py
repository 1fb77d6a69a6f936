"""Packed rows on their way: what a worker gets of a step, and the records that carry it there."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.views import Texts
from vitok.packed import PackedTokens, layout_of
from vitok.patches import normalize_patches


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One packed row on the host.

    Attributes:
        step: the global step that it belongs to.
        tokens: [T, D], patches [T, 3P^2] uint8 or latents; a tensor where it lies on a device
            already.
        patch_size: pixels along each side of the patch that a token stands for.
        image_size: [S, 2] int32, pixels (height, width); 0 in unused slots.
        tile_position: [S, 2] float32 in [0, 1).
        label: [S] int64, class of each image; -1 for none, and in unused slots.
        keys: keys of the images, in the order in which they lie in the row.
        skipped: (shard, key, reason) of the samples that should be here but were unreadable.
        max_seqlen: no image has more tokens.
        texts: of each slot; None for samples without texts.
    """

    step: int
    tokens: NDArray[Any] | torch.Tensor
    patch_size: int
    image_size: NDArray[np.int32]
    tile_position: NDArray[np.float32]
    label: NDArray[np.int64]
    keys: list[str]
    skipped: list[tuple[str, str, str]]
    max_seqlen: int
    texts: Texts | None = None

    @property
    def image_tokens(self) -> list[int]:
        """Tokens of each image slot of the row; 0 in unused ones."""
        return (-(-self.image_size // self.patch_size)).prod(axis=1).tolist()

    @property
    def num_tokens(self) -> int:
        """Real tokens of the row."""
        return sum(self.image_tokens)

    def layout(self, device: torch.device) -> PackedTokens:
        """Return where the images lie in the row, on the device; without tokens."""
        used = self.image_size[self.image_size[:, 0] > 0]
        return layout_of(
            [(int(height), int(width)) for height, width in used],
            patch_size=self.patch_size,
            row_tokens=len(self.tokens),
            max_images=len(self.image_size),
            max_seqlen=self.max_seqlen,
        ).to(device)

    def to_packed(self, device: torch.device) -> tuple[PackedTokens, torch.Tensor]:
        """Return a row of patches as pixels in [-1, 1] on the device, and its tile positions."""
        layout = self.layout(device)
        patches = torch.as_tensor(self.tokens).to(device, non_blocking=True)
        pixels = normalize_patches(patches, layout.patch_coord, layout.token_image_size())
        position = torch.from_numpy(self.tile_position).to(device, non_blocking=True)
        return layout.with_tokens(pixels), position


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of one worker in one global step.

    Attributes:
        retries: requests to the object store that had to be repeated, by reason, since the record
            before; a process that reads counts them once.
    """

    step: int
    rows: list[PackedRow]
    retries: dict[str, int]


def empty_row(row: PackedRow) -> PackedRow:
    """Return a row of the same shape that holds nothing."""
    return dataclasses.replace(
        row,
        tokens=np.zeros_like(row.tokens),
        image_size=np.zeros_like(row.image_size),
        tile_position=np.zeros_like(row.tile_position),
        label=np.full_like(row.label, -1),
        keys=[],
        skipped=[],
        texts=row.texts and row.texts.in_slots([], len(row.image_size)),
    )


def record_of(rows: list[PackedRow], retries: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Return one record of the dataset: one worker's rows of the steps of a task."""
    names = [json.dumps({"keys": row.keys, "skipped": row.skipped}) for row in rows]
    record = {
        "step": np.array([[row.step for row in rows]]),
        "tokens": np.stack([row.tokens for row in rows])[None],
        "patch_size": np.array([rows[0].patch_size]),
        "image_size": np.stack([row.image_size for row in rows])[None],
        "tile_position": np.stack([row.tile_position for row in rows])[None],
        "label": np.stack([row.label for row in rows])[None],
        "max_seqlen": np.array([[row.max_seqlen for row in rows]]),
        "names": np.array([json.dumps(names)]),
        "retries": np.array([json.dumps(retries)]),
    }
    if texts := [row.texts for row in rows if row.texts is not None]:
        record["texts"] = np.stack([np.asarray(text.values) for text in texts])[None]
        record["text_tokens"] = np.stack([text.num_tokens for text in texts])[None]
    return record


def iterate_steps(
    records: Iterable[dict[str, NDArray[Any]]], first_step: int
) -> Iterator[StepRows]:
    """Turn a worker's records into its steps, and check that none is missing or doubled.

    Args:
        records: batches of one record each, as `iter_batches(batch_size=None)` gives them.

    Raises:
        RuntimeError: a step arrives out of turn.
    """
    expected = first_step
    for record in records:
        rows = _rows_of_record(record)
        retries = json.loads(str(record["retries"][0]))
        for step in dict.fromkeys(row.step for row in rows):
            if step != expected:
                raise RuntimeError(f"data of step {step} arrived where step {expected} was due")
            yield StepRows(step, [row for row in rows if row.step == step], retries)
            expected += 1
            retries = {}


def _rows_of_record(record: dict[str, NDArray[Any]]) -> list[PackedRow]:
    names = [json.loads(text) for text in json.loads(str(record["names"][0]))]
    return [
        PackedRow(
            step=int(record["step"][0][i]),
            # Blocks in the object store are read-only, which torch would warn about; a row is
            # copied once here, while the step before it computes.
            tokens=np.array(record["tokens"][0][i]),
            patch_size=int(record["patch_size"][0]),
            image_size=np.array(record["image_size"][0][i]),
            tile_position=np.array(record["tile_position"][0][i]),
            label=np.array(record["label"][0][i]),
            keys=of_row["keys"],
            skipped=[(shard, key, reason) for shard, key, reason in of_row["skipped"]],
            max_seqlen=int(record["max_seqlen"][0][i]),
            texts=Texts(np.array(record["texts"][0][i]), np.array(record["text_tokens"][0][i]))
            if "texts" in record
            else None,
        )
        for i, of_row in enumerate(names)
    ]
