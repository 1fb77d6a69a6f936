"""fit(): the training loop of every training, as each Ray Train worker runs it."""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pipelines import ingest
from pipelines.plan import Plan
from pipelines.runs import RunConfig
from pipelines.tracking import Tracker
from vitok.checkpoint import TrainState
from vitok.optim import OptimConfig, build_optimizer, learning_rate
from vitok.parallel import prepare_blocks, shard_model

logger = logging.getLogger(__name__)

# So many samples may be unreadable before the fraction is judged; it says little of a short run.
_UNREADABLE_GRACE = 1000


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation on held-out data found; complete on rank 0."""

    metrics: dict[str, float]
    images: dict[str, NDArray[np.uint8]]


# Forward pass of one packed row. Returns scalar sums over its images: "loss" and its terms.
StepFn = Callable[[nn.Module, ingest.PackedRow, torch.device], dict[str, Tensor]]
# Judges the model; called by every rank at the same step.
EvaluateFn = Callable[[nn.Module, torch.device], Evaluation]


def fit(
    model: nn.Module,
    step_fn: StepFn,
    *,
    initialize: Callable[[Any], None],
    plan: Plan,
    optim: OptimConfig,
    run: RunConfig,
    tracker: Tracker | None,
    board: Any,
    evaluate: EvaluateFn | None = None,
) -> None:
    """Train a model through the plan; called in every Ray Train worker.

    Continues from the run's newest checkpoint. The gradient of a step is that of the mean loss
    over all its images, however they are packed and on however many workers.

    Args:
        model: on the meta device; sharded here before it takes any memory.
        initialize: sets the sharded model to its first weights; called by every rank.
        tracker: on rank 0 alone.
        board: the driver's ProgressBoard.

    Raises:
        FloatingPointError: a gradient is not finite; the optimizer has not moved.
        RuntimeError: too many samples were unreadable.
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
    optimizer = build_optimizer(model, optim)
    state = TrainState(model, optimizer)
    progress = {"cursor": plan.cursor(0), "skipped": 0, "corpus": plan.corpus.digest}
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        initialize(model)
    else:
        with checkpoint.as_directory() as folder:
            progress = state.load(Path(folder))
        if progress["corpus"] != plan.corpus.digest:
            raise ValueError(
                f"{plan.corpus.location} has changed since the run's last checkpoint, and with it "
                "the order of samples; restore the manifests, or choose another run.name"
            )
    first_step = progress["cursor"]["step"]
    # What a killed attempt logged after its last checkpoint is not logged twice.
    logged = tracker.last_step("loss") if tracker else -1
    total_images = plan.images_before(plan.num_steps)
    meter = Meter(plan.data.row_tokens * world_size)

    for batch in _timed(_steps(first_step), meter):
        step = batch.step
        done = step + 1
        for group in optimizer.param_groups:
            seen = (plan.images_before(step) + plan.images_before(done)) / 2
            group["lr"] = learning_rate(optim, seen / total_images)
        sums, totals, row_losses = _accumulate(model, step_fn, batch.rows, device)
        num_images, num_tokens, num_skipped = (int(total) for total in totals)
        progress |= {
            "cursor": plan.cursor(done),
            "skipped": progress["skipped"] + num_skipped,
        }
        _report_unreadable(batch.rows, board)
        _check_unreadable(progress["skipped"], plan, done, batch.rows)
        grad_norm = _scale_and_clip(model, world_size / max(1, num_images), optim.clip_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"step {step}: the gradient's norm is {grad_norm}; the optimizer has not moved. "
                f"{_describe_suspects(batch.rows, row_losses)}"
            )
        optimizer.step()
        optimizer.zero_grad()

        meter.add(num_images, num_tokens, len(batch.rows))
        last = done == plan.num_steps
        metrics = {name: value / max(1, num_images) for name, value in sums.items()}
        logs = last or done % run.log_every == 0
        evaluates = evaluate is not None and (last or done % run.evaluate_every == 0)
        images: dict[str, NDArray[np.uint8]] = {}
        if logs:
            metrics |= meter.flush() | {
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                **{
                    f"epoch_{name}" if name else "epoch": used
                    for name, used in plan.corpus.epochs(plan.images_before(done)).items()
                },
                "skipped_samples": float(progress["skipped"]),
            }
        if evaluates:
            evaluation = evaluate(model, device)
            metrics |= evaluation.metrics
            images = evaluation.images
            meter.restart()
        if tracker and (logs or evaluates) and done > logged:
            for name, image in images.items():
                tracker.log_image(image, name, done)
            # One call for all of a step's metrics: a kill leaves all or none of them.
            tracker.log_metrics(metrics, done)
        if done % run.checkpoint_every == 0 or last:
            _save_checkpoint(state, progress, metrics, done)
            meter.restart()
        if rank == 0:
            board.update.remote(done, f"loss {metrics['loss']:.4f}")


class Meter:
    """Rates between two log steps. Waiting for data counts, evaluation and checkpoints do not.

    Args:
        tokens_per_pass: tokens, with padding, of one forward pass on all workers.
    """

    def __init__(self, tokens_per_pass: int) -> None:
        self._tokens_per_pass = tokens_per_pass
        self._images = self._tokens = self._capacity = 0
        self._elapsed_s = self._waited_s = 0.0
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._mark = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Count time in which this worker had no data."""
        self._waited_s += seconds

    def add(self, num_images: int, num_tokens: int, num_passes: int) -> None:
        """Count one global step, ending now."""
        now = time.perf_counter()
        self._elapsed_s += now - self._mark
        self._mark = now
        self._images += num_images
        self._tokens += num_tokens
        self._capacity += num_passes * self._tokens_per_pass

    def flush(self) -> dict[str, float]:
        """Return the rates since the last flush, and start anew."""
        seconds = max(self._elapsed_s, 1e-9)
        rates = {
            "images_per_s": self._images / seconds,
            "tokens_per_s": self._tokens / seconds,
            "token_utilisation": self._tokens / max(1, self._capacity),
            "data_wait": min(1.0, self._waited_s / seconds),
        }
        self._images = self._tokens = self._capacity = 0
        self._elapsed_s = self._waited_s = 0.0
        return rates


def _steps(first_step: int) -> Iterator[ingest.StepRows]:
    records = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=None, batch_format="numpy", prefetch_batches=1
    )
    yield from ingest.iterate_steps(records, first_step)


def _timed(steps: Iterator[ingest.StepRows], meter: Meter) -> Iterator[ingest.StepRows]:
    start = time.perf_counter()
    for index, step in enumerate(steps):
        if index == 0:
            meter.restart()  # the pipeline fills up once
        else:
            meter.waited(time.perf_counter() - start)
        yield step
        start = time.perf_counter()


def _accumulate(
    model: nn.Module, step_fn: StepFn, rows: list[ingest.PackedRow], device: torch.device
) -> tuple[dict[str, float], list[float], list[Tensor]]:
    """Run forward and backward over this worker's rows.

    Returns:
        loss sums by name, and [images, tokens, skipped samples], all over all workers; and the
        loss of each row of this worker.
    """
    row_losses: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for index, row in enumerate(rows):
        # Gradients are reduced once a step, with the last row's backward pass.
        model.set_requires_gradient_sync(index == len(rows) - 1)  # type: ignore[operator]
        terms = step_fn(model, row, device)
        terms["loss"].backward()
        row_losses.append(terms["loss"].detach())
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
        counts += torch.tensor([len(row.keys), row.num_tokens, len(row.skipped)], device=device)
    packed = torch.cat([counts, torch.stack(list(sums.values()))])
    dist.all_reduce(packed)
    values = packed.tolist()
    return dict(zip(sums, values[3:], strict=True)), values[:3], row_losses


def _describe_suspects(rows: list[ingest.PackedRow], row_losses: list[Tensor]) -> str:
    """Name the samples of the rows, on all ranks, whose loss is not finite."""
    mine = [
        key
        for row, loss in zip(rows, row_losses, strict=True)
        if not math.isfinite(loss.item())
        for key in row.keys
    ]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    suspects = [key for keys in gathered for key in keys]
    if not suspects:
        return "Every row's loss is finite; lower the learning rate"
    return f"Rows with a loss that is not finite hold {', '.join(suspects[:50])}"


def _scale_and_clip(model: nn.Module, scale: float, clip_norm: float) -> float:
    """Scale the gradients, clip their global norm, and return that norm from before the clip."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm_value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm) * scale
    if math.isfinite(norm_value):
        torch._foreach_mul_(gradients, scale * min(1.0, clip_norm / max(norm_value, 1e-12)))
    return norm_value


def _report_unreadable(rows: list[ingest.PackedRow], board: Any) -> None:
    for row in rows:
        for shard, key, reason in row.skipped:
            logger.warning("skipped unreadable sample %s of %s: %s", key, shard, reason)
            board.message.remote(f"skipped unreadable sample {key} of {shard}: {reason}")


def _check_unreadable(
    num_skipped: int, plan: Plan, done: int, rows: list[ingest.PackedRow]
) -> None:
    seen = max(plan.images_before(done), _UNREADABLE_GRACE)
    if num_skipped > plan.data.max_unreadable * seen:
        lost = [f"{shard} {key}: {reason}" for row in rows for shard, key, reason in row.skipped]
        raise RuntimeError(
            f"{num_skipped} of {plan.images_before(done)} samples were unreadable, more than "
            f"data.max_unreadable={plan.data.max_unreadable} allows; repair the shards or raise "
            f"it. The last ones: {'; '.join(lost[:20]) or 'on other workers'}"
        )


def _save_checkpoint(
    state: TrainState, progress: dict[str, Any], metrics: dict[str, float], done: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder), progress)
        # Every rank uploads its own shards; Ray Train joins them, and commits once all are there.
        ray.train.report(
            metrics | progress,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{done:08d}",
        )
