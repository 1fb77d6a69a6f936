"""From the plan to packed rows in the training workers: Ray Data around pure functions.

A task reads, decodes and packs a few neighbouring steps, and gives every worker its rows of them.
Which worker gets a row changes nothing but the place of the computation: keys, crops and rows of a
step come from the plan alone.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus import SampleRecords
from pipelines.decode import UnreadableImage, decode_rgb
from pipelines.mixture import Corpus
from pipelines.plan import Plan, SampleView, StepPlan
from vitok.packed import PackedTokens, layout_of
from vitok.patches import grid_size, normalize_patches

# Small steps are read several at a time, so that a task is worth its start.
_IMAGES_PER_TASK = 256
# Ray's input blocks are made before the first task starts: there must not be millions of them.
_MAX_INPUT_BLOCKS = 1000


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One packed row on the host.

    Attributes:
        step: the global step that it belongs to.
        patches: [T, 3P^2] uint8.
        image_size: [S, 2] int32, pixels (height, width); 0 in unused slots.
        tile_position: [S, 2] float32 in [0, 1).
        keys: keys of the images, in the order in which they lie in the row.
        skipped: (shard, key, reason) of the samples that should be here but were unreadable.
        max_seqlen: no image has more tokens.
    """

    step: int
    patches: NDArray[np.uint8]
    image_size: NDArray[np.int32]
    tile_position: NDArray[np.float32]
    keys: list[str]
    skipped: list[tuple[str, str, str]]
    max_seqlen: int

    @property
    def patch_size(self) -> int:
        """Pixels along each side of a patch."""
        return isqrt(self.patches.shape[1] // 3)

    @property
    def num_tokens(self) -> int:
        """Real tokens of the row."""
        return int((-(-self.image_size // self.patch_size)).prod(axis=1).sum())

    def to_packed(self, device: torch.device) -> tuple[PackedTokens, torch.Tensor]:
        """Return the row as pixels in [-1, 1] on the device, and its tile positions [S, 2]."""
        used = self.image_size[self.image_size[:, 0] > 0]
        layout = layout_of(
            [(int(height), int(width)) for height, width in used],
            patch_size=self.patch_size,
            row_tokens=len(self.patches),
            max_images=len(self.image_size),
            max_seqlen=self.max_seqlen,
        ).to(device)
        patches = torch.from_numpy(self.patches).to(device, non_blocking=True)
        pixels = normalize_patches(patches, layout.patch_coord, layout.token_image_size())
        position = torch.from_numpy(self.tile_position).to(device, non_blocking=True)
        return layout.with_tokens(pixels), position


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of one worker in one global step."""

    step: int
    rows: list[PackedRow]


def load_step(plan: Plan, step: int) -> list[PackedRow]:
    """Read, decode and pack the samples of one global step, in the calling process."""
    return _load_worker(plan, step, plan.step(step), worker=0, num_workers=1)


def _load_worker(
    plan: Plan, step: int, planned: StepPlan, worker: int, num_workers: int
) -> list[PackedRow]:
    """Load the rows of a planned step that one worker takes."""
    index = plan.stage_index(step)
    rows = planned.rows[worker::num_workers]
    # Every worker takes part in every collective: one that has no row gets an empty one.
    rows += [[]] * (-(-len(planned.rows) // num_workers) - len(rows))
    place = {sample_id: i for i, sample_id in enumerate(planned.records.sample_id.tolist())}
    mine = sorted({place[view.sample_id] for row in rows for view in row})
    return load_rows(
        plan.corpus,
        planned.records.take(mine),
        rows,
        step=step,
        patch_size=plan.patch_size,
        row_tokens=plan.data.row_tokens,
        max_images=plan.row_shapes[index].max_images,
        max_seqlen=max(plan.stages[index].token_budgets),
    )


def load_rows(
    corpus: Corpus,
    records: SampleRecords,
    rows: list[list[SampleView]],
    *,
    step: int,
    patch_size: int,
    row_tokens: int,
    max_images: int,
    max_seqlen: int,
) -> list[PackedRow]:
    """Read and decode samples, and pack them as planned; what is unreadable leaves its slot out.

    Args:
        records: where the samples of all rows lie.
        rows: the samples of each row, in order; together they have at most row_tokens tokens.
    """
    place = {sample_id: i for i, sample_id in enumerate(records.sample_id.tolist())}
    contents = corpus.read(records)

    def load_row(views: list[SampleView]) -> PackedRow:
        patches = np.zeros((row_tokens, 3 * patch_size**2), dtype=np.uint8)
        image_size = np.zeros((max_images, 2), dtype=np.int32)
        tile_position = np.zeros((max_images, 2), dtype=np.float32)
        keys: list[str] = []
        skipped: list[tuple[str, str, str]] = []
        end = 0
        for view in views:
            index = place[view.sample_id]
            key = str(records.key[index])
            try:
                pixels = decode_rgb(contents[index], crop=view.crop, size=view.size)
            except UnreadableImage as error:
                skipped.append((corpus.uri(int(records.shard[index])), key, str(error)))
                continue
            start, end = end, end + view.num_tokens(patch_size)
            write_patches(pixels, patches[start:end], patch_size)
            image_size[len(keys)] = view.size
            tile_position[len(keys)] = view.tile_position
            keys.append(key)
        return PackedRow(
            step=step,
            patches=patches,
            image_size=image_size,
            tile_position=tile_position,
            keys=keys,
            skipped=skipped,
            max_seqlen=max_seqlen,
        )

    return [load_row(views) for views in rows]


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


def training_dataset(plan: Plan, first_step: int, num_workers: int) -> Any:
    """Return the Ray Dataset of a training from a step on; worker r takes rows r, r + W, ...

    Each of its records holds the rows of one worker in a few steps; records come in the order
    worker 0, 1, ..., W - 1, and again, which `streaming_split` deals out one by one.
    """
    import ray.data

    # Computed once here, it travels with the plan; otherwise every task would compute it again.
    assert plan.row_shapes
    tasks = _tasks(plan, first_step, num_workers)
    num_tasks = len(tasks)

    def load(batch: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, NDArray[Any]]]:
        for number in batch["id"].tolist():
            steps, workers = tasks[number]
            planned = {step: plan.step(step) for step in steps}
            for worker in workers:
                rows: list[PackedRow] = []
                for step in steps:
                    rows += _load_worker(plan, step, planned[step], worker, num_workers)
                yield _record(rows)

    dataset = ray.data.range(num_tasks, override_num_blocks=min(num_tasks, _MAX_INPUT_BLOCKS))
    if num_tasks > _MAX_INPUT_BLOCKS:
        # With preserved order a task's rows wait for all tasks before it: tasks must stay small.
        dataset = dataset.repartition(target_num_rows_per_block=1)
    dataset = dataset.map_batches(load, batch_size=None, num_cpus=0.5)
    # `streaming_split` deals out blocks. Only blocks of one record each go round in turn, and Ray
    # joins records into one block until it exceeds this many bytes.
    dataset.context.target_max_block_size = 1
    return dataset


def _tasks(plan: Plan, first_step: int, num_workers: int) -> list[tuple[range, range]]:
    """Cut the remaining steps into tasks: (steps, workers), in the order of their records.

    A task holds at most about _IMAGES_PER_TASK images, or one worker's part of one step; its rows
    are of one stage, and so of one shape.
    """
    tasks: list[tuple[range, range]] = []
    end = 0
    for stage in plan.stages:
        start, end = end, end + stage.steps
        size = max(1, _IMAGES_PER_TASK // stage.images_per_step)
        together = num_workers if stage.images_per_step <= _IMAGES_PER_TASK else 1
        for step in range(max(start, first_step), end, size):
            steps = range(step, min(step + size, end))
            tasks += [
                (steps, range(worker, worker + together))
                for worker in range(0, num_workers, together)
            ]
    return tasks


def execution_options() -> Any:
    """Return the Ray Data options that deal records out in order."""
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


def _record(rows: list[PackedRow]) -> dict[str, NDArray[Any]]:
    """Return one record of the dataset: one worker's rows of the steps of a task."""
    texts = [json.dumps({"keys": row.keys, "skipped": row.skipped}) for row in rows]
    return {
        "step": np.array([[row.step for row in rows]]),
        "patches": np.stack([row.patches for row in rows])[None],
        "image_size": np.stack([row.image_size for row in rows])[None],
        "tile_position": np.stack([row.tile_position for row in rows])[None],
        "max_seqlen": np.array([[row.max_seqlen for row in rows]]),
        "texts": np.array([json.dumps(texts)]),
    }


def empty_row(row: PackedRow) -> PackedRow:
    """Return a row of the same shape that holds nothing."""
    return dataclasses.replace(
        row,
        patches=np.zeros_like(row.patches),
        image_size=np.zeros_like(row.image_size),
        tile_position=np.zeros_like(row.tile_position),
        keys=[],
        skipped=[],
    )


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
        for step in dict.fromkeys(row.step for row in rows):
            if step != expected:
                raise RuntimeError(f"data of step {step} arrived where step {expected} was due")
            yield StepRows(step, [row for row in rows if row.step == step])
            expected += 1


def _rows_of_record(record: dict[str, NDArray[Any]]) -> list[PackedRow]:
    texts = [json.loads(text) for text in json.loads(str(record["texts"][0]))]
    return [
        PackedRow(
            step=int(record["step"][0][i]),
            # Blocks in the object store are read-only, which torch would warn about; a row is
            # copied once here, while the step before it computes.
            patches=np.array(record["patches"][0][i]),
            image_size=np.array(record["image_size"][0][i]),
            tile_position=np.array(record["tile_position"][0][i]),
            keys=text["keys"],
            skipped=[(shard, key, reason) for shard, key, reason in text["skipped"]],
            max_seqlen=int(record["max_seqlen"][0][i]),
        )
        for i, text in enumerate(texts)
    ]
