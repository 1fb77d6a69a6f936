"""What keeps latents in bounds: LayerNorm, tanh with noise, or a Gaussian posterior (KL).

All three are a Gaussian around a mean, of which the first has no width: without noise the latent
is the mean, and the same pixels always give the same latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.variants import AutoencoderConfig

_LOG_VARIANCE_BOUNDS = (-30.0, 20.0)  # exp() of these is finite, in both directions, in float32


@dataclass(frozen=True)
class Posterior:
    """Where the latents of a row may lie.

    Attributes:
        mean: [T, c] float32.
        std: [T, c] float32; None where a latent is exactly its mean.
        kl_T: [T] divergence from the standard normal, mean over the channels; of KL latents alone.
    """

    mean: Tensor
    std: Tensor | None = None
    kl_T: Tensor | None = None

    def sample(self, noise: Tensor | None) -> Tensor:
        """Return latents [T, c]: the mean, moved by standard normal noise [T, c] if given."""
        if noise is None or self.std is None:
            return self.mean
        return self.mean + self.std * noise


def posterior_of(code: Tensor, config: AutoencoderConfig) -> Posterior:
    """Return the posterior that the encoder's last layer describes.

    Args:
        code: [T, c]; for KL latents [T, 2c], mean then log-variance.
    """
    code = code.float()
    if config.latent == "layernorm":
        return Posterior(F.layer_norm(code, code.shape[-1:], eps=1e-6))
    if config.latent == "tanh":
        mean = code.tanh()
        return Posterior(mean, std=torch.full_like(mean, config.latent_noise))
    assert config.latent == "kl"
    mean, log_variance = code.chunk(2, dim=-1)
    log_variance = log_variance.clamp(*_LOG_VARIANCE_BOUNDS)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return Posterior(mean, std=(0.5 * log_variance).exp(), kl_T=divergence.mean(dim=-1))
