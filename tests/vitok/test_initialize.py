from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vitok.autoencoder import Autoencoder
from vitok.initialize import attend_to_neighbors, start_at_random, start_from_pca
from vitok.metrics import constant_patches, psnr
from vitok.packed import pack_images, unpack_images
from vitok.parallel import shard_model
from vitok.transformer import rope_rotation

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
    start_at_random(model, seed=0)
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
    outputs = unpack_images(model(pack_images(images, patch_size=8)).pixels, 8)
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


def test_random_weights_depend_on_the_seed_alone(make_autoencoder):
    model = make_autoencoder(encoder_width=64, decoder_width=48)
    start_at_random(model, seed=3)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.rand(5)
    start_at_random(model, seed=3)
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())
    start_at_random(model, seed=4)
    assert not torch.equal(first["patch_embed.weight"], model.patch_embed.weight)

    for name, parameter in first.items():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "gamma" in name:
            assert (parameter == model.config.layer_scale).all(), name
        elif "bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.2), name
    same_shape = [first[f"decoder_blocks.{i}.attn.out_proj.weight"] for i in range(2)]
    assert not torch.equal(*same_shape)


def test_a_linear_encoder_starts_from_the_same_pca(make_autoencoder, images):
    linear = {"encoder_width": 0, "encoder_depth": 0, "encoder_heads": 0}
    model = make_autoencoder(latent_channels=CHANNELS, decoder_width=96, **linear)
    start_at_random(model, seed=0)
    start_from_pca(model, pack_images(images, patch_size=8).tokens)
    exact = pca_psnr(images, CHANNELS - 2)
    assert exact - 1.5 < mean_psnr(without_blocks(model), images) <= exact + 0.01


def test_pca_start_is_for_layernorm_latents(make_autoencoder):
    with pytest.raises(ValueError, match="not for latent='kl'; start at random"):
        start_from_pca(make_autoencoder(latent="kl", latent_channels=24), torch.randn(500, 192))


def test_sharded_models_start_with_the_same_weights(make_autoencoder, images, tmp_path):
    config = make_autoencoder(latent_channels=CHANNELS, encoder_width=64, decoder_width=96).config
    whole = Autoencoder(config)
    with torch.device("meta"):
        sharded = Autoencoder(config)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shard_model(sharded, init_device_mesh("cpu", (1,)), torch.float32)
        sharded.to_empty(device="cpu")
        for model in (whole, sharded):
            start_at_random(model, seed=1)
            start_from_pca(model, pack_images(images, patch_size=8).tokens)
            attend_to_neighbors(model)
        for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert isinstance(b, DTensor), name
            assert torch.equal(a, b.full_tensor()), name
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_heads_start_with_looking_left_right_up_and_down(make_autoencoder, images):
    model = make_autoencoder(
        latent_channels=CHANNELS,
        **{"encoder_width": 256, "encoder_heads": 4, "decoder_width": 256, "decoder_heads": 4},
    )
    start_at_random(model, seed=0)
    start_from_pca(model, pack_images(images, patch_size=8).tokens)
    attend_to_neighbors(model)
    packed = pack_images(images[:1], patch_size=8)  # 9 x 9 patches
    latents = model.encode_packed(packed)
    streams = {
        "encoder": model.patch_embed(packed.tokens),
        "decoder": model.decoder_embed(latents.tokens),
    }
    middle = 4 * 9 + 4
    for part, x_TW in streams.items():
        for block in getattr(model, f"{part}_blocks"):
            q_THD, k_THD, _ = block.attn.project(
                block.norm1(x_TW), rope_rotation(packed.patch_coord, 64)
            )
            scores_HT = torch.einsum("hd,thd->ht", q_THD[middle], k_THD) / 64**0.5
            weights_HT = scores_HT.softmax(dim=-1)
            assert weights_HT.argmax(dim=-1).tolist() == [
                middle - 1,
                middle + 1,
                middle - 9,
                middle + 9,
            ], part
            assert weights_HT.amax(dim=-1).min() > 0.6, part


def test_looking_at_neighbors_keeps_the_quality_of_the_pca(started, images):
    before = mean_psnr(started, images)
    attend_to_neighbors(started)
    assert abs(mean_psnr(started, images) - before) < 0.5
