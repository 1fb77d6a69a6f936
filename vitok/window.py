"""Attention of one image's patches to their neighbours: a square window, clipped at the border.

Shape suffixes: H heads, n tokens of the image (row-major), D head dimension; R and C rows and
columns of the grid; q and k queries and keys of one tile; P tokens padded to whole tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

WindowBackend = Literal["halo", "flex"]

# Queries of a halo tile are at most TILE x TILE. Larger tiles read more keys that no query of
# theirs may see, smaller ones are bound by the calls; 8 x 8 was the fastest at radius 8.
TILE = 8

# A block of FlexAttention: 128 tokens, its default block size, as a compact rectangle.
BLOCK_ROWS, BLOCK_COLUMNS = 8, 16
BLOCK_TOKENS = BLOCK_ROWS * BLOCK_COLUMNS


def window_attention(
    q_HnD: Tensor,
    k_HnD: Tensor,
    v_HnD: Tensor,
    grid: tuple[int, int],
    radius: int,
    backend: WindowBackend = "halo",
) -> Tensor:
    """Let each patch attend to those at most radius rows and radius columns away.

    Time grows linearly with the image. "halo" computes tile by tile: what it holds at a time does
    not depend on the image, and its backward pass computes the scores again instead of keeping
    them. "flex" is compiled FlexAttention, meant for CUDA: the tokens are reordered so that its
    blocks are compact in the image.

    Args:
        q_HnD, k_HnD, v_HnD: [H, n, D], one dtype; tokens are the row-major patches of the grid.
        grid: rows and columns, n = rows * columns.
        radius: in patches; 0 sees only the patch itself.

    Returns:
        [H, n, D].

    Raises:
        ValueError: grid does not hold n tokens, or radius is negative.
        NotImplementedError: "flex" on CPU where gradients are needed.
    """
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != q_HnD.shape[1]:
        raise ValueError(f"{grid=} holds {rows * columns} tokens, the query {q_HnD.shape[1]}")
    if radius < 0:
        raise ValueError(f"{radius=} is negative; 0 is the patch alone")
    if max(rows, columns) <= radius + 1:
        return F.scaled_dot_product_attention(q_HnD[None], k_HnD[None], v_HnD[None])[0]
    if backend == "flex":
        return _flex_attention(q_HnD, k_HnD, v_HnD, grid, radius)
    out_HnD: Tensor = _HaloAttention.apply(q_HnD, k_HnD, v_HnD, grid, radius)  # type: ignore[no-untyped-call]
    return out_HnD


@dataclasses.dataclass(frozen=True)
class _Span:
    """Where a tile lies along one axis of the grid.

    Attributes:
        queries: the tile's own rows (or columns).
        keys: the rows (or columns) within radius of any of them.
        bias: [queries, keys], 0 within radius and -inf beyond it.
    """

    queries: slice
    keys: slice
    bias: Tensor


def _spans(size: int, radius: int, like: Tensor) -> list[_Span]:
    """Cut an axis into tiles of equal length, the last one at most shorter."""
    length = -(-size // -(-size // TILE))
    spans = []
    for start in range(0, size, length):
        stop = min(start + length, size)
        first_key, last_key = max(start - radius, 0), min(stop + radius, size)
        query = torch.arange(start, stop, device=like.device)
        key = torch.arange(first_key, last_key, device=like.device)
        is_far = (query[:, None] - key).abs() > radius
        bias = like.new_zeros(is_far.shape).masked_fill(is_far, -torch.inf)
        spans.append(_Span(slice(start, stop), slice(first_key, last_key), bias))
    return spans


def _probabilities(q_HqD: Tensor, k_HkD: Tensor, row: _Span, column: _Span) -> Tensor:
    """Return the attention [H, q, k] of a tile; the queries are scaled already."""
    bias_qk = row.bias[:, None, :, None] + column.bias[None, :, None, :]
    scores_Hqk = q_HqD @ k_HkD.mT
    scores_Hqk += bias_qk.reshape(scores_Hqk.shape[1:])
    return scores_Hqk.softmax(dim=-1)


def _attend(q_HqD: Tensor, k_HkD: Tensor, v_HkD: Tensor, row: _Span, column: _Span) -> Tensor:
    """Return the output [H, q, D] of a tile."""
    if q_HqD.dtype == torch.float32:
        # The fused kernel takes half as long again.
        return _probabilities(q_HqD * q_HqD.shape[-1] ** -0.5, k_HkD, row, column) @ v_HkD
    # In half precision the scores themselves would be rounded, and where the gains of q and k are
    # large the result with them; the fused kernel holds them in float32.
    bias_qk = (row.bias[:, None, :, None] + column.bias[None, :, None, :]).reshape(
        q_HqD.shape[1], k_HkD.shape[1]
    )
    out_1HqD = F.scaled_dot_product_attention(
        q_HqD[None], k_HkD[None], v_HkD[None], attn_mask=bias_qk
    )
    return out_1HqD[0]


class _HaloAttention(torch.autograd.Function):
    """Tiles of queries, each with the keys around it: dense products of a few megabytes.

    A Function of its own, because autograd would fill the whole image with zeros for the backward
    pass of every slice of keys, and keep the scores of all tiles.
    """

    @staticmethod
    def forward(
        ctx: Any, q_HnD: Tensor, k_HnD: Tensor, v_HnD: Tensor, grid: tuple[int, int], radius: int
    ) -> Tensor:
        ctx.save_for_backward(q_HnD, k_HnD, v_HnD)
        ctx.grid, ctx.radius = grid, radius
        out_HnD = torch.empty_like(v_HnD)
        q_HRCD, k_HRCD, v_HRCD, out_HRCD = (
            x.unflatten(1, grid) for x in (q_HnD, k_HnD, v_HnD, out_HnD)
        )
        row_spans, column_spans = (_spans(size, radius, like=q_HnD) for size in grid)
        for row in row_spans:
            for column in column_spans:
                queries = slice(None), row.queries, column.queries
                keys = slice(None), row.keys, column.keys
                k_HkD, v_HkD = (x[keys].flatten(1, 2) for x in (k_HRCD, v_HRCD))
                tile_HqD = _attend(q_HRCD[queries].flatten(1, 2), k_HkD, v_HkD, row, column)
                out_HRCD[queries] = tile_HqD.view_as(out_HRCD[queries])
        return out_HnD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HnD: Tensor) -> tuple[Tensor | None, ...]:
        qkv = ctx.saved_tensors
        scale = qkv[0].shape[-1] ** -0.5
        # Many tiles add to the gradient of a key: in bf16 the sum would lose bits.
        sum_dtype = torch.promote_types(qkv[1].dtype, torch.float32)
        grads = (
            torch.empty_like(qkv[0]),
            *(torch.zeros_like(x, dtype=sum_dtype) for x in qkv[1:]),
        )
        dq_HRCD, dk_HRCD, dv_HRCD = (x.unflatten(1, ctx.grid) for x in grads)
        q_HRCD, k_HRCD, v_HRCD, grad_HRCD = (x.unflatten(1, ctx.grid) for x in (*qkv, grad_HnD))
        row_spans, column_spans = (_spans(size, ctx.radius, like=qkv[0]) for size in ctx.grid)
        for row in row_spans:
            for column in column_spans:
                queries = slice(None), row.queries, column.queries
                keys = slice(None), row.keys, column.keys
                q_HqD = q_HRCD[queries].flatten(1, 2) * scale
                grad_HqD = grad_HRCD[queries].flatten(1, 2)
                k_HkD, v_HkD = (x[keys].flatten(1, 2) for x in (k_HRCD, v_HRCD))
                weight_Hqk = _probabilities(q_HqD, k_HkD, row, column)
                dscore_Hqk = torch._softmax_backward_data(
                    grad_HqD @ v_HkD.mT, weight_Hqk, -1, weight_Hqk.dtype
                )
                dq_HRCD[queries] = (dscore_Hqk @ k_HkD * scale).view_as(dq_HRCD[queries])
                dk_HRCD[keys] += (dscore_Hqk.mT @ q_HqD).view_as(dk_HRCD[keys])
                dv_HRCD[keys] += (weight_Hqk.mT @ grad_HqD).view_as(dv_HRCD[keys])
        return *(grad.to(x.dtype) for grad, x in zip(grads, qkv, strict=True)), None, None


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # fullgraph: past the limit of recompilations it fails instead of computing all n x n scores.
    # A shape of heads, a dtype, and gradients or none each compile once.
    return torch.compile(  # type: ignore[call-overload]  # which lacks recompile_limit
        flex_attention, dynamic=True, fullgraph=True, recompile_limit=64
    )


def _flex_attention(
    q_HnD: Tensor, k_HnD: Tensor, v_HnD: Tensor, grid: tuple[int, int], radius: int
) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_HnD, k_HnD, v_HnD))
    if needs_grad and q_HnD.device.type == "cpu":
        raise NotImplementedError(
            "FlexAttention has no backward pass on CPU in torch 2.13; use backend='halo'"
        )
    block_mask, patch_P, token_n = _flex_layout(grid, radius, q_HnD.device)
    # Gathers, not views: of a view the compiler would guard the layout of its base as well.
    q_1HPD, k_1HPD, v_1HPD = (x[None].index_select(2, patch_P) for x in (q_HnD, k_HnD, v_HnD))
    out_1HPD = _compiled_flex_attention()(q_1HPD, k_1HPD, v_1HPD, block_mask=block_mask)
    return out_1HPD[0].index_select(1, token_n)


# Every layer of a forward pass asks for the layouts of the same images. Tensors made in inference
# mode could not be saved for a later backward pass.
@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _flex_layout(
    grid: tuple[int, int], radius: int, device: torch.device
) -> tuple[BlockMask, Tensor, Tensor]:
    """Return the mask, and the two orders of _block_order, on the device."""
    patch_P, token_n = _block_order(grid)
    return tiled_block_mask(grid, radius, device), patch_P.to(device), token_n.to(device)


def tiled_block_mask(
    grid: tuple[int, int], radius: int, device: torch.device | str = "cpu"
) -> BlockMask:
    """Build FlexAttention's mask of a window from the geometry, without looking at pairs of tokens.

    Tokens are those of the grid padded to whole blocks of 8 x 16 patches: block after block,
    row-major, and row-major inside a block. Padding is no key; as a query it sees what the nearest
    real patch sees, so that no row of scores is empty.

    Returns:
        a BlockMask [1, 1, P, P] of 4 * (P / 128)^2 bytes: 17 MB for 512 x 512 patches.
    """
    rows, columns = grid
    block_rows, block_columns = -(-rows // BLOCK_ROWS), -(-columns // BLOCK_COLUMNS)
    num_blocks = block_rows * block_columns
    first_row, num_rows = _touched_blocks(rows, BLOCK_ROWS, radius)
    first_column, num_columns = _touched_blocks(columns, BLOCK_COLUMNS, radius)

    # Block (i, j) touches num_rows[i] x num_columns[j] blocks; the places behind them are unused.
    counts = num_rows[:, None] * num_columns
    place = torch.arange(int(counts.max()))
    row = first_row[:, None, None] + place // num_columns[:, None]
    column = first_column[:, None] + place % num_columns[:, None]
    touched = torch.where(place < counts[:, :, None], row * block_columns + column, 0)
    # The kernels want room for every block.
    kv_indices = torch.zeros(1, 1, num_blocks, num_blocks, dtype=torch.int32, device=device)
    kv_indices[0, 0, :, : len(place)] = touched.flatten(0, 1)
    kv_num_blocks = counts.reshape(1, 1, num_blocks).to(device, torch.int32)

    # Tensors, not numbers: another grid or radius must not compile another kernel. And without
    # dimensions: the C++ kernel cannot index a tensor of dynamic size (torch 2.13).
    last_row, last_column, block_stride, reach = (
        torch.tensor(limit, dtype=torch.int32, device=device)
        for limit in (rows - 1, columns - 1, block_columns, radius)
    )

    def is_in_window(b: Tensor, h: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        q_row, q_column = _patch_of_token(q_token, block_stride)
        k_row, k_column = _patch_of_token(k_token, block_stride)
        row_distance = (torch.minimum(q_row, last_row) - k_row).abs()
        column_distance = (torch.minimum(q_column, last_column) - k_column).abs()
        is_near = (row_distance <= reach) & (column_distance <= reach)
        return is_near & (k_row <= last_row) & (k_column <= last_column)

    # The relation is symmetric: the queries that touch a block are the keys that it touches.
    return BlockMask(
        seq_lengths=(num_blocks * BLOCK_TOKENS, num_blocks * BLOCK_TOKENS),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=kv_num_blocks,
        q_indices=kv_indices,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK_TOKENS, BLOCK_TOKENS),
        mask_mod=is_in_window,
    )


def _touched_blocks(size: int, block: int, radius: int) -> tuple[Tensor, Tensor]:
    """Return, for each block of an axis, the first block that its window touches and how many."""
    num_blocks = -(-size // block)
    start = torch.arange(num_blocks) * block
    first = (start - radius).clamp(min=0) // block
    last = ((start + block - 1 + radius) // block).clamp(max=num_blocks - 1)
    return first, last - first + 1


def _patch_of_token(token: Tensor, block_columns: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return row and column of a token in the order of blocks."""
    block, place = token // BLOCK_TOKENS, token % BLOCK_TOKENS
    row = block // block_columns * BLOCK_ROWS + place // BLOCK_COLUMNS
    column = block % block_columns * BLOCK_COLUMNS + place % BLOCK_COLUMNS
    return row, column


def _block_order(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the patch [P] at each token in the order of blocks, and the token [n] of each patch.

    Padding repeats the nearest patch.
    """
    rows, columns = grid
    block_rows, block_columns = -(-rows // BLOCK_ROWS), -(-columns // BLOCK_COLUMNS)
    token = torch.arange(block_rows * block_columns * BLOCK_TOKENS)
    row, column = _patch_of_token(token, block_columns)
    patch = row.clamp(max=rows - 1) * columns + column.clamp(max=columns - 1)
    is_real = (row < rows) & (column < columns)
    token_of_patch = torch.empty(rows * columns, dtype=torch.long)
    token_of_patch[patch[is_real]] = token[is_real]
    return patch, token_of_patch
