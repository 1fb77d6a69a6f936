"""Which images share a row: best-fit decreasing bin packing. Pure functions."""

from bisect import bisect_left, insort
from collections.abc import Sequence


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
