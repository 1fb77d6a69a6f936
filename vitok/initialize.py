"""A closed-form start for an autoencoder: its linear layers do principal component analysis."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitok.autoencoder import Autoencoder

# Length of the constant part of a code, in units of the length of a typical principal part. The
# LayerNorm on the code divides by its length, which a large constant part keeps nearly the same
# for all patches: at 3, a patch of typical contrast is off by 5%, and the decoder can learn that.
_CARRIER = 3.0


@torch.no_grad()
def start_from_pca(model: Autoencoder, patches: Tensor) -> None:
    """Set the four linear layers so that model(x) is close to a PCA of the patches, in place.

    The blocks keep their weights; with a small LayerScale they start near the identity. Of the c
    latent channels c - 2 carry principal components: LayerNorm takes the mean and the length.

    Args:
        patches: [N, 3P^2] in [-1, 1], a sample of the training data, N at least a few thousand.

    Raises:
        ValueError: fewer than 4 channels, or more channels than the widths can carry.
    """
    config = model.config
    components = config.latent_channels - 2
    if not 2 <= components <= min(config.encoder_width, config.decoder_width, config.patch_dim):
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

    kept = min(config.encoder_width, config.patch_dim)
    _set_linear(model.patch_embed, basis[:, :kept].T / spread, -mean @ basis[:, :kept] / spread)
    frame = _zero_mean_frame(config.latent_channels)  # [c, c-1]
    carrier = frame[:, 0] * _CARRIER * components**0.5
    _set_linear(model.to_code, frame[:, 1:], carrier)

    # The latent is sqrt(c) * code / |code|; undo that at the typical length of a code.
    length = (components * (1 + _CARRIER**2)) ** 0.5 / config.latent_channels**0.5
    _set_linear(model.decoder_embed, frame[:, 1:].T * length, torch.zeros(components))
    _set_linear(model.to_pixels, basis[:, :components] * spread, mean)


def _set_linear(linear: torch.nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Put weight and bias into the upper left of a layer, zeros elsewhere."""
    out_missing = linear.out_features - weight.shape[0]
    in_missing = linear.in_features - weight.shape[1]
    linear.weight.copy_(F.pad(weight, (0, in_missing, 0, out_missing)))
    linear.bias.copy_(F.pad(bias, (0, linear.out_features - bias.shape[0])))


def _zero_mean_frame(channels: int) -> Tensor:
    """Return [c, c-1] orthonormal columns, each of mean 0 (a Helmert matrix), double."""
    frame = torch.zeros(channels, channels - 1, dtype=torch.double)
    for column in range(channels - 1):
        size = column + 1
        frame[:size, column] = 1.0
        frame[size, column] = -float(size)
        frame[:, column] /= (size * (size + 1)) ** 0.5
    return frame
