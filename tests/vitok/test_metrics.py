import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from vitok.metrics import constant_patches, psnr, ssim


def image_pair(height: int, width: int) -> tuple[Tensor, Tensor]:
    target = torch.rand(3, height, width) * 2 - 1
    return (target + 0.3 * torch.randn_like(target)).clamp(-1, 1), target


def channels_last(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (40, 31)])
def test_psnr_equals_scikit_image(height: int, width: int) -> None:
    output, target = image_pair(height, width)
    expected = peak_signal_noise_ratio(channels_last(target), channels_last(output), data_range=2)
    assert psnr(output, target) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(11, 11), (12, 50), (40, 31)])
def test_ssim_equals_scikit_image_with_its_gaussian_window(height: int, width: int) -> None:
    output, target = image_pair(height, width)
    expected = structural_similarity(
        channels_last(output),
        channels_last(target),
        data_range=2,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(output, target) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (30, 1), (2, 2), (3, 20), (10, 10)])
def test_ssim_of_an_image_smaller_than_its_window_is_defined(height: int, width: int) -> None:
    output, target = image_pair(height, width)
    assert ssim(target, target) == pytest.approx(1, abs=1e-5)
    assert -1 <= ssim(output, target) < 1


def test_ssim_of_a_line_of_pixels_compares_each_with_its_partner():
    """In a window of one pixel nothing is left but the comparison of means."""
    output, target = image_pair(1, 9)
    c1 = (0.01 * 2) ** 2
    expected = (2 * output * target + c1) / (output**2 + target**2 + c1)
    assert ssim(output, target) == pytest.approx(float(expected.mean()), abs=1e-5)


def test_metrics_clamp_the_output():
    output, target = image_pair(20, 20)
    beyond = output * 3
    assert psnr(beyond, target) == psnr(beyond.clamp(-1, 1), target)
    assert ssim(beyond, target) == ssim(beyond.clamp(-1, 1), target)
    assert psnr(target, target) == pytest.approx(100)


def test_constant_patches_are_the_mean_of_the_pixels_inside_the_image():
    image = torch.rand(3, 7, 10)
    flat = constant_patches(image, 4)
    assert flat.shape == image.shape
    for top in range(0, 7, 4):
        for left in range(0, 10, 4):
            window = (slice(None), slice(top, top + 4), slice(left, left + 4))
            mean = image[window].mean((1, 2), keepdim=True).expand_as(image[window])
            torch.testing.assert_close(flat[window], mean)


@pytest.mark.parametrize("change", [0.02, -0.02])
def test_no_other_colours_of_the_patches_have_a_higher_psnr(change: float) -> None:
    image = torch.rand(3, 7, 10) * 1.8 - 0.9
    best = constant_patches(image, 4)
    for channel in range(3):
        for top in range(0, 7, 4):
            for left in range(0, 10, 4):
                other = best.clone()
                other[channel, top : top + 4, left : left + 4] += change
                assert psnr(other, image) < psnr(best, image)
