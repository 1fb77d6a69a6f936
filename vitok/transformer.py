"""The transformer block of ViTok-v2: parallel attention and SwiGLU, one LayerScale a block.

Shape suffixes: T tokens of the row, W width, H heads, D head dimension.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitok.attention import AttentionLayout, packed_attention

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


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
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)  # output (3, heads, head_dim)
        self.norm_q = RMSNorm(width // num_heads)
        self.norm_k = RMSNorm(width // num_heads)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_TW: Tensor, rotation: Tensor, layout: AttentionLayout) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv_proj(x_TW).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_THD = apply_rope(self.norm_q(q_THD), rotation)
        k_THD = apply_rope(self.norm_k(k_THD), rotation)
        return self.out_proj(packed_attention(q_THD, k_THD, v_THD, layout).flatten(1))


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


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x_TW: Tensor) -> Tensor:
        return x_TW * self.gamma


class Block(nn.Module):
    """`x + gamma * (attention(h) + swiglu(h))` with `h = RMSNorm(x)`."""

    def __init__(self, width: int, num_heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads)
        self.ffn = SwiGLU(width)
        self.layer_scale = LayerScale(width, layer_scale)

    def forward(self, x_TW: Tensor, rotation: Tensor, layout: AttentionLayout) -> Tensor:
        h_TW = self.norm1(x_TW)
        return x_TW + self.layer_scale(self.attn(h_TW, rotation, layout) + self.ffn(h_TW))
