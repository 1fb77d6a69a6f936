"""From the plan to packed rows in the training workers: Ray Data around pure functions.

A task reads, decodes and packs a few neighbouring steps, and gives every worker its rows of them.
Which worker gets a row changes nothing but the place of the computation: keys, crops and rows of a
step come from the plan alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus import SampleRecords
from pipelines.packed_rows import PackedRow, record_of
from pipelines.plan import Plan, RowShape
from pipelines.reading.decode import UnreadableImage
from pipelines.reading.objects import retry_counts
from pipelines.views import Samples, SampleView, write_patches
from vitok.patches import num_tokens

# Small steps are read several at a time, so that a task is worth its start.
_IMAGES_PER_TASK = 256
# One task plans so many groups of steps in turn, which is worth its start; where a training has
# very many, each plans more: the input blocks of these tasks are all made before the first starts.
_GROUPS_PER_PLANNING = 64
_MAX_INPUT_BLOCKS = 1000
# A task of many large photographs is read in parts, so that it stays small.
_MAX_ENCODED_BYTES = 128 * 2**20
# Rows wait in the object store for this many steps at most, where that is not too little to stream.
_STEPS_AHEAD = 4
_MIN_STORE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Share:
    """What one worker does in one global step, before any pixel is read.

    Attributes:
        rows: the samples of each of its rows.
        records: where these samples lie.
        row_shape: of the step.
        max_seqlen: no image has more tokens.
    """

    step: int
    rows: list[list[SampleView]]
    records: SampleRecords
    row_shape: RowShape
    max_seqlen: int


def load_step(plan: Plan, step: int) -> list[PackedRow]:
    """Read, decode and pack the samples of one global step, in the calling process."""
    (share,) = shares_of_step(plan, step, num_workers=1)
    return load_share(plan, share)


def shares_of_step(plan: Plan, step: int, num_workers: int) -> list[Share]:
    """Plan a step and deal its rows out: row i to worker i mod num_workers.

    Every worker takes part in every collective: all get as many rows, the last ones empty.
    """
    index = plan.stage_index(step)
    planned = plan.step(step)
    place = {sample_id: i for i, sample_id in enumerate(planned.records.sample_id.tolist())}
    passes = -(-len(planned.rows) // num_workers)
    shares = []
    for worker in range(num_workers):
        rows = planned.rows[worker::num_workers]
        rows += [[]] * (passes - len(rows))
        mine = sorted({place[view.sample_id] for row in rows for view in row})
        shares.append(
            Share(
                step=step,
                rows=rows,
                records=planned.records.take(mine),
                row_shape=plan.row_shapes[index],
                max_seqlen=max(plan.stages[index].token_budgets),
            )
        )
    return shares


def load_share(plan: Plan, share: Share) -> list[PackedRow]:
    """Read, decode and pack what a worker does in a step."""
    return load_rows(
        plan.corpus,
        share.records,
        share.rows,
        step=share.step,
        patch_size=plan.patch_size,
        row_tokens=plan.data.row_tokens,
        max_images=share.row_shape.max_images,
        max_seqlen=share.max_seqlen,
    )


def load_rows(
    corpus: Samples,
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
    shown = decode_views(corpus, records, [view for row in rows for view in row])
    texts = corpus.texts(records)

    def load_row(views: list[SampleView]) -> PackedRow:
        readable: list[tuple[NDArray[Any], SampleView, int]] = []
        skipped: list[tuple[str, str, str]] = []
        for view in views:
            index = place[view.sample_id]
            seen = shown[view]
            if isinstance(seen, UnreadableImage):
                shard = corpus.uri(int(records.shard[index]))
                skipped.append((shard, str(records.key[index]), str(seen)))
            else:
                readable.append((seen, view, index))
        values, dtype = corpus.token_format(patch_size)
        row = _blank_row(
            [view.size for _, view, _ in readable],
            np.zeros((row_tokens, values), dtype),
            patch_size=patch_size,
            max_images=max_images,
            max_seqlen=max_seqlen,
        )
        end = 0
        for slot, (seen, view, index) in enumerate(readable):
            start, end = end, end + view.num_tokens(patch_size)
            corpus.write(seen, row.tokens[start:end], patch_size)
            row.tile_position[slot] = view.tile_position
            row.label[slot] = records.label[index]
        indices = [index for _, _, index in readable]
        return dataclasses.replace(
            row,
            step=step,
            keys=[str(records.key[index]) for index in indices],
            skipped=skipped,
            texts=None if texts is None else texts.in_slots(indices, max_images),
        )

    return [load_row(views) for views in rows]


def pack_pixels(
    images: Sequence[NDArray[np.uint8]],
    tokens: NDArray[np.uint8],
    *,
    patch_size: int,
    max_images: int,
    max_seqlen: int,
) -> PackedRow:
    """Pack decoded images [H, W, 3] one after the other; of step 0, without keys and classes.

    Args:
        tokens: [T, 3P^2] zeros, which become the row's; the images have at most T together.
    """
    row = _blank_row(
        [(pixels.shape[0], pixels.shape[1]) for pixels in images],
        tokens,
        patch_size=patch_size,
        max_images=max_images,
        max_seqlen=max_seqlen,
    )
    end = 0
    for pixels in images:
        start, end = end, end + num_tokens(*pixels.shape[:2], patch_size)
        write_patches(pixels, row.tokens[start:end], patch_size)
    return dataclasses.replace(row, keys=[""] * len(images))


def _blank_row(
    sizes: Sequence[tuple[int, int]],
    tokens: NDArray[Any],
    *,
    patch_size: int,
    max_images: int,
    max_seqlen: int,
) -> PackedRow:
    """Return a row of images of these sizes before anything is written into its tokens."""
    image_size = np.zeros((max_images, 2), dtype=np.int32)
    image_size[: len(sizes)] = np.array(sizes).reshape(-1, 2)
    return PackedRow(
        step=0,
        tokens=tokens,
        patch_size=patch_size,
        image_size=image_size,
        tile_position=np.zeros((max_images, 2), dtype=np.float32),
        label=np.full(max_images, -1, dtype=np.int64),
        keys=[],
        skipped=[],
        max_seqlen=max_seqlen,
    )


def decode_views(
    corpus: Samples, records: SampleRecords, views: list[SampleView]
) -> dict[SampleView, NDArray[Any] | UnreadableImage]:
    """Read the samples of views as they lie in the shards, and return what each view sees.

    No more than _MAX_ENCODED_BYTES of what was read are held at a time.
    """
    views_of: dict[int, list[SampleView]] = {}
    for view in views:
        views_of.setdefault(view.sample_id, []).append(view)
    in_order = np.lexsort((records.offset, records.shard))
    part_of = np.cumsum(records.length[in_order]) // _MAX_ENCODED_BYTES
    shown: dict[SampleView, NDArray[Any] | UnreadableImage] = {}
    for number in np.unique(part_of):
        part = records.take(in_order[part_of == number].tolist())
        for sample_id, sample in zip(part.sample_id.tolist(), corpus.read(part), strict=True):
            shown |= corpus.show(sample, views_of[sample_id])
    return shown


def training_dataset(plan: Plan, first_step: int, num_workers: int) -> Any:
    """Return the Ray Dataset of a training from a step on; worker r takes rows r, r + W, ...

    One task at a time plans, step by step, far enough ahead of the many that read and decode what
    it planned. Each record holds the rows of one worker in a few steps; records come in the order
    worker 0, 1, ..., W - 1, and again, which `streaming_split` deals out one by one.
    """
    import pyarrow as pa
    import ray.data

    # Computed once here, it travels with the plan; otherwise every task would compute it again.
    assert plan.row_shapes
    groups = _step_groups(plan, first_step)
    num_blocks = min(-(-len(groups) // _GROUPS_PER_PLANNING), _MAX_INPUT_BLOCKS)
    blocks = np.array_split(groups, num_blocks)

    def plan_groups(batch: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, NDArray[Any]]]:
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            by_step = [shares_of_step(plan, step, num_workers) for step in range(start, stop)]
            by_worker = [list(shares) for shares in zip(*by_step, strict=True)]
            together = _workers_per_task(plan, start, num_workers)
            for worker in range(0, num_workers, together):
                task = np.empty(1, dtype=object)
                task[0] = by_worker[worker : worker + together]
                yield {"task": task}

    def load(batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for by_worker in batch["task"]:
            for shares in by_worker:
                rows = [row for share in shares for row in load_share(plan, share)]
                yield record_of(rows, _new_retries())

    # Not ray.data.range: its read tasks would each take a whole core from the training.
    dataset = ray.data.from_blocks(
        [pa.table({"start": block[:, 0], "stop": block[:, 1]}) for block in blocks]
    )
    # Different resources keep Ray from fusing the two.
    dataset = dataset.map_batches(plan_groups, batch_size=None, num_cpus=0.25, concurrency=1)
    dataset = dataset.map_batches(load, batch_size=None, num_cpus=0.5)
    # `streaming_split` deals out blocks. Only blocks of one record each go round in turn, and Ray
    # joins records into one block until it exceeds this many bytes.
    dataset.context.target_max_block_size = 1
    return dataset


def _step_groups(plan: Plan, first_step: int) -> NDArray[np.int64]:
    """Cut the remaining steps into neighbours that are planned and read together.

    Returns:
        (first step, step after the last) of each, int64 [G, 2]; the steps of one are of one stage,
        and so their rows of one shape.
    """
    groups = []
    end = 0
    for stage in plan.stages:
        begin, end = max(end, first_step), end + stage.steps
        starts = np.arange(begin, end, max(1, _IMAGES_PER_TASK // stage.images_per_step))
        if len(starts):
            groups.append(np.stack([starts, np.append(starts[1:], end)], axis=1))
    return np.concatenate(groups)


def _workers_per_task(plan: Plan, step: int, num_workers: int) -> int:
    """Return for how many workers one task reads: together about _IMAGES_PER_TASK images."""
    images_per_worker = max(1, plan.stage_of(step).images_per_step // num_workers)
    return min(num_workers, max(1, _IMAGES_PER_TASK // images_per_worker))


def execution_options(plan: Plan) -> Any:
    """Return the Ray Data options that deal records out in order, a bounded way ahead."""
    from ray.data import ExecutionOptions, ExecutionResources

    options = ExecutionOptions(preserve_order=True)
    step_bytes = max(
        shape.num_rows * (plan.row_bytes + shape.max_images * plan.corpus.text_bytes)
        for shape in plan.row_shapes
    )
    options.resource_limits = ExecutionResources(
        object_store_memory=max(_MIN_STORE_BYTES, _STEPS_AHEAD * step_bytes)
    )
    return options


def object_store_bytes() -> float:
    """Return the bytes in use in the object stores of all nodes of the connected cluster."""
    import ray

    name = "object_store_memory"
    return ray.cluster_resources().get(name, 0.0) - ray.available_resources().get(name, 0.0)


_counted_retries: dict[str, int] = {}


def _new_retries() -> dict[str, int]:
    """Return the retries of this process since the last call, by reason."""
    now = retry_counts()
    new = {reason: count - _counted_retries.get(reason, 0) for reason, count in now.items()}
    _counted_retries.update(now)
    return {reason: count for reason, count in new.items() if count}
