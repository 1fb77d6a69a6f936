"""A data plan read through Ray Data from a store that fails, while tasks and consumers die."""

import io
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import Manifest, SampleRecords, index_shard, write_manifest, write_shards
from pipelines.ingest import execution_options, load_step, training_dataset
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow, StepRows, iterate_steps
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.reading import objects, stores
from tests.pipelines.faulty_store import FAULTS, FaultyProxy, rarely, running

NUM_SAMPLES, SAMPLES_PER_SHARD = 384, 64
# Whole epochs: 1, 2 and 2. Several steps make a task in the first stage, one in the second; in the
# third a task is one worker's part of a step.
STAGES = (
    Stage(steps=4, images_per_step=96, token_budgets=(4, 16)),
    Stage(steps=4, images_per_step=192, token_budgets=(16,)),
    Stage(steps=2, images_per_step=384, token_budgets=(2, 9)),
)
# Slow bytes beside all that goes wrong at once: none at all until the client gives up, or one by
# one, which is no failure.
SLOW = "timeout"
ALL_FAULTS = {**FAULTS, "stalled": SLOW, "trickled": "no retry"}
JOIN_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, eq=False)
class FarCorpus(Corpus):
    """A corpus whose tasks, in processes of their own, find the store and its limits in here.

    Attributes:
        endpoint: of the store.
        max_attempts: before a read fails.
        fatal_samples: a task that has read one of them kills its process, each once.
        deaths: folder with a file named after each fatal sample that killed.
    """

    endpoint: str
    max_attempts: int
    fatal_samples: frozenset[int]
    deaths: Path

    def read(self, records: SampleRecords) -> list[bytes]:
        with pytest.MonkeyPatch.context() as patched:
            for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
                patched.delenv(name, raising=False)
            patched.setenv("AWS_ENDPOINT_URL", self.endpoint)
            patched.setenv("AWS_ACCESS_KEY_ID", "anyone")
            patched.setenv("AWS_SECRET_ACCESS_KEY", "anything")
            patched.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patched.setattr(objects, "MAX_ATTEMPTS", self.max_attempts)
            patched.setattr(objects, "FIRST_PAUSE_S", 0.01)
            # A process keeps its client, and this with it, but no other test has this endpoint.
            patched.setattr(stores, "READ_TIMEOUT_S", 2.0)
            images = super().read(records)
        for sample_id in self.fatal_samples.intersection(records.sample_id.tolist()):
            try:
                (self.deaths / str(sample_id)).touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return images


@dataclass(frozen=True)
class Store:
    """The corpus on a disk, and behind a proxy in a store; one plan, wherever it is read."""

    proxy: FaultyProxy
    near: Manifest
    far: Manifest

    def local_plan(self) -> Plan:
        return plan_of(Corpus.of(self.near))

    def plan(self, deaths: Path, fatal: Sequence[int] = (), max_attempts: int = 20) -> Plan:
        corpus = FarCorpus(
            **vars(Corpus.of(self.far)),
            endpoint=self.proxy.url,
            max_attempts=max_attempts,
            fatal_samples=frozenset(fatal),
            deaths=deaths,
        )
        return plan_of(corpus)


def plan_of(corpus: Corpus) -> Plan:
    data = DataConfig(row_tokens=128, chunk_samples=8)
    return Plan(corpus=corpus, data=data, stages=STAGES, patch_size=8, seed=11)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server], see extra dev")
    import boto3

    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)

    def encode() -> bytes:
        height, width = rng.integers(16, 40, 2)
        stream = io.BytesIO()
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(stream, format="JPEG")
        return stream.getvalue()

    samples = ({"__key__": f"{i:04d}", "jpg": encode()} for i in range(NUM_SAMPLES))
    paths = write_shards(samples, folder / "shards", "train", SAMPLES_PER_SHARD)
    indexes = [index_shard(path) for path in paths]
    near = write_manifest(indexes, folder / "near")
    far = write_manifest(
        [replace(index, uri=f"s3://ordered/{Path(index.uri).name}") for index in indexes],
        folder / "far",
    )
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="anyone",
        aws_secret_access_key="anything",
    )
    client.create_bucket(Bucket="ordered")
    for path in paths:
        client.put_object(Bucket="ordered", Key=Path(path).name, Body=Path(path).read_bytes())
    proxy = FaultyProxy(f"http://{host}:{port}")
    with running(proxy):
        yield Store(proxy, near, far)
    server.stop()


def consume(plan: Plan, first_step: int, num_steps: Sequence[int]) -> list[list[StepRows]]:
    """Read on concurrent consumers, each of which stops after so many steps.

    Raises:
        ExceptionGroup: what the consumers raised.
    """
    num_workers = len(num_steps)
    dataset = training_dataset(plan, first_step, num_workers)
    options = execution_options(plan)
    # Planning and three readers: a machine for tests is busy with starting more processes.
    options.resource_limits = options.resource_limits.copy(cpu=1.75)
    dataset.context.execution_options = options
    iterators = dataset.streaming_split(num_workers, equal=True)
    arrived: list[list[StepRows]] = [[] for _ in range(num_workers)]
    errors: list[Exception] = []

    def read(worker: int) -> None:
        records = iterators[worker].iter_batches(batch_size=None, prefetch_batches=1)
        try:
            with closing(iterate_steps(records, first_step)) as steps:
                for step in steps:
                    arrived[worker].append(step)
                    if len(arrived[worker]) == num_steps[worker]:
                        return
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=read, args=(worker,), daemon=True) for worker in range(num_workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive(), f"no end after {JOIN_TIMEOUT_S} s"
    if errors:
        raise ExceptionGroup("consumers", errors)
    return arrived


def in_turn(parts: Sequence[StepRows]) -> list[PackedRow]:
    """Put the rows of all workers of one step back into the order of the step."""
    assert len({part.step for part in parts}) == 1
    assert len({len(part.rows) for part in parts}) == 1, "every worker runs as many passes"
    return [part.rows[i] for i in range(len(parts[0].rows)) for part in parts]


def keys_of(plan: Plan, step: int) -> list[list[str]]:
    planned = plan.step(step)
    columns = planned.records.sample_id.tolist(), planned.records.key.tolist()
    key_of = dict(zip(*columns, strict=True))
    return [[key_of[view.sample_id] for view in row] for row in planned.rows]


def sorted_keys(rows: Sequence[PackedRow]) -> list[str]:
    return sorted(key for row in rows for key in row.keys)


def with_one_at_the_start(
    schedule: Callable[[str], str | None],
) -> Callable[[str], str | None]:
    first = iter(["truncated"])
    return lambda path: next(first, None) or schedule(path)


@pytest.mark.parametrize(
    ("fraction", "num_deaths", "worlds"), [(0.01, 0, (2, 1, 4)), (0.1, 1, (8, 3))]
)
def test_a_faulty_store_and_kills_change_no_step_on_any_number_of_workers(
    ray_cluster: None,
    store: Store,
    tmp_path: Path,
    fraction: float,
    num_deaths: int,
    worlds: tuple[int, ...],
) -> None:
    rng = random.Random(num_deaths)
    store.proxy.reset()
    schedule = rarely(fraction, 1, ALL_FAULTS)
    local = store.local_plan()
    # Every epoch reads it, so that some task surely dies of it.
    fatal = rng.sample(range(NUM_SAMPLES), num_deaths)
    plan = store.plan(tmp_path, fatal)
    stops = sorted(rng.sample(range(1, plan.num_steps - 2), len(worlds) - 1))
    steps: dict[int, list[PackedRow]] = {}
    retries: Counter[str] = Counter()
    for leg, num_workers in enumerate(worlds):
        store.proxy.schedule = with_one_at_the_start(schedule)
        first_step = len(steps)
        last = stops[leg] if leg < len(stops) else plan.num_steps
        # A kill finds the workers at different steps; what only some of them have is lost again.
        num_steps = [
            min(last - first_step + rng.randint(0, 2), plan.num_steps - first_step)
            for _ in range(num_workers)
        ]
        arrived = consume(plan, first_step, num_steps)
        assert [len(parts) for parts in arrived] == num_steps
        for parts in zip(*arrived, strict=False):
            steps[parts[0].step] = in_turn(parts)
        for part in (part for parts in arrived for part in parts):
            retries.update(part.retries)

    assert list(steps) == list(range(plan.num_steps)), "no step is missing, doubled or out of turn"
    for step, rows in steps.items():
        expected = load_step(local, step)
        assert [row.keys for row in expected] == keys_of(local, step)
        for row, wanted in zip(rows, expected, strict=False):
            assert (row.keys, row.skipped) == (wanted.keys, [])
            assert np.array_equal(row.tokens, wanted.tokens)
            assert np.array_equal(row.image_size, wanted.image_size)
        assert all(row.keys == [] for row in rows[len(expected) :])
    everything = sorted(f"{i:04d}" for i in range(NUM_SAMPLES))
    stream = [key for step in steps for key in sorted_keys(steps[step])]
    num_epochs, remainder = divmod(len(stream), NUM_SAMPLES)
    assert (num_epochs, remainder) == (5, 0)
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == everything

    assert {path.name for path in tmp_path.iterdir()} == {str(sample) for sample in fatal}
    assert store.proxy.injected.total() > 0.5 * fraction * len(store.proxy.requests) > 0
    assert len(store.proxy.injected) >= (8 if fraction > 0.05 else 2)
    by_reason: Counter[str] = Counter()
    for fault, count in store.proxy.injected.items():
        by_reason[ALL_FAULTS[fault]] += count
    assert retries.total() > 0
    # What was read and never arrived took its count along; a busy store may be slow by itself.
    assert all(count <= by_reason[reason] for reason, count in retries.items() if reason != SLOW)


def test_a_shard_that_stays_broken_is_named_to_every_consumer(
    ray_cluster: None, store: Store, tmp_path: Path
) -> None:
    name = "train-000003.tar"
    assert f"s3://ordered/{name}" in store.far.uris
    store.proxy.reset(lambda path: "503" if name in path else None)
    plan = store.plan(tmp_path, max_attempts=3)
    with pytest.raises(ExceptionGroup) as failure:
        consume(plan, 0, [plan.num_steps] * 2)
    assert len(failure.value.exceptions) == 2
    for error in failure.value.exceptions:
        assert f"s3://ordered/{name}: bytes " in str(error)
        assert "could not be read in 3 attempts" in str(error)
        assert "try again when the store is well" in str(error)
    assert store.proxy.injected["503"] >= 3
