import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ingest
from pipelines.corpus import SampleRecords, build_manifest, write_shards
from pipelines.mixture import Corpus, Source
from pipelines.packed_rows import StepRows, iterate_steps, record_of
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.reading.decode import decode_rgb
from vitok.packed import unpack_images

STAGES = (
    Stage(steps=11, images_per_step=8, token_budgets=(16,)),
    Stage(steps=4, images_per_step=5, token_budgets=(36, 64)),
)


@pytest.fixture(scope="module")
def plan(sample_manifests: tuple[Path, Path]) -> Plan:
    """Plan a mixture of two sources."""
    weights = zip(("many", "few"), sample_manifests, (3.0, 1.0), strict=True)
    return Plan(
        corpus=Corpus.mix([Source(name=n, manifest=str(m), weight=w) for n, m, w in weights]),
        data=DataConfig(row_tokens=64, chunk_samples=4),
        stages=STAGES,
        patch_size=16,
        seed=3,
    )


def consume(plan: Plan, first_step: int, num_workers: int) -> list[list[StepRows]]:
    """Read a training's dataset on concurrent consumers, as the training workers do."""
    dataset = ingest.training_dataset(plan, first_step, num_workers)
    dataset.context.execution_options = ingest.execution_options(plan)
    iterators = dataset.streaming_split(num_workers, equal=True)
    steps: list[list[StepRows]] = [[] for _ in range(num_workers)]

    def read(worker: int) -> None:
        records = iterators[worker].iter_batches(batch_size=None, prefetch_batches=1)
        steps[worker] = list(iterate_steps(records, first_step))

    threads = [threading.Thread(target=read, args=(worker,)) for worker in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return steps


@pytest.mark.parametrize(
    ("num_workers", "first_step", "images_per_task"),
    [(2, 5, 16), (8, 9, 7)],  # several steps a task, and parts of one
)
def test_every_step_has_the_planned_keys_in_order_on_any_number_of_workers(
    ray_cluster: None,
    plan: Plan,
    num_workers: int,
    first_step: int,
    images_per_task: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingest, "_IMAGES_PER_TASK", images_per_task)
    arrived = consume(plan, first_step, num_workers)
    for worker_steps in arrived:
        assert [step.step for step in worker_steps] == list(range(first_step, plan.num_steps))
    for index, step in enumerate(range(first_step, plan.num_steps)):
        expected = [row.keys for row in ingest.load_step(plan, step)]
        by_worker = [arrived[worker][index].rows for worker in range(num_workers)]
        assert len({len(rows) for rows in by_worker}) == 1, "every worker runs as many passes"
        in_turn = [rows[i].keys for i in range(len(by_worker[0])) for rows in by_worker]
        assert in_turn[: len(expected)] == expected
        assert all(keys == [] for keys in in_turn[len(expected) :])
        assert any(expected)


@pytest.mark.parametrize("max_blocks", [3, 1000])
def test_several_tasks_plan_in_order(
    ray_cluster: None, plan: Plan, max_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_IMAGES_PER_TASK", 1)
    monkeypatch.setattr(ingest, "_GROUPS_PER_PLANNING", 4)
    monkeypatch.setattr(ingest, "_MAX_INPUT_BLOCKS", max_blocks)
    (steps,) = consume(plan, 0, 1)
    assert len(steps) == 15
    for step in steps:
        expected = [row.keys for row in ingest.load_step(plan, step.step)]
        assert [row.keys for row in step.rows] == expected


def test_a_step_out_of_turn_is_refused(plan: Plan) -> None:
    records = [record_of(ingest.load_step(plan, step), {}) for step in (2, 3)]
    assert [step.step for step in iterate_steps(records, 2)] == [2, 3]
    with pytest.raises(RuntimeError, match="data of step 2 arrived where step 1 was due"):
        list(iterate_steps(records, 1))


def test_packed_pixels_are_the_planned_crops(plan: Plan) -> None:
    step = 12
    planned = plan.step(step)
    contents = dict(
        zip(
            planned.records.sample_id.tolist(),
            plan.corpus.read(planned.records),
            strict=True,
        )
    )
    rows = ingest.load_step(plan, step)
    compared = 0
    for row, views in zip(rows, planned.rows, strict=True):
        packed, position = row.to_packed(torch.device("cpu"))
        assert row.num_tokens == int(packed.num_tokens())
        images = unpack_images(packed, plan.patch_size)
        for image, view, where in zip(images, views, position.tolist(), strict=False):
            pixels = decode_rgb(contents[view.sample_id], crop=view.crop, size=view.size)
            expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
            torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(where, view.tile_position, atol=1e-6)
            compared += 1
    assert compared == STAGES[1].images_per_step


def test_an_unreadable_sample_leaves_its_slot_out_and_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "image.jpg"
    samples: list[dict[str, Any]] = []
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
        data = path.read_bytes()
        # The header survives, so that the manifest lists it; the pixels are cut off.
        samples.append({"__key__": f"k{index}", "jpg": data[:900] if index == 2 else data})
    shards = write_shards(samples, tmp_path / "shards", "bad", 6)
    manifest = build_manifest(shards, tmp_path / "manifest")
    assert manifest.num_samples == 6
    plan = Plan(
        corpus=Corpus.of(manifest),
        data=DataConfig(row_tokens=64),
        stages=(Stage(steps=1, images_per_step=6, token_budgets=(16,)),),
        patch_size=16,
        seed=0,
    )
    rows = ingest.load_step(plan, 0)
    skipped = [entry for row in rows for entry in row.skipped]
    assert [(shard, key) for shard, key, _ in skipped] == [(shards[0], "k2")]
    assert "truncated" in skipped[0][2]
    keys = [key for row in rows for key in row.keys]
    assert sorted(keys) == ["k0", "k1", "k3", "k4", "k5"]
    assert sum(int((row.image_size[:, 0] > 0).sum()) for row in rows) == 5
    whole = replace(rows[0], keys=[])
    assert whole.num_tokens == rows[0].num_tokens


@pytest.mark.parametrize("max_bytes", [1, 5000, 20_000])
def test_rows_do_not_depend_on_how_many_images_are_read_at_a_time(
    plan: Plan, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ingest.load_step(plan, 12)
    parts: list[int] = []
    read = Corpus.read

    def reading(corpus: Corpus, records: SampleRecords) -> list[bytes]:
        parts.append(int(records.length.sum()))
        return read(corpus, records)

    monkeypatch.setattr(ingest, "_MAX_ENCODED_BYTES", max_bytes)
    monkeypatch.setattr(Corpus, "read", reading)
    rows = ingest.load_step(plan, 12)
    assert len(parts) > 1
    largest = max(plan.step(12).records.length)
    assert max(parts) < max_bytes + largest
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys == wanted.keys
        assert np.array_equal(row.tokens, wanted.tokens)
