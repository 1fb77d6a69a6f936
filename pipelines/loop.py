"""fit(): the training loop of every training. launch(): what puts it on a Ray cluster."""

import json
import logging
import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train.torch import TorchTrainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pipelines import ingest
from pipelines.failures import root_cause
from pipelines.plan import Plan
from pipelines.progress import progress_bar
from pipelines.storage import Folder
from pipelines.tracking import Tracker, TrackingConfig
from vitok.checkpoint import TrainState
from vitok.config import config, describe_difference, parse_json, to_dict
from vitok.optim import OptimConfig, build_optimizer, learning_rate
from vitok.parallel import shard_model

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# Ray Train's own record of what was committed: a checkpoint that it does not name is half-written.
_SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
# So many samples may be unreadable before the fraction is judged; it says little of a short run.
_UNREADABLE_GRACE = 1000


@config
class RunConfig:
    """How and where a training runs; nothing here changes what is learned.

    Attributes:
        name: the same name continues the same run.
        storage: folder or `s3://` prefix that holds runs.
        num_workers: training processes, one for each GPU.
        cpus_per_worker: CPU cores that Ray sets aside for each of them.
        use_gpu: train on GPUs.
        compute_dtype: of matrix products; master weights and reductions are float32.
        log_every: steps between two records of rates and norms; the last step has one too.
        evaluate_every: steps between two evaluations; the last step has one too.
        checkpoint_every: steps between two checkpoints; the last step has one too.
        keep_checkpoints: older ones are deleted.
        max_failures: worker failures after which the run gives up.
        tracking: the MLflow run.
    """

    name: str
    storage: str = "runs"
    num_workers: int = 8
    cpus_per_worker: float = 8.0
    use_gpu: bool = True
    compute_dtype: str = "bfloat16"
    log_every: int = 10
    evaluate_every: int = 5000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_failures: int = 3
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain name: it becomes a folder")
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers} must be at least 1")
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints} must be at least 1")
        if min(self.log_every, self.evaluate_every, self.checkpoint_every) < 1:
            raise ValueError("log_every, evaluate_every and checkpoint_every must be at least 1")
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} must be bfloat16 or float32")

    @property
    def folder(self) -> Folder:
        """The run's folder: its config, its checkpoints, its export."""
        return Folder.of(self.storage, self.name)


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
        model: the same weights on every rank; sharded here.
        tracker: on rank 0 alone.
        board: the driver's ProgressBoard.

    Raises:
        FloatingPointError: a gradient is not finite; the optimizer has not moved.
        RuntimeError: too many samples were unreadable.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    model.to(device)
    for parameter in model.parameters():
        # Ranks on other processors may have rounded their start differently.
        dist.broadcast(parameter.data, src=0)
    shard_model(
        model,
        init_device_mesh(device.type, (world_size,)),
        getattr(torch, run.compute_dtype),
    )
    optimizer = build_optimizer(model, optim)
    state = TrainState(model, optimizer)
    progress = {"cursor": plan.cursor(0), "skipped": 0, "manifest": plan.manifest.digest}
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            progress = state.load(Path(folder))
        if progress["manifest"] != plan.manifest.digest:
            raise ValueError(
                f"{plan.manifest.path} has changed since the run's last checkpoint, and with it "
                "the order of samples; restore the manifest, or choose another run.name"
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
                "epoch": plan.images_before(done) / plan.manifest.num_samples,
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


def launch(
    worker: Callable[[dict[str, Any]], None], settings: Any, plan: Plan, tracker: Tracker
) -> None:
    """Run a training on the connected Ray cluster until it is done; called in the driver.

    Args:
        worker: what every Ray Train worker runs; it is given {"settings", "tracking", "board"}
            and calls fit().
        settings: the training's config, with a RunConfig as `run`.

    Raises:
        RuntimeError: the workers failed more often than max_failures; says why.
    """
    run: RunConfig = settings.run
    folder = run.folder
    if next_step(folder) >= plan.num_steps:
        return

    def remaining() -> Any:
        # Called at every start of the worker group, with the checkpoint that it will restore.
        return ingest.training_dataset(plan, next_step(folder), run.num_workers)

    check_resources(
        # One more core reads and decodes: without it no data would ever come.
        num_cpus=run.num_workers * run.cpus_per_worker + 1,
        num_gpus=run.num_workers * run.use_gpu,
        remedy="lower run.num_workers or run.cpus_per_worker, or set run.use_gpu to False",
    )
    first_step = next_step(folder)
    with progress_bar("train", plan.num_steps, "step", first_step) as board:
        trainer = TorchTrainer(
            worker,
            train_loop_config={
                "settings": settings,
                "tracking": {"uri": tracker.uri, "run_id": tracker.run_id},
                "board": board,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=run.num_workers,
                use_gpu=run.use_gpu,
                resources_per_worker={"CPU": run.cpus_per_worker}
                | ({"GPU": 1} if run.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=Folder.of(run.storage).uri,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.keep_checkpoints),
                failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            ),
            datasets={"train": remaining},
            dataset_config=ray.train.DataConfig(execution_options=ingest.execution_options()),
        )
        try:
            with _own_interrupts():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RuntimeError(
                f"the training stopped after step {next_step(folder)}: {root_cause(error)}"
            ) from error
    if next_step(folder) < plan.num_steps:
        raise RuntimeError(
            f"the training ended after step {next_step(folder)} of {plan.num_steps}, without an "
            "error; start it again to go on"
        )


def check_resources(num_cpus: float, num_gpus: float, remedy: str) -> None:
    """Refuse a job for which the connected cluster is too small: Ray would wait for ever.

    Raises:
        RuntimeError: says what is asked for, what is there, and the remedy.
    """
    offered = ray.cluster_resources()
    for name, asked in (("CPU", num_cpus), ("GPU", num_gpus)):
        if asked > offered.get(name, 0):
            raise RuntimeError(
                f"the job asks for {asked:g} {name}s, the cluster has {offered.get(name, 0):g}; "
                f"{remedy}"
            )


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Make Ctrl-C during a training a KeyboardInterrupt, and nothing else after it.

    Ray Train takes over SIGINT, aborts its workers, exits with SystemExit, and leaves its handler.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def claim_folder(settings: Any) -> None:
    """Write a run's config into its folder, or check that the run that is there has the same.

    A run without a checkpoint has nothing to lose, and takes the new config.

    Raises:
        ValueError: a run of this name has another config; the differences are listed.
    """
    folder: Folder = settings.run.folder
    text = folder.read_text(CONFIG_FILE)
    if text is None or latest_checkpoint(folder) is None:
        folder.write_text(CONFIG_FILE, json.dumps(to_dict(settings), indent=2) + "\n")
        return
    before = parse_json(type(settings), text, f"{folder.uri}/{CONFIG_FILE}")
    differences = [
        line for line in describe_difference(before, settings) if not line.startswith("run.")
    ]
    if differences:
        raise ValueError(
            f"the run {settings.run.name!r} in {folder.uri} has another config "
            f"({'; '.join(differences)}); choose another run.name, or undo the change to go on"
        )


def latest_checkpoint(folder: Folder) -> tuple[Folder, dict[str, Any]] | None:
    """Return a run's newest complete checkpoint and the metrics reported with it, if any.

    It is the one that `ray.train.get_checkpoint()` gives to a restarted worker.
    """
    text = folder.read_text(_SNAPSHOT_FILE)
    latest = json.loads(text)["latest_checkpoint_result"] if text else None
    return (folder.child(latest["checkpoint_dir_name"]), latest["metrics"]) if latest else None


def next_step(folder: Folder) -> int:
    """Return the first step of a run that no complete checkpoint contains."""
    latest = latest_checkpoint(folder)
    return int(latest[1]["cursor"]["step"]) if latest else 0
