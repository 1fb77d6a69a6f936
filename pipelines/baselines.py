"""Autoencoders that people compare with, through diffusers (extra `baselines`)."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def reconstruct_with(baseline: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that reconstructs a batch [B, 3, H, W] in [-1, 1] with a baseline."""

    def reconstruct(images: Tensor) -> Tensor:
        encoded = baseline.encode(images)  # type: ignore[operator]
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return baseline.decode(latents).sample  # type: ignore[operator]

    return reconstruct


def _diffusers() -> Any:
    # Its models bring torchao, which reports the extensions that this machine cannot load.
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
    except ImportError as error:
        raise ImportError(
            "diffusers is not installed; `pip install diffusers`, or ask for no baselines"
        ) from error
    return diffusers
