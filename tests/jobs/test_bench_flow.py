from dataclasses import replace
from pathlib import Path

import pytest

from jobs import bench_flow
from jobs.bench_train import StepFigures, one_rank
from pipelines.corpus import Manifest
from pipelines.latents import LatentCache
from pipelines.train_flow import FlowTraining
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
    settings = replace(settings, run=replace(settings.run, use_gpu=False))
    with one_rank():
        figures, encode_s = bench_flow._in_memory(
            settings, Manifest.load(sample_manifests[0]), small_autoencoder(), 16, steps=3
        )
    assert isinstance(figures, StepFigures)
    assert figures.seconds > 0 and encode_s > 0
    tokens = figures.tokens_per_s * figures.seconds
    assert 0.6 * 128 < tokens <= 128 * 1.2
    assert 0 < figures.mfu < 2
