"""Autoencoders that people compare with, through diffusers (extra `baselines`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.networks import hush_torchao

# Where weights are published: repository, and the folder in it.
REPOSITORIES: dict[str, tuple[str, str]] = {
    "sd-vae": ("stabilityai/sd-vae-ft-mse", ""),
    "sdxl-vae": ("stabilityai/sdxl-vae", ""),
    "flux1-vae": ("black-forest-labs/FLUX.1-dev", "vae"),
    "flux2-vae": ("black-forest-labs/FLUX.2-dev", "vae"),
    "qwen-image-vae": ("Qwen/Qwen-Image", "vae"),
    "hunyuan-video-vae": ("hunyuanvideo-community/HunyuanVideo", "vae"),
    "hunyuan-image-vae": ("hunyuanvideo-community/HunyuanImage-2.1-Diffusers", "vae"),
    "dc-ae-f32c32": ("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", ""),
    "rae-dinov2": ("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", ""),
}

# The shapes of published autoencoders, as arguments of their diffusers classes.
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd-vae": ("AutoencoderKL", {**_KL, "latent_channels": 4}),
    "flux": (
        "AutoencoderKL",
        {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "dc-ae": (
        "AutoencoderDC",
        {
            "latent_channels": 32,
            "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "Conv",
            "decoder_act_fns": "silu",
        },
    ),
}


def random_baseline(name: str, dtype: torch.dtype) -> nn.Module:
    """Build a published autoencoder's shape with random weights; in eval mode, on the CPU.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"there is no baseline {name!r}, only {', '.join(SHAPES)}")
    kind, arguments = SHAPES[name]
    return getattr(_diffusers(), kind)(**arguments).eval().requires_grad_(False).to(dtype)


@dataclass(frozen=True)
class _Family:
    """How the models of a diffusers class are used.

    Attributes:
        stride: pixels along each side of a latent.
        channels: of a latent.
        is_video: images are videos of one frame.
    """

    stride: Callable[[Any], int]
    channels: Callable[[Any], int]
    is_video: bool = False


_BY_LEVELS = _Family(
    lambda model: 2 ** (len(model.config.block_out_channels) - 1),
    lambda model: model.config.latent_channels,
)
_FAMILIES: dict[str, _Family] = {
    "AutoencoderKL": _BY_LEVELS,
    "AutoencoderKLFlux2": _BY_LEVELS,
    "AutoencoderKLQwenImage": _Family(
        lambda model: model.spatial_compression_ratio,
        lambda model: model.config.z_dim,
        is_video=True,
    ),
    "AutoencoderKLHunyuanVideo": _Family(
        lambda model: model.config.spatial_compression_ratio,
        lambda model: model.config.latent_channels,
        is_video=True,
    ),
    "AutoencoderKLHunyuanImage": _Family(
        lambda model: model.config.spatial_compression_ratio,
        lambda model: model.config.latent_channels,
    ),
    "AutoencoderDC": _Family(
        lambda model: model.spatial_compression_ratio,
        lambda model: model.config.latent_channels,
    ),
    # Its decoder draws squares of one size.
    "AutoencoderRAE": _Family(
        lambda model: model.decoder_patch_size,
        lambda model: model.config.encoder_hidden_size,
    ),
}


def load_baseline(location: str, dtype: torch.dtype) -> nn.Module:
    """Load an autoencoder of diffusers; in eval mode, on the CPU. Nothing is downloaded.

    Args:
        location: a name of REPOSITORIES, a folder, or a repository that is in Hugging Face's cache.

    Raises:
        ImportError: diffusers is not installed, or too old for it.
        FileNotFoundError: the weights are not there.
        ValueError: they are of no autoencoder of images that we know.
    """
    repository, subfolder = REPOSITORIES.get(location, (location, ""))
    diffusers = _diffusers()
    # Weights that are pickles could run code.
    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": dtype}
    source = {"local_files_only": not Path(repository).is_dir()}
    if subfolder:
        source["subfolder"] = subfolder
    try:
        fields = diffusers.AutoencoderKL.load_config(repository, **source)
        kind = fields.get("_class_name")
        if kind not in _FAMILIES:
            raise ValueError(
                f"{location} is of the class {kind}; only {', '.join(_FAMILIES)} are known"
            )
        if not hasattr(diffusers, kind):
            raise ImportError(
                f"{location} needs the class {kind}, which this diffusers "
                f"({diffusers.__version__}) does not have; `pip install -U diffusers`"
            )
        model = getattr(diffusers, kind).from_pretrained(repository, **source, **options)
    except OSError as error:
        inside = f' --include "{subfolder}/*"' if subfolder else ""
        folder = f"FOLDER/{subfolder}" if subfolder else "FOLDER"
        raise FileNotFoundError(
            f"no weights of {location} on this machine; download them with `hf download "
            f"{repository}{inside} --local-dir FOLDER` and give diffusers:{folder}, or without "
            "--local-dir, and give the same name again"
        ) from error
    return model.eval().requires_grad_(False)


def latent_shape(baseline: nn.Module) -> tuple[int, int]:
    """Return (pixels along each side of a latent, its channels)."""
    family = _FAMILIES[type(baseline).__name__]
    return family.stride(baseline), family.channels(baseline)


def reconstruct_with(baseline: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that reconstructs a batch [B, 3, H, W] in [-1, 1] with a baseline.

    Images are padded to whole latents by reflection, right and bottom, and cut again. Latents are
    the mode of their distribution, and are not scaled: scaling is for models that generate them.
    """
    kind = type(baseline).__name__
    family, (stride, _) = _FAMILIES[kind], latent_shape(baseline)

    def pass_through(images: Tensor) -> Tensor:
        encoded = baseline.encode(images)  # type: ignore[operator]
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return baseline.decode(latents).sample  # type: ignore[operator]

    def reconstruct(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if kind == "AutoencoderRAE":
            side = baseline.decoder_image_size
            if (height, width) != (side, side):
                raise ValueError(
                    f"it reconstructs squares of {side} pixels alone; evaluate it at square={side}"
                )
            return pass_through((images + 1) / 2) * 2 - 1
        padded = _pad(images, stride)
        if family.is_video:
            return pass_through(padded[:, :, None])[:, :, 0, :height, :width]
        return pass_through(padded)[..., :height, :width]

    return reconstruct


def _pad(images: Tensor, stride: int) -> Tensor:
    """Pad [B, 3, H, W] right and bottom to multiples of the stride."""
    height, width = images.shape[-2:]
    right, bottom = -width % stride, -height % stride
    # There is nothing beyond the opposite edge to reflect.
    mode = "reflect" if right < width and bottom < height else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)


def _diffusers() -> Any:
    hush_torchao()
    try:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
    except ImportError as error:
        raise ImportError(
            "diffusers is not installed; `pip install diffusers`, or ask for no baselines"
        ) from error
    return diffusers
