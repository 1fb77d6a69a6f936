import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor, nn

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.evaluation.baselines import (
    REPOSITORIES,
    latent_shape,
    load_baseline,
    reconstruct_with,
)
from pipelines.evaluation.codecs import compress, reconstruct_with_codec
from pipelines.evaluation.subjects import SubjectSpec, load_subject
from vitok.images import to_tensor

CPU = torch.device("cpu")
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# Classes of diffusers, a small shape of each, and what follows from it: (stride, channels).
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "AutoencoderKL": ({**_KL, "latent_channels": 4}, (4, 4)),
    "AutoencoderKLFlux2": ({**_KL, "latent_channels": 4}, (4, 4)),
    "AutoencoderKLQwenImage": (
        {
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        (4, 4),
    ),
    "AutoencoderKLHunyuanVideo": (
        {
            "latent_channels": 4,
            "block_out_channels": (4, 4, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        },
        (8, 4),
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "sample_size": 64,
        },
        (4, 8),
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 8,
            "attention_head_dim": 8,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": (8, 16, 16),
            "decoder_block_out_channels": (8, 16, 16),
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "encoder_qkv_multiscales": ((), (), ()),
            "decoder_qkv_multiscales": ((), (), ()),
        },
        (4, 8),
    ),
    "AutoencoderRAE": (
        {
            "encoder_hidden_size": 64,
            "encoder_num_hidden_layers": 1,
            "encoder_patch_size": 14,
            "encoder_input_size": 56,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
            "patch_size": 16,
        },
        (16, 64),
    ),
}


def random_model(kind: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return getattr(diffusers, kind)(**SHAPES[kind][0]).eval().requires_grad_(False)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return to_tensor(Image.fromarray(photographs.astronaut()[100:260, 100:300]))


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "AutoencoderRAE"])
def test_baselines_of_every_kind_give_images_of_any_size_back(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path / "model")
    spec = SubjectSpec(location=f"diffusers:{tmp_path / 'model'}")
    subject = load_subject(spec, CPU)
    stride, channels = SHAPES[kind][1]
    assert latent_shape(model) == (stride, channels)
    assert subject.facts.compression_ratio == 3 * stride**2 / channels
    assert subject.facts.bits_per_pixel == 16 * channels / stride**2
    sources = [image(32, 48), image(33, 46), image(32, 48, seed=1)]
    outputs = subject.reconstruct(sources)
    assert [x.shape for x in outputs] == [x.shape for x in sources]
    for source, output in zip(sources, outputs, strict=True):
        (alone,) = subject.reconstruct([source])
        torch.testing.assert_close(output, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2])
    # Whole latents: what the model itself makes of the image.
    batch = (
        sources[0][None]
        if "Qwen" not in kind and "Video" not in kind
        else sources[0][None, :, None]
    )
    encoded = model.encode(batch)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    assert latents.shape[-2:] == (32 // stride, 48 // stride)
    expected = model.decode(latents).sample.reshape(3, 32, 48)
    torch.testing.assert_close(outputs[0], expected, atol=1e-4, rtol=1e-4)


def test_images_are_padded_to_whole_latents_by_reflection() -> None:
    model = random_model("AutoencoderKL")
    source = image(30, 42)
    padded = torch.from_numpy(np.pad(source.numpy(), ((0, 0), (0, 2), (0, 2)), mode="reflect"))
    expected = model.decode(model.encode(padded[None]).latent_dist.mode()).sample
    found = reconstruct_with(model)(source[None])
    torch.testing.assert_close(found, expected[..., :30, :42])
    assert reconstruct_with(model)(image(1, 1)[None]).shape == (1, 3, 1, 1), "nothing to reflect"


def test_rae_takes_squares_of_its_size_alone_and_colours_from_0_to_1() -> None:
    model = random_model("AutoencoderRAE")
    assert latent_shape(model) == (16, 64)
    source = image(64, 64)
    expected = model.decode(model.encode((source[None] + 1) / 2).latent).sample * 2 - 1
    torch.testing.assert_close(reconstruct_with(model)(source[None]), expected)
    with pytest.raises(ValueError, match="squares of 64 pixels alone; evaluate it at square=64"):
        reconstruct_with(model)(image(64, 80)[None])


def test_weights_of_baselines_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    for name, (repository, subfolder) in REPOSITORIES.items():
        with pytest.raises(FileNotFoundError) as caught:
            load_baseline(name, torch.float32)
        message = str(caught.value)
        assert f"no weights of {name} on this machine; download them with `hf download" in message
        assert repository in message
        assert ("give diffusers:FOLDER/vae" in message) == (subfolder == "vae")
    nowhere = SubjectSpec(location=f"diffusers:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no weights of"):
        load_subject(nowhere, CPU)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="is of the class UNet2DModel; only AutoencoderKL, "):
        load_subject(nowhere, CPU)


@pytest.mark.parametrize(("wrong", "right"), [("sdvae", "sd-vae"), ("web", "webp")])
def test_a_misspelt_subject_is_named_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"no subject '{wrong}'; did you mean {right}"):
        load_subject(SubjectSpec(location=wrong), CPU)


def test_our_models_are_reconstructed_with_the_options_of_the_spec(tiny_weights: Path) -> None:
    model = load_autoencoder(str(tiny_weights))
    sources = [image(64, 80), image(33, 47)]
    for options, window in ((",dtype=float32", None), (",dtype=float32,window=1", 1)):
        spec = SubjectSpec.parse(f"{tiny_weights}{options}")
        subject = load_subject(spec, CPU)
        expected = model.decode(model.encode(sources, window=window), window=window)
        for output, wanted in zip(subject.reconstruct(sources), expected, strict=True):
            torch.testing.assert_close(output, wanted)
    exact = subject.reconstruct(sources)
    half = load_subject(SubjectSpec.parse(f"{tiny_weights},window=1"), CPU)
    rounded = half.reconstruct(sources)
    assert not torch.equal(rounded[0], exact[0])
    torch.testing.assert_close(rounded[0], exact[0], atol=0.1, rtol=0.1)
    assert half.facts.digest != subject.facts.digest, "it is that of the weights in use"
    with pytest.raises(RuntimeError, match="float8 needs a CUDA device"):
        load_subject(SubjectSpec.parse(f"{tiny_weights},dtype=float8"), CPU)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_codecs_take_the_best_quality_that_fits(codec: Any, photograph: Tensor) -> None:
    picture = Image.fromarray(photographs.astronaut()[100:260, 100:300])

    def size_at(quality: int) -> int:
        stream = io.BytesIO()
        options = {"optimize": True} if codec == "jpeg" else {"method": 4}
        picture.save(stream, codec.upper(), quality=quality, **options)
        return len(stream.getvalue())

    for bits_per_pixel in (0.8, 2.0):
        limit = bits_per_pixel * 160 * 200 / 8
        data = compress(picture, codec, limit)
        assert len(data) <= limit
        fitting = [quality for quality in range(1, 101) if size_at(quality) <= limit]
        assert len(data) == size_at(max(fitting))
        with Image.open(io.BytesIO(data)) as opened:
            expected = to_tensor(opened.convert("RGB"))
        torch.testing.assert_close(
            reconstruct_with_codec(codec, bits_per_pixel)(photograph), expected
        )
    assert len(compress(picture, codec, size_at(1))) == size_at(1)
    with pytest.raises(ValueError, match=f"at least {size_at(1)} bytes for 200 x 160 pixels, and"):
        compress(picture, codec, size_at(1) - 1)


def test_a_spec_names_itself_by_what_is_special() -> None:
    assert SubjectSpec.parse("runs/a/").title == "runs/a"
    assert SubjectSpec.parse("350M-f16x64,window=8,dtype=float8").title == (
        "350M-f16x64, window 8, float8"
    )
    assert SubjectSpec.parse("sd-vae,name=SD").title == "SD"
    assert SubjectSpec.parse("350M-f16x64,compile=yes").compile
    assert SubjectSpec.parse("jpeg,bits-per-pixel=2").bits_per_pixel == 2, "as on the command line"
    assert SubjectSpec.parse("sd-vae").is_baseline
    assert not SubjectSpec.parse("sd-vae").is_ours
    assert SubjectSpec.parse("owner/name@main").is_ours
