"""Square tiles out of packed rows, for the losses that look at neighbourhoods of pixels."""

from math import isqrt

import torch
from torch import Tensor

from vitok.packed import PackedTokens


def gather_tiles(
    packed: PackedTokens, position: Tensor, tile_patches: int
) -> tuple[Tensor, Tensor]:
    """Cut one square tile, aligned to the patches, out of every image of a row.

    Args:
        packed: tokens [T, 3P^2].
        position: [S, 2] in [0, 1): 0 is the top or left, towards 1 the bottom or right.
        tile_patches: side of the tile in patches.

    Returns:
        tiles [S, 3, t*P, t*P] and their extent [S, 2]: pixels (height, width) of the tile that lie
        on the image itself. The rest is gray (0) whatever the tokens say: the last patches of an
        image reach over its edge, and what a decoder writes there belongs to no image. Unused
        slots give gray tiles. No gradient comes from there, not even from one that is not finite.
    """
    patch_size = isqrt(packed.tokens.shape[1] // 3)
    slack_S2 = (packed.grid - tile_patches).clamp(min=0)
    origin_S2 = (position * (slack_S2 + 1)).long().minimum(slack_S2)
    inside = torch.arange(tile_patches, device=packed.tokens.device)
    row_St = origin_S2[:, 0:1] + inside
    column_St = origin_S2[:, 1:2] + inside
    index_Stt = (
        packed.cu_seqlens[:-1, None, None]
        + row_St[:, :, None] * packed.grid[:, 1, None, None]
        + column_St[:, None]
    )
    held_Stt = inside_mask(packed.grid - origin_S2, tile_patches)
    tokens = packed.tokens.index_select(0, torch.where(held_Stt, index_Stt, 0).flatten())
    side = tile_patches * patch_size
    tiles = tokens.reshape(-1, tile_patches, tile_patches, 3, patch_size, patch_size)
    tiles = tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)
    extent_S2 = (packed.image_size - origin_S2 * patch_size).clamp(min=0, max=side)
    # Not a product: NaN times 0 is NaN, on the way back too.
    return torch.where(inside_mask(extent_S2, side)[:, None], tiles, 0.0), extent_S2


def inside_mask(extent_S2: Tensor, side: int) -> Tensor:
    """Return [S, side, side]: true in the top left rectangle of height and width extent_S2."""
    place = torch.arange(side, device=extent_S2.device)
    return (place < extent_S2[:, 0:1])[:, :, None] & (place < extent_S2[:, 1:2])[:, None]
