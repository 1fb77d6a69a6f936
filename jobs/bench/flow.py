"""Benchmark of flow training: the step, the loop through Ray, and what the latent cache saves."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn

from cluster.local import ray_session
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
from jobs.models import save_random
from pipelines.cache_latents import cache_latents
from pipelines.caching.config import LatentCaching
from pipelines.corpus import Manifest
from pipelines.ingest import load_step
from pipelines.loop import Recipe
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow, StepRows
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.tracking import metric_history
from pipelines.train_flow import (
    FlowTraining,
    build_model,
    corpus_of,
    flow_step,
    plan_of,
    prepare,
    run_training,
)
from vitok.autoencoder import Autoencoder
from vitok.dit import DiTConfig
from vitok.flops import peak_flops, training_flops
from vitok.optim import build_optimizer
from vitok.parallel import ParallelConfig
from vitok.variants import AutoencoderConfig


def run(
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    autoencoder: str = "Ld4-B/16x64",
    token_budget: int = 256,
    row_tokens: int = 4096,
    rows_per_step: int = 1,
    steps: int = 7,
    ray_steps: int = 12,
    compile: bool = True,
    float8: bool = False,
    shards: tuple[str, ...] = (),
    threads: int = os.cpu_count() or 1,
    json: bool = False,
) -> None:
    """Flow training on cached latents through Ray and in memory, and what the cache saves.

    Args:
        width: channels of the generator.
        depth: its blocks.
        heads: its attention heads.
        autoencoder: whose latents these are, a name; random weights.
        token_budget: most tokens of an image.
        row_tokens: tokens of a packed row.
        rows_per_step: rows that are accumulated in a step.
        steps: on rows in memory, two of which warm up.
        ray_steps: steps through Ray.
        compile: compile the blocks.
        float8: compute the blocks in float8; needs compute capability 8.9.
        shards: as for the benchmark ingest.
        threads: CPU threads.
        json: print the JSON alone.
    """
    torch.set_num_threads(threads)

    figures = measure_flow(
        model=DiTConfig(
            latent_channels=AutoencoderConfig.from_name(autoencoder).latent_channels,
            width=width,
            depth=depth,
            heads=heads,
            num_classes=1000,
        ),
        autoencoder=autoencoder,
        token_budget=token_budget,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        steps=steps,
        ray_steps=ray_steps,
        parallel=ParallelConfig(compile=compile, float8=float8),
        shards=shards,
        threads=threads,
        show=show_nothing if json else show_step,
    )
    shape = {"width": width, "depth": depth, "autoencoder": autoencoder, "row_tokens": row_tokens}
    finish("flow", {**shape, **rounded(figures, quiet=json)}, threads)


def measure_flow(
    *,
    model: DiTConfig,
    autoencoder: str,
    token_budget: int,
    row_tokens: int,
    rows_per_step: int,
    steps: int,
    ray_steps: int,
    parallel: ParallelConfig,
    shards: Sequence[str],
    threads: int,
    show: Callable[[str, StepFigures], None],
) -> dict[str, float | str]:
    """Time the steps of one worker in memory and through Ray, and the encoder on the same images.

    Args:
        autoencoder: a name; its weights are random, which costs the same time.
        show: called with the name and the figures of each measurement.

    Returns:
        the figures of the benchmark by name.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        indexed_shards(shards) as manifest,
        tempfile.TemporaryDirectory(prefix="vitok-bench-") as folder,
    ):
        weights = save_random(autoencoder, Path(folder) / "autoencoder")
        # One core more, in name: reading shares the cores with the training.
        with ray_session(num_cpus=threads + 1):
            cache_latents(
                LatentCaching(
                    manifest=str(manifest.path),
                    model=f"{folder}/autoencoder",
                    out=f"{folder}/latents",
                    token_budgets=(token_budget,),
                    num_workers=1,
                    cpus_per_worker=1,
                    cpus_per_reader=0.5,
                    use_gpu=device.type == "cuda",
                )
            )
        settings = prepare(
            _settings(model, folder, row_tokens, rows_per_step, ray_steps, parallel, threads)
        )
        batches = load_batches(plan_of(replace(settings, steps=steps)), steps)

        def in_memory(name: str) -> StepFigures:
            with one_rank():
                found = _in_memory(settings, batches, device)
            show(name, found)
            return found

        memory = in_memory("memory")
        images = _images_of(settings, manifest, token_budget, batches)
        encode_s = _encoding_s(weights, images, device)
        through_ray = time_through_ray(
            partial(run_training, settings),
            settings.run,
            settings.images_per_step,
            threads,
            device,
        )
        recorded = metric_history(settings.run.folder, "data_wait")
        waits = [wait for step, wait in recorded if step > WARM_UP_STEPS]
        show("ray", through_ray)
        # Once more after it: what else the machine does changes from minute to minute.
        again = in_memory("again")
    memory_s = (memory.seconds + again.seconds) / 2
    tokens = memory.tokens_per_s * memory.seconds
    return {
        "peak": peak_flops(device).source,
        "images_per_step": float(settings.images_per_step),
        "tokens_per_s": through_ray.tokens_per_s,
        "mfu": through_ray.mfu,
        "data_wait": fmean(waits),
        "step_s": through_ray.seconds,
        "memory_step_s": memory.seconds,
        "memory_tokens_per_s": memory.tokens_per_s,
        "memory_mfu": memory.mfu,
        "again_step_s": again.seconds,
        "again_mfu": again.mfu,
        "ray_overhead": through_ray.seconds / memory_s - 1,
        "encode_s": encode_s,
        "on_the_fly_tokens_per_s": tokens / (memory_s + encode_s),
        "cache_speedup": 1 + encode_s / memory_s,
    }


def _settings(
    model: DiTConfig,
    folder: str,
    row_tokens: int,
    rows_per_step: int,
    ray_steps: int,
    parallel: ParallelConfig,
    threads: int,
) -> FlowTraining:
    settings = FlowTraining(
        model=model,
        cache=f"{folder}/latents",
        steps=ray_steps,
        images_per_step=SAMPLED_IMAGES,
        row_tokens=row_tokens,
        run=replace(run_config(folder, threads), parallel=parallel),
    )
    of_an_image = tokens_of_an_image(plan_of(settings))
    images = max(1, int(rows_per_step * row_tokens / of_an_image))
    return replace(settings, images_per_step=images)


def _in_memory(
    settings: FlowTraining, batches: Sequence[StepRows], device: torch.device
) -> StepFigures:
    """Return what steps on rows in memory achieve."""
    corpus = corpus_of(settings)
    model = build_model(settings)
    start_sharded(model, settings.run.parallel, device, settings.seed)

    def step(model: nn.Module, row: PackedRow, device: torch.device) -> dict[str, Tensor]:
        return flow_step(settings, corpus, model, row, device)

    recipe = Recipe(
        step=step,
        flops=lambda row: training_flops(settings.model, row.image_tokens),
        initialize=lambda model: None,
    )
    optimizer = build_optimizer(model, settings.optim)
    return time_steps(model, optimizer, recipe, batches, device)


def _images_of(
    settings: FlowTraining, manifest: Manifest, token_budget: int, batches: Sequence[StepRows]
) -> Plan:
    """Return a plan of as many steps of as many whole images as the batches have latents."""
    stage = Stage(
        steps=len(batches),
        images_per_step=settings.images_per_step,
        token_budgets=(token_budget,),
        rows_per_step=ceil(fmean(len(batch.rows) for batch in batches)),
    )
    return Plan(
        corpus=Corpus.of(manifest),
        data=DataConfig(row_tokens=settings.row_tokens, crop_area=1.0, crop_aspect=1.0),
        stages=(stage,),
        patch_size=corpus_of(settings).statistics.patch_size,
        seed=settings.seed,
    )


def _encoding_s(autoencoder: Autoencoder, images: Plan, device: torch.device) -> float:
    """Return the seconds to encode the images of a step, median; the first are not counted."""
    encoder = autoencoder.to(device, torch.bfloat16).eval()
    seconds = []
    for number in range(images.num_steps):
        rows = load_step(images, number)
        start = seconds_now(device)
        with torch.inference_mode():
            for row in rows:
                encoder.encode_packed(row.to_packed(device)[0])
        seconds.append(seconds_now(device) - start)
    return median(seconds[WARM_UP_STEPS:])
