"""Benchmarks: JSON on the last line of stdout."""

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import attention as attention_module
from vitok.attention import AttentionLayout, attention_layout, packed_attention
from vitok.packed import layout_of


def attention(
    row_tokens: int = 4096,
    tokens_per_image: int = 240,
    num_heads: int = 12,
    head_dim: int = 64,
    threads: int = 2,
    repeats: int = 5,
) -> None:
    """Forward and backward of packed attention, bf16, against the other ways to compute it.

    Args:
        row_tokens: tokens of the packed row.
        tokens_per_image: of each image in it.
        num_heads: attention heads.
        head_dim: channels of a head.
        threads: CPU threads.
        repeats: timed passes; the median counts.
    """
    torch.set_num_threads(threads)
    layout, mask_STT = _uniform_layout(row_tokens, tokens_per_image)
    real_tokens = int(layout.cu_seqlens[-1])
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(real_tokens, num_heads, head_dim, generator=generator).bfloat16()
        for _ in range(3)
    ]
    num_images = len(layout.lengths or ())
    shape = (num_images, tokens_per_image, num_heads, head_dim)

    def images_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        limit = attention_module.MAX_EXPLICIT_TOKENS
        attention_module.MAX_EXPLICIT_TOKENS = 0
        try:
            return packed_attention(q, k, v, layout)
        finally:
            attention_module.MAX_EXPLICIT_TOKENS = limit

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_STT)
        return out.transpose(1, 2).reshape(real_tokens, num_heads, head_dim)

    candidates: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "per_image_explicit": lambda q, k, v: packed_attention(q, k, v, layout),
        "per_image_sdpa": images_fused,
        "padded_sdpa": padded,
    }
    results = {name: _time(candidate, qkv, repeats) for name, candidate in candidates.items()}
    for name, timing in results.items():
        print(f"{name:<20} forward {timing[0]:8.1f} ms   backward {timing[1]:8.1f} ms")
    _finish(
        "attention",
        {
            f"{name}_{part}_ms": t
            for name, ts in results.items()
            for part, t in zip(("forward", "backward"), ts, strict=True)
        },
        threads,
    )


BENCHMARKS: dict[str, Callable[..., None]] = {"attention": attention}


def _uniform_layout(row_tokens: int, tokens_per_image: int) -> tuple[AttentionLayout, Tensor]:
    num_images = row_tokens // tokens_per_image
    packed = layout_of(
        [(1, tokens_per_image)] * num_images,
        patch_size=1,
        row_tokens=num_images * tokens_per_image,
        max_images=num_images,
        max_seqlen=tokens_per_image,
    )
    mask = torch.ones(num_images, 1, 1, tokens_per_image, dtype=torch.bool)
    return attention_layout(packed), mask


def _time(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: list[Tensor], repeats: int
) -> tuple[float, float]:
    """Return the median milliseconds of forward and of backward, after one warm-up."""
    forward, backward = [], []
    for _ in range(repeats + 1):
        inputs = [x.detach().requires_grad_() for x in qkv]
        start = time.perf_counter()
        out = function(*inputs)
        middle = time.perf_counter()
        out.sum().backward()
        forward.append(1e3 * (middle - start))
        backward.append(1e3 * (time.perf_counter() - middle))
    return statistics.median(forward[1:]), statistics.median(backward[1:])


def _finish(name: str, figures: dict[str, float], threads: int) -> None:
    device = {"machine": platform.machine(), "threads": threads, "torch": torch.__version__}
    rounded = {key: round(value, 3) for key, value in figures.items()}
    print(json.dumps({"benchmark": name, **rounded, **device}))
