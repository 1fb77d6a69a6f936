"""Whatever the corpus, the schedule, the workers and the interruptions: the order is the plan's."""

import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.data
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.corpus import Manifest, SampleRecords
from pipelines.ingest import training_dataset
from pipelines.mixture import Corpus
from pipelines.order import mixture_shares
from pipelines.packed_rows import PackedRow, StepRows, iterate_steps
from pipelines.plan import DataConfig, Plan, Stage

PATCH_SIZE = 4
SIZES = ((3, 9), (4, 4), (7, 21), (12, 12), (16, 5), (20, 30))  # (height, width) of images
# Images of a plan: more would cost time and show nothing new.
MAX_IMAGES = 1000


class TinyManifest(Manifest):
    """Shards that do not exist; the key of a sample says which one it is."""

    def records(self, sample_ids: np.ndarray) -> SampleRecords:
        sample_ids = np.asarray(sample_ids, np.int64)
        shard, index_in_shard = self.locate(sample_ids)
        sizes = np.array(SIZES, np.int32)[sample_ids % len(SIZES)]
        key = [f"{self.path}-{s}-{i}" for s, i in zip(shard, index_in_shard, strict=True)]
        return SampleRecords(
            sample_id=sample_ids,
            shard=shard,
            key=np.array(key, dtype=object),
            offset=index_in_shard * 1000,
            length=np.full(len(sample_ids), 1000),
            height=sizes[:, 0],
            width=sizes[:, 1],
            label=np.full(len(sample_ids), -1),
        )


class TinyCorpus(Corpus):
    """A corpus whose images are made when they are read."""

    def read(self, records: SampleRecords) -> list[bytes]:
        sizes = zip(records.height.tolist(), records.width.tolist(), strict=True)
        return [png_of(height, width) for height, width in sizes]


@functools.cache
def png_of(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (height, width, 0)).save(stream, format="PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class LocalDataset:
    """What ingest uses of a Ray Dataset, lazily in this process: a record of a task is a block."""

    blocks: Iterator[dict[str, Any]]
    context: SimpleNamespace

    @classmethod
    def from_blocks(cls, tables: list[Any]) -> "LocalDataset":
        assert tables and all(len(table) for table in tables)
        columns = (
            {name: table[name].to_numpy() for name in table.column_names} for table in tables
        )
        return cls(columns, SimpleNamespace())

    def map_batches(
        self, function: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], **_: object
    ) -> "LocalDataset":
        mapped = (record for block in self.blocks for record in function(block))
        return LocalDataset(mapped, self.context)


def consume(plan: Plan, first_step: int, last_step: int, num_workers: int) -> list[list[StepRows]]:
    """Deal the records of a training's dataset out in turn, as `streaming_split` does in order."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray.data, "from_blocks", LocalDataset.from_blocks)
        dataset = training_dataset(plan, first_step, num_workers)
    queues: list[list[dict[str, Any]]] = [[] for _ in range(num_workers)]

    def records(worker: int) -> Iterator[dict[str, Any]]:
        while True:
            while not queues[worker]:
                for queue in queues:
                    record = next(dataset.blocks, None)
                    if record is None:
                        assert queue is queues[0], "every worker gets as many records"
                        return
                    queue.append(record)
            yield queues[worker].pop(0)

    return [
        list(islice(iterate_steps(records(worker), first_step), last_step - first_step))
        for worker in range(num_workers)
    ]


@dataclass(frozen=True)
class Journey:
    """A plan, and its way over several sets of workers: (first step, workers) of each."""

    plan: Plan
    legs: tuple[tuple[int, int], ...]


def corpus_of(shards: list[list[int]], weights: list[float]) -> TinyCorpus:
    manifests = tuple(
        TinyManifest(
            path=Path(name),
            uris=[f"{name}/{i}.tar" for i in range(len(sizes))],
            num_samples_per_shard=np.array(sizes),
            first_sample=np.cumsum([0, *sizes]),
            shard_digests=np.array(["0" * 64] * len(sizes)),
        )
        for name, sizes in zip("ab", shards, strict=False)
    )
    return TinyCorpus(
        names=("a", "b")[: len(shards)],
        manifests=manifests,
        shares=tuple(mixture_shares(weights)),
    )


@st.composite
def journeys(draw: st.DrawFn) -> Journey:
    num_sources = draw(st.sampled_from([1, 2, 2, 2]))
    shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)
    shards = [draw(shard_sizes) for _ in range(num_sources)]
    weights = [draw(st.floats(0.2, 1)) for _ in range(num_sources)]
    corpus = corpus_of(shards, weights)
    row_tokens = draw(st.sampled_from([1, 7, 40, 64, 300]))
    budgets = st.lists(st.integers(1, min(row_tokens, 40)), min_size=1, max_size=3)
    # Enough for whole epochs of the sources, where that is not too much.
    epoch = max(ceil(sum(weights) / w * sum(s)) for w, s in zip(weights, shards, strict=True))
    num_images = min(MAX_IMAGES, draw(st.integers(1, 2)) * epoch + draw(st.integers(0, 40)))
    stages = []
    num_stages = draw(st.integers(1, 3))
    for _ in range(num_stages):
        images_per_step = draw(st.one_of(st.integers(1, 40), st.integers(1, 600)))
        steps = max(1, min(12, ceil(num_images / num_stages / images_per_step)))
        stage = Stage(
            steps=steps, images_per_step=images_per_step, token_budgets=tuple(draw(budgets))
        )
        if draw(st.booleans()):
            # Too few rows lower the budgets, too many stay empty in part.
            fewest = ceil(images_per_step / row_tokens)
            stage = replace(stage, rows_per_step=draw(st.integers(fewest, fewest + 12)))
        stages.append(stage)
    plan = Plan(
        corpus=corpus,
        data=DataConfig(row_tokens=row_tokens, chunk_samples=draw(st.integers(1, 50))),
        stages=tuple(stages),
        patch_size=PATCH_SIZE,
        seed=draw(st.integers(0, 2**31)),
    )
    starts = {0, *draw(st.lists(st.integers(0, plan.num_steps - 1), max_size=4))}
    return Journey(plan, tuple((start, draw(st.integers(1, 8))) for start in sorted(starts)))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(journeys())
def test_any_plan_arrives_in_its_order_through_any_workers_and_resumptions(
    journey: Journey,
) -> None:
    plan = journey.plan
    arrived: dict[int, list[list[PackedRow]]] = {}
    ends = [*journey.legs[1:], (plan.num_steps, 0)]
    for (first_step, num_workers), (last_step, _) in zip(journey.legs, ends, strict=True):
        by_worker = consume(plan, first_step, last_step, num_workers)
        for parts in zip(*by_worker, strict=True):
            assert len({part.step for part in parts}) == 1
            assert parts[0].step not in arrived
            arrived[parts[0].step] = [part.rows for part in parts]
    assert list(arrived) == list(range(plan.num_steps))

    other = pickle.loads(pickle.dumps(plan))
    uses: list[tuple[int, int]] = []  # (epoch, sample)
    for step in reversed(range(plan.num_steps)):
        planned = other.step(step)
        keys = dict(
            zip(planned.records.sample_id.tolist(), planned.records.key.tolist(), strict=True)
        )
        of_workers = arrived[step]
        assert len({len(rows) for rows in of_workers}) == 1, "every worker runs as many passes"
        rows = [rows[i] for i in range(len(of_workers[0])) for rows in of_workers]
        expected = [[keys[view.sample_id] for view in row] for row in planned.rows]
        expected += [[]] * (-len(expected) % len(of_workers))
        assert [row.keys for row in rows] == expected
        shape = plan.row_shapes[plan.stage_index(step)]
        assert len(planned.rows) == shape.num_rows
        for row in rows:
            assert row.skipped == []
            assert row.num_tokens <= plan.data.row_tokens == len(row.tokens)
            assert len(row.keys) == (row.image_size[:, 0] > 0).sum() <= shape.max_images
        views = [view for row in planned.rows for view in row]
        assert len(views) == plan.stage_of(step).images_per_step
        uses += [(view.epoch, view.sample_id) for view in views]

    assert max(Counter(uses).values()) == 1
    bounds = plan.corpus.first_sample.tolist()
    for start, end in pairwise(bounds):
        mine = [use for use in uses if start <= use[1] < end]
        per_epoch = Counter(epoch for epoch, _ in mine)
        num_epochs, rest = divmod(len(mine), end - start)
        # Whole epochs with every sample, for no sample is used twice in one; then the beginning
        # of the next.
        whole = {epoch: end - start for epoch in range(num_epochs)}
        assert per_epoch == (whole | {num_epochs: rest} if rest else whole)
        event(f"whole epochs of a source: {min(num_epochs, 3)}")
