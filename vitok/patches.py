"""Sizes for a token budget, aspect buckets, and images cut into patches and put together again.

A patch vector has the channel slowest, then the row, then the column inside the patch; patches
stand in row-major order of the grid. Images are padded right and bottom with gray (0).
"""

from collections.abc import Sequence
from functools import cache
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

# Of a bucket's longer side to its shorter one. Caches do not name it: another value would give
# their images other sizes under the same digest.
_MAX_BUCKET_ASPECT = 2


def grid_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Return how many (rows, columns) of patches cover an image of height x width pixels."""
    return -(-height // patch_size), -(-width // patch_size)


def num_tokens(height: int, width: int, patch_size: int) -> int:
    """Return how many patches cover an image of height x width pixels."""
    rows, columns = grid_size(height, width, patch_size)
    return rows * columns


def fit_to_budget(
    height: int, width: int, *, patch_size: int, token_budget: int, enlarge: bool = False
) -> tuple[int, int]:
    """Return the pixel size at which an image is used under a budget of patches.

    It is the largest scale at which rows x columns of the covering grid is at most
    `token_budget`, with the aspect ratio kept to the pixel. An image that already fits keeps its
    size, unless `enlarge` is set.

    Returns:
        (height, width) in pixels, each at least 1; not padded to the patch.

    Raises:
        ValueError: a side, the patch or the budget is not positive.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {height} x {width} pixels has no pixels; drop it")
    if patch_size < 1 or token_budget < 1:
        raise ValueError(f"{patch_size=} and {token_budget=} must be at least 1")
    rows, columns = grid_size(height, width, patch_size)
    if rows * columns <= token_budget and not enlarge:
        return height, width
    # At the best scale one side is a whole number of patches. Let `full` be the most rows that
    # fit when the rows are the tight side; then either these are tight, or the columns are, with
    # one row more. Integers throughout, so that no rounding error picks a neighbouring grid.
    full = isqrt(token_budget * height // width)
    while full * -(-full * width // height) > token_budget:
        full -= 1
    by_rows = (full * patch_size, height)
    by_columns = (token_budget // (full + 1) * patch_size, width)
    scale = max(by_rows, by_columns, key=lambda fraction: fraction[0] / fraction[1])
    return _scaled(height, *scale), _scaled(width, *scale)


@cache
def bucket_sizes(side: int, patch_size: int) -> tuple[tuple[int, int], ...]:
    """Return the sizes of about the area of a square that whole patches fill, of many aspects.

    They are all sizes of at most the square's area and of at most the aspect 2, either way, of
    which neither side could be a patch longer: each lacks less than one row or column of patches.

    Args:
        side: of the square, a multiple of patch_size; the square is one of them.

    Returns:
        (height, width) in pixels, the widest first.
    """
    assert side % patch_size == 0, (side, patch_size)
    budget = (side // patch_size) ** 2

    def is_allowed(rows: int, columns: int) -> bool:
        within = max(rows, columns) <= _MAX_BUCKET_ASPECT * min(rows, columns)
        return within and rows * columns <= budget

    longest = isqrt(budget * _MAX_BUCKET_ASPECT)
    grids = [
        (rows, columns)
        for rows in range(1, longest + 1)
        for columns in range(1, longest + 1)
        if is_allowed(rows, columns)
        and not is_allowed(rows + 1, columns)
        and not is_allowed(rows, columns + 1)
    ]
    return tuple((rows * patch_size, columns * patch_size) for rows, columns in grids)


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose log aspect is nearest to that of an image; of two the first."""

    def stretch(bucket: tuple[int, int]) -> float:
        # exp |log(h / w) - log(H / W)|, in one division, which rounds alike on every machine.
        products = height * bucket[1], width * bucket[0]
        return max(products) / min(products)

    return min(buckets, key=stretch)


def centre_crop(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the largest centre part of an image that has the aspect of a size, to the pixel.

    Resized to that size, it shows what is left of the image when it covers the size and is cropped.

    Returns:
        (top, left, height, width)
    """
    crop_height = min(height, _scaled(width, *size))
    crop_width = min(width, _scaled(height, *size[::-1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _scaled(side: int, numerator: int, denominator: int) -> int:
    """Return side * numerator / denominator, rounded to nearest and at least 1."""
    return max(1, (2 * side * numerator + denominator) // (2 * denominator))


def patchify(image: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Cut an image into row-major patches.

    Args:
        image: [3, H, W], any dtype; H and W are multiples of patch_size.

    Returns:
        patches [N, 3*P*P] (channel slowest) and patch_coord [N, 2] int32 (row, column).

    Raises:
        ValueError: H or W is not a multiple of patch_size.
    """
    channels, height, width = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height} x {width} pixels is no multiple of {patch_size=}; pad it first"
        )
    rows, columns = height // patch_size, width // patch_size
    patches = image.reshape(channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(1, 3, 0, 2, 4)  # [rows, columns, C, P, P]
    return patches.reshape(rows * columns, -1), grid_coordinates(rows, columns, image.device)


def unpatchify(patches: Tensor, image_size: tuple[int, int], patch_size: int) -> Tensor:
    """Put row-major patches together and cut the padding off: the inverse of patchify.

    Args:
        patches: [N, 3*P*P], the whole grid of an image.
        image_size: (height, width) in pixels, before padding.

    Returns:
        [3, height, width]
    """
    height, width = image_size
    rows, columns = grid_size(height, width, patch_size)
    image = patches.reshape(rows, columns, -1, patch_size, patch_size).permute(2, 0, 3, 1, 4)
    image = image.reshape(-1, rows * patch_size, columns * patch_size)  # [3, rows*P, columns*P]
    return image[:, :height, :width]


def grid_coordinates(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return [rows*columns, 2] int32 (row, column) in row-major order."""
    row = torch.arange(rows, dtype=torch.int32, device=device)
    column = torch.arange(columns, dtype=torch.int32, device=device)
    return torch.cartesian_prod(row, column).reshape(-1, 2)


def pad_to_patch(image: Tensor, patch_size: int, value: float = 0.0) -> Tensor:
    """Pad a [..., H, W] image right and bottom to multiples of patch_size."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % patch_size, 0, -height % patch_size), value=value)


def normalize_patches(patches: Tensor, patch_coord: Tensor, token_image_size: Tensor) -> Tensor:
    """Map uint8 patches to [-1, 1], with exact gray (0) where a patch reaches over its image.

    Args:
        patches: [T, 3*P*P] uint8.
        patch_coord: [T, 2] (row, column).
        token_image_size: [T, 2] pixel size (height, width) of each token's image; 0 for padding
            tokens, which become gray altogether.

    Returns:
        [T, 3*P*P] float32.
    """
    num_tokens, patch_dim = patches.shape
    patch_size = isqrt(patch_dim // 3)
    # No uint8 value is exactly 0 in [-1, 1], so the padding is cut out here, not in the bytes.
    inside = torch.arange(patch_size, device=patches.device)
    left_T2 = token_image_size - patch_coord * patch_size  # pixels of the image from here on
    row_TP = inside < left_T2[:, 0:1]
    column_TP = inside < left_T2[:, 1:2]
    mask_TPP = row_TP[:, :, None] & column_TP[:, None, :]
    # In place: on a CPU a new tensor for each operation took as long again.
    pixels = patches.to(torch.float32, copy=True).div_(127.5).sub_(1.0)
    pixels.view(num_tokens, 3, patch_size, patch_size).mul_(mask_TPP[:, None])
    return pixels
