"""The transformer block of ViTok-v2: parallel attention and SwiGLU, one LayerScale a block.

Shape suffixes: T tokens of the row, W width, H heads, D head dimension, K tokens of conditions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitok.attention import (
    AttentionLayout,
    KeyLayout,
    packed_attention,
    packed_cross_attention,
)

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
# Tokens that a block takes at a time without gradients. On the CPU larger temporaries come fresh
# from the system each time, and clearing their pages costs more than computing them; on CUDA small
# ones would be bound by launches.
CPU_CHUNK, CUDA_CHUNK = 1024, 16384


def swiglu_hidden(width: int) -> int:
    """Return the hidden width of SwiGLU: 2.67 times the width, to the nearest multiple of 16."""
    return (int(2.67 * width) + 8) // 16 * 16


def rope_rotation(patch_coord: Tensor, head_dim: int) -> Tensor:
    """Return the rotation of each token's q and k for its (row, column): axial 2D RoPE.

    The first head_dim/4 angles come from the row, the next from the column, with inverse
    frequencies theta^(-2i / (head_dim/2)).

    Args:
        patch_coord: [T, 2].

    Returns:
        [T, 1, head_dim/2, 2] float32: cosine and sine of every angle.
    """
    step = torch.arange(head_dim // 4, device=patch_coord.device, dtype=torch.float32)
    inverse_frequency = ROPE_THETA ** (-2 * step / (head_dim / 2))
    angle = (patch_coord.float()[:, :, None] * inverse_frequency).flatten(1)  # [T, D/2]
    return torch.stack((angle.cos(), angle.sin()), dim=-1)[:, None]


def apply_rope(x_THD: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent pairs (2j, 2j+1) of the head dimension, in float32.

    Args:
        x_THD: [T, H, D].
        rotation: [T, 1, D/2, 2] from `rope_rotation`.

    Returns:
        [T, H, D] in the dtype of x_THD.
    """
    even, odd = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)  # [T, H, D/2] each
    cosine, sine = rotation.unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(x_THD.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32, with a weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS)
        return normed.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention inside each image, with q/k RMSNorm and 2D RoPE."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)  # output (3, heads, head_dim)
        self.norm_q = RMSNorm(self.head_dim)
        self.norm_k = RMSNorm(self.head_dim)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_TW: Tensor, rotation: Tensor, layout: AttentionLayout) -> Tensor:
        return self.out_proj(packed_attention(*self.project(x_TW, rotation), layout).flatten(1))

    def project(self, x_TW: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v [T, H, D], as attention takes them."""
        q_THD, k_THD, v_THD = self.qkv_proj(x_TW).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_THD = apply_rope(self.norm_q(q_THD), rotation)
        k_THD = apply_rope(self.norm_k(k_THD), rotation)
        return q_THD, k_THD, v_THD


class CrossAttention(nn.Module):
    """Multi-head attention of each image's tokens to the condition of the image.

    With q/k RMSNorm and without positions: a condition has no place in the image.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)  # output (2, heads, head_dim)
        self.norm_q = RMSNorm(width // num_heads)
        self.norm_k = RMSNorm(width // num_heads)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x_TW: Tensor, condition_KW: Tensor, layout: AttentionLayout, keys: KeyLayout
    ) -> Tensor:
        q_THD = self.q_proj(x_TW).unflatten(-1, (self.num_heads, -1))
        k_KHD, v_KHD = self.kv_proj(condition_KW).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        attended_THD = packed_cross_attention(
            self.norm_q(q_THD), self.norm_k(k_KHD), v_KHD, layout, keys
        )
        return self.out_proj(attended_THD.flatten(1))


class SwiGLU(nn.Module):
    """Gated MLP: fc1 gives value and gate, in this order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = swiglu_hidden(width)
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        value, gate = self.fc1(x_TW).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x_TW: Tensor) -> Tensor:
        return x_TW * self.gamma


class Modulation(nn.Module):
    """Shifts and scales by the time: what all blocks share, and an offset of one's own (AdaLN).

    One projection of the time for all blocks, which an offset bends for each, has a fraction of the
    weights of one in every block, and does as well (PixArt-alpha, arXiv:2310.00426, sec. 2.3).
    """

    def __init__(self, width: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        # A vector, which optimizers neither decay nor take for a matrix.
        self.offset = nn.Parameter(torch.zeros(num_parts * width))

    def forward(self, shared_SW: Tensor, membership_TS: Tensor) -> tuple[Tensor, ...]:
        """Return the parts [T, W] for every token; `membership` [T, S] is 1 at a token's image.

        The backward pass of this product is a product too, where that of indexing would add many
        tokens to one place, slowly or in any order.
        """
        parts = (membership_TS @ (shared_SW + self.offset)).chunk(self.num_parts, dim=-1)
        return tuple(parts)


class TransformerBlock(nn.Module):
    """What a transformer repeats, and vitok.parallel treats as one.

    A kind of block gives `compute`, which draws no random numbers.

    Attributes:
        recomputes: keep only the input, and compute the rest again in the backward pass.
        compiled: a compiled `compute` of its class, which runs in its place.

    Both are set by `vitok.parallel`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recomputes = False
        self.compiled: Callable[..., Tensor] | None = None

    def forward(self, x_TW: Tensor, *context: Any) -> Tensor:
        compute = self.compiled or type(self).compute
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(
                compute, self, x_TW, *context, use_reentrant=False, preserve_rng_state=False
            )
        return compute(self, x_TW, *context)

    def compute(self, x_TW: Tensor, *context: Any) -> Tensor:
        """Do what the block does; unbound, so that one compiled function serves all of a kind."""
        raise NotImplementedError


class Block(TransformerBlock):
    """`x + gamma * (attention(h) + swiglu(h))` with `h = RMSNorm(x)`."""

    def __init__(self, width: int, num_heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads)
        self.ffn = SwiGLU(width)
        self.layer_scale = LayerScale(width, layer_scale)

    def forward(self, x_TW: Tensor, rotation: Tensor, layout: AttentionLayout) -> Tensor:
        chunk = CUDA_CHUNK if x_TW.is_cuda else CPU_CHUNK
        if not torch.is_grad_enabled() and not self.compiled and len(x_TW) > chunk:
            return self.compute_in_chunks(x_TW, rotation, layout, chunk)
        return super().forward(x_TW, rotation, layout)

    def compute(self, x_TW: Tensor, rotation: Tensor, layout: AttentionLayout) -> Tensor:
        h_TW = self.norm1(x_TW)
        return x_TW + self.layer_scale(self.attn(h_TW, rotation, layout) + self.ffn(h_TW))

    def compute_in_chunks(
        self, x_TW: Tensor, rotation: Tensor, layout: AttentionLayout, chunk: int
    ) -> Tensor:
        """Do the same without gradients, all but attention a few tokens at a time.

        The wide tensors inside the block (fc1's output has over five times its width) never exist
        for a whole large image.
        """
        out_TW = torch.empty_like(x_TW)
        qkv_T3HD = x_TW.new_empty(len(x_TW), 3, self.attn.num_heads, self.attn.head_dim)
        parts = [slice(start, start + chunk) for start in range(0, len(x_TW), chunk)]
        for part in parts:
            h_TW = self.norm1(x_TW[part])
            torch.stack(self.attn.project(h_TW, rotation[part]), dim=1, out=qkv_T3HD[part])
            out_TW[part] = self.ffn(h_TW)
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
        attended_TW = packed_attention(q_THD, k_THD, v_THD, layout).flatten(1)
        for part in parts:
            branches_TW = self.attn.out_proj(attended_TW[part]) + out_TW[part]
            torch.add(x_TW[part], self.layer_scale(branches_TW), out=out_TW[part])
        return out_TW
