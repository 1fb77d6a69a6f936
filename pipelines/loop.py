"""fit(): the training loop of every training, as each Ray Train worker runs it."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pipelines.checkpoints import Checkpoints
from pipelines.failures import Diverged, Unrecoverable
from pipelines.ingest import object_store_bytes
from pipelines.meter import Meter, process_metrics
from pipelines.packed_rows import PackedRow, StepRows, iterate_steps
from pipelines.plan import Plan
from pipelines.runs import RunConfig
from pipelines.tracking import Tracker
from vitok.checkpoint import TrainState
from vitok.ema import Ema
from vitok.flops import peak_flops
from vitok.optim import OptimConfig, Optimizers, build_optimizer, learning_rate
from vitok.parallel import prepare_blocks, shard_model

logger = logging.getLogger(__name__)

# So many samples may be unreadable before the fraction is judged; it says little of a short run.
_UNREADABLE_GRACE = 1000


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation on held-out data found; complete on rank 0."""

    metrics: dict[str, float]
    images: dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Recipe:
    """What a training gives to the loop.

    Attributes:
        step: forward pass of one packed row; returns scalar sums over its images, "loss" and its
            terms.
        flops: operations of a forward and a backward pass over a row's real tokens.
        initialize: sets the sharded model to its first weights; called by every rank.
        evaluate: judges the model; called by every rank at the same step.
        story: JSON types, kept in every checkpoint: the config, the MLflow run.
    """

    step: Callable[[nn.Module, PackedRow, torch.device], dict[str, Tensor]]
    flops: Callable[[PackedRow], float]
    initialize: Callable[[Any], None]
    evaluate: Callable[[nn.Module, torch.device], Evaluation] | None = None
    story: dict[str, Any] = field(default_factory=dict)


def fit(
    model: nn.Module,
    recipe: Recipe,
    *,
    plan: Plan,
    optim: OptimConfig,
    run: RunConfig,
    tracker: Tracker | None,
    board: Any,
) -> None:
    """Train a model through the plan; called in every Ray Train worker.

    Continues from the run's newest checkpoint. The gradient of a step is that of the mean loss
    over all its images, however they are packed and on however many workers.

    Nothing waits for the device but log steps, evaluations and checkpoints. A step whose gradient
    is not finite leaves the weights as they are, and the next of these names it.

    Args:
        model: on the meta device; sharded here before it takes any memory.
        tracker: on rank 0 alone.
        board: the driver's ProgressBoard.

    Raises:
        Diverged: a gradient was not finite, and the optimizer has not moved.
        Unrecoverable: too many samples were unreadable; the corpus has changed.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    prepare_blocks(model, run.parallel)
    shard_model(
        model,
        init_device_mesh(device.type, (world_size,)),
        getattr(torch, run.compute_dtype),
    )
    model.to_empty(device=device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        recipe.initialize(model)
    optimizer = build_optimizer(model, optim)
    ema = Ema(model, optim.ema_decay) if optim.ema_decay else None
    state = TrainState(model, optimizer, ema)
    checkpoints = Checkpoints(run.folder, state, plan, recipe.story)
    progress = checkpoints.load(checkpoint)
    first_step = progress["cursor"]["step"]
    # What a killed attempt logged after its last checkpoint is not logged twice.
    logged = tracker.last_step("loss") if tracker else -1
    total_images = plan.images_before(plan.num_steps)
    meter = Meter(plan.data.row_tokens * world_size, _peak_of_all(device) if run.mfu else 0.0)
    ledger: list[Outcome] = []
    status = ""
    preempted = False

    for batch in _timed(_steps(first_step), meter):
        step, done = batch.step, batch.step + 1
        last = done == plan.num_steps
        logs = last or done % run.log_every == 0
        evaluates = recipe.evaluate is not None and (last or done % run.evaluate_every == 0)
        saves = last or done % run.checkpoint_every == 0
        settles = logs or evaluates or saves
        # A driver that was told to leave says so on its board; all workers learn it together.
        leaves = settles and rank == 0 and ray.get(board.is_leaving.remote())
        for group in optimizer.param_groups:
            seen = (plan.images_before(step) + plan.images_before(done)) / 2
            group["lr"] = learning_rate(optim, seen / total_images)
        ledger.append(train_step(model, optimizer, recipe, batch, optim.clip_norm, device, leaves))
        if ema is not None:
            ema.update(model)
        _report_unreadable(batch.rows, board)
        if rank == 0:
            board.update.remote(done, status)
        if not settles:
            continue

        settled = settle(ledger)
        ledger.clear()
        totals = {name: sum(s.totals[name] for s in settled) for name in _TOTALS}
        progress["cursor"] = plan.cursor(done)
        progress["skipped"] += int(totals["skipped"])
        progress["store_retries"] += int(totals["store_retries"])
        _check_unreadable(progress["skipped"], plan, done, batch.rows)
        meter.add(
            totals["images"], totals["tokens"], totals["flops"], sum(s.num_passes for s in settled)
        )
        metrics = dict(settled[-1].losses)
        status = f"loss {metrics['loss']:.4f}"
        images: dict[str, NDArray[np.uint8]] = {}
        if logs:
            metrics |= meter.flush() | process_metrics(device)
            metrics |= {
                "grad_norm": settled[-1].grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                **{
                    f"epoch_{name}" if name else "epoch": used
                    for name, used in plan.corpus.epochs(plan.images_before(done)).items()
                },
                "skipped_samples": float(progress["skipped"]),
                "store_retries": float(progress["store_retries"]),
            }
            if rank == 0:
                metrics["object_store_gb"] = object_store_bytes() / 1e9
        if recipe.evaluate is not None and evaluates:
            with ema.applied_to(model) if ema is not None else nullcontext():
                evaluation = recipe.evaluate(model, device)
            metrics |= evaluation.metrics
            images = evaluation.images
        if tracker:
            for earlier in settled[:-1]:
                if earlier.step + 1 > logged:
                    tracker.log_metrics(earlier.losses, earlier.step + 1)
            if done > logged:
                for name, image in images.items():
                    tracker.log_image(image, name, done)
                # One call for all of a step's metrics: a kill leaves all or none of them.
                tracker.log_metrics(metrics, done)
        # A node that is about to go: save at once, and train on until Ray Train restarts the group.
        leaves = totals["leaves"] > 0
        warned = ray.train.get_preemption_info() is not None
        if saves or leaves or (warned and not preempted):
            if tracker:  # what comes before a checkpoint is never computed again
                tracker.flush()
            checkpoints.save(progress, metrics, done, wait=last or leaves or warned)
        preempted = warned
        meter.restart()
        if rank == 0:
            board.update.remote(done, status)
        if leaves:
            return


# What all workers together did in a step, in the order in which it is summed.
_TOTALS = ("images", "tokens", "flops", "skipped", "store_retries", "leaves")


@dataclass(frozen=True)
class Outcome:
    """What came of a step, still on the device.

    Attributes:
        values: float64 [1 + len(_TOTALS) + len(names)]: gradient norm, totals, sums of the losses.
        names: of the losses.
        row_losses, row_keys: of this worker's rows.
    """

    step: int
    values: Tensor
    names: tuple[str, ...]
    row_losses: list[Tensor]
    row_keys: list[list[str]]


@dataclass(frozen=True)
class Settled:
    """What came of a step, over all workers. Losses are means over its images."""

    step: int
    grad_norm: float
    totals: dict[str, float]
    losses: dict[str, float]
    num_passes: int


def train_step(
    model: nn.Module,
    optimizer: Optimizers,
    recipe: Recipe,
    batch: StepRows,
    clip_norm: float,
    device: torch.device,
    leaves: bool,
) -> Outcome:
    """Run forward and backward over this worker's rows, and move the weights; waits for nothing."""
    rows = _copied_to(batch.rows, device)
    row_losses: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for index, row in enumerate(rows):
        # Gradients are reduced once a step, with the last row's backward pass.
        model.set_requires_gradient_sync(index == len(rows) - 1)  # type: ignore[operator]
        terms = recipe.step(model, row, device)
        terms["loss"].backward()
        row_losses.append(terms["loss"].detach())
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    mine = [
        float(sum(len(row.keys) for row in rows)),
        float(sum(row.num_tokens for row in rows)),
        sum(recipe.flops(row) for row in rows),
        float(sum(len(row.skipped) for row in rows)),
        float(sum(batch.retries.values())),
        float(leaves),
    ]
    totals = torch.tensor(mine, dtype=torch.float64).to(device, non_blocking=True)
    summed = torch.cat([totals, torch.stack(list(sums.values()))])
    dist.all_reduce(summed)
    num_images = summed[_TOTALS.index("images")].clamp(min=1)
    norm = _scale_and_clip(model, dist.get_world_size() / num_images, clip_norm)
    optimizer.step(skip=~torch.isfinite(norm))
    optimizer.zero_grad()
    return Outcome(
        step=batch.step,
        values=torch.cat([norm.double()[None], summed]),
        names=tuple(sums),
        row_losses=row_losses,
        row_keys=[row.keys for row in rows],
    )


def _copied_to(rows: list[PackedRow], device: torch.device) -> list[PackedRow]:
    """Return rows with tokens and texts on the device, copied while it computes what was before."""
    if device.type != "cuda":
        return rows
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)

    def copy(values: Any) -> torch.Tensor:
        with torch.cuda.stream(stream):
            copied = torch.as_tensor(values).pin_memory().to(device, non_blocking=True)
        copied.record_stream(current)
        return copied

    copied = [
        replace(
            row,
            tokens=copy(row.tokens),
            texts=row.texts and replace(row.texts, values=copy(row.texts.values)),
        )
        for row in rows
    ]
    current.wait_stream(stream)
    return copied


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _scale_and_clip(model: nn.Module, scale: Tensor, clip_norm: float) -> Tensor:
    """Scale the gradients, clip their global norm, and return that norm from before the clip."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm) * scale
    factor = scale * (clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return norm


def settle(ledger: list[Outcome]) -> list[Settled]:
    """Wait for the steps of the ledger, and return what came of them.

    Raises:
        Diverged: a gradient was not finite.
    """
    settled = []
    rows = torch.stack([outcome.values for outcome in ledger]).tolist()
    for outcome, (grad_norm, *values) in zip(ledger, rows, strict=True):
        if not math.isfinite(grad_norm):
            raise Diverged(
                f"step {outcome.step}: the gradient's norm is {grad_norm}; the optimizer has not "
                f"moved. {_describe_suspects(outcome)}"
            )
        summed = dict(zip(_TOTALS + outcome.names, values, strict=True))
        num_images = max(1.0, summed["images"])
        losses = {name: summed[name] / num_images for name in outcome.names}
        totals = {name: summed[name] for name in _TOTALS}
        settled.append(Settled(outcome.step, grad_norm, totals, losses, len(outcome.row_losses)))
    return settled


def _describe_suspects(outcome: Outcome) -> str:
    """Name the samples of the rows, on all ranks, whose loss is not finite."""
    mine = [
        key
        for keys, loss in zip(outcome.row_keys, outcome.row_losses, strict=True)
        if not math.isfinite(loss.item())
        for key in keys
    ]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    suspects = [key for keys in gathered for key in keys]
    if not suspects:
        return "Every row's loss is finite; lower the learning rate"
    return f"Rows with a loss that is not finite hold {', '.join(suspects[:50])}"


def _steps(first_step: int) -> Iterator[StepRows]:
    records = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=None, batch_format="numpy", prefetch_batches=1
    )
    yield from iterate_steps(records, first_step)


def _timed(steps: Iterator[StepRows], meter: Meter) -> Iterator[StepRows]:
    start = time.perf_counter()
    for index, step in enumerate(steps):
        if index == 0:
            meter.restart()  # the pipeline fills up once
        else:
            meter.waited(time.perf_counter() - start)
        yield step
        start = time.perf_counter()


def _report_unreadable(rows: list[PackedRow], board: Any) -> None:
    for row in rows:
        for shard, key, reason in row.skipped:
            logger.warning("skipped unreadable sample %s of %s: %s", key, shard, reason)
            board.message.remote(f"skipped unreadable sample {key} of {shard}: {reason}")


def _check_unreadable(num_skipped: int, plan: Plan, done: int, rows: list[PackedRow]) -> None:
    seen = max(plan.images_before(done), _UNREADABLE_GRACE)
    if num_skipped > plan.data.max_unreadable * seen:
        lost = [f"{shard} {key}: {reason}" for row in rows for shard, key, reason in row.skipped]
        raise Unrecoverable(
            f"{num_skipped} of {plan.images_before(done)} samples were unreadable, more than "
            f"data.max_unreadable={plan.data.max_unreadable} allows; repair the shards or raise "
            f"it. The last ones: {'; '.join(lost[:20]) or 'on other workers'}"
        )


def _peak_of_all(device: torch.device) -> float:
    """Return the peak of all workers' devices together, measured at the same time if measured."""
    dist.barrier()
    peak = torch.tensor(peak_flops(device).flops_per_s, dtype=torch.float64, device=device)
    dist.all_reduce(peak)
    return peak.item()
