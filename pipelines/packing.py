"""Which images share a row: as few rows as possible, or rows that are alike. Pure functions."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heapreplace


def pack_best_fit(lengths: Sequence[int], *, row_tokens: int, max_images: int) -> list[list[int]]:
    """Distribute images over as few rows as best-fit decreasing finds.

    Args:
        lengths: tokens of each image.
        row_tokens: tokens that a row holds.
        max_images: images that a row holds.

    Returns:
        rows of indices into `lengths`; rows in the order they were opened, the indices of a row
        ascending. The same input gives the same rows on every machine.

    Raises:
        ValueError: an image is longer than a row, or has no tokens; max_images is below 1.
    """
    if max_images < 1:
        raise ValueError(f"{max_images=} must be at least 1")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 1 <= length <= row_tokens:
            raise ValueError(
                f"image {index} has {length} tokens, a row holds 1 to {row_tokens}; lower the "
                "token budget or raise row_tokens"
            )
        place = bisect_left(open_rows, (length, -1))
        if place == len(open_rows):
            rows.append([])
            free, row = row_tokens, len(rows) - 1
        else:
            free, row = open_rows.pop(place)
        rows[row].append(index)
        if len(rows[row]) < max_images and free > length:
            insort(open_rows, (free - length, row))
    for members in rows:
        members.sort()
    return rows


def pack_evenly(
    lengths: Sequence[int], *, num_rows: int, row_tokens: int, max_images: int
) -> list[list[int]] | None:
    """Distribute images over a given number of rows so that all rows have much the same to do.

    The longest image first, each goes to the row that has the fewest tokens (Graham 1969, "Bounds
    on multiprocessing timing anomalies"). Rows come out with nearly equal numbers of tokens and,
    because long and short images spread alike, nearly equal costs of attention.

    Args:
        lengths: tokens of each image.
        row_tokens, max_images: that a row holds.

    Returns:
        num_rows rows of ascending indices into `lengths`; None if this way they do not fit.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    open_rows = [(0, row) for row in range(num_rows)]  # (tokens, row), a heap
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not open_rows:
            return None
        tokens, row = open_rows[0]
        tokens += lengths[index]
        if tokens > row_tokens:
            return None
        rows[row].append(index)
        if len(rows[row]) < max_images:
            heapreplace(open_rows, (tokens, row))
        else:
            heappop(open_rows)
    for members in rows:
        members.sort()
    return rows
