"""DiT: the velocity of latents on their way from noise to data, given a time and a condition.

A training starts at the identity. The layer that gives the velocity is zero, so that the first
prediction is the mean velocity of normalised latents, 0, whatever the blocks do; every LayerScale
is zero, so that a block passes on what it is given until its branches have learned something; the
modulation by time is zero, so that norms start plain. The zeros are in series: the velocity's layer
moves first, then the LayerScales, then all else.

Shape suffixes: T tokens of the row, W width, S image slots, K condition tokens, G side of the table
of positions.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.attention import AttentionLayout, KeyLayout, attention_layout, key_layout
from vitok.config import config
from vitok.packed import PackedTokens
from vitok.transformer import (
    Attention,
    CrossAttention,
    LayerScale,
    Modulation,
    RMSNorm,
    SwiGLU,
    TransformerBlock,
    ZeroLinear,
    rope_rotation,
    swiglu_hidden,
)

# Name -> (width, depth, heads), arXiv 2605.05331. The names are the paper's; `num_parameters` says
# how many there are: 0.52B and 1.23B, without an embedding of classes.
SIZES = {
    "450M": (1152, 24, 16),
    "1.2B": (1536, 32, 24),
}
_TIME_CHANNELS = 256
_TIME_SCALE = 1000.0  # times in [0, 1] turn the slowest wave by 0.1, the fastest by 1000 radians
_LONGEST_WAVE = 10_000.0
_BLOCK_PARTS, _HEAD_PARTS = 6, 2
# Products of float8 sum over the condition tokens of a row, and need a multiple of 16.
_CONDITION_MULTIPLE = 16


@config
class DiTConfig:
    """The shape of a velocity model.

    Attributes:
        latent_channels: of the latents, c.
        width: channels of the tokens.
        depth: number of blocks.
        heads: attention heads of a block.
        num_classes: classes that an image may be conditioned on; 0 for none.
        text_channels: channels of the text embeddings that it may be conditioned on; 0 for none.
        text_tokens: the most tokens of a text.
        position_grid: rows and columns of the learned positions; larger grids are interpolated.
        layer_scale: initial LayerScale of every branch; 0 starts every block as the identity.
    """

    latent_channels: int = 64
    width: int = 1152
    depth: int = 24
    heads: int = 16
    num_classes: int = 0
    text_channels: int = 0
    text_tokens: int = 0
    position_grid: int = 16
    layer_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % (4 * self.heads):
            raise ValueError(
                f"width={self.width} over heads={self.heads} must leave a head dimension that is a "
                "multiple of 4 (2D RoPE turns pairs of rows and of columns)"
            )
        if self.depth < 0 or self.latent_channels < 1 or self.position_grid < 2:
            raise ValueError(
                f"depth={self.depth} must be at least 0, latent_channels={self.latent_channels} at "
                f"least 1 and position_grid={self.position_grid} at least 2"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be positive, or 0 for none")
        if min(self.text_channels, self.text_tokens) < 0 or (
            bool(self.text_channels) != bool(self.text_tokens)
        ):
            raise ValueError(
                f"text_channels={self.text_channels} and text_tokens={self.text_tokens} must both "
                "be positive, or both 0 for a model without texts"
            )

    @classmethod
    def from_name(
        cls, name: str, *, latent_channels: int, num_classes: int = 0, position_grid: int = 16
    ) -> "DiTConfig":
        """Return the config of a size by its name, as in `450M`.

        Raises:
            ValueError: there is no such size.
        """
        if name not in SIZES:
            raise ValueError(f"{name!r} is no size of a DiT; choose {' or '.join(SIZES)}")
        width, depth, heads = SIZES[name]
        return cls(
            latent_channels=latent_channels,
            width=width,
            depth=depth,
            heads=heads,
            num_classes=num_classes,
            position_grid=position_grid,
        )

    @property
    def condition_tokens(self) -> int:
        """Condition tokens of an image, at most: the null token, its class, its text."""
        return 1 + bool(self.num_classes) + self.text_tokens

    def flops_per_token(self, num_keys: float) -> float:
        """Return the floating-point operations of one forward pass, for each token.

        Matrix products only, two operations for each multiply-add. What is done once an image, for
        its time and its condition, is shared out among its tokens.

        Args:
            num_keys: tokens of the image, all of which a query attends to.
        """
        width, conditions = self.width, self.condition_tokens
        matrices = (4 + 2) * width**2 + 3 * width * swiglu_hidden(width)
        attention = 4 * width * (num_keys + conditions)
        per_token = self.depth * (2 * matrices + attention) + 4 * width * self.latent_channels
        parts = _BLOCK_PARTS + _HEAD_PARTS
        once = 2 * width * (_TIME_CHANNELS + width + parts * width)
        once += 2 * width * self.text_tokens * self.text_channels
        once += self.depth * 4 * width**2 * conditions
        return per_token + once / num_keys


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the images of a row are conditioned on.

    Attributes:
        labels: [S] int64, the class of each slot; -1 for the null condition.
        text: [S, K, C] embeddings of a text; None for a model without texts.
        text_tokens: [S] int64, how many of the K tokens count; 0 for the null condition.
    """

    labels: Tensor
    text: Tensor | None = None
    text_tokens: Tensor | None = None

    def where(self, keeps_S: Tensor) -> "Condition":
        """Return the same, but the null condition where `keeps` [S] is False."""
        return Condition(
            labels=torch.where(keeps_S, self.labels, -1),
            text=self.text,
            text_tokens=None
            if self.text_tokens is None
            else torch.where(keeps_S, self.text_tokens, 0),
        )

    def to(self, device: torch.device) -> "Condition":
        """Return a copy on another device."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Condition(**{name: value.to(device) for name, value in given.items()})

    def null(self) -> "Condition":
        """Return the null condition for the same images."""
        return self.where(torch.zeros_like(self.labels, dtype=torch.bool))


class FlowBlock(TransformerBlock):
    """Self-attention, cross-attention to the condition and SwiGLU, each with its LayerScale.

    The time shifts and scales the norms before self-attention and SwiGLU, and scales both branches.
    """

    def __init__(self, width: int, num_heads: int, layer_scale: float) -> None:
        super().__init__()
        self.modulation = Modulation(width, _BLOCK_PARTS)
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads)
        self.layer_scale1 = LayerScale(width, layer_scale)
        self.norm2 = RMSNorm(width)
        self.cross_attn = CrossAttention(width, num_heads)
        self.layer_scale2 = LayerScale(width, layer_scale)
        self.norm3 = RMSNorm(width)
        self.ffn = SwiGLU(width)
        self.layer_scale3 = LayerScale(width, layer_scale)

    def compute(
        self,
        x_TW: Tensor,
        time_SW: Tensor,
        membership_TS: Tensor,
        condition_KW: Tensor,
        rotation: Tensor,
        layout: AttentionLayout,
        keys: KeyLayout,
    ) -> Tensor:
        shift1, scale1, gate1, shift3, scale3, gate3 = self.modulation(time_SW, membership_TS)
        h_TW = self.norm1(x_TW) * (1 + scale1) + shift1
        x_TW = x_TW + self.layer_scale1(self.attn(h_TW, rotation, layout)) * (1 + gate1)
        h_TW = self.norm2(x_TW)
        x_TW = x_TW + self.layer_scale2(self.cross_attn(h_TW, condition_KW, layout, keys))
        h_TW = self.norm3(x_TW) * (1 + scale3) + shift3
        return x_TW + self.layer_scale3(self.ffn(h_TW)) * (1 + gate3)


class DiT(nn.Module):
    """Maps PackedTokens of latents [T, c] to PackedTokens of their velocity; one token a latent.

    Built under `torch.device("meta")` it takes no memory; `to_empty` and `start_at_random`
    (vitok.initialize) make it real, sharded or whole.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.latent_embed = nn.Linear(config.latent_channels, width)
        # A table for rows and one for columns: of one table for both, ragged grids of a token
        # budget would leave the corner that only large squares reach untrained.
        self.row_embed = nn.Embedding(config.position_grid, width)
        self.column_embed = nn.Embedding(config.position_grid, width)
        self.time_in = nn.Linear(_TIME_CHANNELS, width)
        self.time_out = nn.Linear(width, width)
        self.time_modulation = ZeroLinear(width, (_BLOCK_PARTS + _HEAD_PARTS) * width)
        # Always among the keys: alone it is the null condition, and beside a class it lets a token
        # choose how much of it to take, where the softmax over a single key could choose nothing.
        self.null_embed = nn.Embedding(1, width)
        if config.num_classes:
            self.class_embed = nn.Embedding(config.num_classes, width)
        if config.text_channels:
            self.text_embed = nn.Linear(config.text_channels, width)
        self.blocks = nn.ModuleList(
            FlowBlock(width, config.heads, config.layer_scale) for _ in range(config.depth)
        )
        self.modulation = Modulation(width, _HEAD_PARTS)
        self.norm = RMSNorm(width)
        self.to_velocity = ZeroLinear(width, config.latent_channels)

    def forward(self, packed: PackedTokens, time: Tensor, condition: Condition) -> PackedTokens:
        """Return the velocity of a packed row of latents.

        Args:
            packed: tokens [T, c], normalised latents mixed with noise; of any grids.
            time: [S] float32, of each image slot: 0 is noise, 1 is data.
            condition: of each image slot.

        Returns:
            the same layout around velocities [T, c] float32.
        """
        dtype, width = self.latent_embed.weight.dtype, self.config.width
        head_dim = width // self.config.heads
        layout = attention_layout(packed, dtype, head_dim)
        membership_TS = _membership(packed).to(dtype)
        x_TW = self.latent_embed(packed.tokens.to(dtype)) + self._positions(packed)
        time_SW = self.time_out(F.silu(self.time_in(_waves(time).to(dtype))))
        of_blocks, of_head = self.time_modulation(F.silu(time_SW)).split(
            [_BLOCK_PARTS * width, _HEAD_PARTS * width], dim=-1
        )
        condition_KW, keys = self._condition_tokens(condition, layout.flash)
        rotation = rope_rotation(packed.patch_coord, head_dim)
        for block in self.blocks:
            x_TW = block(x_TW, of_blocks, membership_TS, condition_KW, rotation, layout, keys)
        shift, scale = self.modulation(of_head, membership_TS)
        velocity = self.to_velocity(self.norm(x_TW) * (1 + scale) + shift)
        return packed.with_tokens(velocity.float())

    def num_parameters(self) -> int:
        """Count parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _positions(self, packed: PackedTokens) -> Tensor:
        """Return the learned positions [T, W]; a grid beyond the table is scaled down to it."""
        most = self.config.position_grid - 1
        shrink_S = (most / (packed.grid.amax(dim=1) - 1).clamp(min=1)).clamp(max=1.0)
        place_T2 = packed.patch_coord * shrink_S[packed.segment_ids.clamp(min=0)][:, None]
        table = torch.arange(most + 1, device=place_T2.device)
        # Weights of linear interpolation, 1 at the token's own place; a product as in Modulation.
        weight_T2G = (1 - (place_T2[:, :, None] - table).abs()).clamp(min=0)
        row_TG, column_TG = weight_T2G.to(self.row_embed.weight.dtype).unbind(1)
        return row_TG @ self.row_embed.weight + column_TG @ self.column_embed.weight

    def _condition_tokens(self, condition: Condition, flash: bool) -> tuple[Tensor, KeyLayout]:
        """Return the condition tokens [K, W] of all slots, one after the other, and their layout.

        K is a constant of the model and the number of slots, so that nothing recompiles.
        """
        labels_S = condition.labels
        num_slots, num_keys = len(labels_S), self.config.condition_tokens
        tokens = [self.null_embed.weight.expand(num_slots, 1, -1)]
        counts = [torch.ones_like(labels_S, dtype=torch.bool)[:, None]]
        if self.config.num_classes:
            tokens.append(self.class_embed(labels_S.clamp(min=0))[:, None])
            counts.append((labels_S >= 0)[:, None])
        if self.config.text_channels:
            assert condition.text is not None
            assert condition.text_tokens is not None
            place = torch.arange(self.config.text_tokens, device=labels_S.device)
            tokens.append(self.text_embed(condition.text.to(self.text_embed.weight.dtype)))
            counts.append(place < condition.text_tokens[:, None])
        counts_SK = torch.cat(counts, dim=1)
        # What counts comes first, in order, and no number has to leave the device for it.
        order = counts_SK.flatten().argsort(descending=True, stable=True)
        tokens_KW = torch.cat(tokens, dim=1).flatten(0, 1)[order]
        tokens_KW = F.pad(tokens_KW, (0, 0, 0, -len(tokens_KW) % _CONDITION_MULTIPLE))
        keys = key_layout(counts_SK.sum(dim=1), len(tokens_KW), num_keys, flash=flash)
        return tokens_KW, keys


def _membership(packed: PackedTokens) -> Tensor:
    """Return [T, S]: 1 at the slot of each token's image; 0 in padding."""
    slots = torch.arange(len(packed.grid), device=packed.segment_ids.device)
    return packed.segment_ids[:, None] == slots


def _waves(time: Tensor) -> Tensor:
    """Return cosines and sines [S, 256] of times at geometrically spaced frequencies."""
    half = _TIME_CHANNELS // 2
    step = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angle = _TIME_SCALE * time.float()[:, None] * _LONGEST_WAVE**-step
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


# FSDP finds the tensors in the arguments of a forward pass through pytrees.
torch.export.register_dataclass(Condition)
