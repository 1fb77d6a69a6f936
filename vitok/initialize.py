"""Starts for an autoencoder: random, or its linear layers do principal component analysis.

Both set a model that is sharded already as well as one that is whole.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from vitok.autoencoder import Autoencoder
from vitok.transformer import LayerScale, RMSNorm

# Length of the constant part of a code, in units of the length of a typical principal part. The
# LayerNorm on the code divides by its length, which a large constant part keeps nearly the same
# for all patches: at 3, a patch of typical contrast is off by 5%, and the decoder can learn that.
_CARRIER = 3.0


@torch.no_grad()
def start_at_random(model: nn.Module, seed: int) -> None:
    """Draw fresh weights in place: truncated normal (0.02), zero biases.

    Every matrix has a generator of its own, so that the weights depend on the seed and the kind of
    device alone, not on how the model is sharded.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(module.weight.device)
            generator.manual_seed(int.from_bytes(digest[:8], "little"))
            weight = torch.empty(module.weight.shape, device=module.weight.device)
            _assign(module.weight, nn.init.trunc_normal_(weight, std=0.02, generator=generator))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)


def _assign(parameter: Tensor, value: Tensor, source_rank: int | None = None) -> None:
    """Set a parameter, sharded or not, to a value of its full shape.

    Args:
        source_rank: whose value all ranks take; each its own, which must be equal, if None.
    """
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=source_rank
        )
    parameter.copy_(value)


@torch.no_grad()
def start_from_pca(model: Autoencoder, patches: Tensor) -> None:
    """Set the four linear layers so that model(x) is close to a PCA of the patches, in place.

    The blocks keep their weights; with a small LayerScale they start near the identity. Of the c
    latent channels c - 2 carry principal components: LayerNorm takes the mean and the length.

    Args:
        patches: [N, 3P^2] in [-1, 1], a sample of the training data, N at least a few thousand.

    Raises:
        ValueError: fewer than 4 channels, more channels than the widths can carry, or another
            latent than LayerNorm.
    """
    config = model.config
    if config.latent != "layernorm":
        raise ValueError(
            f"a PCA start is made for LayerNorm latents, not for latent={config.latent!r}; "
            "start at random"
        )
    components = config.latent_channels - 2
    widths = (config.encoder_width or config.patch_dim, config.decoder_width, config.patch_dim)
    if not 2 <= components <= min(widths):
        raise ValueError(
            f"latent_channels={config.latent_channels} must be at least 4 and exceed neither the "
            f"widths nor the {config.patch_dim} values of a patch by more than 2 for a PCA start"
        )
    patches = patches.double()
    mean = patches.mean(0)
    _, basis = torch.linalg.eigh((patches - mean).T.cov())
    basis = basis.flip(1)  # [3P^2, 3P^2], strongest component first
    # The stream is scaled so that what the blocks see, and add to, has unit variance.
    spread = ((patches - mean) @ basis[:, :components]).square().mean().sqrt()

    frame = _zero_mean_frame(config.latent_channels)  # [c, c-1]
    carrier = frame[:, 0] * _CARRIER * components**0.5
    if config.encoder_width:
        kept = min(config.encoder_width, config.patch_dim)
        project = basis[:, :kept].T / spread
        _set_linear(model.patch_embed, project, -project @ mean)
        _set_linear(model.to_code, frame[:, 1:], carrier)
    else:
        project = frame[:, 1:] @ basis[:, :components].T / spread
        _set_linear(model.to_code, project, carrier - project @ mean)

    # The latent is sqrt(c) * code / |code|; undo that at the typical length of a code.
    length = (components * (1 + _CARRIER**2)) ** 0.5 / config.latent_channels**0.5
    _set_linear(model.decoder_embed, frame[:, 1:].T * length, torch.zeros(components))
    _set_linear(model.to_pixels, basis[:, :components] * spread, mean)


def _set_linear(linear: torch.nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Put weight and bias into the upper left of a layer, zeros elsewhere."""
    out_missing = linear.out_features - weight.shape[0]
    in_missing = linear.in_features - weight.shape[1]
    # The signs of components are the solver's choice: ranks on other processors may differ.
    _assign(linear.weight, F.pad(weight, (0, in_missing, 0, out_missing)), source_rank=0)
    _assign(linear.bias, F.pad(bias, (0, linear.out_features - bias.shape[0])), source_rank=0)


def _zero_mean_frame(channels: int) -> Tensor:
    """Return [c, c-1] orthonormal columns, each of mean 0 (a Helmert matrix), double."""
    frame = torch.zeros(channels, channels - 1, dtype=torch.double)
    for column in range(channels - 1):
        size = column + 1
        frame[:size, column] = 1.0
        frame[size, column] = -float(size)
        frame[:, column] /= (size * (size + 1)) ** 0.5
    return frame
