"""Benchmark of packed attention against the other ways to compute it."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from jobs.bench.output import finish, rounded
from vitok import attention as attention_module
from vitok.attention import AttentionLayout, attention_layout, packed_attention
from vitok.packed import layout_of


def run(
    row_tokens: int = 4096,
    tokens_per_image: int = 240,
    num_heads: int = 12,
    head_dim: int = 64,
    threads: int = 2,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Forward and backward of packed attention, bf16, against the other ways to compute it.

    Args:
        row_tokens: tokens of the packed row.
        tokens_per_image: most tokens of an image in it; the least are three quarters of that.
        num_heads: attention heads.
        head_dim: channels of a head.
        threads: CPU threads.
        repeats: timed passes; the median counts.
        json: print the JSON alone.
    """
    torch.set_num_threads(threads)
    figures = measure_attention(
        row_tokens=row_tokens,
        tokens_per_image=tokens_per_image,
        num_heads=num_heads,
        head_dim=head_dim,
        repeats=repeats,
    )
    finish("attention", rounded(figures, quiet=json), threads)


def measure_attention(
    *, row_tokens: int, tokens_per_image: int, num_heads: int, head_dim: int, repeats: int
) -> dict[str, float]:
    """Return the median milliseconds of forward and backward of every way, bf16."""
    layout, is_key = _layout(row_tokens, tokens_per_image)
    real_tokens = int(layout.cu_seqlens[-1])
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(real_tokens, num_heads, head_dim, generator=generator).bfloat16()
        for _ in range(3)
    ]
    lengths = [rows * columns for rows, columns in layout.grids]

    def images_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        limit = attention_module.MAX_EXPLICIT_TOKENS
        attention_module.MAX_EXPLICIT_TOKENS = 0
        try:
            return packed_attention(q, k, v, layout)
        finally:
            attention_module.MAX_EXPLICIT_TOKENS = limit

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_key).transpose(1, 2)
        return torch.cat([image[:n] for image, n in zip(out, lengths, strict=True)])

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [x.split(lengths) for x in (q, k, v)]
        outputs: list[Tensor] = [q] * len(lengths)
        for length in sorted(set(lengths)):
            members = [i for i, n in enumerate(lengths) if n == length]
            stacked = (torch.stack([x[i] for i in members]).transpose(1, 2) for x in parts)
            out = F.scaled_dot_product_attention(*stacked).transpose(1, 2)
            for place, i in enumerate(members):
                outputs[i] = out[place]
        return torch.cat(outputs)

    candidates: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "per_image_explicit": lambda q, k, v: packed_attention(q, k, v, layout),
        "per_image_sdpa": images_fused,
        "length_groups_sdpa": grouped,
        "padded_sdpa": padded,
    }
    results = {name: _time(candidate, qkv, repeats) for name, candidate in candidates.items()}
    return {
        f"{name}_{part}_ms": milliseconds
        for name, timings in results.items()
        for part, milliseconds in zip(("forward", "backward"), timings, strict=True)
    }


def _layout(row_tokens: int, tokens_per_image: int) -> tuple[AttentionLayout, Tensor]:
    """Return a full row of images of 3/4 to all of the tokens, and which padded keys are real."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < row_tokens - tokens_per_image:
        low = max(1, tokens_per_image * 3 // 4)
        lengths.append(int(torch.randint(low, tokens_per_image + 1, (), generator=generator)))
    packed = layout_of(
        [(1, n) for n in lengths],
        patch_size=1,
        row_tokens=sum(lengths),
        max_images=len(lengths),
        max_seqlen=tokens_per_image,
    )
    is_key = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return attention_layout(packed, torch.bfloat16, 64), is_key[:, None, None]


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
