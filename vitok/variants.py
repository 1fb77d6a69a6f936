"""The shapes of autoencoders, and their names."""

import re
from typing import Literal

from vitok.config import config, require_choice
from vitok.transformer import swiglu_hidden

Part = Literal["encoder", "decoder"]
Latent = Literal["layernorm", "tanh", "kl"]

# Letter -> (width, depth, heads), arXiv 2605.05331. Its Table 6 prints G as 1408 x 40 with 16
# heads, which would be 0.95B; its own parameter counts (1.1B to 1.2B) are those of 1728 x 32 with
# 24 heads.
SIZES = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "G": (1728, 32, 24),
    "T": (3072, 40, 24),
}
# The sizes of ViTok v1 (arXiv 2501.09755), whose L is another one: named `v1/S-L/16x64`.
SIZES_V1 = {
    "S": (768, 6, 12),
    "B": (768, 12, 12),
    "L": (1152, 24, 16),
}
# Models whose weights are released, by the names of their repositories.
RELEASED_TOWERS = {"350M": "Ld4-Ld24", "5B": "Td4-T"}
RELEASED = (
    *(f"350M-f16x{channels}" for channels in (16, 32, 64)),
    *(f"5B-f16x{channels}" for channels in (16, 32, 64)),
    *(f"5B-f32x{channels}" for channels in (64, 128, 256)),
)
_NAME = re.compile(r"(v1/)?(linear|([A-Z])(?:d(\d+))?)-([A-Z])(?:d(\d+))?/(?:1x)?(\d+)x(\d+)")


@config
class AutoencoderConfig:
    """The shape of an autoencoder.

    Attributes:
        patch_size: pixels along each side of a patch, P.
        latent_channels: channels of a latent, c; the compression ratio is 3 P^2 / c.
        encoder_width: channels of the encoder's tokens; 0 for a linear encoder, a single layer from
            patch to latent, whose depth and heads are 0 too.
        encoder_depth: its blocks.
        encoder_heads: its attention heads.
        decoder_width: channels of the decoder's tokens.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        latent: how the latent is kept in bounds: LayerNorm over its channels, tanh with added noise
            in training, or a Gaussian posterior (KL).
        latent_noise: standard deviation of the noise of `tanh`.
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
    latent: Latent = "layernorm"
    latent_noise: float = 0.01
    layer_scale: float = 0.1

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            width, depth, heads = (
                getattr(self, f"{side}_{name}") for name in ("width", "depth", "heads")
            )
            if side == "encoder" and width == 0:
                if depth or heads:
                    raise ValueError(
                        f"encoder_width=0 is a linear encoder, which has no blocks; set "
                        f"encoder_depth={depth} and encoder_heads={heads} to 0 too"
                    )
                continue
            if heads < 1 or width < 1 or width % (4 * heads):
                raise ValueError(
                    f"{side}_width={width} over {side}_heads={heads} must leave a head dimension "
                    "that is a multiple of 4 (2D RoPE turns pairs of rows and of columns)"
                )
            if depth < 0:
                raise ValueError(f"{side}_depth={depth} is negative; 0 is the least")
        if self.patch_size < 1 or self.latent_channels < 2:
            raise ValueError(
                f"patch_size={self.patch_size} must be at least 1 and "
                f"latent_channels={self.latent_channels} at least 2"
            )
        require_choice("latent", self.latent, Latent)
        if not 0 <= self.latent_noise < float("inf"):
            raise ValueError(f"latent_noise={self.latent_noise} must be finite and not negative")

    @classmethod
    def from_name(cls, name: str) -> "AutoencoderConfig":
        """Read a model's name.

        `{encoder}-{decoder}/{patch}x{channels}`, as in `Ld4-Ld24/16x64`, `linear-B/16x64`, or
        `Td4-T/1x16x64` as released checkpoints write it; a released model, as in `350M-f16x64`; or
        one of ViTok v1's sizes, as in `v1/S-L/16x16`.

        Raises:
            ValueError: the name has another form or another size letter.
        """
        if released := released_name(name):
            towers, _, shape = released.partition("-f")
            name = f"{RELEASED_TOWERS[towers]}/{shape}"
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is no model name; write ENCODER-DECODER/PATCHxCHANNELS with the sizes "
                f"{', '.join(SIZES)} and an optional depth, as in Ld4-L/16x64, linear-B/16x64 or "
                f"v1/S-L/16x64, or a released model: {', '.join(RELEASED)}"
            )
        v1, encoder, letter, encoder_depth, decoder, decoder_depth, patch, channels = match.groups()
        sizes = SIZES_V1 if v1 else SIZES
        for size in (letter, decoder):
            if size not in (None, *sizes):
                of = "ViTok v1" if v1 else "ViTok-v2"
                other = "; S is a size of ViTok v1: write v1/S-..." if size == "S" else ""
                raise ValueError(
                    f"{name!r}: there is no size {size} of {of}, only {', '.join(sizes)}{other}"
                )
        encoder_width, depth, encoder_heads = (0, 0, 0) if encoder == "linear" else sizes[letter]
        decoder_width, full_depth, decoder_heads = sizes[decoder]
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
    def code_channels(self) -> int:
        """Values that the encoder gives for a patch: 2c for KL latents, which have a spread."""
        return self.latent_channels * (2 if self.latent == "kl" else 1)

    @property
    def compression_ratio(self) -> float:
        """Pixel values for each latent value: r = 3 P^2 / c."""
        return self.patch_dim / self.latent_channels

    def flops_per_token(self, num_keys: float, part: Part | None = None) -> float:
        """Return the floating-point operations of one forward pass, for each token.

        Matrix products only, two operations for each multiply-add.

        Args:
            num_keys: keys that a query attends to, on average.
            part: of this part alone.
        """

        def tower(width: int, depth: int) -> float:
            matrices = 4 * width**2 + 3 * width * swiglu_hidden(width)
            return depth * (2 * matrices + 4 * width * num_keys)

        if self.encoder_width:
            encoder = tower(self.encoder_width, self.encoder_depth)
            encoder += 2 * self.encoder_width * (self.patch_dim + self.code_channels)
        else:
            encoder = 2 * self.patch_dim * self.code_channels
        decoder = tower(self.decoder_width, self.decoder_depth)
        decoder += 2 * self.decoder_width * (self.patch_dim + self.latent_channels)
        return {"encoder": encoder, "decoder": decoder, None: encoder + decoder}[part]


def released_name(location: str) -> str | None:
    """Return the released model, such as `350M-f16x64`, of its name or repository; None if none."""
    name = location.rsplit("/", 1)[-1].removeprefix("ViTok-v2-")
    return name if name in RELEASED else None


def mean_window_keys(rows: int, columns: int, radius: int | None) -> float:
    """Return how many keys a query of a grid attends to on average, under a window or without.

    Args:
        radius: of the 2D sliding window, in patches; None for full attention.
    """

    def along(side: int) -> float:
        if radius is None:
            return side
        reach = min(radius, side - 1)
        # Each of the `reach` offsets on either side exists for side - offset queries.
        return (side + 2 * (reach * side - reach * (reach + 1) / 2)) / side

    return along(rows) * along(columns)
