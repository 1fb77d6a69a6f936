"""The references here follow the published description, token by token, in float64."""

from math import cos, exp, sin, sqrt

import pytest
import torch
from torch import Tensor

from vitok import transformer
from vitok.attention import attention_layout
from vitok.packed import layout_of
from vitok.transformer import (
    Attention,
    Block,
    RMSNorm,
    SwiGLU,
    apply_rope,
    rope_rotation,
    swiglu_hidden,
)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise one vector: x over its root mean square, with 1e-6 under the root."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return x / sqrt(mean_square + 1e-6) * weight


def plain_rope(x: Tensor, row: int, column: int) -> Tensor:
    """Rotate one head's vector by the place of its token."""
    d = len(x)
    rotated = torch.empty_like(x)
    for j in range(d // 2):
        position, i = (row, j) if j < d // 4 else (column, j - d // 4)
        angle = position * 10000 ** (-2 * i / (d / 2))
        a, b = float(x[2 * j]), float(x[2 * j + 1])
        rotated[2 * j] = a * cos(angle) - b * sin(angle)
        rotated[2 * j + 1] = a * sin(angle) + b * cos(angle)
    return rotated


def plain_attention(
    weights: dict[str, Tensor], x: Tensor, places: list[list[int]], heads: int
) -> Tensor:
    """Attend inside one image, x [n, W]."""
    n, width = x.shape
    d = width // heads
    q, k, v = (torch.empty(heads, n, d, dtype=x.dtype) for _ in range(3))
    for t in range(n):
        qkv = weights["qkv_proj.weight"] @ x[t]
        for h in range(heads):
            part = [qkv[which * width + h * d : which * width + (h + 1) * d] for which in range(3)]
            q[h, t] = plain_rope(plain_rms_norm(part[0], weights["norm_q.weight"]), *places[t])
            k[h, t] = plain_rope(plain_rms_norm(part[1], weights["norm_k.weight"]), *places[t])
            v[h, t] = part[2]
    out = torch.zeros_like(x)
    for t in range(n):
        for h in range(heads):
            scores = [float(q[h, t] @ k[h, s]) / sqrt(d) for s in range(n)]
            total = sum(exp(score) for score in scores)
            for s in range(n):
                out[t, h * d : (h + 1) * d] += exp(scores[s]) / total * v[h, s]
    return out @ weights["out_proj.weight"].T


def plain_swiglu(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Apply the gated MLP to one vector."""
    hidden = weights["fc1.weight"] @ x
    half = len(hidden) // 2
    gated = [
        float(gate) / (1 + exp(-float(gate))) * float(value)
        for value, gate in zip(hidden[:half], hidden[half:], strict=True)
    ]
    return weights["fc2.weight"] @ torch.tensor(gated, dtype=x.dtype)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.3 * torch.randn_like(parameter)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return module


def double_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in module.named_parameters()}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm_equals_its_definition_at_every_scale(scale: float) -> None:
    norm = randomized(RMSNorm(12))
    x = scale * torch.randn(5, 2, 12)
    expected = torch.stack(
        [
            torch.stack([plain_rms_norm(v.double(), norm.weight.detach().double()) for v in rows])
            for rows in x
        ]
    )
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_and_rope_compute_in_float32_whatever_their_input():
    norm, x = randomized(RMSNorm(16)), torch.randn(9, 2, 16).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    rotation = rope_rotation(torch.randint(0, 300, (9, 2)), 16)
    assert rotation.dtype == torch.float32
    assert torch.equal(apply_rope(x, rotation), apply_rope(x.float(), rotation).bfloat16())


@pytest.mark.parametrize("head_dim", [4, 8, 16])
def test_rope_equals_its_definition(head_dim: int) -> None:
    places = [(0, 0), (1, 0), (0, 1), (2, 5), (5, 2), (37, 11)]
    x = torch.randn(len(places), 3, head_dim)
    rotated = apply_rope(x, rope_rotation(torch.tensor(places, dtype=torch.int32), head_dim))
    expected = torch.stack(
        [
            torch.stack([plain_rope(v.double(), row, column) for v in heads])
            for heads, (row, column) in zip(x, places, strict=True)
        ]
    )
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(rotated[0], x[0])


def test_rope_scores_depend_on_the_displacement_alone():
    q, k = torch.randn(2, 1, 1, 16)

    def score(query_at: tuple[int, int], key_at: tuple[int, int]) -> float:
        q_turned = apply_rope(q, rope_rotation(torch.tensor([query_at]), 16))
        k_turned = apply_rope(k, rope_rotation(torch.tensor([key_at]), 16))
        return float((q_turned * k_turned).sum())

    here = score((0, 0), (2, 3))
    assert score((5, 0), (7, 3)) == pytest.approx(here, abs=1e-4)
    assert score((4, 9), (6, 12)) == pytest.approx(here, abs=1e-4)
    others = [score((0, 0), displacement) for displacement in [(3, 2), (-2, 3), (2, -3), (0, 0)]]
    assert all(abs(other - here) > 1e-2 for other in others)


@pytest.mark.parametrize(
    ("width", "hidden"), [(768, 2048), (1024, 2736), (1728, 4608), (3072, 8208)]
)
def test_swiglu_hidden_widths_are_those_of_the_named_sizes(width: int, hidden: int) -> None:
    assert swiglu_hidden(width) == hidden
    with torch.device("meta"):
        layer = SwiGLU(width)
    assert layer.fc1.weight.shape == (2 * hidden, width)
    assert layer.fc2.weight.shape == (width, hidden)


def test_swiglu_takes_the_value_first_and_the_gate_second():
    layer = randomized(SwiGLU(16))
    x = torch.randn(4, 16)
    expected = torch.stack([plain_swiglu(double_weights(layer), v) for v in x.double()])
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


GRIDS = [(2, 3), (1, 1), (3, 1)]


def split_by_image(x: Tensor) -> list[tuple[Tensor, list[list[int]]]]:
    """Cut rows of GRIDS into images, each with the places of its tokens."""
    images, start = [], 0
    for rows, columns in GRIDS:
        places = [[row, column] for row in range(rows) for column in range(columns)]
        images.append((x[start : start + len(places)], places))
        start += len(places)
    return images


def test_attention_equals_its_definition():
    width, heads = 24, 3
    layer = randomized(Attention(width, heads))
    row = layout_of(GRIDS, patch_size=1, row_tokens=12, max_images=4, max_seqlen=6)
    x = torch.randn(12, width)
    out = layer(
        x, rope_rotation(row.patch_coord, width // heads), attention_layout(row, torch.float32, 8)
    )

    expected = [
        plain_attention(double_weights(layer), image, places, heads)
        for image, places in split_by_image(x.double())
    ]
    torch.testing.assert_close(out[:10].double(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert not out[10:].any()


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_block_is_parallel_and_has_one_gain(scale: float) -> None:
    width, heads = 16, 2
    block = randomized(Block(width, heads, 0.1))
    row = layout_of(GRIDS, patch_size=1, row_tokens=12, max_images=3, max_seqlen=6)
    x = scale * torch.randn(12, width)
    out = block(
        x, rope_rotation(row.patch_coord, width // heads), attention_layout(row, torch.float32, 8)
    )

    weights = double_weights(block)
    attn, ffn = (
        {name.removeprefix(part): w for name, w in weights.items() if name.startswith(part)}
        for part in ("attn.", "ffn.")
    )
    expected = []
    for image, places in split_by_image(x.double()):
        h = torch.stack([plain_rms_norm(v, weights["norm1.weight"]) for v in image])
        branches = plain_attention(attn, h, places, heads)
        branches = branches + torch.stack([plain_swiglu(ffn, v) for v in h])
        expected.append(image + weights["layer_scale.gamma"] * branches)
    torch.testing.assert_close(out[:10].double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_new_block_has_its_initial_gain():
    block = Block(8, 1, 0.25)
    assert torch.equal(block.layer_scale.gamma, torch.full((8,), 0.25))
    assert not any("bias" in name for name, _ in block.named_parameters())


@pytest.mark.parametrize("chunk", [1, 5, 11])
def test_a_block_in_chunks_equals_the_block_at_once(chunk: int, monkeypatch) -> None:
    block = randomized(Block(16, 2, 0.1))
    row = layout_of(GRIDS, patch_size=1, row_tokens=12, max_images=4, max_seqlen=6)
    layout = attention_layout(row, torch.float32, 8)
    rotation = rope_rotation(row.patch_coord, 8)
    x = torch.randn(12, 16)
    at_once = block(x, rotation, layout)

    sizes: list[int] = []
    monkeypatch.setattr(transformer, "CPU_CHUNK", chunk)
    block.ffn.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    with torch.inference_mode():
        in_chunks = block(x, rotation, layout)
    torch.testing.assert_close(in_chunks, at_once.detach(), rtol=1e-5, atol=1e-6)
    assert max(sizes) == chunk
    assert sum(sizes) == 12
    block(x, rotation, layout)
    assert sizes[-1] == 12, "with gradients nothing is cut"
