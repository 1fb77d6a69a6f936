"""Timing of training steps: in this process, and as a run through Ray recorded them."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from cluster.local import ray_session
from pipelines.ingest import load_step
from pipelines.loop import Recipe, train_step
from pipelines.packed_rows import StepRows
from pipelines.plan import Plan
from pipelines.runs import RunConfig
from pipelines.tracking import metric_history
from vitok.flops import peak_flops
from vitok.initialize import start_at_random
from vitok.optim import Optimizers
from vitok.parallel import ParallelConfig, prepare_blocks, shard_model

# The first steps of a run compile, allocate and fill queues.
WARM_UP_STEPS = 2
# Of a plan that tells how many images fill a row.
SAMPLED_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What a training step achieves.

    Attributes:
        seconds: median of the steps.
        tokens_per_s: real tokens.
        mfu: operations on real tokens, forward and backward, over what the device could do.
        peak_flops: what the device could do in a second.
    """

    seconds: float
    tokens_per_s: float
    mfu: float
    peak_flops: float


def run_config(folder: str, threads: int) -> RunConfig:
    """Return how a training of one worker is run that records every step."""
    return RunConfig(
        name="bench",
        storage=folder,
        num_workers=1,
        cpus_per_worker=threads,
        use_gpu=torch.cuda.is_available(),
        log_every=1,
        mfu=False,
    )


def tokens_of_an_image(plan: Plan) -> float:
    """Return the tokens that a sample of a plan's first step has in the mean."""
    views = [view for row in plan.step(0).rows for view in row]
    return fmean(view.num_tokens(plan.patch_size) for view in views)


def load_batches(plan: Plan, steps: int) -> list[StepRows]:
    """Read the rows of the first steps of a plan into memory."""
    return [StepRows(step, load_step(plan, step), {}) for step in range(steps)]


def start_sharded(
    model: nn.Module, parallel: ParallelConfig, device: torch.device, seed: int
) -> None:
    """Put a model that has no storage yet on a device, sharded over the one rank, at random."""
    prepare_blocks(model, parallel)
    shard_model(model, init_device_mesh(device.type, (1,)), torch.bfloat16)
    start_at_random(model.to_empty(device=device), seed)


def time_steps(
    model: nn.Module,
    optimizer: Optimizers,
    recipe: Recipe,
    batches: Sequence[StepRows],
    device: torch.device,
) -> StepFigures:
    """Train on batches in turn, as the loop does; the first steps are not counted.

    The peak is taken before and after every step: on a shared machine it changes by the minute.
    """
    seconds, tokens_per_s, mfu, peaks = [], [], [], []
    peak = peak_flops(device).flops_per_s
    for batch in batches:
        start = seconds_now(device)
        train_step(model, optimizer, recipe, batch, 1.0, device, leaves=False)
        taken = seconds_now(device) - start
        before, peak = peak, peak_flops(device).flops_per_s
        seconds.append(taken)
        tokens_per_s.append(sum(row.num_tokens for row in batch.rows) / taken)
        peaks.append((before + peak) / 2)
        mfu.append(sum(map(recipe.flops, batch.rows)) / taken / peaks[-1])
    counted = slice(WARM_UP_STEPS, None)
    return StepFigures(
        seconds=median(seconds[counted]),
        tokens_per_s=median(tokens_per_s[counted]),
        mfu=median(mfu[counted]),
        peak_flops=median(peaks[counted]),
    )


def time_through_ray(
    train: Callable[[], object],
    run: RunConfig,
    images_per_step: int,
    threads: int,
    device: torch.device,
) -> StepFigures:
    """Train with Ray Data, Ray Train and MLflow, and read what that logged of its steps.

    The first steps are not counted.

    Args:
        train: does the training of `run`.
    """
    before = peak_flops(device).flops_per_s
    # One core more, in name: the reading and decoding shares the cores with the training.
    with ray_session(num_cpus=threads + 1):
        train()
    peak = (before + peak_flops(device).flops_per_s) / 2
    recorded = {
        name: [value for step, value in metric_history(run.folder, name) if step > WARM_UP_STEPS]
        for name in ("tokens_per_s", "images_per_s", "flops_per_s")
    }
    return StepFigures(
        seconds=images_per_step / median(recorded["images_per_s"]),
        tokens_per_s=median(recorded["tokens_per_s"]),
        mfu=median(recorded["flops_per_s"]) / peak,
        peak_flops=peak,
    )


def seconds_now(device: torch.device) -> float:
    """Return the time at which a device has done what it was given so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def one_rank() -> Iterator[None]:
    """Be the only rank of a process group."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def show_step(name: str, figures: StepFigures) -> None:
    """Print what was measured, under a name, in a line."""
    print(
        f"{name:<12} {figures.seconds:8.3f} s/step {figures.tokens_per_s:10.0f} tokens/s "
        f"{figures.mfu:6.1%} of {figures.peak_flops / 1e12:.3g} TFLOP/s",
        flush=True,
    )


def show_nothing(name: str, figures: StepFigures) -> None:
    """Print nothing of what was measured."""
