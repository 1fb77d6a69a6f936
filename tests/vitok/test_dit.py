import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.vitok.latent_rows import labelled, one_latent, row_of_latents, tiny_dit
from vitok.dit import SIZES, Condition, DiT, DiTConfig
from vitok.ema import Ema
from vitok.flops import training_flops
from vitok.initialize import start_at_random
from vitok.optim import OptimConfig, build_optimizer
from vitok.packed import PackedTokens
from vitok.parallel import ParallelConfig, prepare_blocks, shard_model
from vitok.transformer import apply_rope, rope_rotation

GRIDS = [(2, 3), (4, 4), (1, 7), (3, 2)]
TIMES = torch.tensor([0.1, 0.9, 0.5, 0.0, 0.3, 0.7])


def texts(lengths: list[int], *, tokens: int = 3, channels: int = 4, seed: int = 0) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        labels=torch.full((len(lengths),), -1),
        text=torch.randn(len(lengths), tokens, channels, generator=generator),
        text_tokens=torch.tensor(lengths),
    )


def part_of(condition: Condition, index: int) -> Condition:
    pick = slice(index, index + 1)
    return Condition(
        labels=condition.labels[pick],
        text=None if condition.text is None else condition.text[pick],
        text_tokens=None if condition.text_tokens is None else condition.text_tokens[pick],
    )


def plain_velocity(
    model: DiT, latent: PackedTokens, time: float, condition_tokens: Tensor
) -> Tensor:
    """Read the formula of the model off its docstrings, for one image: no packing, no products."""
    weights, width = dict(model.named_parameters()), model.config.width
    heads = model.config.heads

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    def split(x: Tensor) -> Tensor:
        return x.view(len(x), heads, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
        return out[0].transpose(0, 1).flatten(1)

    frequency = 10_000.0 ** -(torch.arange(128) / 128)
    angle = 1000.0 * time * frequency
    embedded = linear(F.silu(linear(torch.cat((angle.cos(), angle.sin())), "time_in")), "time_out")
    shared = linear(F.silu(embedded), "time_modulation")
    rotation = rope_rotation(latent.patch_coord, width // heads)
    row, column = latent.patch_coord.long().unbind(1)
    x = linear(latent.tokens, "latent_embed")
    x = x + weights["row_embed.weight"][row] + weights["column_embed.weight"][column]
    for index in range(model.config.depth):
        block = f"blocks.{index}"
        parts = (shared[: 6 * width] + weights[f"{block}.modulation.offset"]).chunk(6)
        h = norm(x, f"{block}.norm1") * (1 + parts[1]) + parts[0]
        qkv = linear(h, f"{block}.attn.qkv_proj").view(len(h), 3, heads, -1)
        q = apply_rope(norm(qkv[:, 0], f"{block}.attn.norm_q"), rotation)
        k = apply_rope(norm(qkv[:, 1], f"{block}.attn.norm_k"), rotation)
        branch = linear(attend(q, k, qkv[:, 2]), f"{block}.attn.out_proj")
        x = x + weights[f"{block}.layer_scale1.gamma"] * branch * (1 + parts[2])
        cross = f"{block}.cross_attn"
        q = norm(split(linear(norm(x, f"{block}.norm2"), f"{cross}.q_proj")), f"{cross}.norm_q")
        k, v = map(split, linear(condition_tokens, f"{cross}.kv_proj").chunk(2, dim=-1))
        branch = linear(attend(q, norm(k, f"{cross}.norm_k"), v), f"{cross}.out_proj")
        x = x + weights[f"{block}.layer_scale2.gamma"] * branch
        h = norm(x, f"{block}.norm3") * (1 + parts[4]) + parts[3]
        value, gate = linear(h, f"{block}.ffn.fc1").chunk(2, dim=-1)
        branch = linear(F.silu(gate) * value, f"{block}.ffn.fc2")
        x = x + weights[f"{block}.layer_scale3.gamma"] * branch * (1 + parts[5])
    shift, scale = (shared[6 * width :] + weights["modulation.offset"]).chunk(2)
    return linear(norm(x, "norm") * (1 + scale) + shift, "to_velocity")


@pytest.mark.parametrize("kind", ["class", "null", "text", "unconditional"])
def test_velocity_is_that_of_a_plain_reading_of_the_formula(kind: str) -> None:
    shapes = {
        "text": {"num_classes": 0, "text_channels": 4, "text_tokens": 3},
        "unconditional": {"num_classes": 0},
    }
    model = tiny_dit(**shapes.get(kind, {}))
    latent = row_of_latents([(3, 4)], extra_tokens=0, extra_slots=0)
    null = model.null_embed.weight
    tokens = {"null": null, "unconditional": null}
    condition = labelled(-1)
    if kind == "class":
        condition = labelled(3)
        tokens[kind] = torch.cat([null, model.class_embed.weight[3:4]])
    elif kind == "text":
        condition = texts([2])
        tokens[kind] = torch.cat([null, model.text_embed(condition.text[0, :2])])
    velocity = model(latent, torch.tensor([0.4]), condition).tokens
    expected = plain_velocity(model, latent, 0.4, tokens[kind])
    assert expected.norm() > 1
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_packed_velocity_equals_each_latent_alone(kind: str) -> None:
    text = {"num_classes": 0, "text_channels": 4, "text_tokens": 3}
    model = tiny_dit(**(text if kind == "text" else {}))
    packed = row_of_latents(GRIDS)
    condition = (
        labelled(2, -1, 4, 0, slots=6) if kind == "class" else texts([3, 0, 1, 2, 0, 3], seed=1)
    )
    together = model(packed, TIMES, condition).tokens
    for index in range(len(GRIDS)):
        start, stop = packed.cu_seqlens[index : index + 2].tolist()
        alone = model(
            one_latent(packed, index), TIMES[index : index + 1], part_of(condition, index)
        )
        torch.testing.assert_close(together[start:stop], alone.tokens, rtol=1e-4, atol=1e-5)
        assert alone.tokens.std() > 0.1


def test_time_and_condition_of_an_image_reach_that_image_alone() -> None:
    model, packed = tiny_dit(), row_of_latents(GRIDS)
    before = model(packed, TIMES, labelled(1, 1, 1, 1, slots=6)).tokens
    other_time = TIMES.clone()
    other_time[1] = 0.2
    changes = {
        "class": model(packed, TIMES, labelled(1, 2, 1, 1, slots=6)).tokens,
        "null": model(packed, TIMES, labelled(1, -1, 1, 1, slots=6)).tokens,
        "time": model(packed, other_time, labelled(1, 1, 1, 1, slots=6)).tokens,
    }
    mine = packed.segment_ids == 1
    for what, after in changes.items():
        change = (after - before).norm(dim=-1)
        assert (change[mine] > 1e-3).all(), what
        assert (change[~mine] == 0).all(), what


def test_tokens_behind_the_end_of_a_text_do_not_count() -> None:
    model = tiny_dit(num_classes=0, text_channels=4, text_tokens=3)
    latent = row_of_latents([(2, 2)], extra_tokens=0, extra_slots=0)
    time = torch.tensor([0.5])
    one, two = texts([1]), texts([2])
    changed = dataclasses.replace(one, text=one.text + torch.tensor([0.0, 1.0, 1.0])[:, None])
    velocity = model(latent, time, one).tokens
    assert torch.equal(velocity, model(latent, time, changed).tokens)
    assert not torch.allclose(velocity, model(latent, time, two).tokens)
    null = model(latent, time, one.null()).tokens
    assert torch.equal(null, model(latent, time, texts([0], seed=9)).tokens)
    assert not torch.allclose(velocity, null)


def test_positions_beyond_the_table_are_interpolated_and_keep_the_aspect() -> None:
    model = tiny_dit(position_grid=4)
    # Columns 0 .. 6 are laid on places 0 .. 3 of the table, and rows at the same scale.
    packed = row_of_latents([(3, 7), (4, 2)])
    positions = model._positions(packed)

    def table(embedding: nn.Embedding, places: Tensor) -> Tensor:
        low = places.floor().long()
        part = (places - low)[:, None]
        high = (low + 1).clamp(max=3)
        return (1 - part) * embedding.weight[low] + part * embedding.weight[high]

    row, column = packed.patch_coord[:21].float().unbind(1)
    expected = table(model.row_embed, row / 2) + table(model.column_embed, column / 2)
    torch.testing.assert_close(positions[:21], expected)
    stretched = F.interpolate(
        model.column_embed.weight.T[None], size=7, mode="linear", align_corners=True
    )[0].T
    torch.testing.assert_close(positions[:7] - model.row_embed.weight[0], stretched)
    # A grid within the table has its rows and columns as they are.
    row, column = packed.patch_coord[21:29].long().unbind(1)
    expected = model.row_embed.weight[row] + model.column_embed.weight[column]
    torch.testing.assert_close(positions[21:29], expected)


def test_training_starts_with_zero_velocity_and_blocks_that_change_nothing() -> None:
    with torch.device("meta"):
        model = DiT(tiny_dit().config)
    start_at_random(model.to_empty(device="cpu"), seed=0)
    packed = row_of_latents(GRIDS)
    streams: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: streams.append((given[0], out)))
    velocity = model(packed, TIMES, labelled(0, 1, 2, 3, slots=6)).tokens
    assert not velocity.any()
    assert len(streams) == 2 and streams[0][0].any()
    assert all(torch.equal(before, after) for before, after in streams)


def test_every_parameter_has_moved_after_a_few_steps_from_the_start() -> None:
    model = tiny_dit(text_channels=4, text_tokens=3)
    start_at_random(model, seed=0)
    first = copy.deepcopy(dict(model.named_parameters()))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.0))
    packed = row_of_latents(GRIDS, extra_slots=0)
    condition = dataclasses.replace(texts([3, 0, 2, 1]), labels=torch.tensor([0, 1, -1, 4]))
    for step in range(6):
        velocity = model(packed, TIMES[:4], condition).tokens
        (velocity - row_of_latents(GRIDS, seed=step + 1).tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, first[name]), name
    # Classes that were never seen stay where they began.
    unseen = [2, 3]
    assert torch.equal(model.class_embed.weight[unseen], first["class_embed.weight"][unseen])


def test_weights_at_the_start_follow_from_the_seed() -> None:
    models = [tiny_dit(seed) for seed in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        start_at_random(model, seed=seed)
    one, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = {name for name in one if one[name].std() > 0}
    assert {"class_embed.weight", "null_embed.weight", "row_embed.weight"} <= drawn
    assert all(not torch.equal(one[name], other[name]) for name in drawn)
    assert one["class_embed.weight"].std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("name", "millions"), [("450M", 522.4), ("1.2B", 1230.5)])
def test_sizes_have_the_parameters_that_are_printed_beside_their_names(
    name: str, millions: float
) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig.from_name(name, latent_channels=64))
        with_classes = DiT(DiTConfig.from_name(name, latent_channels=64, num_classes=21_841))
    width, depth, heads = SIZES[name]
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    assert with_classes.num_parameters() - model.num_parameters() == 21_841 * width
    assert (width / heads) % 8 == 0  # what flash attention takes
    assert model.num_parameters() == pytest.approx(depth * 16 * width**2, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"width": 36, "heads": 2}, "width=36 over heads=2 must leave a head dimension"),
        ({"depth": -1}, "depth=-1 must be at least 0"),
        ({"num_classes": -1}, "num_classes=-1 must be positive"),
        ({"text_channels": 4}, "text_channels=4 and text_tokens=0 must both"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**shape)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'2B' is no size of a DiT; choose 450M or 1.2B"):
        DiTConfig.from_name("2B", latent_channels=16)


def run(model: nn.Module, grids: list[tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what the model makes of a row, and the gradients of its mean square."""
    model.zero_grad()
    lengths = sum(rows * columns for rows, columns in grids)
    packed = row_of_latents(grids, extra_tokens=48 - lengths, extra_slots=6 - len(grids))
    packed = dataclasses.replace(packed, max_seqlen=48)
    labels = labelled(*range(len(grids)), slots=6)
    velocity = model(packed, TIMES, labels).tokens
    velocity.square().mean().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return velocity.detach(), gradients


ROWS = [GRIDS, [(6, 8)], [(1, 1)] * 5, []]


@pytest.mark.parametrize(
    "config",
    [ParallelConfig(checkpoint_every=1), ParallelConfig(checkpoint_every=2, compile=True)],
    ids=["checkpointed", "checkpointed and compiled"],
)
def test_sharded_blocks_give_the_same_gradients_and_compile_once(
    config: ParallelConfig, mesh: DeviceMesh, traced: None
) -> None:
    model = tiny_dit()
    expected = [run(model, grids) for grids in ROWS]
    assert all(gradient is not None for gradient in expected[-1][1].values())
    prepare_blocks(model, config)
    shard_model(model, mesh, torch.float32)
    compiled = None
    for grids, (velocity, gradients) in zip(ROWS, expected, strict=True):
        actual = run(model, grids)
        torch.testing.assert_close(actual[0], velocity, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual[1], gradients, rtol=1e-3, atol=1e-5)
        compiled = compiled or copy.deepcopy(counters["frames"])
        assert counters["frames"] == compiled
    assert bool(compiled) == config.compile


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else() -> None:
    model = tiny_dit()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = build_optimizer(model, OptimConfig(algorithm="muon"))
    stacks = {
        names[id(p)].split(".", 2)[2]: group["num_stacked"]
        for group in muon.param_groups
        for p in group["params"]
    }
    assert stacks == {
        "attn.qkv_proj.weight": 3,
        "attn.out_proj.weight": 1,
        "cross_attn.q_proj.weight": 1,
        "cross_attn.kv_proj.weight": 2,
        "cross_attn.out_proj.weight": 1,
        "ffn.fc1.weight": 2,
        "ffn.fc2.weight": 1,
    }
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert {"blocks.0.modulation.offset", "class_embed.weight", "to_velocity.weight"} <= rest
    decayed = {
        names[id(p)]
        for group in adamw.param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    assert "blocks.0.modulation.offset" not in decayed and "latent_embed.weight" in decayed


def test_average_of_a_dit_follows_its_weights() -> None:
    model = tiny_dit()
    ema = Ema(model, 0.5, warmup=False)
    before = model.class_embed.weight.detach().clone()
    with torch.no_grad():
        model.class_embed.weight.add_(2.0)
    ema.update(model)
    with ema.applied_to(model):
        torch.testing.assert_close(model.class_embed.weight, before + 1.0)


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_training_flops_are_those_that_torch_counts(
    text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The products that spread positions and modulations over tokens stand for look-ups.
    monkeypatch.setattr("vitok.transformer.Modulation.forward", looked_up)
    monkeypatch.setattr("vitok.dit.DiT._positions", lambda self, packed: 0.0)
    conditions = {"num_classes": 0, "text_channels": 32, "text_tokens": 15} if text else {}
    model = tiny_dit(width=64, depth=3, latent_channels=16, **conditions)
    counted = 0
    grids = [(6, 8), (4, 4), (12, 16)]
    for grid in grids:
        packed = row_of_latents([grid], channels=16, extra_tokens=0, extra_slots=0)
        condition = texts([15], tokens=15, channels=32) if text else labelled(1)
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(packed, TIMES[:1], condition).tokens.square().mean().backward()
        counted += counter.get_total_flops()
    lengths = [rows * columns for rows, columns in grids]
    assert training_flops(model.config, [*lengths, 0]) == pytest.approx(counted, rel=0.03)
    assert training_flops(model.config, [sum(lengths)]) > 1.05 * counted


def looked_up(self: nn.Module, shared_SW: Tensor, membership_TS: Tensor) -> tuple[Tensor, ...]:
    return (shared_SW + self.offset)[membership_TS.argmax(1)].chunk(self.num_parts, dim=-1)
