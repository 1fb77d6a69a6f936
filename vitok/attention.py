"""Attention inside the images of a packed row, and to what an image is conditioned on.

Shape suffixes: T tokens of the row, H heads, D head dimension, n tokens of one image, K tokens of
the conditions of a row, m those of one image.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.config import require_choice
from vitok.packed import PackedTokens
from vitok.window import WindowBackend, window_attention

# Below this many tokens an image's scores are cheap to hold, and two plain matrix products beat
# the fused CPU kernel, above all in the backward pass (docs/benchmarks.md, "Packed attention").
MAX_EXPLICIT_TOKENS = 1536
_FLEX_HEAD_DIM = 16  # the least that the kernel of FlexAttention takes on CUDA (torch 2.13)


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """What every layer needs to know of a packed row; made once a forward pass.

    Attributes:
        cu_seqlens: [S+1] int32.
        is_real: [T, 1, 1] bool, False in padding.
        max_seqlen: bound on the tokens of one image.
        flash: full attention by a CUDA kernel for variable lengths.
        grids: (rows, columns) of each used slot, on the host; empty for flash attention, which
            needs no more than the tensors: reading them would wait for the device.
        window: radius in patches of sliding-window attention; None for full attention.
        window_backend: how windows are computed.
    """

    cu_seqlens: Tensor
    is_real: Tensor
    max_seqlen: int
    flash: bool
    grids: tuple[tuple[int, int], ...]
    window: int | None = None
    window_backend: WindowBackend = "halo"


@dataclasses.dataclass(frozen=True)
class KeyLayout:
    """Which condition tokens belong to which image of a row; made once a forward pass.

    Attributes:
        cu_seqlens: [S+1] int32, image s attends to tokens cu_seqlens[s] to cu_seqlens[s+1].
        is_real: [K, 1, 1] bool, False behind the last of them.
        max_seqlen: bound on the condition tokens of one image.
        lengths: condition tokens of each slot, on the host; empty for flash attention.
    """

    cu_seqlens: Tensor
    is_real: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]


def attention_layout(
    packed: PackedTokens,
    dtype: torch.dtype,
    head_dim: int,
    *,
    window: int | None = None,
    window_backend: WindowBackend | None = None,
) -> AttentionLayout:
    """Derive the attention layout of a packed row.

    Args:
        dtype, head_dim: of q, k and v.
        window: radius in patches of 2D sliding-window attention; full attention if None.
        window_backend: if None "flex" on CUDA, for heads that its kernel takes, else "halo".

    Raises:
        ValueError: the window is negative, or there is no such backend.
    """
    if window is not None and window < 0:
        raise ValueError(f"{window=} must be at least 0, or None for full attention")
    on_cuda = packed.cu_seqlens.is_cuda
    if window_backend is None:
        window_backend = "flex" if on_cuda and head_dim >= _FLEX_HEAD_DIM else "halo"
    require_choice("window_backend", window_backend, WindowBackend)
    flash = on_cuda and window is None and _flash_takes(dtype, head_dim)
    grids = () if flash else tuple((r, c) for r, c in packed.grid.tolist() if r > 0)
    return AttentionLayout(
        cu_seqlens=packed.cu_seqlens,
        is_real=(packed.segment_ids >= 0)[:, None, None],
        max_seqlen=packed.max_seqlen,
        flash=flash,
        grids=grids,
        window=window,
        window_backend=window_backend,
    )


def key_layout(lengths_S: Tensor, num_keys: int, max_seqlen: int, *, flash: bool) -> KeyLayout:
    """Derive the layout of condition tokens that lie one image after the other.

    Args:
        lengths_S: [S] condition tokens of each slot.
        num_keys: tokens of the whole, K.
        max_seqlen: no image has more.
        flash: as the attention layout of the row has it.
    """
    cu_seqlens = F.pad(lengths_S.cumsum(0, dtype=torch.int32), (1, 0))
    place_K = torch.arange(num_keys, device=lengths_S.device)
    return KeyLayout(
        cu_seqlens=cu_seqlens,
        is_real=(place_K < cu_seqlens[-1])[:, None, None],
        max_seqlen=max_seqlen,
        lengths=() if flash else tuple(lengths_S.tolist()),
    )


def _flash_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention runs on this device: half precision, from compute capability 8.0."""
    half = dtype in (torch.bfloat16, torch.float16)
    fits = head_dim % 8 == 0 and head_dim <= 256
    return half and fits and torch.cuda.get_device_capability() >= (8, 0)


def packed_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: AttentionLayout
) -> Tensor:
    """Let every token attend to the tokens of its own image, to all or to those in its window.

    Full attention on CUDA in half precision runs flash attention on variable lengths where the
    device has it; everything else runs image by image.

    Args:
        q_THD, k_THD, v_THD: [T, H, D], one dtype.

    Returns:
        [T, H, D]; 0 in padding.
    """
    if layout.flash:
        return _varlen_attention(q_THD, k_THD, v_THD, layout, layout)
    return _attention_per_image(q_THD, k_THD, v_THD, layout)


def packed_cross_attention(
    q_THD: Tensor, k_KHD: Tensor, v_KHD: Tensor, layout: AttentionLayout, keys: KeyLayout
) -> Tensor:
    """Let every token attend to the condition tokens of its own image.

    Args:
        q_THD: [T, H, D].
        k_KHD, v_KHD: [K, H, D], one dtype with q.

    Returns:
        [T, H, D]; 0 in padding.
    """
    if layout.flash:
        return _varlen_attention(q_THD, k_KHD, v_KHD, layout, keys)
    return _cross_attention_per_image(q_THD, k_KHD, v_KHD, layout, keys)


def _varlen_attention(
    q_THD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    queries: AttentionLayout,
    keys: AttentionLayout | KeyLayout,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The kernel leaves rows past cu_seqlens[-1] unwritten, forward and backward. The masks keep
    # that garbage out of the output and out of the gradients.
    q_THD = torch.where(queries.is_real, q_THD, 0)
    k_KHD, v_KHD = (torch.where(keys.is_real, x, 0) for x in (k_KHD, v_KHD))
    out_THD = varlen_attn(
        q_THD,
        k_KHD,
        v_KHD,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_seqlen,
        keys.max_seqlen,
    )
    assert isinstance(out_THD, Tensor)
    return torch.where(queries.is_real, out_THD, 0)


# Compiled, it would be compiled again for every other list of images in a row.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention_per_image(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: AttentionLayout
) -> Tensor:
    lengths = [rows * columns for rows, columns in layout.grids]
    # One split for all images: slicing would make the backward pass fill T rows for each image.
    sections = [*lengths, q_THD.shape[0] - sum(lengths)]
    q_images, k_images, v_images = (
        x.transpose(0, 1).split(sections, dim=1) for x in (q_THD, k_THD, v_THD)
    )
    outputs = [
        _attention(q_HnD, k_HnD, v_HnD)
        if layout.window is None
        else window_attention(q_HnD, k_HnD, v_HnD, grid, layout.window, layout.window_backend)
        for q_HnD, k_HnD, v_HnD, grid in zip(
            q_images[:-1], k_images[:-1], v_images[:-1], layout.grids, strict=True
        )
    ]
    if len(outputs) == 1 and not sections[-1]:
        return outputs[0].transpose(0, 1)
    # Padding keeps a path to the graph, so that an empty row still gives every parameter a gradient
    # (zeros): ranks of which one lacks a gradient would reduce buffers of different sizes.
    outputs.append((q_images[-1] + k_images[-1] + v_images[-1]) * 0)
    return torch.cat(outputs, dim=1).transpose(0, 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _cross_attention_per_image(
    q_THD: Tensor, k_KHD: Tensor, v_KHD: Tensor, layout: AttentionLayout, keys: KeyLayout
) -> Tensor:
    lengths = [rows * columns for rows, columns in layout.grids]
    q_images = q_THD.transpose(0, 1).split([*lengths, q_THD.shape[0] - sum(lengths)], dim=1)
    # Unused slots come after the images.
    used = keys.lengths[: len(lengths)]
    k_images, v_images = (
        x.transpose(0, 1).split([*used, x.shape[0] - sum(used)], dim=1) for x in (k_KHD, v_KHD)
    )
    outputs = [
        _attention(q_HnD, k_HmD, v_HmD)
        for q_HnD, k_HmD, v_HmD in zip(q_images[:-1], k_images[:-1], v_images[:-1], strict=True)
    ]
    # As above: an empty row, too, gives every parameter a gradient.
    rest = k_images[-1].sum() + v_images[-1].sum()
    outputs.append((q_images[-1] + rest) * 0)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _attention(q_HnD: Tensor, k_HnD: Tensor, v_HnD: Tensor) -> Tensor:
    # Explicit scores are rounded to half precision. Training on a CPU takes that for its speed;
    # inference, where the fused kernel is nearly as fast, need not.
    rounds = q_HnD.dtype != torch.float32 and not torch.is_grad_enabled()
    if rounds or q_HnD.shape[1] > MAX_EXPLICIT_TOKENS:
        fused = F.scaled_dot_product_attention(q_HnD[None], k_HnD[None], v_HnD[None])
        return fused[0]
    scores_Hnn = (q_HnD * q_HnD.shape[-1] ** -0.5) @ k_HnD.transpose(-1, -2)
    return scores_Hnn.softmax(dim=-1) @ v_HnD
