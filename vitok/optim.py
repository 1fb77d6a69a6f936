"""AdamW and Muon with parameter groups, and the learning-rate schedule over the images of a run."""

from collections.abc import Iterator, Sequence
from math import cos, pi
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from vitok.config import config, require_choice
from vitok.transformer import TransformerBlock

Algorithm = Literal["adamw", "muon"]

# Muon as in "Muon is Scalable for LLM Training" (arXiv:2502.16982): with this RMS of an update,
# which is about AdamW's, Muon takes AdamW's learning rate and weight decay.
_UPDATE_RMS = 0.2
_MOMENTUM = 0.95
# The quintic of https://kellerjordan.github.io/posts/muon: singular values end near 1, not at it.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
# Linears of a block that hold matrices one above the other, each with a task of its own: q, k and
# v; k and v of cross-attention; value and gate.
_STACKED = {"qkv_proj": 3, "kv_proj": 2, "fc1": 2}


@config
class OptimConfig:
    """The optimizer, warm-up and cosine; the defaults are those of arXiv 2605.05331.

    Attributes:
        algorithm: "adamw", or "muon" for the matrices of the blocks and AdamW for all else.
        lr: peak learning rate, of both.
        betas: decay of AdamW's first and second moment.
        weight_decay: of matrices alone; norms, biases and gains have none.
        clip_norm: the gradient's global norm is clipped to this.
        warmup: fraction of the run's images over which the rate rises from 0.
        final_lr: the cosine ends at this fraction of the peak.
        ema_decay: share that a moving average of the weights keeps at a step; the average is what
            is evaluated and exported. 0 keeps none.
    """

    algorithm: Algorithm = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup: float = 0.01
    final_lr: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        require_choice("algorithm", self.algorithm, Algorithm)
        if self.lr <= 0 or self.clip_norm <= 0:
            raise ValueError(f"lr={self.lr} and clip_norm={self.clip_norm} must be positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a fraction of the run, from 0 to below 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and below 1")


class Optimizers:
    """Optimizers of different parameters that step as one.

    Iterates over them, which is the form in which `get_state_dict` and `set_state_dict` of
    torch.distributed.checkpoint take several.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self._optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers; each has its "lr"."""
        return [group for optimizer in self for group in optimizer.param_groups]

    def step(self, skip: Tensor | None = None) -> None:
        """Let every optimizer move its parameters.

        Args:
            skip: bool [], on their device; if true nothing moves. The host does not wait for it.
        """
        for optimizer in self:
            # Where torch's gradient scaler says the same to the optimizers that can be told so.
            optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self:
            optimizer.zero_grad()


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Return the optimizer of the parameters that train, with weight decay on matrices alone.

    Raises:
        ValueError: Muon is asked for, and no matrix of a block trains.
    """
    stacks = _block_matrices(model) if config.algorithm == "muon" else {}
    of_muon = {id(p) for matrices in stacks.values() for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in of_muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        # With several optimizers a checkpoint cannot hold a group without parameters.
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )
    if config.algorithm == "adamw":
        return Optimizers(adamw)
    if not stacks:
        raise ValueError(
            "algorithm='muon' is for the matrices of the blocks, but none of this model trains; "
            "choose algorithm='adamw'"
        )
    return Optimizers(Muon(stacks, lr=config.lr, weight_decay=config.weight_decay), adamw)


def learning_rate(config: OptimConfig, progress: float) -> float:
    """Return the learning rate after a fraction `progress` of the run's images: linear, cosine."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    done = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    cosine = 0.5 * (1 + cos(pi * done))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def _block_matrices(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Return the matrices of the blocks that train, by how many are stacked in a parameter."""
    stacks: dict[int, list[nn.Parameter]] = {}
    for block in model.modules():
        if not isinstance(block, TransformerBlock):
            continue
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                layer = name.split(".")[-2]
                stacks.setdefault(_STACKED.get(layer, 1), []).append(parameter)
    return stacks


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal: torch.optim.Muon for parameters that FSDP2 has sharded.

    An update needs whole matrices. As many parameters as there are ranks are stepped together:
    every rank gathers one of them, makes it orthogonal alone, and gives the others their rows back.
    A step sends every shard away and back in bfloat16, which with n ranks is an n-th of what FSDP2
    gathers for the two passes, and a rank holds one whole parameter at a time. The momentum stays
    sharded.

    Args:
        stacks: parameters [n * rows, columns] by the number n of matrices that are stacked in them;
            each of these is made orthogonal, and scaled, alone.
        lr, weight_decay: those of AdamW.
    """

    def __init__(
        self, stacks: dict[int, list[nn.Parameter]], *, lr: float, weight_decay: float
    ) -> None:
        groups = [
            {"params": matrices, "num_stacked": num_stacked}
            for num_stacked, matrices in stacks.items()
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; called by all ranks of its mesh.

        Nothing moves where found_inf, set from outside as for torch's own optimizers, is 1.
        """
        assert closure is None
        skip = getattr(self, "found_inf", None)
        work = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        # Neighbours in this order cost their owners about the same.
        work.sort(key=lambda item: item[0].numel(), reverse=True)
        ranks = _ranks_of([p for p, _ in work])
        together = dist.get_world_size(ranks) if ranks else 1
        for start in range(0, len(work), together):
            self._step_together(work[start : start + together], ranks, skip)

    def _step_together(
        self,
        work: list[tuple[nn.Parameter, dict[str, Any]]],
        ranks: dist.ProcessGroup | None,
        skip: Tensor | None,
    ) -> None:
        for p, _ in work:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [_local(p.grad) for p, _ in work]
        momenta = [_local(self.state[p]["momentum"]) for p, _ in work]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, _MOMENTUM)
        stacks = [group["num_stacked"] for _, group in work]
        shapes = [(n, p.shape[0] // n, p.shape[1]) for n, (p, _) in zip(stacks, work, strict=True)]
        if ranks is None:
            updates = [orthogonalize(x.view(s)) for x, s in zip(nesterov, shapes, strict=True)]
        else:
            updates = _orthogonalize_shards(nesterov, shapes, ranks)
        for (p, group), update, shape in zip(work, updates, shapes, strict=True):
            weight, lr = _local(p), group["lr"]
            # The RMS of an orthogonal matrix is 1 / sqrt(its longer side).
            scale = _UPDATE_RMS * max(shape[1:]) ** 0.5
            change = scale * update.reshape(weight.shape) + group["weight_decay"] * weight
            if skip is not None:
                change = change.masked_fill(skip.bool(), 0.0)
            weight.add_(change, alpha=-lr)


def orthogonalize(stack: Tensor) -> Tensor:
    """Bring the singular values of matrices [n, rows, columns] close to 1, by Newton-Schulz.

    Five iterations in bfloat16 are rough, and enough for Muon.

    Returns:
        [n, rows, columns] bfloat16.
    """
    a, b, c = _QUINTIC
    x = stack.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def _orthogonalize_shards(
    shards: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]], ranks: dist.ProcessGroup
) -> list[Tensor]:
    """Orthogonalize up to as many parameters as there are ranks; rank i does the i-th.

    Args:
        shards: this rank's rows of each parameter.
        shapes: (stacked, rows, columns) of each whole parameter.

    Returns:
        this rank's rows of each result, flat, in bfloat16.
    """
    rank, num_ranks = dist.get_rank(ranks), dist.get_world_size(ranks)
    lengths = [shard.numel() for shard in shards]
    mine = lengths + [0] * (num_ranks - len(lengths))
    theirs = [0] * num_ranks
    if rank < len(shapes):
        num_stacked, rows, columns = shapes[rank]
        # Rows are cut as torch.chunk cuts them.
        most = -(-num_stacked * rows // num_ranks)
        theirs = [
            max(0, min(most, num_stacked * rows - most * other)) * columns
            for other in range(num_ranks)
        ]
    # The iteration would round to bfloat16 anyway.
    sent = torch.cat([shard.bfloat16().flatten() for shard in shards])
    whole = sent.new_empty(sum(theirs))
    dist.all_to_all_single(whole, sent, theirs, mine, group=ranks)
    if rank < len(shapes):
        whole = orthogonalize(whole.view(shapes[rank])).flatten()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, whole, mine, theirs, group=ranks)
    return list(received.split(lengths))


def _ranks_of(parameters: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """Return the ranks over which the rows of parameters are sharded; None if they are whole."""
    layouts = {
        (p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in parameters
    }
    assert len(layouts) <= 1, f"parameters are sharded in different ways: {layouts}"
    layout = next(iter(layouts), None)
    if layout is None:
        return None
    mesh, placements = layout
    assert placements == (Shard(0),), f"Muon knows rows sharded over one mesh, not {placements}"
    return mesh.get_group()


def _local(tensor: Tensor | None) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
