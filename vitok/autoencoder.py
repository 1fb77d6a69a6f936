"""The ViTok-v2 autoencoder (arXiv 2605.05331)."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vitok.attention import attention_layout
from vitok.bottleneck import Posterior, posterior_of
from vitok.config import require_choice
from vitok.images import Latent, decode_latents, encode_images
from vitok.packed import PackedTokens
from vitok.pixels import ImageLike
from vitok.transformer import Block, rope_rotation
from vitok.variants import AutoencoderConfig, Part
from vitok.window import WindowBackend

_ENCODER_MODULES = ("patch_embed.", "encoder_blocks.", "to_code.")


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What a forward pass gives.

    Attributes:
        pixels: reconstructed patches [T, 3P^2]; not clamped.
        latents: [T, c], as the decoder saw them.
        kl_T: [T] divergence of each token's posterior, mean over channels; None but for KL latents.
    """

    pixels: PackedTokens
    latents: PackedTokens
    kl_T: Tensor | None


class Autoencoder(nn.Module):
    """ViT encoder and decoder around a latent of c channels a patch.

    Maps PackedTokens of pixels in [-1, 1] to PackedTokens of reconstructed pixels. Parameter names
    are those of the released ViTok-v2 weights. Built under `torch.device("meta")` it takes no
    memory; `to_empty` and `start_at_random` (vitok.initialize) make it real, sharded or whole.

    Args:
        part: build the encoder or the decoder alone.

    Attributes:
        window_backend: how sliding windows are computed: "halo", "flex", or None for the one that
            suits the device.
    """

    def __init__(self, config: AutoencoderConfig, part: Part | None = None) -> None:
        super().__init__()
        if part is not None:
            require_choice("part", part, Part)
        self.config = config
        self.window_backend: WindowBackend | None = None
        if part != "decoder":
            if config.encoder_width:
                self.patch_embed = nn.Linear(config.patch_dim, config.encoder_width)
            self.encoder_blocks = nn.ModuleList(
                Block(config.encoder_width, config.encoder_heads, config.layer_scale)
                for _ in range(config.encoder_depth)
            )
            self.to_code = nn.Linear(config.encoder_width or config.patch_dim, config.code_channels)
        if part != "encoder":
            self.decoder_embed = nn.Linear(config.latent_channels, config.decoder_width)
            self.decoder_blocks = nn.ModuleList(
                Block(config.decoder_width, config.decoder_heads, config.layer_scale)
                for _ in range(config.decoder_depth)
            )
            self.to_pixels = nn.Linear(config.decoder_width, config.patch_dim)

    def forward(
        self, packed: PackedTokens, *, noise: Tensor | None = None, window: int | None = None
    ) -> Reconstruction:
        """Reconstruct a packed row of patches [T, 3P^2].

        Args:
            noise: [T, c] standard normal, which tanh and KL latents are moved by in training;
                without it they are deterministic.
            window: radius in patches of 2D sliding-window attention; full attention if None.
        """
        posterior = self.posterior(packed, window=window)
        latents = packed.with_tokens(posterior.sample(noise))
        return Reconstruction(
            pixels=self.decode_packed(latents, window=window),
            latents=latents,
            kl_T=posterior.kl_T,
        )

    def posterior(self, packed: PackedTokens, *, window: int | None = None) -> Posterior:
        """Encode patches [T, 3P^2] to where their latents [T, c] may lie."""
        self._require("encoder")
        x_TW = packed.tokens.to(self.to_code.weight.dtype)
        if self.config.encoder_width:
            x_TW = self.patch_embed(x_TW)
            x_TW = self._run_blocks(self.encoder_blocks, x_TW, packed, window)
        return posterior_of(self.to_code(x_TW), self.config)

    def encode_packed(self, packed: PackedTokens, *, window: int | None = None) -> PackedTokens:
        """Encode patches [T, 3P^2] to latents [T, c] float32: always the same for the same pixels.

        LayerNorm latents have mean 0 and variance 1 over c, tanh latents lie in (-1, 1), KL latents
        are the mean of their posterior.
        """
        return packed.with_tokens(self.posterior(packed, window=window).mean)

    def decode_packed(self, latents: PackedTokens, *, window: int | None = None) -> PackedTokens:
        """Decode latents [T, c] to patches [T, 3P^2]; not clamped."""
        self._require("decoder")
        x_TW = self.decoder_embed(latents.tokens.to(self.decoder_embed.weight.dtype))
        x_TW = self._run_blocks(self.decoder_blocks, x_TW, latents, window)
        return latents.with_tokens(self.to_pixels(x_TW))

    def encode(
        self, images: ImageLike | Iterable[ImageLike], *, window: int | None = None
    ) -> list[Latent]:
        """Encode images of any kind and size; see vitok.images.encode_images."""
        return encode_images(self, images, window=window)

    def decode(
        self, latents: Latent | Iterable[Latent], *, window: int | None = None
    ) -> list[Tensor]:
        """Decode to images [3, H, W] in [-1, 1]; see vitok.images.decode_latents."""
        return decode_latents(self, latents, window=window)

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        part: Part | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Autoencoder":
        """Load a released or an exported model; see vitok.pretrained.load_pretrained."""
        from vitok.pretrained import load_pretrained

        return load_pretrained(location, part=part, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and config to a folder; see vitok.pretrained.save_pretrained."""
        from vitok.pretrained import save_pretrained

        save_pretrained(Path(folder), self.config, self.state_dict())

    def num_parameters(self, part: Part | None = None) -> int:
        """Count parameters, of the whole or of one part."""
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if part is None or part_of(name) == part
        )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, in which the blocks compute."""
        return next(self.parameters()).dtype

    def _run_blocks(
        self, blocks: nn.ModuleList, x_TW: Tensor, packed: PackedTokens, window: int | None
    ) -> Tensor:
        if not blocks:
            return x_TW
        first = blocks[0]
        assert isinstance(first, Block)
        head_dim = first.attn.head_dim
        layout = attention_layout(
            packed, x_TW.dtype, head_dim, window=window, window_backend=self.window_backend
        )
        rotation = rope_rotation(packed.patch_coord, head_dim)
        for block in blocks:
            x_TW = block(x_TW, rotation, layout)
        return x_TW

    def _require(self, part: Part) -> None:
        if not hasattr(self, "to_code" if part == "encoder" else "to_pixels"):
            other = "decoder" if part == "encoder" else "encoder"
            raise ValueError(f"this model has its {other} alone; load it without part={other!r}")


def part_of(parameter_name: str) -> Part:
    """Say which of the two released files a parameter belongs to."""
    return "encoder" if parameter_name.startswith(_ENCODER_MODULES) else "decoder"


# FSDP finds the tensors in the results of a forward pass through pytrees.
torch.export.register_dataclass(Reconstruction)
