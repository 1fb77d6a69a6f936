import pytest
import torch

from tests.vitok.packed_rows import pack, padded_to, paint_beyond_edges, tile_of
from vitok.tiles import gather_tiles

PATCH = 8
SIZES = [(40, 17), (8, 8), (24, 64), (3, 5)]


@pytest.mark.parametrize("tile_patches", [1, 2, 4])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.9999999])
def test_gathered_tiles_are_slices_of_the_images(tile_patches: int, place: float) -> None:
    images = [torch.rand(3, *size) for size in SIZES]
    position = torch.full((6, 2), place)
    position[:, 1] = 1 - 2**-20 - place  # the row and the column must not be confused
    tiles, extent = gather_tiles(paint_beyond_edges(pack(images)), position, tile_patches)

    side = tile_patches * PATCH
    assert tiles.shape == (6, 3, side, side)
    for image, tile, size, where in zip(images, tiles, extent, position, strict=False):
        inside = tile_of(image, where, tile_patches)
        assert size.tolist() == list(inside.shape[1:])
        assert torch.equal(tile, padded_to(inside, side, side))
    assert extent[4:].tolist() == [[0, 0], [0, 0]]
    assert not tiles[4:].any()


def test_every_place_of_a_tile_is_reached_and_equally_wide():
    image = torch.rand(3, 5 * PATCH, PATCH)
    steps = (torch.arange(400) + 0.5) / 400
    tops = []
    for place in steps:
        tile, _ = gather_tiles(pack([image]), torch.full((3, 2), float(place)), 2)
        tops += [
            top
            for top in range(4)
            if torch.equal(tile[0, :, :PATCH, :PATCH], image[:, top * PATCH : (top + 1) * PATCH])
        ]
    assert tops == [0] * 100 + [1] * 100 + [2] * 100 + [3] * 100


def test_no_gradient_comes_from_beyond_an_image_even_if_it_is_not_finite():
    row = pack([torch.rand(3, *size) for size in SIZES])
    tokens = row.tokens.requires_grad_()
    tiles, extent = gather_tiles(row, torch.rand(6, 2), 4)
    slope = torch.full_like(tiles, torch.nan)
    for tile, (height, width) in zip(slope, extent.tolist(), strict=True):
        tile[:, :height, :width] = 1.0
    tiles.backward(slope)
    assert tokens.grad.isfinite().all()
    assert tokens.grad.sum() == 3 * sum(height * width for height, width in extent.tolist())
