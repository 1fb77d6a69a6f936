"""Attention inside the images of a packed row.

Shape suffixes: T tokens of the row, H heads, D head dimension, n tokens of one image.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.packed import PackedTokens

# Below this many tokens an image's scores are cheap to hold, and two plain matrix products beat
# the fused CPU kernel, above all in the backward pass (docs/benchmarks.md, "Packed attention").
MAX_EXPLICIT_TOKENS = 1536


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """What every layer needs to know of a packed row; made once a forward pass.

    Attributes:
        cu_seqlens: [S+1] int32.
        is_real: [T, 1, 1] bool, False in padding.
        max_seqlen: bound on the tokens of one image.
        lengths: tokens of each used slot, on the host; None on CUDA, where reading them would
            wait for the device.
    """

    cu_seqlens: Tensor
    is_real: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None


def attention_layout(packed: PackedTokens) -> AttentionLayout:
    """Derive the attention layout of a packed row."""
    lengths = None
    if not packed.cu_seqlens.is_cuda:
        lengths = tuple(n for n in packed.cu_seqlens.diff().tolist() if n > 0)
    return AttentionLayout(
        cu_seqlens=packed.cu_seqlens,
        is_real=(packed.segment_ids >= 0)[:, None, None],
        max_seqlen=packed.max_seqlen,
        lengths=lengths,
    )


def packed_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: AttentionLayout
) -> Tensor:
    """Let every token attend to all tokens of its own image.

    CUDA in half precision runs flash attention on variable lengths; everything else runs image by
    image.

    Args:
        q_THD, k_THD, v_THD: [T, H, D], one dtype.

    Returns:
        [T, H, D]; 0 in padding.
    """
    if q_THD.is_cuda and q_THD.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(q_THD, k_THD, v_THD, layout)
    return _attention_per_image(q_THD, k_THD, v_THD, layout)


def _varlen_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: AttentionLayout
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The kernel leaves rows past cu_seqlens[-1] unwritten, forward and backward. The masks keep
    # that garbage out of the output and out of the gradients.
    q_THD, k_THD, v_THD = (torch.where(layout.is_real, x, 0) for x in (q_THD, k_THD, v_THD))
    out_THD = varlen_attn(
        q_THD,
        k_THD,
        v_THD,
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.max_seqlen,
        layout.max_seqlen,
    )
    assert isinstance(out_THD, Tensor)
    return torch.where(layout.is_real, out_THD, 0)


def _attention_per_image(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: AttentionLayout
) -> Tensor:
    lengths = layout.lengths
    if lengths is None:
        lengths = tuple(n for n in layout.cu_seqlens.diff().tolist() if n > 0)
    padding = q_THD.shape[0] - sum(lengths)
    # One split for all images: slicing would make the backward pass fill T rows for each image.
    sections = [*lengths, padding]
    q_images, k_images, v_images = (
        x.transpose(0, 1).split(sections, dim=1) for x in (q_THD, k_THD, v_THD)
    )
    outputs = [
        _attention(q_HnD, k_HnD, v_HnD)
        for q_HnD, k_HnD, v_HnD in zip(q_images[:-1], k_images[:-1], v_images[:-1], strict=True)
    ]
    # Padding keeps a path to the graph, so that an empty row still gives every parameter a gradient
    # (zeros): ranks of which one lacks a gradient would reduce buffers of different sizes.
    outputs.append((q_images[-1] + k_images[-1] + v_images[-1]) * 0)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _attention(q_HnD: Tensor, k_HnD: Tensor, v_HnD: Tensor) -> Tensor:
    if q_HnD.shape[1] > MAX_EXPLICIT_TOKENS:
        fused = F.scaled_dot_product_attention(q_HnD[None], k_HnD[None], v_HnD[None])
        return fused[0]
    scores_Hnn = (q_HnD * q_HnD.shape[-1] ** -0.5) @ k_HnD.transpose(-1, -2)
    return scores_Hnn.softmax(dim=-1) @ v_HnD
