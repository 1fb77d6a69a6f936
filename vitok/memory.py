"""What a training holds in a worker's memory, known before it starts."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from vitok.attention import MAX_EXPLICIT_TOKENS
from vitok.autoencoder import Autoencoder
from vitok.losses import LossConfig
from vitok.optim import OptimConfig
from vitok.parallel import ParallelConfig
from vitok.transformer import Block
from vitok.variants import AutoencoderConfig

_FLOAT32 = 4
# Tokens of the block that is run to see what it keeps; what it keeps is proportional to them.
_PROBE_TOKENS = 16
# Tensors in float32 that the losses keep: Charbonnier of the size of the row's pixels, SSIM of the
# size of its windows.
_CHARBONNIER_COPIES, _SSIM_COPIES = 2, 14


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training holds on one worker.

    Attributes:
        states: its share of float32 weights, gradients, optimizer and moving average.
        gathered: whole weights of the blocks that FSDP has gathered, and a block's gradients.
        activations: what autograd keeps of one packed row between forward and backward pass.
    """

    states: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.gathered + self.activations


def training_memory(
    model: AutoencoderConfig,
    *,
    row_tokens: int,
    image_tokens: int,
    num_workers: int,
    optim: OptimConfig,
    parallel: ParallelConfig,
    loss: LossConfig,
    compute_dtype: torch.dtype = torch.bfloat16,
    on_cuda: bool = True,
    frozen_encoder: bool = False,
) -> TrainingMemory:
    """Return what a training with FSDP2 holds on each of its workers.

    What a block keeps is counted by running one on the meta device, without compilation; compiled
    blocks keep less. Not counted are perceptual networks and their tiles, the kernels' workspace,
    fragmentation, a checkpoint's copy in host memory, and what torch itself takes: leave a tenth.

    Args:
        row_tokens: of a packed row, padding included.
        image_tokens: of each of its images; where attention is not fused, its scores are kept.
        frozen_encoder: the encoder has neither gradients nor optimizer, and keeps nothing.
    """
    whole = _on_meta(model)
    num_weights = whole.num_parameters()
    num_trained = whole.num_parameters("decoder") if frozen_encoder else num_weights
    num_averaged = num_trained if optim.ema_decay else 0
    moments = 2 * num_trained
    blocks = [(whole.decoder_blocks, model.decoder_width, model.decoder_heads)]
    if not frozen_encoder:
        blocks.append((whole.encoder_blocks, model.encoder_width, model.encoder_heads))
    if optim.algorithm == "muon":  # one moment for the matrices of blocks
        moments -= sum(
            p.numel() for group, _, _ in blocks for p in group.parameters() if p.ndim >= 2
        )
    states = _FLOAT32 * (num_weights + num_trained + moments + num_averaged) / num_workers

    width = compute_dtype.itemsize
    largest = max((_numel(group[0]) for group, _, _ in blocks if len(group)), default=0)
    # A block and the one after it, which is gathered while the first computes.
    gathered = largest * (2 * width + _FLOAT32)

    per_token = recomputed = 0.0
    for group, channels, heads in blocks:
        if not len(group):
            continue
        whole_block = _kept_by_block(channels, heads, image_tokens, compute_dtype, on_cuda)
        num_inputs = len(group) // parallel.checkpoint_every if parallel.checkpoint_every else 0
        per_token += (len(group) - num_inputs) * whole_block + num_inputs * channels * width
        if num_inputs:  # one block at a time is computed again
            recomputed = max(recomputed, whole_block)
    image_pixels = image_tokens * model.patch_size**2
    window = min(1.0, loss.ssim_tile**2 / image_pixels) if loss.ssim else 0.0
    copies = _CHARBONNIER_COPIES + _SSIM_COPIES * window
    per_token += model.patch_dim * copies * _FLOAT32
    per_token += width * (model.decoder_width + 3 * model.latent_channels)
    if not frozen_encoder:
        per_token += width * (model.patch_dim + model.encoder_width)
    return TrainingMemory(states, gathered, row_tokens * (per_token + recomputed))


@cache
def _on_meta(model: AutoencoderConfig) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(model)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def _kept_by_block(
    width: int, num_heads: int, image_tokens: int, dtype: torch.dtype, on_cuda: bool
) -> float:
    """Return the bytes for each token that autograd keeps of a block's forward pass."""
    with torch.device("meta"):
        block = Block(width, num_heads, layer_scale=0.1).to(dtype)
        x_TW = torch.empty(_PROBE_TOKENS, width, dtype=dtype, requires_grad=True)
        rotation = torch.empty(_PROBE_TOKENS, 1, width // num_heads // 2, 2)
    own = {p.untyped_storage()._cdata for p in (*block.parameters(), rotation)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        h_TW = block.norm1(x_TW)
        q_THD, k_THD, v_THD = block.attn.project(h_TW, rotation)
        attended_TW = (q_THD + k_THD + v_THD).flatten(1)  # keeps nothing; counted below
        block.layer_scale(block.attn.out_proj(attended_TW) + block.ffn(h_TW))
    counted = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    attention = _kept_by_attention(width, num_heads, image_tokens, dtype, on_cuda)
    return counted / _PROBE_TOKENS + attention


def _kept_by_attention(
    width: int, num_heads: int, image_tokens: int, dtype: torch.dtype, on_cuda: bool
) -> float:
    """Return the bytes for each token that attention keeps beyond its output.

    That is q, k and v, and of every head the scores (explicit products) or their sum (fused). On a
    CPU v is a view that holds on to all of the layer's output, before q and k were turned.
    """
    fused = on_cuda or image_tokens > MAX_EXPLICIT_TOKENS
    scores = _FLOAT32 if fused else image_tokens * dtype.itemsize
    return (3 if on_cuda else 5) * width * dtype.itemsize + num_heads * scores
