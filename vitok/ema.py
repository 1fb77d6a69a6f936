"""An exponential moving average of the weights, sharded as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Ema:
    """The moving average of the weights that train, in float32.

    Begins at the weights as they are. `state_dict` and `load_state_dict` are what
    torch.distributed.checkpoint asks for, which reshards as for the weights:
    `dcp.save({"ema": ema})`.

    Args:
        model: with its first weights, and sharded already if it is going to be.
        decay: share of the average that an update keeps.
        warmup: keep no more than (1 + n) / (10 + n) at the n-th update, so that the first weights
            are soon forgotten.

    Raises:
        ValueError: the decay is not in [0, 1), or a weight is not float32: in half precision an
            average would not move.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"{decay=} must be at least 0 and less than 1")
        self._decay = decay
        self._warmup = warmup
        self._is_applied = False
        self.begin(model)

    def begin(self, model: nn.Module) -> None:
        """Begin anew, at the weights as they are."""
        _reshard(model)
        self._average: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {parameter.dtype}, but an average is of float32 weights; keep the "
                    "weights in float32 and compute in half precision (vitok.parallel.shard_model)"
                )
            self._average[name] = parameter.detach().clone()
        # On the host, where reading it waits for nothing.
        self._num_updates = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights; called after every step of the optimizer."""
        assert not self._is_applied, "the model holds the average"
        num_updates = int(self._num_updates)
        decay = self._decay
        if self._warmup:
            decay = min(decay, (1 + num_updates) / (10 + num_updates))
        averages, weights = self._pairs(model)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self._num_updates += 1

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model compute with the average; called by every rank.

        Weights and average change places, one tensor at a time, and come back bit for bit. The
        weights must not be trained meanwhile.
        """
        assert not self._is_applied, "the model holds the average already"
        self._exchange(model)
        self._is_applied = True
        try:
            yield
        finally:
            self._exchange(model)
            self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by the names of the parameters, and the number of updates."""
        assert not self._is_applied, "the model holds the average"
        return {"average": self._average, "num_updates": self._num_updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; what dcp.load has read in place is there already."""
        if state["average"].keys() != self._average.keys():
            names = sorted(state["average"].keys() ^ self._average.keys())
            raise ValueError(
                f"the state averages other weights than this model trains ({', '.join(names[:3])})"
                "; use the model it was made of"
            )
        for name, average in self._average.items():
            average.copy_(state["average"][name])
        self._num_updates.copy_(state["num_updates"])

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return what this rank holds of the averages and of the weights."""
        _reshard(model)
        weights = dict(model.named_parameters())
        return (
            [_local(average) for average in self._average.values()],
            [_local(weights[name]) for name in self._average],
        )

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        # FSDP2 gathers from the memory of the shards, so it is the values that change places.
        for average, weight in zip(*self._pairs(model), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _reshard(model: nn.Module) -> None:
    """Drop gathered weights: after a forward pass without gradients FSDP2 keeps the root's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
