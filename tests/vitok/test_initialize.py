from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.autoencoder import Autoencoder
from vitok.initialize import start_from_pca
from vitok.metrics import constant_patches, psnr
from vitok.packed import pack_images, unpack_images

CHANNELS = 24


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Make smooth images: coarse noise, enlarged, with some fine noise on top."""
    torch.manual_seed(0)
    coarse = torch.randn(40, 3, 16, 16)
    smooth = F.interpolate(coarse, size=(72, 72), mode="bicubic")
    fine = F.interpolate(torch.randn(40, 3, 36, 36), size=(72, 72), mode="bilinear")
    return list((0.4 * smooth + 0.05 * fine).clamp(-1, 1))


@pytest.fixture
def started(make_autoencoder: Callable[..., Autoencoder], images: list[Tensor]) -> Autoencoder:
    model = make_autoencoder(latent_channels=CHANNELS, encoder_width=64, decoder_width=96)
    model.reset_parameters()
    start_from_pca(model, pack_images(images, patch_size=8).tokens)
    return model


def without_blocks(model: Autoencoder) -> Autoencoder:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.zero_()
    return model


@torch.no_grad()
def mean_psnr(model: Autoencoder, images: list[Tensor]) -> float:
    outputs = unpack_images(model(pack_images(images, patch_size=8)), 8)
    return sum(psnr(a, b) for a, b in zip(outputs, images, strict=True)) / len(images)


def pca_psnr(images: list[Tensor], components: int) -> float:
    packed = pack_images(images, patch_size=8)
    patches = packed.tokens.double()
    mean = patches.mean(0)
    _, _, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    kept = directions[:components]
    projected = ((patches - mean) @ kept.T @ kept + mean).float()
    outputs = unpack_images(packed.with_tokens(projected), 8)
    return sum(psnr(a, b) for a, b in zip(outputs, images, strict=True)) / len(images)


def test_pca_start_is_far_better_than_constant_patches(started, images):
    flat = [psnr(constant_patches(image, 8), image) for image in images]
    assert mean_psnr(started, images) > sum(flat) / len(flat) + 3


def test_pca_start_is_close_to_the_exact_pca(started, images):
    exact = pca_psnr(images, CHANNELS - 2)
    assert exact - 1.5 < mean_psnr(without_blocks(started), images) <= exact + 0.01


def test_pca_start_needs_few_enough_channels(make_autoencoder):
    patches = torch.randn(500, 192)
    for channels in (3, 67):
        model = make_autoencoder(latent_channels=channels, encoder_width=64, decoder_width=96)
        with pytest.raises(ValueError, match=rf"latent_channels={channels} must be at least 4"):
            start_from_pca(model, patches)
    start_from_pca(
        make_autoencoder(latent_channels=66, encoder_width=64, decoder_width=96), patches
    )


def test_pca_start_leaves_the_blocks_alone(make_autoencoder, images):
    model, untouched = make_autoencoder(seed=4), make_autoencoder(seed=4)
    start_from_pca(model, pack_images(images, patch_size=8).tokens)
    num_equal = 0
    for (name, a), b in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b) == ("_blocks." in name), name
        num_equal += torch.equal(a, b)
    assert num_equal == 3 * 8
