"""Starts: random, for any model here; for an autoencoder linear layers that do a PCA, and heads
that look at neighbours.

All set a model that is sharded already as well as one that is whole.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from vitok.autoencoder import Autoencoder
from vitok.seeds import keyed_generator
from vitok.transformer import (
    ROPE_THETA,
    Block,
    LayerScale,
    Modulation,
    RMSNorm,
    ZeroLinear,
)

# Length of the constant part of a code, in units of the length of a typical principal part. The
# LayerNorm on the code divides by its length, which a large constant part keeps nearly the same
# for all patches: at 3, a patch of typical contrast is off by 5%, and the decoder can learn that.
_CARRIER = 3.0
# Components weaker than this, relative to the strongest, are not scaled up any further.
_WEAKEST = 1e-3
# Offsets (rows, columns) at which the heads of a block look in turn.
_NEIGHBORS = ((0, -1), (0, 1), (-1, 0), (1, 0))
# Weight of the norms of q and k of such a head: at 64 channels, the patch that it looks at then
# has a score 4 higher than the patches beside it.
_SHARPNESS = 2.0
# Of weights of q and k that were drawn at random, so much stays: content can be learned from it.
_CONTENT = 0.25


@torch.no_grad()
def start_at_random(model: nn.Module, seed: int) -> None:
    """Draw fresh weights in place: truncated normal (0.02), zero biases; layers that start at zero.

    Every matrix has a generator of its own, so that the weights depend on the seed and the kind of
    device alone, not on how the model is sharded.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = torch.zeros(module.weight.shape, device=module.weight.device)
            if not isinstance(module, ZeroLinear):
                generator = keyed_generator(seed, name, device=module.weight.device)
                nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            _assign(module.weight, weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)
        elif isinstance(module, Modulation):
            nn.init.zeros_(module.offset)


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


def principal_components(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, standard deviations and directions of the principal components of patches.

    Args:
        patches: [N, D].

    Returns:
        mean [D], deviation of every component [D], and the components as columns [D, D], strongest
        first; float64.
    """
    patches = patches.double()
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh((patches - mean).T.cov())
    return mean, variance.flip(0).clamp(min=0).sqrt(), basis.flip(1)


@torch.no_grad()
def start_from_pca(model: Autoencoder, patches: Tensor) -> None:
    """Set the four linear layers so that model(x) is close to a PCA of the patches, in place.

    The blocks keep their weights; with a small LayerScale they start near the identity. Of the c
    latent channels c - 2 carry principal components: LayerNorm takes the mean and the length.

    The channels of both streams are principal components too, strongest first, as many as there
    are channels: the encoder's blocks see details that the latent drops, and what the decoder's
    add to a channel is a detail of the patch. A component is divided by the square root of its
    standard deviation, so that weak ones count for more than in pixels and for less than noise.

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
    mean, std, basis = principal_components(patches)
    spread = std[:components].square().mean().sqrt()
    # What one unit of a channel stands for; over the components of the latent, the stream that the
    # blocks see and add to has unit variance.
    unit = std.clamp(min=float(_WEAKEST * std[0])).sqrt()
    unit *= (std / unit)[:components].square().mean().sqrt()

    frame = _zero_mean_frame(config.latent_channels)  # [c, c-1]
    carrier = frame[:, 0] * _CARRIER * components**0.5
    if config.encoder_width:
        kept = min(config.encoder_width, config.patch_dim)
        project = basis[:, :kept].T / unit[:kept, None]
        _set_linear(model.patch_embed, project, -project @ mean)
        _set_linear(model.to_code, frame[:, 1:] * unit[:components] / spread, carrier)
    else:
        project = frame[:, 1:] @ basis[:, :components].T / spread
        _set_linear(model.to_code, project, carrier - project @ mean)

    # The latent is sqrt(c) * code / |code|; undo that at the typical length of a code.
    length = (components * (1 + _CARRIER**2)) ** 0.5 / config.latent_channels**0.5
    embed = frame[:, 1:].T * length * spread / unit[:components, None]
    _set_linear(model.decoder_embed, embed, torch.zeros(components))
    kept = min(config.decoder_width, config.patch_dim)
    _set_linear(model.to_pixels, basis[:, :kept] * unit[:kept], mean)


@torch.no_grad()
def attend_to_neighbors(model: Autoencoder) -> None:
    """Let the heads of every block start with looking at the patches beside their own, in place.

    Heads look left, right, up and down in turn, whatever the patches hold; their values keep their
    weights. The idea is that of ConViT (arXiv:2103.10697), here by RoPE: q and k are read from a
    constant channel of the stream, the last, which is taken from the linear layers around the
    blocks; q is k rotated by the offset, so that their product is greatest there. Call it last.
    """
    starts = []
    if model.config.encoder_depth:
        starts.append(model.patch_embed)
    if model.config.decoder_depth:
        starts.append(model.decoder_embed)
        _assign(model.to_pixels.weight, _with_last(model.to_pixels.weight, column=0.0))
    for linear in starts:
        _assign(linear.weight, _with_last(linear.weight, row=0.0))
        _assign(linear.bias, _with_last(linear.bias, row=1.0))
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        attention = block.attn
        qkv = _whole(attention.qkv_proj.weight).unflatten(0, (3, attention.num_heads, -1))
        qkv[:2] *= _CONTENT
        for head in range(attention.num_heads):
            q, k = _looking_at(_NEIGHBORS[head % len(_NEIGHBORS)], attention.head_dim)
            qkv[0, head, :, -1], qkv[1, head, :, -1] = q.to(qkv), k.to(qkv)
        _assign(attention.qkv_proj.weight, qkv.flatten(0, 2))
        for norm in (attention.norm_q, attention.norm_k):
            nn.init.constant_(norm.weight, _SHARPNESS)


def _looking_at(offset: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Return q and k [head_dim], of length 1, whose product under RoPE peaks at an offset.

    With k = (a, 0) and q = (a cos(w d), a sin(w d)) in the pair of channels of frequency w, the
    product at a distance x is a^2 cos(w (x - d)). High frequencies tell neighbours apart, so that
    a^2 is proportional to w.
    """
    step = torch.arange(head_dim // 4)
    frequency = ROPE_THETA ** (-2 * step / (head_dim / 2))
    amplitude = (frequency / frequency.sum() / 2).sqrt()
    angle = torch.stack([distance * frequency for distance in offset])  # [2, head_dim/4]
    q = torch.stack((angle.cos(), angle.sin()), dim=-1) * amplitude[:, None]
    k = torch.stack((torch.ones_like(angle), torch.zeros_like(angle)), dim=-1)
    return q.flatten(), (k * amplitude[:, None]).flatten()


def _with_last(
    parameter: Tensor, *, row: float | None = None, column: float | None = None
) -> Tensor:
    """Return the values of a parameter with another last row or column."""
    value = _whole(parameter)
    if row is not None:
        value[-1] = row
    if column is not None:
        value[:, -1] = column
    return value


def _whole(parameter: Tensor) -> Tensor:
    """Return a copy of all values of a parameter, sharded or not; called by every rank."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()


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
