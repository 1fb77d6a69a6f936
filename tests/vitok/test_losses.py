from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_msssim
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitok import losses
from vitok.losses import (
    DINO_TILE,
    DinoTileLoss,
    LossConfig,
    ReconstructionLoss,
    charbonnier,
    gather_tiles,
    ssim_map,
    ssim_tile_loss,
)
from vitok.packed import PackedTokens, pack_images

PATCH = 8


def image_pairs(sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    targets = [torch.rand(3, height, width) * 2 - 1 for height, width in sizes]
    return [(x + 0.2 * torch.randn_like(x)) for x in targets], targets


def pack(images: list[Tensor], extra_tokens: int = 5, extra_slots: int = 2) -> PackedTokens:
    """Pack images with something other than gray beyond their edges and in the padding."""
    num_tokens = len(pack_images(images, patch_size=PATCH).tokens)
    packed = pack_images(
        images,
        patch_size=PATCH,
        row_tokens=num_tokens + extra_tokens,
        max_images=len(images) + extra_slots,
    )
    packed.tokens[num_tokens:] = torch.randn(extra_tokens, 3 * PATCH**2)
    return packed


def padded(image: Tensor, side: int = PATCH) -> Tensor:
    return F.pad(image, (0, -image.shape[2] % side, 0, -image.shape[1] % side))


def tile_of(image: Tensor, position: Tensor, patches: int) -> Tensor:
    """Slice the tile out of an image: aligned to patches, at most as large as the image."""
    starts = []
    for side, place in zip(image.shape[1:], position.tolist(), strict=True):
        slack = max(0, -(-side // PATCH) - patches)
        starts.append(min(slack, int(place * (slack + 1))) * PATCH)
    top, left = starts
    return image[:, top : top + patches * PATCH, left : left + patches * PATCH]


def test_charbonnier_is_the_mean_of_each_image_summed_over_images():
    outputs, targets = image_pairs([(8, 8), (24, 32), (9, 16)])
    expected = 0.0
    for output, target in zip(outputs, targets, strict=True):
        difference = (padded(output) - padded(target)).double()
        expected += float(torch.sqrt(difference**2 + 1e-6).mean())
    packed = charbonnier(pack(outputs), pack(targets))
    assert float(packed) == pytest.approx(expected, rel=1e-5)


def test_charbonnier_of_equal_images_is_a_thousandth_each():
    row = pack([torch.rand(3, 16, 8), torch.rand(3, 8, 8)])
    assert float(charbonnier(row, row)) == pytest.approx(2e-3, rel=1e-5)


@pytest.mark.parametrize("tile_patches", [1, 2, 4])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.9999999])
def test_gathered_tiles_are_slices_of_the_images(tile_patches: int, place: float) -> None:
    images = [torch.rand(3, *size) for size in [(40, 17), (8, 8), (24, 64), (3, 5)]]
    position = torch.full((6, 2), place)
    position[:, 1] = 1 - 2**-20 - place  # the row and the column must not be confused
    tiles, extent = gather_tiles(pack(images), position, tile_patches)

    side = tile_patches * PATCH
    assert tiles.shape == (6, 3, side, side)
    for image, tile, size, where in zip(images, tiles, extent, position, strict=False):
        inside = tile_of(image, where, tile_patches)
        height, width = inside.shape[1:]
        assert size.tolist() == [height, width]
        assert torch.equal(tile, F.pad(inside, (0, side - width, 0, side - height)))
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


@pytest.mark.parametrize("size", [11, 16, 40])
def test_ssim_map_averages_to_pytorch_msssim(size: int) -> None:
    x = torch.rand(2, 3, size, size) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    y[1] = 0.2 * y[1]  # low contrast, where the constants weigh most
    similarity = ssim_map(x, y)
    assert similarity.shape == (2, 3, size - 10, size - 10)
    expected = pytorch_msssim.ssim(x, y, data_range=2, size_average=False)
    torch.testing.assert_close(similarity.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ssim_map(x, x), torch.ones_like(similarity), rtol=0, atol=1e-4)


def test_ssim_of_faint_images_equals_pytorch_msssim():
    """Variances near the constants, so that a changed constant shows."""
    x = 0.03 * torch.randn(4, 3, 24, 24)
    y = 0.03 * torch.randn(4, 3, 24, 24)
    expected = pytorch_msssim.ssim(x, y, data_range=2)
    assert float(ssim_map(x, y).mean()) == pytest.approx(float(expected), abs=1e-4)


def test_ssim_map_can_be_trained_after_it_was_used_for_inference():
    losses._gaussian_band.cache_clear()
    x, y = torch.rand(2, 1, 3, 16, 16)
    with torch.inference_mode():
        ssim_map(x, y)
    x.requires_grad_()
    ssim_map(x, y).mean().backward()
    assert x.grad.any()


# (10, 40) and (8, 8) hold no window of 11 pixels; (17, 13) and (24, 21) are smaller than the tile.
SIZES = [(64, 40), (17, 13), (10, 40), (24, 21), (8, 8), (11, 11)]


@pytest.mark.parametrize("tile_pixels", [16, 29, 32])
def test_ssim_tile_loss_equals_pytorch_msssim_on_the_tiles(tile_pixels: int) -> None:
    outputs, targets = image_pairs(SIZES)
    position = torch.rand(len(SIZES) + 2, 2)
    output, target = pack(outputs), pack(targets)
    # Whatever the decoder paints beyond the edge of an image must not count.
    for i, (height, width) in enumerate(SIZES):
        begin, end = (int(bound) for bound in output.cu_seqlens[i : i + 2])
        canvas = torch.randn_like(padded(outputs[i]))
        canvas[:, :height, :width] = outputs[i]
        output.tokens[begin:end] = pack_images([canvas], patch_size=PATCH).tokens
    actual = ssim_tile_loss(output, target, position, tile_pixels)

    expected, num_counted = 0.0, 0
    for x, y, where in zip(outputs, targets, position, strict=False):
        a, b = (tile_of(image, where, round(tile_pixels / PATCH)) for image in (x, y))
        if min(a.shape[1:]) >= 11:
            expected += 1 - float(pytorch_msssim.ssim(a[None], b[None], data_range=2))
            num_counted += 1
    assert num_counted >= 3
    assert float(actual) == pytest.approx(expected, abs=1e-4)


def test_images_without_a_window_add_no_ssim_loss_and_no_gradient():
    outputs, targets = image_pairs([(10, 40), (40, 10), (1, 1)])
    output, target = pack(outputs), pack(targets)
    output.tokens.requires_grad_()
    loss = ssim_tile_loss(output, target, torch.rand(5, 2), 32)
    assert loss == 0
    loss.backward()
    assert torch.equal(output.tokens.grad, torch.zeros_like(output.tokens))


def dino_distance(network: nn.Module, output: Tensor, target: Tensor) -> float:
    """Follow the definition on one pair of 224 x 224 tiles [3, 224, 224], block by block."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: states.append(out))
        for layer in network.model.layer
    ]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        for tile in (output, target):
            network((((tile + 1) / 2 - mean) / std)[None])
    for hook in hooks:
        hook.remove()
    depth = len(hooks)
    assert len(states) == 2 * depth
    distances = []
    for a, b in zip(states[:depth], states[depth:], strict=True):
        a, b = (state[0].double() for state in (a, b))
        a, b = (state / state.norm(dim=-1, keepdim=True) for state in (a, b))
        distances.append(float(((a - b) ** 2).mean()))
    return sum(distances) / depth


def test_dino_loss_equals_its_definition_on_each_tile(tiny_dino: nn.Module) -> None:
    outputs, targets = image_pairs([(232, 248), (24, 16)])
    position = torch.tensor([[0.6, 0.9], [0.5, 0.5], [0.1, 0.1]])
    loss = DinoTileLoss(tiny_dino)
    actual = loss(pack(outputs, extra_slots=1), pack(targets, extra_slots=1), position)

    expected = 0.0
    for output, target, where in zip(outputs, targets, position, strict=False):
        tiles = [tile_of(image, where, DINO_TILE // PATCH) for image in (output, target)]
        tiles = [F.pad(x, (0, 224 - x.shape[2], 0, 224 - x.shape[1])) for x in tiles]
        expected += dino_distance(tiny_dino, *tiles)
    assert expected > 1e-4
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_dino_gradients_reach_the_reconstruction_and_not_the_network(tiny_dino: nn.Module) -> None:
    outputs, targets = image_pairs([(24, 16)])
    output, target = pack(outputs), pack(targets)
    output.tokens.requires_grad_()
    target.tokens.requires_grad_()
    loss = DinoTileLoss(tiny_dino)
    assert loss(target, target, torch.rand(3, 2)) == 0
    loss(output, target, torch.rand(3, 2)).backward()
    assert output.tokens.grad[:6].abs().sum(1).all()
    assert not output.tokens.grad[6:].any()
    assert target.tokens.grad is None
    assert all(p.grad is None for p in loss.parameters())
    assert not loss.state_dict().keys() & {"mean", "std"}


def test_dino_weights_come_from_a_folder_or_are_named_as_missing(
    tiny_dino: nn.Module, tmp_path: Path
) -> None:
    tiny_dino.save_pretrained(tmp_path / "dino")
    loaded = DinoTileLoss.from_pretrained(str(tmp_path / "dino")).network
    tiles = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded(tiles).last_hidden_state, tiny_dino(tiles).last_hidden_state)
    (tmp_path / "empty").mkdir()
    for missing in (str(tmp_path / "empty"), str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"no DINOv3 weights at .* request access to"):
            DinoTileLoss.from_pretrained(missing)


def test_loss_is_the_weighted_sum_of_its_terms(tiny_dino: nn.Module, tmp_path: Path) -> None:
    tiny_dino.save_pretrained(tmp_path)
    config = LossConfig(
        charbonnier=2.0, ssim=0.3, ssim_tile=16, dino=7.0, dino_weights=str(tmp_path)
    )
    outputs, targets = image_pairs([(24, 40), (8, 8)])
    output, target, position = pack(outputs), pack(targets), torch.rand(4, 2)
    terms = ReconstructionLoss(config)(output, target, position)

    assert set(terms) == {"loss", "charbonnier", "ssim_loss", "dino"}
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
    assert all(term > 0 for term in terms.values())
    weighted = 2.0 * terms["charbonnier"] + 0.3 * terms["ssim_loss"] + 7.0 * terms["dino"]
    torch.testing.assert_close(terms["loss"], weighted)
    torch.testing.assert_close(terms["charbonnier"], charbonnier(output, target))
    torch.testing.assert_close(terms["ssim_loss"], ssim_tile_loss(output, target, position, 16))


def test_terms_without_weight_are_not_computed_and_bfloat16_is_compared_in_float32():
    outputs, targets = image_pairs([(24, 40), (8, 8)])
    output, target, position = pack(outputs), pack(targets), torch.rand(4, 2)
    loss = ReconstructionLoss(LossConfig(ssim=0.0))
    terms = loss(output, target, position)
    assert set(terms) == {"loss", "charbonnier"}
    half = output.with_tokens(output.tokens.bfloat16())
    rounded = output.with_tokens(output.tokens.bfloat16().float())
    assert loss(half, target, position)["loss"].dtype == torch.float32
    assert loss(half, target, position)["loss"] == loss(rounded, target, position)["loss"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"charbonnier": -1.0}, "loss weights must not be negative"),
        ({"ssim_tile": 10}, "ssim_tile=10 must be at least 11 pixels"),
        ({"dino": 500.0}, r"dino=500.0 needs DINOv3 weights: request access to facebook/dinov3"),
    ],
)
def test_loss_config_refuses(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(LossConfig(), **change)
