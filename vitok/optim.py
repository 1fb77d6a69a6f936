"""AdamW with parameter groups, and the learning-rate schedule over the images of a run."""

from math import cos, pi

import torch
from torch import nn

from vitok.config import config


@config
class OptimConfig:
    """AdamW, warm-up and cosine; the defaults are those of arXiv 2605.05331.

    Attributes:
        lr: peak learning rate.
        betas: decay of the first and second moment.
        weight_decay: of matrices alone; norms, biases and gains have none.
        clip_norm: the gradient's global norm is clipped to this.
        warmup: fraction of the run's images over which the rate rises from 0.
        final_lr: the cosine ends at this fraction of the peak.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup: float = 0.01
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip_norm <= 0:
            raise ValueError(f"lr={self.lr} and clip_norm={self.clip_norm} must be positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a fraction of the run, from 0 to below 1")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices alone."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def learning_rate(config: OptimConfig, progress: float) -> float:
    """Return the learning rate after a fraction `progress` of the run's images: linear, cosine."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    done = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    cosine = 0.5 * (1 + cos(pi * done))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
