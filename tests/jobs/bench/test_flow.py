from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.bench import flow as bench_flow
from jobs.bench.steps import one_rank
from pipelines.corpus import Manifest
from pipelines.ingest import load_step
from pipelines.latents import LatentCache
from pipelines.packed_rows import StepRows
from pipelines.train_flow import FlowTraining, plan_of
from tests.pipelines.flow_runs import flow_training, small_autoencoder
from vitok.dit import DiTConfig
from vitok.parallel import ParallelConfig

MODEL = DiTConfig(latent_channels=5, width=16, depth=1, heads=2, num_classes=8)


def settings_of(folder: Path, rows_per_step: int) -> FlowTraining:
    return bench_flow._settings(
        MODEL,
        str(folder),
        row_tokens=64,
        rows_per_step=rows_per_step,
        ray_steps=3,
        parallel=ParallelConfig(),
        threads=1,
    )


def test_steps_in_memory_and_the_encoder_are_timed_on_as_many_images(
    tmp_path: Path, sample_manifests: tuple[Path, Path]
) -> None:
    flow_training(tmp_path)
    (tmp_path / "cache").rename(tmp_path / "latents")
    settings = settings_of(tmp_path, rows_per_step=2)
    # Latents of 9.1 tokens in the mean fill two rows of 64.
    cache = LatentCache(str(tmp_path / "latents"))
    mean = cache.manifest.num_tokens / len(cache)
    assert settings.images_per_step == pytest.approx(2 * 64 / mean, rel=0.15)
    plan = plan_of(replace(settings, steps=3))
    batches = [StepRows(step, load_step(plan, step), {}) for step in range(3)]
    cpu = torch.device("cpu")
    with one_rank():
        figures = bench_flow._in_memory(settings, batches, cpu)
    images = bench_flow._images_of(settings, Manifest.load(sample_manifests[0]), 16, batches)
    assert images.num_steps == 3
    assert sum(map(len, images.step(0).rows)) == settings.images_per_step
    assert bench_flow._encoding_s(small_autoencoder(), images, cpu) > 0
    assert figures.seconds > 0
    tokens = figures.tokens_per_s * figures.seconds
    assert 0.6 * 128 < tokens <= 128 * 1.2
    assert 0 < figures.mfu < 2
