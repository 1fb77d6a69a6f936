import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vitok.autoencoder import Autoencoder
from vitok.bottleneck import posterior_of
from vitok.diffusers_adapter import DiffusersAutoencoder
from vitok.packed import pack_images, unpack_images

LATENT_KINDS = ["layernorm", "tanh", "kl"]


@pytest.fixture
def make_vae(make_autoencoder: Callable[..., Autoencoder]) -> Callable[..., DiffusersAutoencoder]:
    def make(**shape: object) -> DiffusersAutoencoder:
        return DiffusersAutoencoder(make_autoencoder(**shape))

    return make


@pytest.fixture
def make_reference() -> Callable[[int], nn.Module]:
    """Build a random AutoencoderKL of diffusers with 6 latent channels and pixels 8 to a latent."""
    diffusers = pytest.importorskip("diffusers")

    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=6,
            norm_num_groups=2,
            sample_size=32,
            scaling_factor=0.5,
            shift_factor=0.1,
        ).eval()

    return make


def random_batch(num_images: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(num_images, 3, height, width) * 2 - 1


def run_as_pipelines_do(
    vae: nn.Module, images: list[Image.Image], generator: torch.Generator
) -> dict[str, object]:
    """Take a VAE through the calls of Flux's and Stable Diffusion's image-to-image pipelines."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents

    vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    processor = VaeImageProcessor(
        vae_scale_factor=vae_scale_factor, vae_latent_channels=vae.config.latent_channels
    )
    pixels = processor.preprocess(images).to(device=vae.device, dtype=vae.dtype)
    needs_upcasting = vae.dtype == torch.float16 and vae.config.force_upcast
    with torch.no_grad():
        sampled = retrieve_latents(vae.encode(pixels), generator=generator)
        mode = retrieve_latents(vae.encode(pixels), sample_mode="argmax")
        from_tuple = vae.encode(pixels, return_dict=False)[0].sample(generator)
        scaled = (sampled - vae.config.shift_factor) * vae.config["scaling_factor"]
        z = (scaled / vae.config.scaling_factor) + vae.config.shift_factor
        decoded = vae.decode(z, return_dict=False, generator=generator)[0]
        same = vae.decode(z).sample
        forward = vae(pixels).sample
    assert torch.equal(decoded, same)
    return {
        "vae_scale_factor": vae_scale_factor,
        "needs_upcasting": needs_upcasting,
        "sampled": sampled,
        "mode": mode,
        "from_tuple": from_tuple,
        "scaled": scaled,
        "decoded": decoded,
        "forward": forward,
        "pil": processor.postprocess(decoded.float(), output_type="pil"),
        "np": processor.postprocess(decoded.float(), output_type="np"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent", LATENT_KINDS)
def test_pipelines_get_what_autoencoder_kl_gives_them(
    make_vae: Callable[..., DiffusersAutoencoder],
    make_reference: Callable[[], nn.Module],
    latent: str,
    dtype: torch.dtype,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 35, 51, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    expected, found = (
        run_as_pipelines_do(vae.to(dtype), images, torch.Generator().manual_seed(0))
        for vae in (make_reference(), make_vae(latent=latent))
    )
    assert expected["sampled"].shape == (2, 6, 4, 6) and expected["decoded"].shape[2:] == (32, 48)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        ours = found[name]
        assert type(ours) is type(value), name
        if isinstance(value, Tensor):
            assert (ours.shape, ours.dtype, ours.device) == (value.shape, value.dtype, value.device)
            assert ours.is_contiguous() and ours.isfinite().all(), name
        elif isinstance(value, np.ndarray):
            assert (ours.shape, ours.dtype) == (value.shape, value.dtype)
        elif isinstance(value, list):
            assert [(x.mode, x.size) for x in ours] == [(x.mode, x.size) for x in value]
        else:
            assert ours == value, name


def test_everything_pipelines_read_of_the_config_is_there(
    make_vae: Callable[..., DiffusersAutoencoder], make_reference: Callable[[], nn.Module]
) -> None:
    config, reference = make_vae().config, make_reference().config
    names = {"scaling_factor", "shift_factor", "latent_channels", "block_out_channels"}
    names |= {"in_channels", "out_channels", "force_upcast", "sample_size"}
    names |= {"latents_mean", "latents_std"}
    assert names <= set(reference) and set(config) == names
    for name in names:
        assert getattr(config, name) == config[name] == dict(config)[name] == config.get(name)
    assert (config.scaling_factor, config.shift_factor) == (1.0, 0.0)
    assert config.latent_channels == 6 and config.in_channels == config.out_channels == 3
    assert config.force_upcast is False and config.latents_mean is None
    assert "encoder" not in config and not hasattr(config, "scale_factor_spatial")
    with pytest.raises(KeyError):
        config["items"]
    with pytest.raises(AttributeError):
        config.scaling_factor = 2.0


@pytest.mark.parametrize("patch_size", [1, 2, 8, 16, 32])
def test_the_scale_factor_of_pipelines_is_the_patch(
    make_vae: Callable[..., DiffusersAutoencoder], patch_size: int
) -> None:
    vae = make_vae(patch_size=patch_size, latent_channels=2)
    assert 2 ** (len(vae.config.block_out_channels) - 1) == patch_size
    images = torch.zeros(1, 3, 2 * patch_size, 3 * patch_size)
    assert vae.encode(images).latent_dist.mode().shape == (1, 2, 2, 3)


@pytest.mark.parametrize("patch_size", [6, 14, 24])
def test_a_patch_that_pipelines_could_not_know_is_refused(
    make_vae: Callable[..., DiffusersAutoencoder], patch_size: int
) -> None:
    with pytest.raises(ValueError, match=f"patch_size={patch_size} is no power of two"):
        make_vae(patch_size=patch_size)


@pytest.mark.parametrize("latent", LATENT_KINDS)
def test_each_image_of_a_batch_comes_out_as_if_alone(
    make_vae: Callable[..., DiffusersAutoencoder], latent: str
) -> None:
    vae = make_vae(latent=latent)
    model = vae.autoencoder
    images = random_batch(3)
    with torch.no_grad():
        distribution = vae.encode(images).latent_dist
        decoded = vae.decode(distribution.mode()).sample
    assert distribution.mean.shape == distribution.std.shape == (3, 6, 2, 3)
    for index, image in enumerate(images):
        with torch.no_grad():
            packed = pack_images([image], patch_size=8)
            posterior = model.posterior(packed)
            [alone] = unpack_images(model.decode_packed(packed.with_tokens(posterior.mean)), 8)
        std = torch.zeros_like(posterior.mean) if posterior.std is None else posterior.std
        for row in range(2):
            for column in range(3):
                at = index, slice(None), row, column
                torch.testing.assert_close(distribution.mean[at], posterior.mean[row * 3 + column])
                torch.testing.assert_close(distribution.std[at], std[row * 3 + column])
        torch.testing.assert_close(decoded[index], alone)
    assert decoded.abs().max() > 1, "a clamp would not show"


def test_batch_results_are_those_of_the_friendly_interface(
    make_vae: Callable[..., DiffusersAutoencoder],
) -> None:
    vae = make_vae()
    images = random_batch()
    latents = vae.autoencoder.encode(images)
    maps = torch.stack([latent.as_map() for latent in latents])
    torch.testing.assert_close(vae.encode(images).latent_dist.mode(), maps)
    pixels = torch.stack(vae.autoencoder.decode(latents))
    torch.testing.assert_close(vae.decode(maps).sample.clamp(-1, 1), pixels)


def test_layernorm_latents_have_no_width_and_unit_variance(
    make_vae: Callable[..., DiffusersAutoencoder],
) -> None:
    distribution = make_vae().encode(random_batch()).latent_dist
    assert torch.equal(distribution.sample(), distribution.mode())
    assert (distribution.std == 0).all()
    variance = distribution.mode().var(dim=1, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-3, rtol=0)


@pytest.mark.parametrize("latent", ["tanh", "kl"])
def test_samples_are_reproducible_and_lie_around_the_mode(
    make_vae: Callable[..., DiffusersAutoencoder], latent: str
) -> None:
    distribution = make_vae(latent=latent).encode(random_batch()).latent_dist
    first, again, other = (
        distribution.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, distribution.mean + distribution.std * noise)
    assert not torch.equal(first, distribution.mode())
    draws = torch.stack([distribution.sample() for _ in range(2000)])
    deviation = (draws.mean(0) - distribution.mean).abs() / distribution.std
    assert deviation.max() < 5 / 2000**0.5
    torch.testing.assert_close(draws.std(0), distribution.std, rtol=0.1, atol=0)


def test_kl_samples_are_those_of_diffusers(make_vae: Callable[..., DiffusersAutoencoder]) -> None:
    vae_module = pytest.importorskip("diffusers.models.autoencoders.vae")
    vae = make_vae(latent="kl")
    code = torch.randn(6, 12)
    parameters = code.T.reshape(1, 12, 2, 3)
    reference = vae_module.DiagonalGaussianDistribution(parameters)
    posterior = posterior_of(code, vae.autoencoder.config)
    vae.autoencoder.posterior = lambda packed, window: posterior
    ours = vae.encode(torch.zeros(1, 3, 16, 24)).latent_dist
    for found, expected in (
        (ours.mean, reference.mean),
        (ours.std, reference.std),
        (
            ours.sample(torch.Generator().manual_seed(3)),
            reference.sample(torch.Generator().manual_seed(3)),
        ),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (2, 3, 12, 16)])
def test_sides_that_are_no_multiples_of_the_patch_are_named(
    make_vae: Callable[..., DiffusersAutoencoder], shape: tuple[int, ...]
) -> None:
    side = "height 12" if shape[2] == 12 else "width 20"
    with pytest.raises(ValueError, match=f"{side} are no multiples of patch_size=8: resize"):
        make_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 4, 16, 16), (0, 3, 16, 16), (2, 3, 0, 16)])
def test_what_is_no_batch_is_named(
    make_vae: Callable[..., DiffusersAutoencoder], shape: tuple[int, ...]
) -> None:
    vae = make_vae()
    named = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"images of shape {named} are no batch \[B, 3, height"):
        vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"latents of shape {named} are no batch \[B, 6, height"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize("tiling", [False, True])
def test_gradients_flow_through_both_directions(
    make_vae: Callable[..., DiffusersAutoencoder], tiling: bool
) -> None:
    vae = make_vae(latent="kl")
    if tiling:
        vae.enable_tiling(1)
    images = random_batch(1).requires_grad_()
    latents = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    latents.retain_grad()
    vae.decode(latents).sample.square().mean().backward()
    for tensor in (images, latents, *vae.parameters()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    step = 1e-3 * torch.randn(latents.shape)
    with torch.no_grad():
        high, low = (vae.decode(latents + s).sample.square().mean() for s in (step, -step))
    torch.testing.assert_close((latents.grad * step).sum(), (high - low) / 2, rtol=0.05, atol=1e-5)


def test_slicing_goes_image_by_image_and_changes_nothing(
    make_vae: Callable[..., DiffusersAutoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make_vae(latent="kl")
    images = random_batch(3)
    expected = vae.encode(images).latent_dist
    decoded = vae.decode(expected.mean).sample
    num_images: list[int] = []
    for name in ("posterior", "decode_packed"):
        compute = getattr(vae.autoencoder, name)

        def recorded(packed, *, compute=compute, **options):
            num_images.append(int(packed.num_images()))
            return compute(packed, **options)

        monkeypatch.setattr(vae.autoencoder, name, recorded)
    vae.enable_slicing()
    sliced = vae.encode(images).latent_dist
    torch.testing.assert_close(sliced.mean, expected.mean)
    torch.testing.assert_close(sliced.std, expected.std)
    torch.testing.assert_close(vae.decode(sliced.mean).sample, decoded)
    assert num_images == [1] * 6
    vae.disable_slicing()
    torch.testing.assert_close(vae.encode(images).latent_dist.mean, expected.mean)
    assert num_images[6:] == [3]


def test_tiling_is_sliding_window_attention(make_vae: Callable[..., DiffusersAutoencoder]) -> None:
    vae = make_vae()
    images = random_batch(1, 88, 80)
    full = vae.encode(images).latent_dist.mode()
    full_pixels = vae.decode(full).sample
    for enable, window in ((vae.enable_tiling, 8), (lambda: vae.enable_tiling(2), 2)):
        enable()
        assert vae.use_tiling
        [expected] = vae.autoencoder.encode(images, window=window)
        tiled = vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(tiled[0], expected.as_map())
        assert (tiled - full).abs().max() > 1e-3
        assert (vae.decode(full).sample - full_pixels).abs().max() > 1e-3
    small = images[:, :, :24, :24]
    tiled_small = vae.encode(small).latent_dist.mode()
    vae.disable_tiling()
    assert not vae.use_tiling
    torch.testing.assert_close(vae.encode(images).latent_dist.mode(), full)
    torch.testing.assert_close(vae.encode(small).latent_dist.mode(), tiled_small)


def test_forward_reconstructs_from_the_mode_or_from_a_sample(
    make_vae: Callable[..., DiffusersAutoencoder],
) -> None:
    vae = make_vae(latent="kl")
    images = random_batch()
    distribution = vae.encode(images).latent_dist
    assert torch.equal(vae(images).sample, vae.decode(distribution.mode()).sample)
    drawn = distribution.sample(torch.Generator().manual_seed(4))
    (found,) = vae(
        images,
        sample_posterior=True,
        return_dict=False,
        generator=torch.Generator().manual_seed(4),
    )
    assert torch.equal(found, vae.decode(drawn).sample)


def test_an_offloading_hook_runs_before_the_weights_are_used(
    make_vae: Callable[..., DiffusersAutoencoder],
) -> None:
    class Hook:
        calls = 0

        def pre_forward(self, module: nn.Module) -> None:
            self.calls += 1
            module.to(torch.float64)

    vae = make_vae()
    vae._hf_hook = hook = Hook()
    assert vae.encode(random_batch()).latent_dist.mean.dtype == torch.float64
    vae.decode(torch.zeros(1, 6, 2, 2))
    assert hook.calls == 2


def test_state_and_moves_are_those_of_the_autoencoder(
    make_vae: Callable[..., DiffusersAutoencoder],
) -> None:
    vae = make_vae()
    assert vae.device == torch.device("cpu") and vae.dtype == torch.float32
    names = {f"autoencoder.{name}" for name in vae.autoencoder.state_dict()}
    assert set(vae.state_dict()) == names
    vae.requires_grad_(False).to(torch.bfloat16)
    assert vae.dtype == vae.autoencoder.dtype == torch.bfloat16
    assert vae.to(device="meta").device.type == "meta"


def test_a_class_conditional_pipeline_runs_end_to_end(
    make_vae: Callable[..., DiffusersAutoencoder], make_reference: Callable[[], nn.Module]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=6,
        out_channels=6,
        num_layers=1,
        norm_num_groups=2,
        sample_size=4,
        patch_size=2,
    )
    images = []
    for vae in (make_reference(), make_vae(), make_vae(seed=1)):
        pipeline = diffusers.DiTPipeline(
            transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler()
        ).to("cpu")
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline([1, 2], num_inference_steps=2, generator=generator).images)
    assert len({tuple((image.mode, image.size) for image in batch) for batch in images}) == 1
    assert images[1][0].size == (32, 32)
    ours, other_seed = np.asarray(images[1][0]), np.asarray(images[2][0])
    assert ours.std() > 1 and not np.array_equal(ours, other_seed)


def test_an_image_to_image_pipeline_runs_end_to_end(
    make_vae: Callable[..., DiffusersAutoencoder], make_reference: Callable[[], nn.Module]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=6,
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (35, 51, 3), dtype=np.uint8))
    prompt_embeds = torch.randn(1, 3, 8)

    def run(vae: nn.Module, strength: float, dtype: torch.dtype = torch.float32) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = diffusers.StableDiffusionImg2ImgPipeline(
                vae=vae,
                text_encoder=None,
                tokenizer=None,
                unet=unet,
                scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompt_embeds=prompt_embeds.to(dtype),
            image=source,
            strength=strength,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    expected, found = run(make_reference(), 0.5), run(make_vae(), 0.5)
    assert found.shape == expected.shape == (1, 3, 32, 48) and found.dtype == expected.dtype
    assert found.isfinite().all() and found.std() > 0.01
    assert not torch.equal(run(make_vae(), 1.0), found)
    half_expected = run(make_reference(), 0.5, torch.bfloat16)
    half = run(make_vae(latent="kl"), 0.5, torch.bfloat16)
    assert half.dtype == half_expected.dtype == torch.bfloat16


def test_a_training_script_gets_its_latents(
    make_vae: Callable[..., DiffusersAutoencoder],
) -> None:
    """The calls of diffusers' examples/text_to_image/train_text_to_image.py."""
    vae = make_vae(latent="kl")
    vae.requires_grad_(False)
    vae.to("cpu", dtype=torch.bfloat16)
    pixel_values = random_batch().to(torch.bfloat16)
    latents = vae.encode(pixel_values).latent_dist.sample()
    latents = latents * vae.config.scaling_factor
    denoiser = nn.Conv2d(6, 6, 1).to(torch.bfloat16)
    (denoiser(latents) - torch.randn_like(latents)).square().mean().backward()
    assert denoiser.weight.grad is not None and denoiser.weight.grad.abs().sum() > 0
