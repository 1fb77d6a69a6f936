from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitok import attention
from vitok.attention import attention_layout, packed_attention
from vitok.packed import PackedTokens, layout_of

NUM_HEADS, HEAD_DIM = 3, 8
# Image sizes in patches, tokens of padding, empty slots.
ROWS = {
    "one image": ([(2, 3)], 0, 0),
    "single tokens": ([(1, 1), (1, 1), (1, 1)], 0, 0),
    "mixed with padding": ([(1, 3), (4, 5), (1, 1), (2, 2)], 5, 3),
    "only padding": ([], 6, 2),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> PackedTokens:
    grids, padding, empty_slots = ROWS[request.param]
    return layout_of(
        grids,
        patch_size=1,
        row_tokens=sum(rows * columns for rows, columns in grids) + padding,
        max_images=len(grids) + empty_slots,
        max_seqlen=20,
    )


def dense_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, row: PackedTokens) -> Tensor:
    """Attend over the whole row under a mask of who shares an image with whom."""
    segment = row.segment_ids.to(q_THD.device)
    real = segment >= 0
    mask = (segment[:, None] == segment[None]) & real[:, None] & real[None]
    mask |= torch.diag(~real)  # a softmax over nothing would be NaN
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
    return torch.where(real[:, None, None], out, 0)


def outputs_and_gradients(function, row: PackedTokens, *more: object, **to) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (len(row.segment_ids), NUM_HEADS, HEAD_DIM)
    qkv = [torch.randn(shape).to(**to).requires_grad_() for _ in range(3)]
    out = function(*qkv, *more)
    (out * torch.randn(shape).to(**to)).sum().backward()
    assert all(x.grad is not None for x in qkv)
    return [out.detach(), *(x.grad for x in qkv)]


@pytest.mark.parametrize("max_explicit_tokens", [0, 4, 1536])
def test_packed_attention_equals_dense_attention_under_a_block_mask(
    row: PackedTokens, max_explicit_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_EXPLICIT_TOKENS", max_explicit_tokens)
    actual = outputs_and_gradients(
        packed_attention, row, attention_layout(row, torch.float32, HEAD_DIM)
    )
    expected = outputs_and_gradients(dense_attention, row, row)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert not got[row.segment_ids < 0].any()


def test_long_images_run_the_fused_kernel_and_short_ones_do_not(monkeypatch):
    lengths = []

    def fused(q, k, v):
        lengths.append(q.shape[-2])
        return v

    monkeypatch.setattr(attention, "MAX_EXPLICIT_TOKENS", 4)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    row = layout_of(
        [(1, 4), (1, 5), (1, 1)], patch_size=1, row_tokens=12, max_images=3, max_seqlen=5
    )
    q, k, v = torch.randn(3, 12, NUM_HEADS, HEAD_DIM).unbind()
    packed_attention(q, k, v, attention_layout(row, torch.float32, HEAD_DIM))
    assert lengths == [5]


def test_a_row_without_images_has_gradients_of_zeros():
    row = layout_of([], patch_size=1, row_tokens=6, max_images=2, max_seqlen=4)
    for x in outputs_and_gradients(
        packed_attention, row, attention_layout(row, torch.float32, HEAD_DIM)
    ):
        assert torch.equal(x, torch.zeros(6, NUM_HEADS, HEAD_DIM))


def test_layout_says_where_images_lie():
    row = layout_of([(2, 2), (1, 3)], patch_size=1, row_tokens=9, max_images=4, max_seqlen=5)
    layout = attention_layout(row, torch.float32, HEAD_DIM)
    assert layout.grids == ((2, 2), (1, 3))
    assert layout.cu_seqlens.tolist() == [0, 4, 7, 7, 7]
    assert layout.is_real.shape == (9, 1, 1)
    assert layout.is_real.flatten().tolist() == [True] * 7 + [False] * 2
    assert layout.max_seqlen == 5


def test_windows_reach_every_image_with_its_own_grid(monkeypatch):
    calls = []

    def record(q, k, v, grid, radius, backend):
        calls.append((q.shape[1], grid, radius, backend))
        return v

    monkeypatch.setattr(attention, "window_attention", record)
    row = layout_of([(2, 2), (1, 3)], patch_size=1, row_tokens=9, max_images=4, max_seqlen=5)
    layout = attention_layout(row, torch.float32, HEAD_DIM, window=8, window_backend="flex")
    packed_attention(*torch.randn(3, 9, NUM_HEADS, HEAD_DIM).unbind(), layout)
    assert calls == [(4, (2, 2), 8, "flex"), (3, (1, 3), 8, "flex")]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "window", "flash", "backend"),
    [
        ((9, 0), torch.bfloat16, 64, None, True, "flex"),
        ((9, 0), torch.float16, 256, None, True, "flex"),
        ((9, 0), torch.bfloat16, 64, 8, False, "flex"),
        ((9, 0), torch.float32, 64, None, False, "flex"),
        ((7, 5), torch.float16, 64, None, False, "flex"),
        ((9, 0), torch.bfloat16, 12, None, False, "halo"),
        ((9, 0), torch.bfloat16, 264, None, False, "flex"),
    ],
)
def test_cuda_kernels_are_chosen_for_what_they_can_do(
    monkeypatch, capability, dtype, head_dim, window, flash, backend
) -> None:
    class OnCuda:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    row = layout_of([(2, 3)], patch_size=1, row_tokens=6, max_images=1, max_seqlen=6)
    layout = attention_layout(replace(row, cu_seqlens=OnCuda()), dtype, head_dim, window=window)
    assert (layout.flash, layout.window_backend) == (flash, backend)
    # Without flash attention the images' grids are needed on the host.
    assert layout.grids == (() if flash else ((2, 3),))


def test_half_precision_scores_are_not_rounded_in_inference():
    row = layout_of([(8, 8)], patch_size=1, row_tokens=64, max_images=1, max_seqlen=64)
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(64, 2, 64).bfloat16() for _ in range(3))
    exact = packed_attention(
        q.double(), k.double(), v.double(), attention_layout(row, torch.float64, 64)
    )

    def error(window: int | None) -> float:
        layout = attention_layout(row, torch.bfloat16, 64, window=window)
        out = packed_attention(q, k, v, layout).double()
        return float((out - exact).norm() / exact.norm())

    rounded = error(None)  # with gradients
    with torch.no_grad():
        assert error(None) < rounded / 3
        # A tile's halo: 7 reaches from one end to the other.
        assert error(7) < rounded / 3


def test_a_negative_window_is_refused():
    row = layout_of([(2, 2)], patch_size=1, row_tokens=4, max_images=1, max_seqlen=4)
    with pytest.raises(ValueError, match="window=-1 must be at least 0, or None for full"):
        attention_layout(row, torch.float32, HEAD_DIM, window=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a CUDA device")
def test_flash_attention_equals_dense_attention_under_a_block_mask(row: PackedTokens) -> None:
    to = {"device": "cuda", "dtype": torch.bfloat16}
    actual = outputs_and_gradients(
        packed_attention, row, attention_layout(row.to("cuda"), torch.bfloat16, HEAD_DIM), **to
    )
    expected = outputs_and_gradients(dense_attention, row, row, device="cuda", dtype=torch.float32)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=5e-2, atol=5e-2)
        assert not got[(row.segment_ids < 0).cuda()].any()
