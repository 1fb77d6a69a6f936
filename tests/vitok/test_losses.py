from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_msssim
import torch
from torch import Tensor, nn

from tests.vitok.packed_rows import image_pairs, pack, padded_to, paint_beyond_edges, tile_of
from vitok import losses
from vitok.autoencoder import Autoencoder, Reconstruction
from vitok.bottleneck import posterior_of
from vitok.losses import (
    LossConfig,
    ReconstructionLoss,
    charbonnier,
    ssim_map,
    ssim_tile_loss,
    sum_of_image_means,
)
from vitok.packed import PackedTokens, layout_of
from vitok.variants import AutoencoderConfig

PATCH = 8


def padded(image: Tensor) -> Tensor:
    return padded_to(image, *(-(-side // PATCH) * PATCH for side in image.shape[1:]))


def reconstruction_of(pixels: PackedTokens, kl_T: Tensor | None = None) -> Reconstruction:
    return Reconstruction(pixels=pixels, latents=pixels, kl_T=kl_T)


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


def test_ssim_is_computed_in_float32_under_autocast():
    x, y = torch.rand(2, 1, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x[0] @ y[0]).dtype == torch.bfloat16
        under_autocast = ssim_map(x, y)
    assert torch.equal(under_autocast, ssim_map(x, y))


def test_the_window_is_made_once_for_every_device():
    host, meta = torch.device("cpu"), torch.device("meta")
    assert losses._gaussian_band(16, host) is losses._gaussian_band(16, host)
    assert losses._gaussian_band(16, meta) is losses._gaussian_band(16, meta)
    assert losses._gaussian_band(16, meta).device == meta
    assert losses._gaussian_band(16, host).device == host


# Dynamo looks through the cache of the window, and says so.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_ssim_compiles_as_one_graph_and_leaves_the_cache_usable():
    x, y = torch.rand(2, 1, 3, 24, 24)
    losses._gaussian_band.cache_clear()
    compiled = torch.compile(ssim_map, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), ssim_map(x, y))


# (10, 40) and (8, 8) hold no window of 11 pixels; (17, 13) and (24, 21) are smaller than the tile.
SIZES = [(64, 40), (17, 13), (10, 40), (24, 21), (8, 8), (11, 11)]


@pytest.mark.parametrize("tile_pixels", [16, 29, 32])
def test_ssim_tile_loss_equals_pytorch_msssim_on_the_tiles(tile_pixels: int) -> None:
    outputs, targets = image_pairs(SIZES)
    position = torch.rand(len(SIZES) + 2, 2)
    # Whatever the decoder paints beyond the edge of an image must not count.
    output, target = paint_beyond_edges(pack(outputs)), pack(targets)
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


def test_kl_loss_equals_its_closed_form_by_loops():
    """The mean over an image's tokens and channels, summed over the images."""
    targets = [torch.rand(3, *size) for size in [(8, 8), (24, 17)]]
    target = pack(targets)
    config = AutoencoderConfig(latent="kl", latent_channels=3, patch_size=PATCH)
    code = torch.randn(len(target.tokens), 6)
    kl_T = posterior_of(code, config).kl_T
    terms = ReconstructionLoss(LossConfig(kl=0.25))(
        reconstruction_of(target, kl_T), target, torch.rand(4, 2)
    )

    expected = 0.0
    for begin, end in [(0, 1), (1, 10)]:
        divergences = []
        for token in code[begin:end].double():
            for mean, log_variance in zip(token[:3], token[3:], strict=True):
                posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
                prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
                divergences.append(float(torch.distributions.kl_divergence(posterior, prior)))
        expected += sum(divergences) / len(divergences)
    assert expected > 0.1
    assert float(terms["kl"]) == pytest.approx(expected, rel=1e-5)
    without = ReconstructionLoss(LossConfig(kl=0.0))(
        reconstruction_of(target, kl_T), target, torch.rand(4, 2)
    )
    # SSIM and Charbonnier of equal images do not depend on the place of the tile.
    torch.testing.assert_close(terms["loss"], without["loss"] + 0.25 * terms["kl"])


def test_kl_loss_of_a_row_is_the_sum_over_its_images_alone():
    images = [torch.rand(3, *size) for size in [(8, 24), (16, 16), (9, 40)]]
    row = pack(images)
    kl_T = torch.rand(len(row.tokens))
    bounds = row.cu_seqlens.tolist()
    alone = [
        sum_of_image_means(kl_T[begin:end], pack([image], extra_tokens=0, extra_slots=0))
        for image, begin, end in zip(images, bounds, bounds[1:], strict=False)
    ]
    assert min(alone) > 0
    torch.testing.assert_close(sum_of_image_means(kl_T, row), torch.stack(alone).sum())


@pytest.mark.parametrize("latent", ["layernorm", "tanh", "kl"])
def test_only_kl_latents_have_a_divergence_in_the_loss(
    latent: str, make_autoencoder: Callable[..., Autoencoder]
) -> None:
    target = pack([torch.rand(3, 16, 24)])
    reconstruction = make_autoencoder(latent=latent)(target)
    terms = ReconstructionLoss(LossConfig())(reconstruction, target, torch.rand(3, 2))
    assert ("kl" in terms) == (latent == "kl")
    if latent == "kl":
        terms["kl"].backward()
        assert terms["kl"] > 0
    expected = terms["charbonnier"] + 0.1 * terms["ssim_loss"] + 0.01 * terms.get("kl", 0.0)
    torch.testing.assert_close(terms["loss"], expected)


def test_loss_is_the_weighted_sum_of_its_terms(tiny_dino: nn.Module, tmp_path: Path) -> None:
    tiny_dino.save_pretrained(tmp_path)
    config = LossConfig(
        charbonnier=2.0, ssim=0.3, ssim_tile=16, kl=0.7, dino=7.0, dino_weights=str(tmp_path)
    )
    outputs, targets = image_pairs([(24, 40), (8, 8)])
    output, target, position = pack(outputs), pack(targets), torch.rand(4, 2)
    kl_T = torch.rand(len(target.tokens))
    terms = ReconstructionLoss(config)(reconstruction_of(output, kl_T), target, position)

    assert set(terms) == {"loss", "charbonnier", "ssim_loss", "dino", "kl"}
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
    assert all(term > 0 for term in terms.values())
    weighted = 2.0 * terms["charbonnier"] + 0.3 * terms["ssim_loss"] + 7.0 * terms["dino"]
    torch.testing.assert_close(terms["loss"], weighted + 0.7 * terms["kl"])
    torch.testing.assert_close(terms["charbonnier"], charbonnier(output, target))
    torch.testing.assert_close(terms["ssim_loss"], ssim_tile_loss(output, target, position, 16))
    torch.testing.assert_close(terms["kl"], sum_of_image_means(kl_T, target))


def test_terms_without_weight_are_not_computed_and_bfloat16_is_compared_in_float32():
    outputs, targets = image_pairs([(24, 40), (8, 8)])
    output, target, position = pack(outputs), pack(targets), torch.rand(4, 2)
    loss = ReconstructionLoss(LossConfig(ssim=0.0))
    terms = loss(reconstruction_of(output), target, position)
    assert set(terms) == {"loss", "charbonnier"}
    half = reconstruction_of(output.with_tokens(output.tokens.bfloat16()))
    rounded = reconstruction_of(output.with_tokens(output.tokens.bfloat16().float()))
    assert loss(half, target, position)["loss"].dtype == torch.float32
    assert loss(half, target, position)["loss"] == loss(rounded, target, position)["loss"]


def test_a_row_without_images_has_a_loss_of_zero_and_no_gradient():
    row = layout_of([], patch_size=PATCH, row_tokens=4, max_images=2, max_seqlen=4)
    target = row.with_tokens(torch.randn(4, 3 * PATCH**2))
    output = row.with_tokens(torch.randn(4, 3 * PATCH**2, requires_grad=True))
    terms = ReconstructionLoss(LossConfig())(
        reconstruction_of(output, torch.rand(4)), target, torch.rand(2, 2)
    )
    assert set(terms) == {"loss", "charbonnier", "ssim_loss", "kl"}
    assert all(term == 0 for term in terms.values())
    terms["loss"].backward()
    assert torch.equal(output.tokens.grad, torch.zeros_like(output.tokens))


def test_default_weights_are_those_of_the_paper():
    weights = LossConfig()
    assert (weights.charbonnier, weights.ssim, weights.dino, weights.lpips) == (1.0, 0.1, 0.0, 0.0)


def test_presets_differ_from_the_default_in_dino_alone():
    for preset, weight in ((LossConfig.paper, 500.0), (LossConfig.perceptual, 1000.0)):
        assert preset("folder") == replace(LossConfig(), dino=weight, dino_weights="folder")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"charbonnier": -1.0}, "loss weights must not be negative"),
        ({"ssim_tile": 10}, "ssim_tile=10 must be at least 11 pixels"),
        ({"dino": 500.0}, r"dino=500.0 needs DINOv3 weights: request access to facebook/dinov3"),
        ({"kl": -0.1}, "loss weights must not be negative"),
        ({"lpips": 1.0}, r"lpips=1.0 needs VGG16 weights: download .* of timm/vgg16.tv_in1k"),
    ],
)
def test_loss_config_refuses(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(LossConfig(), **change)
