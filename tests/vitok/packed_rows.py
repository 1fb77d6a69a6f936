"""Rows of images for the tests of the losses, and the plain way to find a tile in an image."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.packed import PackedTokens, pack_images


def image_pairs(sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Draw images and disturbed copies of them; returns the copies first."""
    targets = [torch.rand(3, height, width) * 2 - 1 for height, width in sizes]
    return [(x + 0.2 * torch.randn_like(x)) for x in targets], targets


def pack(
    images: list[Tensor], patch_size: int = 8, extra_tokens: int = 5, extra_slots: int = 2
) -> PackedTokens:
    """Pack images with something other than gray in the row's padding."""
    num_tokens = len(pack_images(images, patch_size=patch_size).tokens)
    packed = pack_images(
        images,
        patch_size=patch_size,
        row_tokens=num_tokens + extra_tokens,
        max_images=len(images) + extra_slots,
    )
    packed.tokens[num_tokens:] = torch.randn(extra_tokens, 3 * patch_size**2)
    return packed


def paint_beyond_edges(packed: PackedTokens, patch_size: int = 8) -> PackedTokens:
    """Write noise where the last patches reach over the edges of their images, and in padding."""
    size_T2, place = packed.token_image_size(), torch.arange(patch_size)
    row_TP = packed.patch_coord[:, 0:1] * patch_size + place
    column_TP = packed.patch_coord[:, 1:2] * patch_size + place
    outside = (row_TP >= size_T2[:, 0:1])[:, :, None] | (column_TP >= size_T2[:, 1:2])[:, None]
    outside = outside[:, None].expand(-1, 3, -1, -1).flatten(1)
    assert outside.any()
    return packed.with_tokens(torch.where(outside, torch.randn_like(packed.tokens), packed.tokens))


def tile_of(image: Tensor, position: Tensor, patches: int, patch_size: int = 8) -> Tensor:
    """Slice the tile out of an image: aligned to patches, at most as large as the image."""
    starts = []
    for side, place in zip(image.shape[1:], position.tolist(), strict=True):
        slack = max(0, -(-side // patch_size) - patches)
        starts.append(min(slack, int(place * (slack + 1))) * patch_size)
    top, left = starts
    end = patches * patch_size
    return image[:, top : top + end, left : left + end]


def padded_to(image: Tensor, height: int, width: int) -> Tensor:
    """Pad an image with gray to the right and at the bottom."""
    return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
