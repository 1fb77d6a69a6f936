from math import ceil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.packing import pack_best_fit, pack_evenly


def plain_best_fit_decreasing(lengths: list[int], row_tokens: int, max_images: int) -> list:
    """Put each image, longest first, where the least room is left over; look at every row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best, least = None, row_tokens + 1
        for row in rows:
            free = row_tokens - sum(lengths[i] for i in row)
            if len(row) < max_images and lengths[index] <= free < least:
                best, least = row, free
        if best is None:
            best = []
            rows.append(best)
        best.append(index)
    return [sorted(row) for row in rows]


def fewest_rows(lengths: list[int], row_tokens: int) -> int:
    """Try every distribution of a few images."""

    def search(remaining: list[int], free: list[int], best: int) -> int:
        if not remaining:
            return len(free)
        for place in range(len(free)):
            if free[place] >= remaining[0]:
                rest = [f - remaining[0] * (i == place) for i, f in enumerate(free)]
                best = min(best, search(remaining[1:], rest, best))
        if len(free) + 1 < best:
            best = min(best, search(remaining[1:], [*free, row_tokens - remaining[0]], best))
        return best

    return search(lengths, [], len(lengths) + 1)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int, int]:
    row_tokens = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(1, row_tokens), max_size=40))
    return lengths, row_tokens, draw(st.integers(1, 12))


@settings(max_examples=200, deadline=None)
@given(packings())
@example(([], 5, 3))
@example(([3, 3, 2, 2, 2], 6, 2))
def test_packing_equals_a_search_through_all_rows(packing: tuple[list[int], int, int]) -> None:
    lengths, row_tokens, max_images = packing
    rows = pack_best_fit(lengths, row_tokens=row_tokens, max_images=max_images)

    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and row for row in rows)
    assert all(sum(lengths[index] for index in row) <= row_tokens for row in rows)
    assert all(len(row) <= max_images for row in rows)
    assert rows == plain_best_fit_decreasing(lengths, row_tokens, max_images)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(5, 40))
def test_packing_needs_at_most_eleven_ninths_of_the_fewest_rows(
    data: st.DataObject, row_tokens: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, row_tokens), min_size=1, max_size=8))
    rows = pack_best_fit(lengths, row_tokens=row_tokens, max_images=len(lengths))
    # Johnson 1974; the constant 6/9 is Dosa's of 2007.
    assert fewest_rows(lengths, row_tokens) <= len(rows)
    assert len(rows) <= (11 * fewest_rows(lengths, row_tokens) + 6) / 9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 256), min_size=1, max_size=200), st.sampled_from([256, 1000, 2048]))
def test_all_rows_but_one_are_filled_up_to_the_longest_image(
    lengths: list[int], row_tokens: int
) -> None:
    rows = pack_best_fit(lengths, row_tokens=row_tokens, max_images=len(lengths))
    assert len(rows) >= ceil(sum(lengths) / row_tokens)
    # A row is opened only for an image that fits into no other.
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert sum(fill + max(lengths) > row_tokens for fill in filled) >= len(rows) - 1


def test_the_slots_of_a_row_limit_it_like_its_tokens():
    assert pack_best_fit([1] * 7, row_tokens=100, max_images=3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert pack_best_fit([1] * 7, row_tokens=3, max_images=100) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("length", [0, 11, -1])
def test_an_image_that_no_row_holds_is_named(length: int) -> None:
    with pytest.raises(
        ValueError, match=rf"image 2 has {length} tokens, a row holds 1 to 10; lower the token"
    ):
        pack_best_fit([4, 10, length], row_tokens=10, max_images=5)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=40),
    num_rows=st.integers(1, 8),
    row_tokens=st.integers(30, 120),
    max_images=st.integers(1, 20),
)
@example(lengths=[], num_rows=3, row_tokens=30, max_images=1)
@example(lengths=[30, 30], num_rows=1, row_tokens=30, max_images=2)
@example(lengths=[30, 1], num_rows=1, row_tokens=30, max_images=2)
def test_even_rows_hold_every_image_once_within_limits_and_differ_by_one_image_at_most(
    lengths: list[int], num_rows: int, row_tokens: int, max_images: int
) -> None:
    rows = pack_evenly(lengths, num_rows=num_rows, row_tokens=row_tokens, max_images=max_images)
    if rows is None:
        # Only where space is short: no row could be told to be full otherwise.
        least_free = num_rows * row_tokens - sum(lengths)
        assert least_free < num_rows * max(lengths) or len(lengths) > num_rows * max_images / 2
        return
    assert len(rows) == num_rows
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and len(row) <= max_images for row in rows)
    tokens = [sum(lengths[i] for i in row) for row in rows]
    assert max(tokens) <= row_tokens
    if all(len(row) < max_images for row in rows) and lengths:
        assert max(tokens) - min(tokens) <= max(lengths)


def test_even_rows_mix_long_and_short_images_and_best_fit_rows_do_not():
    lengths = [256] * 64 + [64] * 64
    even = pack_evenly(lengths, num_rows=5, row_tokens=4200, max_images=30)
    assert even is not None
    squares = [sum(lengths[i] ** 2 for i in row) for row in even]
    assert max(squares) < 1.1 * min(squares)
    tight = pack_best_fit(lengths, row_tokens=4200, max_images=30)
    squares = [sum(lengths[i] ** 2 for i in row) for row in tight]
    assert max(squares) > 5 * min(squares)
