import math
from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitok.patches import (
    bucket_sizes,
    centre_crop,
    fit_to_budget,
    grid_coordinates,
    grid_size,
    nearest_bucket,
    normalize_patches,
    pad_to_patch,
    patchify,
    unpatchify,
)

SIDES = st.integers(1, 5000) | st.integers(1, 40)
PATCHES = st.sampled_from([1, 2, 7, 14, 16, 32])
BUDGETS = st.integers(1, 40) | st.sampled_from([64, 100, 255, 256])


def best_size(height: int, width: int, patch_size: int, token_budget: int) -> tuple[int, int]:
    """Search every scale at which one side is a whole number of patches, exactly."""
    scales = [
        Fraction(patches * patch_size, side)
        for side in (height, width)
        for patches in range(1, token_budget + 1)
    ]
    fitting = [
        scale
        for scale in scales
        if ceil(height * scale / patch_size) * ceil(width * scale / patch_size) <= token_budget
    ]
    scale = max(fitting)
    sides = [max(1, floor(side * scale + Fraction(1, 2))) for side in (height, width)]
    return sides[0], sides[1]


@settings(max_examples=100, deadline=None)
@given(height=SIDES, width=SIDES, patch_size=PATCHES, token_budget=BUDGETS)
@example(height=1, width=5000, patch_size=16, token_budget=256)
@example(height=5000, width=1, patch_size=16, token_budget=1)
@example(height=1, width=1, patch_size=1, token_budget=1)
@example(height=427, width=640, patch_size=16, token_budget=256)
def test_size_rule_equals_a_search_over_all_scales(height, width, patch_size, token_budget):
    best = best_size(height, width, patch_size, token_budget)
    rows, columns = ceil(height / patch_size), ceil(width / patch_size)
    kept = (height, width) if rows * columns <= token_budget else best

    limits = {"patch_size": patch_size, "token_budget": token_budget}
    assert fit_to_budget(height, width, **limits, enlarge=True) == best
    assert fit_to_budget(height, width, **limits) == kept


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, patch_size=PATCHES, token_budget=BUDGETS, enlarge=st.booleans())
@example(height=1, width=5000, patch_size=16, token_budget=7, enlarge=True)
@example(height=5000, width=1, patch_size=16, token_budget=1, enlarge=True)
def test_size_rule_keeps_budget_and_aspect(height, width, patch_size, token_budget, enlarge):
    new_height, new_width = fit_to_budget(
        height, width, patch_size=patch_size, token_budget=token_budget, enlarge=enlarge
    )
    rows, columns = grid_size(new_height, new_width, patch_size)

    assert min(new_height, new_width) >= 1
    assert 1 <= rows * columns <= token_budget
    if not enlarge:
        assert new_height <= height
        assert new_width <= width
    if min(new_height, new_width) > 1:
        # Each side is off by at most half a pixel.
        assert abs(new_height * width - new_width * height) <= (height + width) / 2


@pytest.mark.parametrize("patches", [1, 2, 3, 8, 16, 31])
def test_buckets_are_the_largest_grids_of_the_area_and_aspect(patches):
    sides = range(1, 2 * patches + 1)
    allowed = {
        (rows, columns)
        for rows in sides
        for columns in sides
        if rows * columns <= patches**2 and Fraction(1, 2) <= Fraction(rows, columns) <= 2
    }
    largest = [
        grid
        for grid in sorted(allowed)
        if not any(grid[0] <= rows and grid[1] <= columns for rows, columns in allowed - {grid})
    ]
    assert bucket_sizes(14 * patches, 14) == tuple((14 * r, 14 * c) for r, c in largest)
    assert (patches, patches) in largest
    assert {(columns, rows) for rows, columns in largest} == set(largest)


def test_buckets_of_256_pixels():
    halves = [(176, 352), (192, 336), (208, 304), (224, 288), (240, 272)]
    others = [(width, height) for height, width in reversed(halves)]
    assert bucket_sizes(256, 16) == (*halves, (256, 256), *others)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, patches=st.integers(1, 32), patch_size=PATCHES)
@example(height=512, width=511, patches=16, patch_size=16)
@example(height=4, width=5, patches=2, patch_size=16)
def test_an_image_goes_to_the_bucket_nearest_in_log_aspect(height, width, patches, patch_size):
    buckets = bucket_sizes(patches * patch_size, patch_size)
    found = nearest_bucket(height, width, buckets)

    # Of two products a / b >= 1, as |log(a / b)| is then the distance, exactly.
    distances = {
        bucket: max(ratio := Fraction(height * bucket[1], width * bucket[0]), 1 / ratio)
        for bucket in buckets
    }
    least = min(distances.values())
    assert found == next(bucket for bucket in buckets if distances[bucket] == least)
    by_logarithm = [abs(math.log(height / width) - math.log(h / w)) for h, w in buckets]
    assert by_logarithm[buckets.index(found)] == pytest.approx(min(by_logarithm), abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, size=st.tuples(st.integers(1, 512), st.integers(1, 512)))
@example(height=1, width=5000, size=(352, 176))
@example(height=5000, width=1, size=(176, 352))
@example(height=301, width=200, size=(256, 256))
def test_centre_crop_is_the_largest_middle_part_of_the_aspect(height, width, size):
    top, left, crop_height, crop_width = centre_crop(height, width, size)
    assert 1 <= crop_height <= height
    assert 1 <= crop_width <= width
    assert crop_height == height or crop_width == width
    assert (top, left) == ((height - crop_height) // 2, (width - crop_width) // 2)
    scale = Fraction(size[0], size[1])
    if height < width * scale:
        assert crop_width == 1 or abs(crop_width - height / scale) <= Fraction(1, 2)
    else:
        assert crop_height == 1 or abs(crop_height - width * scale) <= Fraction(1, 2)
    side = min(height, width)
    assert centre_crop(height, width, (7, 7))[2:] == (side, side)


@settings(max_examples=50, deadline=None)
@given(height=SIDES, width=SIDES, patch_size=PATCHES, enlarge=st.booleans())
def test_size_rule_never_shrinks_when_the_budget_grows(height, width, patch_size, enlarge):
    sizes = [
        fit_to_budget(height, width, patch_size=patch_size, token_budget=budget, enlarge=enlarge)
        for budget in range(1, 60)
    ]
    heights, widths = zip(*sizes, strict=True)
    assert list(heights) == sorted(heights)
    assert list(widths) == sorted(widths)


def test_an_image_is_enlarged_only_when_asked():
    limits = {"patch_size": 16, "token_budget": 256}
    assert fit_to_budget(30, 40, **limits) == (30, 40)
    assert fit_to_budget(30, 40, **limits, enlarge=True) == (216, 288)  # 14 x 18 patches
    assert fit_to_budget(256, 256, **limits) == (256, 256)
    assert fit_to_budget(257, 257, **limits) == (256, 256)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 5, 16, 256), "an image of 0 x 5 pixels has no pixels; drop it"),
        ((5, -1, 16, 256), "an image of 5 x -1 pixels has no pixels; drop it"),
        ((5, 5, 0, 256), "patch_size=0 and token_budget=256 must be at least 1"),
        ((5, 5, 16, 0), "patch_size=16 and token_budget=0 must be at least 1"),
    ],
)
def test_size_rule_refuses_what_has_no_size(arguments, sentence):
    height, width, patch_size, token_budget = arguments
    with pytest.raises(ValueError, match=sentence):
        fit_to_budget(height, width, patch_size=patch_size, token_budget=token_budget)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), patch_size=st.integers(1, 7))
def test_patches_are_in_the_order_of_torch_unfold(rows, columns, patch_size):
    image = torch.randn(3, rows * patch_size, columns * patch_size)
    patches, coordinates = patchify(image, patch_size)

    unfolded = F.unfold(image[None], patch_size, stride=patch_size)[0].T
    assert torch.equal(patches, unfolded)
    assert coordinates.dtype == torch.int32
    assert coordinates.tolist() == [[r, c] for r in range(rows) for c in range(columns)]


def test_patches_hold_channel_then_row_then_column():
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    patches, _ = patchify(image, 2)

    expected = [
        [
            int(image[channel, 2 * row + i, 2 * column + j])
            for channel in range(3)
            for i in range(2)
            for j in range(2)
        ]
        for row in range(2)
        for column in range(3)
    ]
    assert patches.dtype == torch.uint8
    assert patches.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 23), width=st.integers(1, 23), patch_size=st.integers(1, 9))
def test_unpatchify_inverts_patchify_at_any_size(height, width, patch_size):
    image = torch.randn(3, height, width)
    padded = pad_to_patch(image, patch_size)
    patches, coordinates = patchify(padded, patch_size)

    assert (len(patches), len(coordinates)) == (
        padded.shape[1] * padded.shape[2] // patch_size**2,
    ) * 2
    assert torch.equal(unpatchify(patches, (height, width), patch_size), image)


def test_padding_is_gray_on_the_right_and_at_the_bottom():
    image = torch.ones(3, 5, 7)
    padded = pad_to_patch(image, 4)
    assert padded.shape == (3, 8, 8)
    assert torch.equal(padded[:, :5, :7], image)
    assert padded.sum() == image.sum()
    assert torch.equal(pad_to_patch(image, 4, value=2.0)[:, 5:], torch.full((3, 3, 8), 2.0))
    assert torch.equal(pad_to_patch(image[:, :4, :4], 4), image[:, :4, :4])


def test_patchify_refuses_an_image_that_is_not_padded():
    with pytest.raises(ValueError, match=r"5 x 8 pixels is no multiple of patch_size=4; pad it"):
        patchify(torch.zeros(3, 5, 8), 4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (4, 1), (2, 3)])
def test_grid_coordinates_are_row_major(rows, columns):
    expected = [[row, column] for row in range(rows) for column in range(columns)]
    assert grid_coordinates(rows, columns).tolist() == expected


def test_normalized_patches_are_exact_inside_the_image_and_gray_outside():
    patch_size = 4
    patches, coordinates, sizes, expected = [], [], [], []
    for height, width in [(5, 7), (4, 4), (1, 9)]:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        # The bytes beyond the image must not matter.
        patch, coordinate = patchify(pad_to_patch(image, patch_size, value=77), patch_size)
        wanted = pad_to_patch(image.float() / 127.5 - 1, patch_size, value=0.0)
        patches.append(patch)
        coordinates.append(coordinate)
        sizes.append(torch.tensor([[height, width]], dtype=torch.int32).expand(len(patch), 2))
        expected.append(patchify(wanted, patch_size)[0])
    patches.append(torch.full((3, 48), 200, dtype=torch.uint8))  # padding tokens of the row
    coordinates.append(torch.zeros(3, 2, dtype=torch.int32))
    sizes.append(torch.zeros(3, 2, dtype=torch.int32))
    expected.append(torch.zeros(3, 48))

    normalized = normalize_patches(torch.cat(patches), torch.cat(coordinates), torch.cat(sizes))

    assert normalized.dtype == torch.float32
    assert torch.equal(normalized, torch.cat(expected))
    ends = normalize_patches(
        torch.tensor([[0, 255, 128]], dtype=torch.uint8), torch.zeros(1, 2), torch.ones(1, 2)
    )
    assert ends.tolist() == [[-1.0, 1.0, pytest.approx(1 / 255, abs=1e-7)]]
