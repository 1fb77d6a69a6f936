"""PSNR and SSIM of an image, and the baseline that a patch autoencoder has to beat."""

import pytorch_msssim
import torch
from torch import Tensor

from vitok.patches import pad_to_patch, patchify, unpatchify


def psnr(output: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio of one image in dB.

    Args:
        output, target: [3, H, W] in [-1, 1], so the data range is 2; output is clamped to it.

    Returns:
        10 log10(4 / MSE), at most 100: equal images must not make a mean over images infinite.
    """
    error = (output.float().clamp(-1, 1) - target.float()).square().mean().clamp(min=4e-10)
    return (10 * torch.log10(4 / error)).item()


def ssim(output: Tensor, target: Tensor) -> float:
    """Return the structural similarity of one image (pytorch-msssim, data range 2).

    The Gaussian window of 11 pixels shrinks, to an odd size, on an image that is smaller.

    Args:
        output, target: [3, H, W] in [-1, 1]; output is clamped to it.
    """
    window = min(11, *target.shape[-2:])
    window -= 1 - window % 2
    if window == 1:
        # pytorch-msssim refuses sides of one pixel; repeating every pixel changes no mean.
        output, target = output.repeat(1, 2, 2), target.repeat(1, 2, 2)
    similarity = pytorch_msssim.ssim(
        output.float().clamp(-1, 1)[None], target.float()[None], data_range=2, win_size=window
    )
    return similarity.item()


def constant_patches(image: Tensor, patch_size: int) -> Tensor:
    """Return the best image that has one colour in every patch: each patch at its mean.

    Args:
        image: [3, H, W].
    """
    height, width = image.shape[1:]
    # Padding must not enter the mean of a patch that reaches over the edge.
    weight = pad_to_patch(torch.ones_like(image), patch_size)
    patches, _ = patchify(pad_to_patch(image, patch_size), patch_size)
    weights, _ = patchify(weight, patch_size)
    patches, weights = (x.unflatten(1, (3, -1)) for x in (patches, weights))
    mean = patches.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return unpatchify(mean.expand_as(patches).flatten(1), (height, width), patch_size)
