"""Reconstruction losses on packed rows.

Every term is a sum over the images of the row. The training loop divides by the number of images
of the whole global step, so neither the packing nor the number of workers changes a loss.
"""

from functools import cache
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from vitok.config import config
from vitok.packed import PackedTokens

CHARBONNIER_EPS = 1e-6
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
DINO_TILE = 224  # pixels; a multiple of DINOv3's patch of 16
DINO_REPOSITORY = "facebook/dinov3-vits16-pretrain-lvd1689m"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@config
class LossConfig:
    """Weights of the terms; the values of arXiv 2605.05331.

    Attributes:
        charbonnier: weight of sqrt((x - y)^2 + 1e-6).
        ssim: weight of 1 - SSIM.
        ssim_tile: SSIM is taken on one random square window of every image, of about this many
            pixels a side.
        dino: weight of the DINOv3 tile loss; 0 leaves the network out.
        dino_weights: folder or repository id of DINOv3-S/16 in the transformers format.
    """

    charbonnier: float = 1.0
    ssim: float = 0.1
    ssim_tile: int = 112
    dino: float = 0.0
    dino_weights: str = ""

    def __post_init__(self) -> None:
        if min(self.charbonnier, self.ssim, self.dino) < 0:
            raise ValueError("loss weights must not be negative")
        if self.ssim and self.ssim_tile < SSIM_WINDOW:
            raise ValueError(f"ssim_tile={self.ssim_tile} must be at least {SSIM_WINDOW} pixels")
        if self.dino and not self.dino_weights:
            raise ValueError(
                f"dino={self.dino} needs DINOv3 weights: request access to {DINO_REPOSITORY} on "
                "Hugging Face, download it, and set dino_weights to the folder (or set dino to 0)"
            )


class ReconstructionLoss(nn.Module):
    """The weighted sum of the terms that a LossConfig asks for."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.dino = DinoTileLoss.from_pretrained(config.dino_weights) if config.dino else None

    def forward(
        self, output: PackedTokens, target: PackedTokens, tile_position: Tensor
    ) -> dict[str, Tensor]:
        """Compare a reconstruction with its source.

        Args:
            output, target: rows of one layout, tokens [T, 3P^2] in [-1, 1].
            tile_position: [S, 2] in [0, 1), where in each image the tiles lie.

        Returns:
            scalar float32 tensors, each summed over the images: "loss" (the weighted sum) and
            every term by name.
        """
        output = output.with_tokens(output.tokens.float())
        target = target.with_tokens(target.tokens.float())
        terms = {"charbonnier": charbonnier(output, target)}
        total = self.config.charbonnier * terms["charbonnier"]
        if self.config.ssim:
            terms["ssim_loss"] = ssim_tile_loss(
                output, target, tile_position, self.config.ssim_tile
            )
            total = total + self.config.ssim * terms["ssim_loss"]
        if self.dino is not None:
            terms["dino"] = self.dino(output, target, tile_position)
            total = total + self.config.dino * terms["dino"]
        return {"loss": total, **terms}


def charbonnier(output: PackedTokens, target: PackedTokens) -> Tensor:
    """Return sqrt((x - y)^2 + 1e-6), mean over each image's tokens, summed over the images."""
    difference = output.tokens - target.tokens
    token_loss_T = (difference.square() + CHARBONNIER_EPS).sqrt().mean(dim=-1)
    real_T = output.segment_ids >= 0
    lengths_S = output.cu_seqlens.diff().clamp(min=1)
    weight_T = real_T / lengths_S[output.segment_ids.clamp(min=0)]
    return (token_loss_T * weight_T).sum()


def gather_tiles(
    packed: PackedTokens, position: Tensor, tile_patches: int
) -> tuple[Tensor, Tensor]:
    """Cut one square tile, aligned to the patches, out of every image of a row.

    Args:
        packed: tokens [T, 3P^2].
        position: [S, 2] in [0, 1): 0 is the top or left, towards 1 the bottom or right.
        tile_patches: side of the tile in patches.

    Returns:
        tiles [S, 3, t*P, t*P], gray (0) where the image is smaller than the tile, and their
        extent [S, 2]: pixels (height, width) of the tile that lie on the image itself.
    """
    patch_size = isqrt(packed.tokens.shape[1] // 3)
    slack_S2 = (packed.grid - tile_patches).clamp(min=0)
    origin_S2 = (position * (slack_S2 + 1)).long().minimum(slack_S2)
    inside = torch.arange(tile_patches, device=packed.tokens.device)
    row_St = origin_S2[:, 0:1] + inside
    column_St = origin_S2[:, 1:2] + inside
    valid_Stt = (row_St < packed.grid[:, 0:1])[:, :, None] & (column_St < packed.grid[:, 1:2])[
        :, None
    ]
    index_Stt = (
        packed.cu_seqlens[:-1, None, None]
        + row_St[:, :, None] * packed.grid[:, 1, None, None]
        + column_St[:, None]
    )
    index = torch.where(valid_Stt, index_Stt, 0).flatten()
    tokens = packed.tokens.index_select(0, index) * valid_Stt.flatten()[:, None]
    side = tile_patches * patch_size
    tiles = tokens.reshape(-1, tile_patches, tile_patches, 3, patch_size, patch_size)
    tiles = tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)
    extent_S2 = (packed.image_size - origin_S2 * patch_size).clamp(min=0, max=side)
    return tiles, extent_S2


def ssim_tile_loss(
    output: PackedTokens, target: PackedTokens, position: Tensor, tile_pixels: int
) -> Tensor:
    """Return 1 - SSIM on one tile of each image, summed over the images.

    The tile is `tile_pixels` rounded to whole patches. Only windows that lie on the image itself
    count; an image under 11 pixels high or wide has none, and adds 0.
    """
    patch_size = isqrt(target.tokens.shape[1] // 3)
    tile_patches = max(round(tile_pixels / patch_size), -(-SSIM_WINDOW // patch_size))
    output_tiles, extent_S2 = gather_tiles(output, position, tile_patches)
    target_tiles, _ = gather_tiles(target, position, tile_patches)
    similarity = ssim_map(output_tiles, target_tiles).mean(dim=1)  # [S, n-10, n-10]
    place = torch.arange(similarity.shape[-1], device=similarity.device)
    windows_S2 = (extent_S2 - (SSIM_WINDOW - 1)).clamp(min=0)
    inside = (place < windows_S2[:, 0:1])[:, :, None] & (place < windows_S2[:, 1:2])[:, None]
    return (((1 - similarity) * inside).sum((1, 2)) / windows_S2.prod(1).clamp(min=1)).sum()


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of every 11 x 11 window (Wang et al. 2004; Gaussian, sigma 1.5).

    The same definition as pytorch-msssim's. The window is applied as a product with a banded
    matrix, which on CPUs takes about half the time of a depthwise convolution at 112 pixels.

    Args:
        x, y: [S, 3, n, n] in [-1, 1], float32.

    Returns:
        [S, 3, n-10, n-10]
    """
    band = _gaussian_band(x.shape[-1]).to(x.device)  # [n-10, n]
    moments = torch.stack((x, y, x * x, y * y, x * y))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = band @ (moments @ band.T)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # data range 2
    covariance = mean_xy - mean_x * mean_y
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


@cache
@torch.inference_mode(False)  # or the cached tensor could not be used in a later training step
def _gaussian_band(size: int) -> Tensor:
    offset = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    rows = size - SSIM_WINDOW + 1
    place = torch.arange(size)[None] - torch.arange(rows)[:, None]
    inside = (place >= 0) & (place < SSIM_WINDOW)
    return torch.where(inside, window[place.clamp(0, SSIM_WINDOW - 1)], 0.0)


class DinoTileLoss(nn.Module):
    """Distance of DINOv3 features on random 224 x 224 tiles (arXiv 2605.05331).

    Features of every block, L2-normalised per token; mean squared difference over tokens and
    channels, mean over blocks, summed over images. The network is frozen; gradients flow through
    it into the reconstruction.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "DinoTileLoss":
        """Stay in eval mode: in training DINOv3 jitters its positions."""
        return super().train(False)

    @classmethod
    def from_pretrained(cls, weights: str) -> "DinoTileLoss":
        """Load DINOv3 from a folder or a Hugging Face repository that is already on this machine.

        Raises:
            FileNotFoundError: the weights are not there.
        """
        from transformers import DINOv3ViTModel

        try:
            network = DINOv3ViTModel.from_pretrained(
                weights, local_files_only=not Path(weights).is_dir()
            )
        except OSError as error:
            raise FileNotFoundError(
                f"no DINOv3 weights at {weights!r}; request access to {DINO_REPOSITORY} on Hugging "
                f"Face, download it with `hf download {DINO_REPOSITORY} --local-dir FOLDER`, and "
                "set loss.dino_weights to FOLDER"
            ) from error
        return cls(network)

    def forward(self, output: PackedTokens, target: PackedTokens, tile_position: Tensor) -> Tensor:
        patch_size = isqrt(target.tokens.shape[1] // 3)
        tile_patches = -(-DINO_TILE // patch_size)
        used_S = target.grid[:, 0] > 0
        with torch.no_grad():
            target_features = self._features(gather_tiles(target, tile_position, tile_patches)[0])
        output_features = self._features(gather_tiles(output, tile_position, tile_patches)[0])
        distance_S = torch.stack(
            [
                (a - b).square().mean(dim=(1, 2))
                for a, b in zip(output_features, target_features, strict=True)
            ]
        ).mean(dim=0)
        return (distance_S * used_S).sum()

    def _features(self, tiles: Tensor) -> list[Tensor]:
        pixels = (tiles[..., :DINO_TILE, :DINO_TILE] + 1) / 2
        pixels = ((pixels - self.mean) / self.std).to(next(self.network.parameters()).dtype)
        states = self.network(pixels, output_hidden_states=True).hidden_states[1:]
        return [nn.functional.normalize(state.float(), dim=-1) for state in states]
