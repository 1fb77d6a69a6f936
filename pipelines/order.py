"""The order of samples: pure functions of sizes, weights and a seed, found at any place at once.

Every source of a corpus has a stream of its own, epoch after epoch, each a keyed permutation of
chunks of neighbouring samples. A mixture deals these streams out in blocks that hold every source
in exact proportion. Nothing is walked through and nothing is stored.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Positions over which the weights of a mixture hold exactly; they are rounded to this many parts.
MIXTURE_BLOCK = 4096

_FEISTEL_ROUNDS = 6
_PURPOSE_CHUNKS, _PURPOSE_REMAINDER, _PURPOSE_MIXTURE = 1, 4, 5


def mixture_shares(weights: Sequence[float]) -> list[int]:
    """Return how many of MIXTURE_BLOCK positions each source gets: largest remainders.

    Raises:
        ValueError: a weight is not positive, or too small to get a position.
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights={list(weights)} must be positive; leave out what is not used")
    exact = [weight / sum(weights) * MIXTURE_BLOCK for weight in weights]
    shares = [int(part) for part in exact]
    largest = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in largest[: MIXTURE_BLOCK - sum(shares)]:
        shares[i] += 1
    if min(shares) == 0:
        raise ValueError(
            f"weights={list(weights)}: the least is under 1/{MIXTURE_BLOCK} of all; raise it or "
            "leave the source out"
        )
    return shares


def mixture_places(
    start: int, count: int, *, shares: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which source stands at places start to start + count, and the place in its stream.

    Each block of MIXTURE_BLOCK places is a shuffle of its own of the sources, each as often as its
    share; a source's stream goes on where the block before left it.

    Args:
        shares: from `mixture_shares`; a single source takes every place.

    Returns:
        (source, place in the source's stream) of each, int64 [count].
    """
    if len(shares) == 1:
        return np.zeros(count, np.int64), np.arange(start, start + count, dtype=np.int64)
    share = np.asarray(shares, dtype=np.int64)
    sources, places = [], []
    for block in range(start // MIXTURE_BLOCK, (start + count - 1) // MIXTURE_BLOCK + 1):
        shuffle = np.argsort(hash_of(seed, _PURPOSE_MIXTURE, block, np.arange(MIXTURE_BLOCK)))
        source = np.repeat(np.arange(len(share)), share)[shuffle]
        by_source = np.argsort(source, kind="stable")
        rank = np.empty(MIXTURE_BLOCK, np.int64)
        rank[by_source] = np.concatenate([np.arange(n) for n in share])
        inside = slice(max(0, start - block * MIXTURE_BLOCK), start + count - block * MIXTURE_BLOCK)
        sources.append(source[inside])
        places.append((block * share[source] + rank)[inside])
    return np.concatenate(sources), np.concatenate(places)


def sample_order(
    place: NDArray[np.int64], *, num_samples: int, chunk_samples: int, seed: int, source: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the samples at places of a source's endless stream of epochs.

    Every epoch holds every sample once: the chunks in an order of its own, the remainder that
    fills no chunk somewhere between two of them.

    Args:
        place: any places, in any order.

    Returns:
        (epoch, sample) of each, int64.
    """
    epoch, place = np.divmod(np.asarray(place, dtype=np.int64), num_samples)
    num_chunks, remainder = divmod(num_samples, chunk_samples)
    if num_chunks == 0:
        return epoch, place
    gap = hash_of(seed, _PURPOSE_REMAINDER, source, epoch) % np.uint64(num_chunks + 1)
    begin = gap.astype(np.int64) * chunk_samples
    in_remainder = (place >= begin) & (place < begin + remainder)
    chunk, offset = np.divmod(place - remainder * (place >= begin + remainder), chunk_samples)
    # Places of the remainder have no chunk of their own; any will do.
    key = hash_of(seed, _PURPOSE_CHUNKS, source, epoch)
    chunk = permute(np.minimum(chunk, num_chunks - 1), num_chunks, key)
    return epoch, np.where(
        in_remainder, num_chunks * chunk_samples + place - begin, chunk * chunk_samples + offset
    )


def permute(index: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply a keyed permutation of range(size) to each index, in constant memory.

    A balanced Feistel network over the next even power of two, walked until the result is in
    range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: values in range(size).
        key: one for each index; equal keys mean the same permutation.
    """
    half_bits = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    value = index.astype(np.uint64)
    pending = np.ones(len(value), dtype=bool)
    while pending.any():
        left, right = value[pending] >> shift, value[pending] & mask
        for round_number in range(_FEISTEL_ROUNDS):
            mixed = hash_of(key[pending], round_number, right) & mask
            left, right = right, left ^ mixed
        value[pending] = (left << shift) | right
        pending = value >= size
    return value.astype(np.int64)


def hash_of(*parts: int | NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix integers into 64 random bits, elementwise (splitmix64, Steele et al. 2014).

    Spelled out rather than taken from a generator, whose streams may change with its version.
    """
    with np.errstate(over="ignore"):
        state: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
        for part in parts:
            state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return numbers in [0, 1) from 64 random bits each."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
