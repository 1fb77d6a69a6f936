import os
import time

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.evaluation.pool import Slice, SliceQueues, WorkerPool, cut
from pipelines.evaluation.subjects import SubjectFacts
from pipelines.evaluation.worker import EvaluatedImage, SliceResult
from pipelines.whole_images import Transform

HANGS, DIES = 15, 11
TRANSFORM = Transform(square=16)


@ray.remote(num_cpus=0.1, max_restarts=0)
class StandIn:
    """Takes its time for one image, and dies of another."""

    def load(self) -> tuple[SubjectFacts, dict[str, str]]:
        return SubjectFacts(compression_ratio=12.0), {"dino": "d"}

    def evaluate(
        self,
        sample_ids: NDArray[np.int64],
        transform: Transform,
        following: NDArray[np.int64] | None,
    ) -> SliceResult:
        assert transform == TRANSFORM
        assert following is None or not set(following) & set(sample_ids)
        if HANGS in sample_ids:
            time.sleep(60)
        if DIES in sample_ids:
            os._exit(1)
        return SliceResult([EvaluatedImage(f"k{i}", num_tokens=i) for i in sample_ids.tolist()])


@ray.remote(num_cpus=0.1, max_restarts=0)
class DiesAsItLoads:
    """Has no memory for its weights."""

    def load(self) -> None:
        os._exit(1)


def test_slices_hold_every_sample_once_in_order() -> None:
    slices = cut(np.arange(10, 17), [f"k{i}" for i in range(10, 17)], 3)
    assert [part.keys for part in slices] == [
        ["k10", "k11", "k12"],
        ["k13", "k14", "k15"],
        ["k16"],
    ]
    assert np.concatenate([part.sample_ids for part in slices]).tolist() == list(range(10, 17))
    alone = slices[0].alone()
    assert [(part.sample_ids.tolist(), part.keys) for part in alone] == [
        ([10], ["k10"]),
        ([11], ["k11"]),
        ([12], ["k12"]),
    ]


@settings(deadline=None)
@given(
    count=st.integers(0, 40),
    num_workers=st.integers(1, 5),
    calls=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=80),
)
def test_every_slice_is_handed_out_once_and_mostly_as_expected(
    count: int, num_workers: int, calls: list[tuple[int, bool]]
) -> None:
    slices = cut(np.arange(count), [f"k{i}" for i in range(count)], 1)
    waiting = SliceQueues(slices, num_workers)
    handed: list[str] = []
    expected: dict[int, int] = {}
    failed: set[str] = set()
    turns = [(worker % num_workers, fails) for worker, fails in calls]
    turns += [(i % num_workers, False) for i in range(2 * count)]
    num_surprises = 0
    for worker, fails in turns:
        if not waiting:
            break
        part, following = waiting.take(worker)
        if worker in expected:
            num_surprises += expected[worker] != part.sample_ids[0]
        if following is None:
            expected.pop(worker, None)
        else:
            expected[worker] = int(following[0])
        if fails and part.keys[0] not in failed:
            failed |= set(part.keys)
            waiting.put_back(worker, part.alone())
            assert waiting.take(worker)[0].keys == part.keys, "before all others"
        handed += part.keys
    assert not waiting
    assert sorted(handed) == sorted(f"k{i}" for i in range(count))
    assert num_surprises <= num_workers, "only the last of a worker is taken from it"


def test_what_hangs_or_dies_costs_one_image_and_the_rest_is_evaluated(ray_cluster: None) -> None:
    pool = WorkerPool(StandIn.remote, num_workers=2, timeout_s=1.0)
    assert pool.facts.compression_ratio == 12
    assert pool.digests == {"dino": "d"}
    slices = cut(np.arange(16), [f"k{i}" for i in range(16)], 3)
    seen: dict[str, EvaluatedImage] = {}
    for part, result in pool.evaluate(slices, TRANSFORM):
        assert [image.key for image in result.images] == part.keys
        seen |= {image.key: image for image in result.images}
    assert len(seen) == 16
    assert seen.pop(f"k{HANGS}").status == "timed out after 1 s"
    assert seen.pop(f"k{DIES}").status.startswith("the process died: ")
    assert all(
        image.status == "ok" and key == f"k{image.num_tokens}" for key, image in seen.items()
    )
    again = list(pool.evaluate([Slice(np.array([1]), ["k1"])], TRANSFORM))
    assert [result.images[0].key for _, result in again] == ["k1"], "the pool goes on"
    pool.close()


def test_a_process_that_dies_as_it_loads_is_no_endless_loop(ray_cluster: None) -> None:
    with pytest.raises(RuntimeError, match="a process died while it loaded weights"):
        WorkerPool(DiesAsItLoads.remote, num_workers=1, timeout_s=1.0)
