"""Benchmark of the training step: on rows in memory, part by part, and through Ray."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from jobs.bench.data import indexed_shards
from jobs.bench.output import finish, rounded
from jobs.bench.steps import (
    SAMPLED_IMAGES,
    WARM_UP_STEPS,
    StepFigures,
    load_batches,
    one_rank,
    run_config,
    seconds_now,
    show_nothing,
    show_step,
    start_sharded,
    time_steps,
    time_through_ray,
    tokens_of_an_image,
)
from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.loop import Recipe
from pipelines.packed_rows import PackedRow, StepRows
from pipelines.plan import DataConfig, Stage
from pipelines.train_autoencoder import (
    build_model,
    prepare,
    reconstruction_step,
    row_flops,
    run_training,
)
from vitok.flops import peak_flops
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.optim import Optimizers, build_optimizer
from vitok.parallel import ParallelConfig
from vitok.variants import AutoencoderConfig

# The ranges in which FSDP2 moves weights and gradients, as it names them for the profiler.
_FSDP_TRANSFERS = ("FSDP::all_gather", "FSDP::post_backward_reduce")


def run(
    model: str = "Bd4-B/16x64",
    token_budget: int = 256,
    row_tokens: int = 4096,
    rows_per_step: int = 1,
    ssim: float = 0.1,
    dino_weights: str = "",
    steps: int = 7,
    compile: tuple[bool, ...] = (False, True),
    checkpoint_every: int = 0,
    float8: bool = False,
    ray_steps: int = 12,
    shards: tuple[str, ...] = (),
    threads: int = os.cpu_count() or 1,
    json: bool = False,
) -> None:
    """The training step of one worker on rows in memory, part by part, and through Ray.

    Args:
        model: a name, such as Ld4-L/16x64; random weights.
        token_budget: most tokens of an image.
        row_tokens: tokens of a packed row.
        rows_per_step: rows that are accumulated in a step.
        ssim: weight of the SSIM term; 0 leaves it out.
        dino_weights: DINOv3 for the perceptual term, with the weight of the paper; none if empty.
        steps: on rows in memory, two of which warm up.
        compile: whether blocks are compiled; both ways are measured.
        checkpoint_every: every n-th block recomputes its activations.
        float8: compute the blocks in float8; needs compute capability 8.9.
        ray_steps: steps through Ray, the faster way of the two; 0 leaves Ray out.
        shards: as for the benchmark ingest.
        threads: CPU threads.
        json: print the JSON alone.
    """
    torch.set_num_threads(threads)

    loss = LossConfig.paper(dino_weights) if dino_weights else LossConfig()
    figures = measure_training(
        model=model,
        token_budget=token_budget,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        loss=replace(loss, ssim=ssim),
        steps=steps,
        parallels={
            "compiled" if compiled else "eager": ParallelConfig(
                compile=compiled, checkpoint_every=checkpoint_every, float8=float8
            )
            for compiled in compile
        },
        ray_steps=ray_steps,
        shards=shards,
        threads=threads,
        show=show_nothing if json else show_step,
    )
    shape = {"model": model, "row_tokens": row_tokens}
    finish("train", {**shape, **rounded(figures, quiet=json)}, threads)


def measure_training(
    *,
    model: str,
    token_budget: int,
    row_tokens: int,
    rows_per_step: int,
    loss: LossConfig,
    steps: int,
    parallels: dict[str, ParallelConfig],
    ray_steps: int,
    shards: Sequence[str],
    threads: int,
    show: Callable[[str, StepFigures], None],
) -> dict[str, float | str]:
    """Time the steps of one worker; the fastest way in memory is then run through Ray.

    Args:
        parallels: ways to compute the blocks, by name.
        show: called with the name and the figures of each measurement.
        ray_steps: steps through Ray; 0 leaves it out.

    Returns:
        the figures of the benchmark by name.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        indexed_shards(shards) as manifest,
        tempfile.TemporaryDirectory(prefix="vitok-bench-") as folder,
        one_rank(),
    ):
        settings = AutoencoderTraining(
            model=AutoencoderConfig.from_name(model),
            data=DataConfig(manifest=str(manifest.path), row_tokens=row_tokens),
            stages=(
                Stage(
                    steps=max(steps, ray_steps),
                    images_per_step=SAMPLED_IMAGES,
                    token_budgets=(token_budget,),
                ),
            ),
            loss=loss,
            run=run_config(folder, threads),
        )
        settings = _with_full_rows(settings, rows_per_step)
        batches = load_batches(plan_of(settings), steps)
        filled = fmean(row.num_tokens / row_tokens for batch in batches for row in batch.rows)
        figures: dict[str, float | str] = {
            "peak": peak_flops(device).source,
            "images_per_step": settings.stages[0].images_per_step,
            "token_utilisation": filled,
        }

        def report(name: str, step: StepFigures) -> StepFigures:
            show(name, step)
            figures.update(
                {
                    f"{name}_step_s": step.seconds,
                    f"{name}_tokens_per_s": step.tokens_per_s,
                    f"{name}_mfu": step.mfu,
                    f"{name}_peak_flops": step.peak_flops,
                }
            )
            return step

        found: dict[str, StepFigures] = {}
        for name, parallel in parallels.items():
            trainee = _Trainee.of(settings, parallel, device)
            found[name] = report(name, trainee.measure(batches))
            figures |= {f"{name}_{part}": x for part, x in trainee.shares(batches).items()}
        best = max(found, key=lambda name: found[name].tokens_per_s)
        figures |= {"best": best} | {
            name: figures[f"{best}_{name}"] for name in ("tokens_per_s", "mfu", "peak_flops")
        }
        if ray_steps:
            through_ray = report(
                "ray", _through_ray(settings, parallels[best], ray_steps, threads, device)
            )
            # Once more after it: what else the machine does changes from minute to minute.
            again = report("again", _Trainee.of(settings, parallels[best], device).measure(batches))
            in_memory = (found[best].seconds + again.seconds) / 2
            figures["ray_overhead"] = through_ray.seconds / in_memory - 1
    return figures


def _with_full_rows(settings: AutoencoderTraining, rows_per_step: int) -> AutoencoderTraining:
    """Return the settings with as many images a step as fill so many rows."""
    of_an_image = tokens_of_an_image(plan_of(settings))
    stage = replace(
        settings.stages[0],
        images_per_step=ceil(rows_per_step * settings.data.row_tokens / of_an_image),
        rows_per_step=rows_per_step,
    )
    return replace(settings, stages=(stage,))


@dataclass(frozen=True)
class _Trainee:
    """A model that is trained in this process, as the loop of a training does it."""

    model: nn.Module
    optimizer: Optimizers
    recipe: Recipe
    loss: ReconstructionLoss
    settings: AutoencoderTraining
    device: torch.device

    @classmethod
    def of(
        cls, settings: AutoencoderTraining, parallel: ParallelConfig, device: torch.device
    ) -> "_Trainee":
        """Build the model, sharded over the one rank."""
        model = build_model(settings)
        start_sharded(model, parallel, device, settings.seed)
        loss = ReconstructionLoss(settings.loss).to(device)

        def step(model: nn.Module, row: PackedRow, device: torch.device) -> dict[str, Tensor]:
            return reconstruction_step(settings, loss, model, row, device)

        recipe = Recipe(
            step=step,
            flops=lambda row: row_flops(settings, row),
            initialize=lambda model: None,
        )
        optimizer = build_optimizer(model, settings.optim)
        return cls(model, optimizer, recipe, loss, settings, device)

    def measure(self, batches: Sequence[StepRows]) -> StepFigures:
        """Train on the batches in turn; see time_steps."""
        return time_steps(self.model, self.optimizer, self.recipe, batches, self.device)

    def shares(self, batches: Sequence[StepRows]) -> dict[str, float]:
        """Return the share of a step that each of its parts takes, medians over the batches.

        Communication, which FSDP2 does during forward and backward, is counted in them too.
        """
        rows = [batch.rows[0] for batch in batches[WARM_UP_STEPS:]]
        parts = [self._timed_parts(row) for row in rows]
        medians = {name: median(part[name] for part in parts) for name in parts[0]}
        total = sum(medians.values())
        shares = {f"{name}_share": seconds / total for name, seconds in medians.items()}
        return shares | {"communication_share": self._communication_s(rows[0]) / total}

    def _communication_s(self, row: PackedRow) -> float:
        """Return the time that FSDP2 takes to gather weights and reduce gradients, copies included.

        On CUDA it is that of the kernels, much of it hidden behind the computation.
        """
        on_cuda = self.device.type == "cuda"
        activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            self._timed_parts(row)
        events = profiler.key_averages()
        if on_cuda:
            micros = sum(e.device_time_total for e in events if e.key.startswith("nccl"))
        else:
            micros = sum(e.cpu_time_total for e in events if e.key.startswith(_FSDP_TRANSFERS))
        return micros / 1e6

    def _timed_parts(self, row: PackedRow) -> dict[str, float]:
        marks = [self._now()]
        packed, tile_position = row.to_packed(self.device)
        marks.append(self._now())
        reconstruction = self.model(packed)
        marks.append(self._now())
        loss = self.loss(reconstruction, packed, tile_position)["loss"]
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        names = ("to_device", "forward", "losses", "backward", "optimizer")
        return {
            name: end - start for name, start, end in zip(names, marks[:-1], marks[1:], strict=True)
        }

    def _now(self) -> float:
        return seconds_now(self.device)


def _through_ray(
    settings: AutoencoderTraining,
    parallel: ParallelConfig,
    steps: int,
    threads: int,
    device: torch.device,
) -> StepFigures:
    """Run a training of its own through Ray; see time_through_ray."""
    settings = prepare(
        replace(
            settings,
            stages=(replace(settings.stages[0], steps=steps),),
            run=replace(settings.run, parallel=parallel),
        )
    )
    return time_through_ray(
        partial(run_training, settings),
        settings.run,
        settings.stages[0].images_per_step,
        threads,
        device,
    )
