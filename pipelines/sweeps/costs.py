"""What a training takes, known before it starts: images, operations, memory."""

from typing import NamedTuple

import torch

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.train_autoencoder import image_flops
from vitok.memory import TrainingMemory, training_memory


class Work(NamedTuple):
    """How far a training is, or how long it is.

    Attributes:
        images: that it has seen.
        flops: operations for them; every image counts with its whole token budget.
    """

    images: int
    flops: float


def work_of(settings: AutoencoderTraining, steps: int | None = None) -> Work:
    """Return the work of a training's first steps; of all of them by default."""
    left = sum(stage.steps for stage in settings.stages) if steps is None else steps
    images, flops = 0, 0.0
    for stage in settings.stages:
        seen = min(left, stage.steps) * stage.images_per_step
        images += seen
        flops += seen * image_flops(settings, stage.token_budgets) / len(stage.token_budgets)
        left -= min(left, stage.steps)
    return Work(images, flops)


def memory_of(settings: AutoencoderTraining, num_workers: int) -> TrainingMemory:
    """Return what a training holds on each of its workers, in its stage of the largest images."""
    budget = max(max(stage.token_budgets) for stage in settings.stages)
    return training_memory(
        settings.model,
        row_tokens=settings.data.row_tokens,
        image_tokens=min(budget, settings.data.row_tokens),
        num_workers=num_workers,
        optim=settings.optim,
        parallel=settings.run.parallel,
        loss=settings.loss,
        compute_dtype=getattr(torch, settings.run.compute_dtype),
        on_cuda=settings.run.use_gpu,
        frozen_encoder=settings.freeze == "encoder",
    )
