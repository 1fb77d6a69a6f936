import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from vitok.attention import attention_layout
from vitok.autoencoder import Autoencoder
from vitok.packed import PackedTokens, layout_of
from vitok.parallel import (
    ParallelConfig,
    checkpoint_blocks,
    compile_blocks,
    float8_inference,
    float8_training,
    prepare_blocks,
    require_float8,
    shard_model,
)
from vitok.transformer import Block, rope_rotation

PATCH, ROW_TOKENS = 8, 32
# (height, width) of images that fill the row in different ways, or not at all.
ROWS = [[(8, 16), (24, 24), (8, 8)], [(32, 40)], [(24, 8)] * 5, []]
# Blocks of a single shape, where a test compiles: that takes seconds for each.
ONE_WIDTH = {"encoder_width": 32, "decoder_width": 32, "decoder_heads": 2}


def row_of(sizes: Sequence[tuple[int, int]]) -> PackedTokens:
    layout = layout_of(
        sizes, patch_size=PATCH, row_tokens=ROW_TOKENS, max_images=5, max_seqlen=ROW_TOKENS
    )
    generator = torch.Generator().manual_seed(len(sizes))
    return layout.with_tokens(torch.randn(ROW_TOKENS, 3 * PATCH**2, generator=generator))


def run(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what the model makes of a row, and the gradients of its mean square."""
    model.zero_grad()
    pixels = model(row_of(sizes)).pixels.tokens
    pixels.float().square().mean().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return pixels.detach(), gradients


def assert_same(
    actual: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Compare outputs and gradients by the norm of their difference."""
    assert actual[1].keys() == expected[1].keys()
    pairs = {name: (actual[1][name], gradient) for name, gradient in expected[1].items()}
    for name, (got, wanted) in (pairs | {"output": (actual[0], expected[0])}).items():
        difference = (got.float() - wanted.float()).norm()
        assert difference <= tolerance * wanted.float().norm(), f"{name} is off by {difference:.1e}"


def blocks_of(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@contextmanager
def pretended_h100() -> Iterator[None]:
    """Let conversions take this machine for one with float8; what then trains is emulated."""
    config = pytest.importorskip("torchao.float8").Float8LinearConfig
    recipe = config.from_recipe_name
    emulated = staticmethod(lambda name: dataclasses.replace(recipe(name), emulate=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "from_recipe_name", emulated)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        yield


def test_checkpointed_block_gives_the_same_output_and_gradients(make_autoencoder) -> None:
    block = make_autoencoder().decoder_blocks[0]
    row = row_of(ROWS[0])
    layout = attention_layout(row, torch.float32, 8)
    rotation = rope_rotation(row.patch_coord, 8)
    results = []
    for every in (0, 1):
        if every:
            checkpoint_blocks(block, every)
        x_TW = torch.linspace(-1, 1, ROW_TOKENS * 24).sin().view(ROW_TOKENS, 24).requires_grad_()
        out_TW = block(x_TW, rotation, layout)
        gradients = torch.autograd.grad(out_TW.square().sum(), [x_TW, *block.parameters()])
        assert all(gradient.any() for gradient in gradients)
        results.append([out_TW.detach(), *gradients])
    assert block.recomputes
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


@pytest.mark.parametrize(("every", "chosen"), [(1, [1, 1, 1, 1]), (2, [0, 1, 0, 1])])
def test_checkpointed_model_computes_chosen_blocks_twice_and_gives_the_same_gradients(
    every: int,
    chosen: list[int],
    make_autoencoder: Callable[..., Autoencoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_autoencoder(encoder_depth=2)
    expected, names = run(model, ROWS[0]), list(model.state_dict())
    checkpoint_blocks(model, every)
    assert list(model.state_dict()) == names

    computed: list[Block] = []
    compute = Block.compute

    def counting(block: Block, *args: object) -> Tensor:
        computed.append(block)
        return compute(block, *args)

    monkeypatch.setattr(Block, "compute", counting)
    assert_same(run(model, ROWS[0]), expected, tolerance=0)
    assert [computed.count(block) - 1 for block in blocks_of(model)] == chosen

    computed.clear()
    with torch.no_grad():
        model(row_of(ROWS[0]))
    assert len(computed) == 4


def test_checkpointed_blocks_keep_nothing_but_their_inputs(make_autoencoder) -> None:
    model = make_autoencoder(encoder_depth=1, encoder_width=24, encoder_heads=3, decoder_depth=6)
    block_input_bytes = 4 * ROW_TOKENS * 24
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def saved_bytes() -> int:
        """Bytes that autograd keeps for the backward pass, each storage once."""
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(row_of(ROWS[0]))
        return sum(
            tensor.untyped_storage().nbytes()
            for pointer, tensor in storages.items()
            if pointer not in parameters
        )

    plain = saved_bytes()
    checkpoint_blocks(model, 2)
    half = saved_bytes()
    checkpoint_blocks(model, 1)
    all_of_them = saved_bytes()
    rest = all_of_them - 7 * block_input_bytes
    assert 0 <= rest < plain / 10
    assert all_of_them < half < plain
    assert plain > 50 * block_input_bytes


def test_checkpointing_refuses_what_is_no_count(make_autoencoder) -> None:
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        checkpoint_blocks(make_autoencoder(), 0)
    with pytest.raises(ValueError, match="checkpoint_every=-1 must be at least 0; 1 checkpoints"):
        ParallelConfig(checkpoint_every=-1)


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_compiled_blocks_compile_once_whatever_images_a_row_holds(
    checkpoint_every: int, make_autoencoder: Callable[..., Autoencoder], traced: None
) -> None:
    model = make_autoencoder(encoder_depth=2)
    expected, names = [run(model, sizes) for sizes in ROWS], list(model.state_dict())
    prepare_blocks(model, ParallelConfig(checkpoint_every=checkpoint_every, compile=True))
    assert list(model.state_dict()) == names

    assert_same(run(model, ROWS[0]), expected[0], tolerance=1e-5)
    compiled = copy.deepcopy(counters)
    assert compiled["stats"]["unique_graphs"] > 0
    for sizes, wanted in zip(ROWS[1:], expected[1:], strict=True):
        assert_same(run(model, sizes), wanted, tolerance=1e-5)
    # Frames too: what holds no operation is compiled to no graph, but takes its time.
    for kind in ("stats", "frames"):
        assert counters[kind] == compiled[kind]


def test_blocks_of_equal_shape_share_what_is_compiled(make_autoencoder, traced) -> None:
    graphs = []
    for depth in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        model = make_autoencoder(decoder_depth=depth)
        compile_blocks(model)
        run(model, ROWS[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_compiled_model_is_copied_whole(make_autoencoder, traced) -> None:
    model = make_autoencoder()
    compile_blocks(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(run(other, ROWS[0]), run(make_autoencoder(), ROWS[0]), tolerance=1e-5)


def test_generated_code_equals_eager(make_autoencoder) -> None:
    model = make_autoencoder(**ONE_WIDTH)
    expected = run(model, ROWS[0])
    prepare_blocks(model, ParallelConfig(checkpoint_every=2, compile=True))
    try:
        assert_same(run(model, ROWS[0]), expected, tolerance=1e-4)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(),
        ParallelConfig(checkpoint_every=1),
        ParallelConfig(checkpoint_every=2, compile=True),
    ],
    ids=["plain", "checkpointed", "checkpointed and compiled"],
)
def test_sharded_blocks_give_the_same_gradients(
    config: ParallelConfig,
    make_autoencoder: Callable[..., Autoencoder],
    mesh: DeviceMesh,
    traced: None,
) -> None:
    model = make_autoencoder(**ONE_WIDTH)
    expected = [run(model, sizes) for sizes in ROWS]
    prepare_blocks(model, config)
    shard_model(model, mesh, torch.float32)
    assert_same(run(model, ROWS[0]), expected[0], tolerance=1e-5)
    compiled = copy.deepcopy(counters)
    assert bool(compiled["frames"]) == config.compile
    for sizes, wanted in zip(ROWS[1:], expected[1:], strict=True):
        assert_same(run(model, sizes), wanted, tolerance=1e-5)
    assert counters["frames"] == compiled["frames"]


def test_model_on_the_meta_device_is_prepared_like_any_other(make_autoencoder, mesh) -> None:
    model = make_autoencoder(decoder_width=48)
    weights = copy.deepcopy(model.state_dict())
    with torch.device("meta"):
        empty = Autoencoder(model.config)
    config = ParallelConfig(checkpoint_every=2, float8=True)
    for one in (model, empty):
        with pretended_h100():
            prepare_blocks(one, config)
        shard_model(one, mesh, torch.bfloat16)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in empty.named_parameters():
            parameter.to_local().copy_(weights[name])
    assert_same(run(empty, ROWS[0]), run(model, ROWS[0]), tolerance=0)


def test_float8_needs_a_device_that_has_it(make_autoencoder, monkeypatch) -> None:
    for convert in (float8_training, float8_inference):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match=r"8\.9 or higher.*has no CUDA device; leave float8"):
            convert(make_autoencoder())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        with pytest.raises(RuntimeError, match=r"has one of compute capability 8\.0; leave float8"):
            convert(make_autoencoder())


def test_float8_needs_torchao(make_autoencoder, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, None)
    for convert in (float8_training, float8_inference):
        with pytest.raises(ImportError, match="pip install torchao"):
            convert(make_autoencoder())


def test_float8_refuses_widths_and_dtypes_it_cannot_multiply(make_autoencoder) -> None:
    narrow = {"encoder_width": 8, "decoder_width": 8, "encoder_heads": 1, "decoder_heads": 1}
    model = make_autoencoder(**narrow)
    with pretended_h100(), pytest.raises(ValueError, match="no Linear in the blocks"):
        float8_training(model)
    sentence = r"torch.float32; call model.to\(torch.bfloat16\) first"
    with pretended_h100(), pytest.raises(ValueError, match=sentence):
        float8_inference(make_autoencoder())


def test_float8_training_replaces_the_linears_in_blocks_and_no_others(make_autoencoder) -> None:
    # The decoder is 24 wide: its matrices have a side that is no multiple of 16.
    model = make_autoencoder(encoder_depth=2)
    names = list(model.state_dict())
    with pretended_h100():
        float8_training(model)
    from torchao.float8.float8_linear import Float8Linear

    replaced = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    linears = ("attn.qkv_proj", "attn.out_proj", "ffn.fc1", "ffn.fc2")
    assert replaced == {f"encoder_blocks.{i}.{linear}" for i in (0, 1) for linear in linears}
    assert list(model.state_dict()) == names


def test_float8_training_gives_nearly_the_gradients_of_bfloat16(
    make_autoencoder, mesh, traced
) -> None:
    results = []
    for config in (
        ParallelConfig(),
        ParallelConfig(float8=True),
        ParallelConfig(float8=True, checkpoint_every=1, compile=True),
    ):
        model = make_autoencoder(**ONE_WIDTH)
        with pretended_h100():
            prepare_blocks(model, config)
        shard_model(model, mesh, torch.bfloat16)
        results.append(run(model, ROWS[0]))
    expected, actual, prepared = results
    assert_same(actual, expected, tolerance=0.3)
    with pytest.raises(AssertionError, match="is off by"):
        assert_same(actual, expected, tolerance=0.01)
    assert_same(prepared, actual, tolerance=0.05)


def test_float8_inference_converts_the_linears_in_blocks_and_stays_close(make_autoencoder) -> None:
    model = make_autoencoder(encoder_width=32, decoder_width=48).bfloat16().eval()
    row = row_of(ROWS[0])
    with torch.no_grad():
        expected = model(row).pixels.tokens
        with pretended_h100():
            float8_inference(model)
        actual = model(row).pixels.tokens
    from torchao.quantization import Float8Tensor

    converted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, Float8Tensor)
    }
    assert converted == {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "_blocks." in name
    }
    difference = (actual - expected).norm() / expected.norm()
    assert 0 < difference < 0.2


def test_float8_asks_for_its_package_and_for_rows_it_can_multiply(monkeypatch) -> None:
    with pytest.raises(ValueError, match="row_tokens=1000 to be a multiple of 16"):
        require_float8(1000)
    require_float8(1008)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        require_float8(1008)
