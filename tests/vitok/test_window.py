import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vitok import window
from vitok.window import tiled_block_mask, window_attention

NUM_HEADS, HEAD_DIM = 2, 16
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}
# (rows, columns), radius
WINDOWS = {
    "one patch": ((1, 1), 2),
    "one row": ((1, 30), 3),
    "one column": ((30, 1), 3),
    "whole tiles": ((16, 24), 5),
    "ragged tiles": ((19, 33), 8),
    "each patch alone": ((9, 11), 0),
    "all columns and some rows": ((21, 5), 6),
    "the whole image": ((7, 9), 8),
    "more than the image": ((5, 20), 40),
}

grids = st.tuples(st.integers(1, 26), st.integers(1, 26))


def is_near(grid: tuple[int, int], radius: int) -> Tensor:
    """Return [n, n], whether the key lies in the query's window."""
    rows, columns = grid
    row = torch.arange(rows)[:, None].expand(grid).flatten()
    column = torch.arange(columns)[None].expand(grid).flatten()
    far_apart = torch.maximum(
        (row[:, None] - row[None]).abs(), (column[:, None] - column[None]).abs()
    )
    return far_apart <= radius


def dense_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    mask = is_near(grid, radius).to(q.device)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


def random_qkv(grid: tuple[int, int], **to) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = grid[0] * grid[1]
    # The layout of a packed row: [n, H, D], heads seen first.
    shape = (num_tokens, NUM_HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(**to).transpose(0, 1) for _ in range(3)]


def outputs_and_gradients(function, grid, radius, *more, **to) -> list[Tensor]:
    qkv = [x.requires_grad_() for x in random_qkv(grid, **to)]
    out = function(*qkv, grid, radius, *more)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(**to)
    gradients = torch.autograd.grad((out * weight).sum(), qkv)
    return [out.detach(), *gradients]


def assert_equals_dense_attention(actual: list[Tensor], grid, radius, dtype=torch.float32) -> None:
    expected = outputs_and_gradients(dense_attention, grid, radius)
    for got, wanted in zip(actual, expected, strict=False):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float().cpu(), wanted, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("grid", "radius"), WINDOWS.values(), ids=WINDOWS)
def test_halo_equals_attention_under_a_dense_mask(grid, radius, dtype):
    actual = outputs_and_gradients(window_attention, grid, radius, "halo", dtype=dtype)
    assert len(actual) == 4
    assert_equals_dense_attention(actual, grid, radius, dtype)


@settings(deadline=None, max_examples=40)
@given(grid=grids, radius=st.integers(0, 30))
def test_halo_equals_attention_under_a_dense_mask_on_any_grid(grid, radius):
    actual = outputs_and_gradients(window_attention, grid, radius, "halo")
    assert_equals_dense_attention(actual, grid, radius)


def test_a_window_is_not_full_attention():
    q, k, v = random_qkv((12, 12))
    windowed, full = (window_attention(q, k, v, (12, 12), radius) for radius in (3, 11))
    assert (windowed - full).abs().max() > 0.1


def test_halo_gradients_agree_with_finite_differences():
    q, k, v = (x[:1, :, :3].double().requires_grad_() for x in random_qkv((3, 10)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: window_attention(q, k, v, (3, 10), 2), (q, k, v)
    )


def test_a_patch_beyond_the_radius_has_no_influence():
    grid, radius, changed = (20, 23), 4, 7 * 23 + 11
    q, k, v = random_qkv(grid)
    before = window_attention(q, k, v, grid, radius)
    k[:, changed] += 3
    v[:, changed] -= 5
    after = window_attention(q, k, v, grid, radius)
    near = is_near(grid, radius)[changed]
    assert near.sum() == (2 * radius + 1) ** 2
    assert torch.equal(before[:, ~near], after[:, ~near])
    assert (before[:, near] != after[:, near]).any(dim=-1).all()


def test_tiles_of_a_larger_image_are_more_but_not_larger(monkeypatch):
    computed = []
    probabilities = window._probabilities

    def recorded(q_HqD, k_HkD, row, column):
        computed.append(q_HqD.shape[1] * k_HkD.shape[1])
        return probabilities(q_HqD, k_HkD, row, column)

    monkeypatch.setattr(window, "_probabilities", recorded)
    calls, largest, pairs = [], [], []
    for side in (24, 48, 96):
        computed.clear()
        outputs_and_gradients(window_attention, (side, side), 4, "halo")
        calls.append(len(computed))
        largest.append(max(computed))
        pairs.append(sum(computed) / side**2)
    assert calls == [2 * 3**2, 2 * 6**2, 2 * 12**2]  # forward and backward
    assert largest == [8**2 * 16**2] * 3
    assert max(pairs) <= 2 * 16**2  # queries times keys, for each token


@settings(deadline=None, max_examples=40)
@given(grid=grids, radius=st.integers(0, 30))
def test_block_mask_equals_the_dense_mask(grid, radius):
    block_mask = tiled_block_mask(grid, radius)
    patch, token_of_patch = window._block_order(grid)
    num_tokens = len(patch)
    assert num_tokens % window.BLOCK_TOKENS == 0
    assert block_mask.shape == (1, 1, num_tokens, num_tokens)
    assert torch.equal(patch[token_of_patch], torch.arange(grid[0] * grid[1]))

    token = torch.arange(num_tokens)
    zero = torch.tensor(0)
    in_window = block_mask.mask_mod(zero, zero, token[:, None], token)
    wanted = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    # Padding sees what its nearest patch sees, and nobody sees padding.
    wanted[:, token_of_patch] = is_near(grid, radius)[patch]
    assert torch.equal(in_window, wanted)
    assert in_window.any(dim=1).all()

    blocks = wanted.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=3).any(dim=1)
    visited = block_mask.to_dense()[0, 0].bool()
    assert not (blocks & ~visited).any()
    # Beyond the blocks in reach only those that padding alone could have reached.
    assert visited.sum(dim=1).max() <= (2 + 2 * radius // 8 + 1) * (2 + 2 * radius // 16 + 1)
    assert torch.equal(visited, visited.T)


def test_block_mask_of_a_large_image_is_small():
    block_mask = tiled_block_mask((512, 512), 8)
    tensors = {x.data_ptr(): x for x in block_mask.as_tuple() if isinstance(x, Tensor)}
    assert sum(x.nbytes for x in tensors.values()) < 20e6
    assert block_mask.kv_num_blocks.sum() == (3 * 64 - 2) * (3 * 32 - 2)
    assert block_mask.kv_num_blocks.max() == 9


def test_flex_equals_attention_under_a_dense_mask_and_compiles_once_for_all_grids():
    def assert_equal(grid, radius, dtype=torch.float32):
        qkv = random_qkv(grid, dtype=dtype)
        actual = window_attention(*qkv, grid, radius, "flex")
        assert_equals_dense_attention([actual], grid, radius, dtype)

    assert_equal((19, 33), 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid, radius in [((1, 30), 3), ((30, 1), 0), ((17, 16), 4), ((9, 40), 20)]:
            assert_equal(grid, radius)
    assert_equal((5, 7), 2)  # a single block
    assert_equal((9, 20), 8, torch.bfloat16)


def test_flex_refuses_gradients_on_cpu():
    q, k, v = random_qkv((4, 4))
    v.requires_grad_()
    with pytest.raises(NotImplementedError, match="halo"):
        window_attention(q, k, v, (4, 4), 1, "flex")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward needs CUDA")
@pytest.mark.parametrize("backend", ["halo", "flex"])
def test_cuda_equals_attention_under_a_dense_mask(backend):
    to = {"device": "cuda", "dtype": torch.bfloat16}
    for grid, radius in [((19, 33), 8), ((1, 30), 3), ((40, 40), 2)]:
        actual = outputs_and_gradients(window_attention, grid, radius, backend, **to)
        assert len(actual) == 4
        assert_equals_dense_attention(actual, grid, radius, torch.bfloat16)


@pytest.mark.parametrize(
    ("grid", "radius", "message"), [((3, 4), 1, "holds 12 tokens"), ((2, 5), -1, "radius=-1")]
)
def test_impossible_windows_are_refused(grid, radius, message):
    q, k, v = random_qkv((2, 5))
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, grid, radius)
