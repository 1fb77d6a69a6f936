"""What the named models are: their sizes, and what an image costs."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.patches import num_tokens
from vitok.pretrained import save_pretrained
from vitok.variants import RELEASED, SIZES, SIZES_V1, AutoencoderConfig

# Every size, at both patches of the paper's scaling study; its linear encoder; ViTok v1.
_LADDER = (
    "linear-B/16x64",
    *(f"{size}d4-{size}/16x64" for size in SIZES),
    *(f"{size}d4-{size}/32x256" for size in SIZES),
    *(f"v1/S-{size}/16x16" for size in SIZES_V1),
)


@dataclass(frozen=True)
class ModelDescription:
    """One model.

    Attributes:
        name: for `AutoencoderConfig.from_name`.
        released: whether its weights are.
        encoder_parameters, decoder_parameters: of either part.
        compression_ratio: pixel values for each latent value, r.
        tokens_256p, tokens_512p: latents of a square image of 256 or 512 pixels a side.
        flops_256p, flops_512p: of reconstructing one with full attention: matrix products, two
            operations for each multiply-add.
    """

    name: str
    released: bool
    encoder_parameters: int
    decoder_parameters: int
    compression_ratio: float
    tokens_256p: int
    tokens_512p: int
    flops_256p: float
    flops_512p: float


def describe_models(names: list[str]) -> list[ModelDescription]:
    """Describe models by name; the released ones and a ladder of sizes if there are no names.

    Raises:
        ValueError: a name is none.
    """
    return [_describe(name) for name in names or (*RELEASED, *_LADDER)]


def _describe(name: str) -> ModelDescription:
    config = AutoencoderConfig.from_name(name)
    with torch.device("meta"):
        model = Autoencoder(config)
    small, large = (num_tokens(side, side, config.patch_size) for side in (256, 512))
    return ModelDescription(
        name=name,
        released=name in RELEASED,
        encoder_parameters=model.num_parameters("encoder"),
        decoder_parameters=model.num_parameters("decoder"),
        compression_ratio=config.compression_ratio,
        tokens_256p=small,
        tokens_512p=large,
        flops_256p=small * config.flops_per_token(small),
        flops_512p=large * config.flops_per_token(large),
    )


def format_models(models: list[ModelDescription]) -> str:
    """Return a table of models for a terminal."""
    header = "model,encoder,decoder,r,tokens 256p,512p,GFLOPs 256p,512p,weights"
    rows = [tuple(header.split(","))]
    rows += [
        (
            model.name,
            _count(model.encoder_parameters),
            _count(model.decoder_parameters),
            f"{model.compression_ratio:g}",
            str(model.tokens_256p),
            str(model.tokens_512p),
            f"{model.flops_256p / 1e9:,.0f}",
            f"{model.flops_512p / 1e9:,.0f}",
            "released" if model.released else "",
        )
        for model in models
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def save_random(name: str, folder: Path) -> Autoencoder:
    """Write a named model with random weights for load_pretrained, which takes as long to compute.

    Returns:
        the model.
    """
    config = AutoencoderConfig.from_name(name)
    model = Autoencoder(config)
    start_at_random(model, seed=0)
    save_pretrained(folder, config, model.state_dict())
    return model
