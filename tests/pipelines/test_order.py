from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.order import (
    MIXTURE_BLOCK,
    hash_of,
    mixture_places,
    mixture_shares,
    permute,
    sample_order,
)
from tests.pipelines.plain_order import WORD, plain_epoch, plain_hash, plain_permute


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000) | st.integers(1, 9), st.integers(0, WORD - 1))
@example(1, 0)
@example(1024, 1)
@example(1025, 1)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    permuted = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(permuted.tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 10**12), st.lists(st.integers(0, WORD - 1), min_size=1, max_size=8), st.data()
)
def test_permute_equals_the_cipher_on_python_integers(
    size: int, keys: list[int], data: st.DataObject
) -> None:
    index = [data.draw(st.integers(0, size - 1)) for _ in keys]
    permuted = permute(np.array(index), size, np.array(keys, np.uint64))
    assert permuted.tolist() == [
        plain_permute(i, size, key) for i, key in zip(index, keys, strict=True)
    ]


def test_permutations_of_different_keys_are_different_and_even():
    size, num_keys = 7, 2000
    orders = Counter()
    first = Counter()
    for key in range(num_keys):
        order = permute(np.arange(size), size, np.full(size, plain_hash(key), np.uint64))
        orders[tuple(order.tolist())] += 1
        first[int(order[0])] += 1
    assert len(orders) > 1500  # 2000 draws of 5040 orders hit about 1650 of them
    assert all(abs(first[i] - num_keys / size) < 60 for i in range(size))  # 4 deviations


@pytest.mark.parametrize("num_samples", [1, 5, 43, 64, 403])
@pytest.mark.parametrize("chunk_samples", [1, 4, 16, 1000])
def test_every_epoch_holds_every_sample_once_and_keeps_neighbours_together(
    num_samples: int, chunk_samples: int
) -> None:
    kept = {"num_samples": num_samples, "chunk_samples": chunk_samples, "seed": 3}
    epochs, ids = sample_order(np.arange(5 * num_samples), **kept)
    assert epochs.tolist() == [epoch for epoch in range(5) for _ in range(num_samples)]
    rounds = ids.reshape(5, num_samples)
    for once in rounds:
        assert sorted(once.tolist()) == list(range(num_samples))
        jumps = int((np.diff(once) != 1).sum())
        assert jumps <= num_samples // chunk_samples
    if num_samples // chunk_samples >= 10:
        orders = {tuple(once.tolist()) for once in rounds}
        for other in ({"seed": 4}, {"source": 1}):
            orders.add(tuple(sample_order(np.arange(num_samples), **(kept | other))[1].tolist()))
        orders.add(tuple(range(num_samples)))
        assert len(orders) == 8
        if num_samples % chunk_samples:
            last = num_samples - 1
            assert len({once.tolist().index(last) for once in rounds}) > 1, "the tail moves too"


@settings(max_examples=50, deadline=None)
@given(
    epoch=st.integers(0, 5) | st.integers(10**12, 10**13),
    num_samples=st.integers(1, 100),
    chunk_samples=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    source=st.integers(0, 5),
    places=st.lists(st.integers(0, 99), min_size=1, max_size=20),
)
def test_sample_order_at_any_place_equals_the_epoch_written_out(
    epoch: int, num_samples: int, chunk_samples: int, seed: int, source: int, places: list[int]
) -> None:
    places = [place % num_samples for place in places]
    epochs, ids = sample_order(
        np.array(places) + epoch * num_samples,
        num_samples=num_samples,
        chunk_samples=chunk_samples,
        seed=seed,
        source=source,
    )
    order = plain_epoch(num_samples, chunk_samples, seed, source, epoch)
    assert epochs.tolist() == [epoch] * len(places)
    assert ids.tolist() == [order[place] for place in places]


def test_an_order_of_a_seed_never_changes_between_versions():
    """A resumed run would use samples twice if it did."""
    _, ids = sample_order(np.arange(25), num_samples=25, chunk_samples=2, seed=1)
    assert ids.tolist() == EXPECTED_ORDER
    source, place = mixture_places(4090, 12, shares=mixture_shares([3, 1]), seed=1)
    assert list(zip(source.tolist(), place.tolist(), strict=True)) == EXPECTED_MIXTURE


EXPECTED_ORDER = [
    14,
    15,
    22,
    23,
    2,
    3,
    4,
    5,
    20,
    21,
    8,
    9,
    24,
    16,
    17,
    0,
    1,
    6,
    7,
    10,
    11,
    18,
    19,
    12,
    13,
]
EXPECTED_MIXTURE = [
    (0, 3068),
    (1, 1022),
    (0, 3069),
    (0, 3070),
    (1, 1023),
    (0, 3071),
    (0, 3072),
    (0, 3073),
    (0, 3074),
    (1, 1024),
    (1, 1025),
    (0, 3075),
]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1.0], [4096]),
        ([1, 1], [2048, 2048]),
        ([1, 1, 1], [1366, 1365, 1365]),
        ([0.7, 0.2, 0.1], [2867, 819, 410]),
        ([4095, 1], [4095, 1]),
    ],
)
def test_shares_are_the_weights_to_one_part_in_a_block(weights: list, shares: list) -> None:
    assert mixture_shares(weights) == shares
    assert sum(shares) == MIXTURE_BLOCK


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [([], "must be positive"), ([1, 0], "must be positive"), ([1e6, 1], "under 1/4096 of all")],
)
def test_weights_that_give_a_source_nothing_are_refused(weights: list, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        mixture_shares(weights)


def test_every_block_of_a_mixture_holds_the_sources_in_exact_proportion_and_shuffled():
    shares = mixture_shares([5, 2, 1])
    source, place = mixture_places(0, 3 * MIXTURE_BLOCK, shares=shares, seed=7)
    blocks = source.reshape(3, MIXTURE_BLOCK)
    for block in blocks:
        assert np.bincount(block).tolist() == shares
    assert not np.array_equal(blocks[0], blocks[1])
    # Within a few hundred positions the proportions are near the weights, too.
    for start in range(0, MIXTURE_BLOCK, 512):
        counts = np.bincount(blocks[0][start : start + 512], minlength=3) / 512
        assert np.abs(counts - np.array([5, 2, 1]) / 8).max() < 0.1
    for number in range(3):
        assert place[source == number].tolist() == list(range(3 * shares[number]))


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 5 * MIXTURE_BLOCK),
    count=st.integers(1, 2 * MIXTURE_BLOCK),
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
)
def test_a_mixture_is_found_at_any_place_without_walking_there(
    start: int, count: int, weights: list[int], seed: int
) -> None:
    shares = mixture_shares(weights)
    source, place = mixture_places(start, count, shares=shares, seed=seed)
    all_sources, all_places = mixture_places(0, start + count, shares=shares, seed=seed)
    assert np.array_equal(source, all_sources[start:])
    assert np.array_equal(place, all_places[start:])


def test_hashes_equal_those_on_python_integers():
    parts = [(1, 2, 3), (2**40, 0), (WORD - 1,)]
    for given_parts in parts:
        arrays = [np.array([part], np.uint64) for part in given_parts]
        assert hash_of(*arrays).tolist() == [plain_hash(*given_parts)]
