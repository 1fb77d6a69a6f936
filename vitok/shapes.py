"""The config of an autoencoder, read off the shapes of its weights."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import NamedTuple

from vitok.variants import AutoencoderConfig, Part

Shapes = Mapping[str, tuple[int, ...]]


class _Side(NamedTuple):
    width: int
    depth: int
    heads: int
    patch_dim: int
    code: int  # what the encoder gives for a patch, or the decoder takes


def config_of_shapes(shapes: Shapes, source: str) -> AutoencoderConfig:
    """Return the config that weights follow.

    Shapes do not tell tanh from LayerNorm latents: both count as LayerNorm. An encoder or a decoder
    alone does not tell the other side: its width and heads repeat this side's (a linear encoder's:
    4 and 1), its depth is 0, and the latents of an encoder alone count as LayerNorm even if KL.
    Without blocks there is no telling the heads either, which then matter to nothing: 1.

    Args:
        shapes: of the parameters by name; of both parts or of one.
        source: where they came from, for the messages.

    Raises:
        ValueError: no autoencoder has weights of these names and shapes.
    """
    try:
        encoder = _encoder(shapes) if "to_code.weight" in shapes else None
        decoder = _decoder(shapes) if "decoder_embed.weight" in shapes else None
        known = encoder or decoder
        if known is None:
            shown = ", ".join(sorted(shapes)[:3])
            raise ValueError(f"neither to_code.weight nor decoder_embed.weight is in it ({shown})")
        placeholder = known._replace(width=known.width or 4, depth=0, heads=known.heads or 1)
        patch_size = isqrt(known.patch_dim // 3)
        if 3 * patch_size**2 != known.patch_dim:
            raise ValueError(f"a patch has {known.patch_dim} values, which is no 3 P^2")
        channels = (decoder or known).code
        encoder, decoder = encoder or placeholder, decoder or placeholder
        return AutoencoderConfig(
            patch_size=patch_size,
            latent_channels=channels,
            encoder_width=encoder.width,
            encoder_depth=encoder.depth,
            encoder_heads=encoder.heads,
            decoder_width=decoder.width,
            decoder_depth=decoder.depth,
            decoder_heads=decoder.heads,
            latent="kl" if encoder.code == 2 * channels else "layernorm",
        )
    except ValueError as error:
        raise ValueError(
            f"{source} does not hold the weights of an autoencoder: {error}"
        ) from error


def _encoder(shapes: Shapes) -> _Side:
    code, width = _matrix(shapes, "to_code.weight")
    if not any(name.startswith(("patch_embed.", "encoder_blocks.")) for name in shapes):
        return _Side(width=0, depth=0, heads=0, patch_dim=width, code=code)
    _, patch_dim = _matrix(shapes, "patch_embed.weight")
    return _Side(width, *_depth_and_heads(shapes, "encoder", width), patch_dim, code)


def _decoder(shapes: Shapes) -> _Side:
    width, channels = _matrix(shapes, "decoder_embed.weight")
    patch_dim, _ = _matrix(shapes, "to_pixels.weight")
    return _Side(width, *_depth_and_heads(shapes, "decoder", width), patch_dim, channels)


def _depth_and_heads(shapes: Shapes, part: Part, width: int) -> tuple[int, int]:
    numbers = [re.match(rf"{part}_blocks\.(\d+)\.", name) for name in shapes]
    depth = max((int(number[1]) + 1 for number in numbers if number), default=0)
    if depth == 0:
        return 0, 1
    name = f"{part}_blocks.0.attn.norm_q.weight"
    shape = shapes.get(name)
    if not shape or len(shape) != 1 or not shape[0] or width % shape[0]:
        raise ValueError(
            f"{name} {'missing' if shape is None else f'has shape {shape}'}; its length, that of a "
            f"head, should divide the width {width}"
        )
    return depth, width // shape[0]


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer."""
    if name not in shapes:
        raise ValueError(f"{name} missing")
    if len(shapes[name]) != 2:
        raise ValueError(f"{name} has shape {shapes[name]}, which is no matrix")
    rows, columns = shapes[name]
    return rows, columns
