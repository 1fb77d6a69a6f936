"""The ViTok-v2 autoencoder and its named variants (arXiv 2605.05331)."""

import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.attention import attention_layout
from vitok.config import config
from vitok.packed import PackedTokens
from vitok.patches import grid_size
from vitok.transformer import Block, LayerScale, RMSNorm, rope_rotation, swiglu_hidden

# Letter -> (width, depth, heads). The paper's Table 6 prints G as 1408 x 40 with 16 heads; its own
# parameter counts (1.1B to 1.2B) are those of 1728 x 32 with 24 heads.
SIZES = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "G": (1728, 32, 24),
    "T": (3072, 40, 24),
}
_NAME = re.compile(r"([BLGT])(?:d(\d+))?-([BLGT])(?:d(\d+))?/(?:1x)?(\d+)x(\d+)")


@config
class AutoencoderConfig:
    """The shape of an autoencoder.

    Attributes:
        patch_size: pixels along each side of a patch, P.
        latent_channels: channels of a latent, c; the compression ratio is 3 P^2 / c.
        encoder_width: channels of the encoder's tokens.
        encoder_depth: its blocks.
        encoder_heads: its attention heads.
        decoder_width: channels of the decoder's tokens.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        layer_scale: initial LayerScale of every block; matters only to training from scratch.
    """

    patch_size: int = 16
    latent_channels: int = 64
    encoder_width: int = 1024
    encoder_depth: int = 4
    encoder_heads: int = 16
    decoder_width: int = 1024
    decoder_depth: int = 24
    decoder_heads: int = 16
    layer_scale: float = 0.1

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if heads < 1 or width % (4 * heads):
                raise ValueError(
                    f"{side}_width={width} over {side}_heads={heads} must leave a head dimension "
                    "that is a multiple of 4 (2D RoPE turns pairs of rows and of columns)"
                )
            if getattr(self, f"{side}_depth") < 0:
                raise ValueError(f"{side}_depth={getattr(self, f'{side}_depth')} is negative")
        if self.patch_size < 1 or self.latent_channels < 2:
            raise ValueError(
                f"patch_size={self.patch_size} must be at least 1 and "
                f"latent_channels={self.latent_channels} at least 2"
            )

    @classmethod
    def from_name(cls, name: str) -> "AutoencoderConfig":
        """Read `{encoder}-{decoder}/{patch}x{channels}`, as in `Ld4-Ld24/16x64` or `Td4-T/1x16x64`.

        Raises:
            ValueError: the name has another form or another size letter.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is no model name; write ENCODER-DECODER/PATCHxCHANNELS with the sizes "
                f"{', '.join(SIZES)} and an optional depth, as in Ld4-L/16x64"
            )
        encoder, encoder_depth, decoder, decoder_depth, patch, channels = match.groups()
        encoder_width, depth, encoder_heads = SIZES[encoder]
        decoder_width, full_depth, decoder_heads = SIZES[decoder]
        return cls(
            patch_size=int(patch),
            latent_channels=int(channels),
            encoder_width=encoder_width,
            encoder_depth=int(encoder_depth or depth),
            encoder_heads=encoder_heads,
            decoder_width=decoder_width,
            decoder_depth=int(decoder_depth or full_depth),
            decoder_heads=decoder_heads,
        )

    @property
    def patch_dim(self) -> int:
        """Values of a patch vector: 3 P^2."""
        return 3 * self.patch_size**2

    @property
    def compression_ratio(self) -> float:
        """Pixel values for each latent value: r = 3 P^2 / c."""
        return self.patch_dim / self.latent_channels

    def flops_per_token(self, sequence_length: float) -> float:
        """Return the floating-point operations of one forward pass, for each token.

        Matrix products only, two operations for each multiply-add; attention over
        sequence_length tokens.
        """

        def tower(width: int, depth: int) -> float:
            matrices = 4 * width**2 + 3 * width * swiglu_hidden(width)
            return depth * (2 * matrices + 4 * width * sequence_length)

        linear = self.patch_dim + self.latent_channels
        return (
            tower(self.encoder_width, self.encoder_depth)
            + tower(self.decoder_width, self.decoder_depth)
            + 2 * linear * (self.encoder_width + self.decoder_width)
        )


class Autoencoder(nn.Module):
    """ViT encoder and decoder around a latent of c channels a patch.

    Maps PackedTokens of pixels in [-1, 1] to PackedTokens of reconstructed pixels. Parameter names
    are those of the released ViTok-v2 weights.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_dim, config.encoder_width)
        self.encoder_blocks = nn.ModuleList(
            Block(config.encoder_width, config.encoder_heads, config.layer_scale)
            for _ in range(config.encoder_depth)
        )
        self.to_code = nn.Linear(config.encoder_width, config.latent_channels)
        self.decoder_embed = nn.Linear(config.latent_channels, config.decoder_width)
        self.decoder_blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, config.layer_scale)
            for _ in range(config.decoder_depth)
        )
        self.to_pixels = nn.Linear(config.decoder_width, config.patch_dim)

    def forward(self, packed: PackedTokens) -> PackedTokens:
        """Reconstruct a packed row: tokens [T, 3P^2] to [T, 3P^2]."""
        return self.decode_packed(self.encode_packed(packed))

    def encode_packed(self, packed: PackedTokens) -> PackedTokens:
        """Encode patches [T, 3P^2] to latents [T, c], each of mean 0 and variance 1 over c."""
        x_TW = self.patch_embed(packed.tokens.to(self.patch_embed.weight.dtype))
        x_TW = _run_blocks(self.encoder_blocks, x_TW, packed, self.config.encoder_heads)
        code = self.to_code(x_TW)
        return packed.with_tokens(F.layer_norm(code.float(), code.shape[-1:], eps=1e-6))

    def decode_packed(self, latents: PackedTokens) -> PackedTokens:
        """Decode latents [T, c] to patches [T, 3P^2]; not clamped."""
        x_TW = self.decoder_embed(latents.tokens.to(self.decoder_embed.weight.dtype))
        x_TW = _run_blocks(self.decoder_blocks, x_TW, latents, self.config.decoder_heads)
        return latents.with_tokens(self.to_pixels(x_TW))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's generator: truncated normal (0.02), zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.initial)

    def num_parameters(self, part: Literal["encoder", "decoder"] | None = None) -> int:
        """Count parameters, of the whole or of one part."""
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if part is None or part_of(name) == part
        )


def part_of(parameter_name: str) -> Literal["encoder", "decoder"]:
    """Say which of the two released files a parameter belongs to."""
    encoder = ("patch_embed.", "encoder_blocks.", "to_code.")
    return "encoder" if parameter_name.startswith(encoder) else "decoder"


def _run_blocks(
    blocks: nn.ModuleList, x_TW: Tensor, packed: PackedTokens, num_heads: int
) -> Tensor:
    layout = attention_layout(packed)
    rotation = rope_rotation(packed.patch_coord, x_TW.shape[-1] // num_heads)
    for block in blocks:
        x_TW = block(x_TW, rotation, layout)
    return x_TW


def num_tokens(height: int, width: int, patch_size: int) -> int:
    """Return the tokens of an image of height x width pixels."""
    rows, columns = grid_size(height, width, patch_size)
    return rows * columns
