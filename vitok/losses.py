"""Reconstruction losses on packed rows.

Every term is a sum over the images of the row. The training loop divides by the number of images
of the whole global step, so neither the packing nor the number of workers changes a loss.
"""

from functools import cache
from math import isqrt
from typing import Self

import torch
from torch import Tensor, nn

from vitok.autoencoder import Reconstruction
from vitok.config import config
from vitok.packed import PackedTokens
from vitok.perceptual import DINO_REPOSITORY, VGG_REPOSITORY, DinoTileLoss, LpipsTileLoss
from vitok.tiles import gather_tiles, inside_mask

CHARBONNIER_EPS = 1e-6
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


@config
class LossConfig:
    """Weights of the terms; the values of arXiv 2605.05331.

    Attributes:
        charbonnier: weight of sqrt((x - y)^2 + 1e-6).
        ssim: weight of 1 - SSIM.
        ssim_tile: SSIM is taken on one random square window of every image, of about this many
            pixels a side.
        kl: weight of the divergence of KL latents, which no other latents have.
        dino: weight of the DINOv3 tile loss; 0 leaves the network out.
        dino_weights: folder or repository id of DINOv3-S/16 in the transformers format.
        lpips: weight of LPIPS on the same tiles, for ablations; 0 leaves the network out.
        lpips_weights: safetensors file of torchvision's VGG16.
    """

    charbonnier: float = 1.0
    ssim: float = 0.1
    ssim_tile: int = 112
    kl: float = 0.01
    dino: float = 0.0
    dino_weights: str = ""
    lpips: float = 0.0
    lpips_weights: str = ""

    def __post_init__(self) -> None:
        if min(self.charbonnier, self.ssim, self.kl, self.dino, self.lpips) < 0:
            raise ValueError("loss weights must not be negative")
        if self.ssim and self.ssim_tile < SSIM_WINDOW:
            raise ValueError(f"ssim_tile={self.ssim_tile} must be at least {SSIM_WINDOW} pixels")
        if self.dino and not self.dino_weights:
            raise ValueError(
                f"dino={self.dino} needs DINOv3 weights: request access to {DINO_REPOSITORY} on "
                "Hugging Face, download it, and set dino_weights to the folder (or set dino to 0)"
            )
        if self.lpips and not self.lpips_weights:
            raise ValueError(
                f"lpips={self.lpips} needs VGG16 weights: download model.safetensors of "
                f"{VGG_REPOSITORY} from Hugging Face, and set lpips_weights to the file (or set "
                "lpips to 0)"
            )

    @classmethod
    def paper(cls, dino_weights: str) -> Self:
        """Return the loss of the published models, with DINO at 500.

        The paper prints rFID .74, rFDD 2.49, PSNR 34.2 and SSIM .924 for the 5B f16x64 on ImageNet
        256p. Its ablation, which has no row for 500, prints rFID 4.87, rFDD 10.42 and SSIM .931
        without DINO, and .51, 1.45 and .919 at 250.
        """
        return cls(dino=500.0, dino_weights=dino_weights)

    @classmethod
    def perceptual(cls, dino_weights: str) -> Self:
        """Return the perceptual variant, with DINO at 1000.

        Nearer in distribution and farther in pixels: the paper prints rFID .30, rFDD 1.12, PSNR
        33.6 and SSIM .914 for the 5B f16x64 on ImageNet 256p.
        """
        return cls(dino=1000.0, dino_weights=dino_weights)


class ReconstructionLoss(nn.Module):
    """The weighted sum of the terms that a LossConfig asks for.

    Raises:
        FileNotFoundError: the weights of a perceptual network are not there.
        ImportError: the LPIPS term is asked for, and lpips is not installed.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.dino = DinoTileLoss.from_pretrained(config.dino_weights) if config.dino else None
        self.lpips = LpipsTileLoss.from_pretrained(config.lpips_weights) if config.lpips else None

    def forward(
        self, reconstruction: Reconstruction, target: PackedTokens, tile_position: Tensor
    ) -> dict[str, Tensor]:
        """Compare a reconstruction with its source.

        Args:
            target: the row that was reconstructed, tokens [T, 3P^2] in [-1, 1].
            tile_position: [S, 2] in [0, 1), where in each image the tiles lie.

        Returns:
            scalar float32 tensors, each summed over the images: "loss" (the weighted sum) and
            every term by name.
        """
        output = reconstruction.pixels.with_tokens(reconstruction.pixels.tokens.float())
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
        if self.lpips is not None:
            terms["lpips"] = self.lpips(output, target, tile_position)
            total = total + self.config.lpips * terms["lpips"]
        if reconstruction.kl_T is not None:
            terms["kl"] = sum_of_image_means(reconstruction.kl_T, target)
            total = total + self.config.kl * terms["kl"]
        return {"loss": total, **terms}


def charbonnier(output: PackedTokens, target: PackedTokens) -> Tensor:
    """Return sqrt((x - y)^2 + 1e-6), mean over each image's tokens, summed over the images."""
    difference = output.tokens - target.tokens
    token_loss_T = (difference.square() + CHARBONNIER_EPS).sqrt().mean(dim=-1)
    return sum_of_image_means(token_loss_T, output)


def sum_of_image_means(token_loss_T: Tensor, packed: PackedTokens) -> Tensor:
    """Average a loss [T] over the tokens of each image, and sum over the images; scalar."""
    real_T = packed.segment_ids >= 0
    lengths_S = packed.cu_seqlens.diff().clamp(min=1)
    weight_T = real_T / lengths_S[packed.segment_ids.clamp(min=0)]
    return (token_loss_T * weight_T).sum()


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
    windows_S2 = (extent_S2 - (SSIM_WINDOW - 1)).clamp(min=0)
    inside = inside_mask(windows_S2, similarity.shape[-1])
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
    band = _gaussian_band(x.shape[-1], x.device)  # [n-10, n]
    moments = torch.stack((x, y, x * x, y * y, x * y))
    # Variances are small differences of these means: autocast would leave nothing of them.
    with torch.autocast(x.device.type, enabled=False):
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = band @ (moments @ band.T)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # data range 2
    covariance = mean_xy - mean_x * mean_y
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


@cache
@torch.inference_mode(False)  # or the cached tensor could not be used in a later training step
def _gaussian_band(size: int, device: torch.device) -> Tensor:
    offset = torch.arange(SSIM_WINDOW, device=device) - SSIM_WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    rows = torch.arange(size - SSIM_WINDOW + 1, device=device)
    place = torch.arange(size, device=device)[None] - rows[:, None]
    inside = (place >= 0) & (place < SSIM_WINDOW)
    return torch.where(inside, window[place.clamp(0, SSIM_WINDOW - 1)], 0.0)
