"""What makes the training of a large model fit and fast: done to its blocks, in place.

The order is float8, checkpointing, compilation, sharding: `prepare_blocks`, then `shard_model`.
float8 replaces layers, so it comes before anything holds on to them; what is compiled lies inside
what is checkpointed, so that a block's second run is compiled too; FSDP gathers the weights of a
block around both. Parameters keep their names, and the model may be on the meta device.
"""

import importlib.util
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vitok.config import config
from vitok.transformer import TransformerBlock

FLOAT8_CAPABILITY = (8, 9)
_NO_TORCHAO = "float8 needs torchao; `pip install torchao`, or leave float8 off"
# Graphs of one torch.compile: encoder and decoder width, with gradients and without, a first row
# length and then any; twice that leaves room for a frozen encoder and another compute dtype.
_RECOMPILE_LIMIT = 16


@config
class ParallelConfig:
    """How the blocks of a model are computed; none of it changes a parameter or its name.

    Attributes:
        checkpoint_every: every n-th block recomputes its activations; 1 saves the most memory for
            about a third more time, 0 none.
        compile: compile the blocks.
        float8: compute the blocks' matrix products in float8; needs compute capability 8.9.
    """

    checkpoint_every: int = 0
    compile: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint_every < 0:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} must be at least 0; "
                "1 checkpoints every block, 0 none"
            )


def prepare_blocks(model: nn.Module, config: ParallelConfig) -> None:
    """Apply float8, checkpointing and compilation to the blocks, in this order.

    Raises:
        ImportError, RuntimeError, ValueError: float8 cannot be had; see `float8_training`.
    """
    if config.float8:
        float8_training(model)
    if config.checkpoint_every:
        checkpoint_blocks(model, config.checkpoint_every)
    if config.compile:
        compile_blocks(model)


def require_float8(row_tokens: int) -> None:
    """Check what float8 training needs that can be known without its devices.

    Raises:
        ImportError: torchao is not installed.
        ValueError: rows are no multiple of 16 tokens, which the products of the backward pass sum
            over.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(_NO_TORCHAO)
    if row_tokens % 16:
        raise ValueError(f"float8 needs {row_tokens=} to be a multiple of 16; change one of them")


def float8_training(model: nn.Module) -> None:
    """Let the Linears in the blocks multiply in float8, forward and backward; scaled by rows.

    Weights and gradients keep their dtype. The first and the last layers of the model, around
    patches and latents, stay as they are, and so do Linears with a side that is no multiple of 16.
    A row must hold a multiple of 16 tokens. Worth its casts only in compiled blocks.

    Raises:
        RuntimeError: no CUDA device of compute capability 8.9 or higher.
        ImportError: torchao is not installed.
        ValueError: no Linear in the blocks has sides that are multiples of 16.
    """
    _require_float8_device()
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError(_NO_TORCHAO) from error
    convert_to_float8_training(
        model,
        module_filter_fn=_filter_float8_linears(model),
        config=Float8LinearConfig.from_recipe_name("rowwise"),
    )


def float8_inference(model: nn.Module) -> None:
    """Store the Linears in the blocks in float8, and multiply in it; scaled by rows.

    Activations are scaled as they come. The weights become tensors that neither train nor load
    another state dict: load first, then convert. The choice of layers is that of
    `float8_training`.

    Raises:
        RuntimeError: no CUDA device of compute capability 8.9 or higher.
        ImportError: torchao is not installed.
        ValueError: the blocks are not bfloat16, or no Linear has sides that are multiples of 16.
    """
    _require_float8_device()
    try:
        from torchao import quantization
    except ImportError as error:
        raise ImportError(_NO_TORCHAO) from error
    for block in _blocks(model):
        for name, parameter in block.named_parameters():
            if parameter.dtype != torch.bfloat16:
                raise ValueError(
                    f"float8 weights are made from bfloat16, but {name} of a block is "
                    f"{parameter.dtype}; call model.to(torch.bfloat16) first"
                )
    quantization.quantize_(
        model,
        quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(),
            # Padding comes out of attention as zeros; a scale of 0 would make it NaN.
            activation_value_lb=1e-12,
        ),
        filter_fn=_filter_float8_linears(model),
    )


def checkpoint_blocks(model: nn.Module, every: int) -> None:
    """Let every n-th block recompute its activations in the backward pass; 1: all blocks.

    Such a block keeps no more than its input between the passes. Without gradients nothing changes.

    Raises:
        ValueError: `every` is less than 1.
    """
    if every < 1:
        raise ValueError(f"{every=} must be at least 1, which checkpoints all blocks")
    for count, block in enumerate(_blocks(model), start=1):
        block.recomputes = count % every == 0


def compile_blocks(model: nn.Module) -> None:
    """Compile the inside of a block once for all blocks of equal shape, when they first run.

    Attention, with the lengths of the images, stays outside on CPUs, so rows of one length T run
    without compiling anything again whatever images they hold; a second T compiles once more, for
    any T. Without gradients a compiled block takes all tokens at once: for very large images on
    little memory leave blocks uncompiled.
    """
    compiled: dict[type[TransformerBlock], Callable[..., Tensor]] = {}
    for block in _blocks(model):
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(  # type: ignore[call-overload]  # lacks recompile_limit
                kind.compute, recompile_limit=_RECOMPILE_LIMIT
            )
        block.compiled = compiled[kind]


def shard_model(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Apply FSDP2 in place: every block, then the root.

    Master weights and gradient reductions stay float32; forward and backward run in
    compute_dtype. Gradients are averaged over the ranks.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # The layers cast for themselves; the RoPE table among a block's arguments stays float32.
        cast_forward_inputs=False,
    )
    blocks = [fully_shard(block, mesh=mesh, mp_policy=policy) for block in _blocks(model)]
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # While a block computes, the weights of the next one are gathered; without being told, FSDP2
    # does so in the backward pass alone.
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])


def _blocks(model: nn.Module) -> list[TransformerBlock]:
    return [module for module in model.modules() if isinstance(module, TransformerBlock)]


def _require_float8_device() -> None:
    found = "no CUDA device"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= FLOAT8_CAPABILITY:
            return
        found = f"one of compute capability {'.'.join(map(str, capability))}"
    raise RuntimeError(
        f"float8 needs a CUDA device of compute capability "
        f"{'.'.join(map(str, FLOAT8_CAPABILITY))} or higher, but this machine has {found}; "
        "leave float8 off"
    )


def _filter_float8_linears(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """Return the test by which torchao chooses modules."""
    linears = {
        module
        for block in _blocks(model)
        for module in block.modules()
        if isinstance(module, nn.Linear)
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    }
    if not linears:
        raise ValueError(
            "no Linear in the blocks has sides that are multiples of 16, as float8 needs them; "
            "choose other widths, or leave float8 off"
        )
    return lambda module, _name: module in linears
