"""Sharding of a model over the ranks of a process group."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vitok.transformer import Block


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
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
