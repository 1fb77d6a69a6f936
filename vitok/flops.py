"""The work of a training step, and how much of it a device could do in a second."""

import re
import statistics
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from vitok.dit import DiTConfig
from vitok.variants import AutoencoderConfig, Part

# The vendor's dense bfloat16 peaks with float32 accumulation, in operations per second: device name
# as CUDA gives it, what it is called here, peak. Data sheets that print the figure with 2:4
# sparsity alone are halved. The first that matches counts.
_VENDOR_PEAKS = (
    # NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOPS for all form factors.
    (r"\bA100\b", "A100", 312e12),
    # NVIDIA H100 Tensor Core GPU data sheet: 1,513 (PCIe), 1,671 (NVL) and 1,979 (SXM) TFLOPS with
    # sparsity.
    (r"\bH100 PCIe\b", "H100 PCIe", 756.5e12),
    (r"\bH100 NVL\b", "H100 NVL", 835.5e12),
    (r"\bH100\b", "H100 SXM", 989.5e12),
    # NVIDIA H200 Tensor Core GPU data sheet: 1,671 (NVL) and 1,979 (SXM) TFLOPS with sparsity.
    (r"\bH200 NVL\b", "H200 NVL", 835.5e12),
    (r"\bH200\b", "H200 SXM", 989.5e12),
    # NVIDIA HGX B200 data sheet: 36 PFLOPS with sparsity for eight. A GB200 has another peak.
    (r"\bB200\b", "B200", 2250e12),
    # NVIDIA L40S data sheet: 362.05 TFLOPS without sparsity.
    (r"\bL40S\b", "L40S", 362.05e12),
    # NVIDIA Ada GPU Architecture white paper, appendix A: 165.2 TFLOPS without sparsity.
    (r"\bRTX 4090(?! D| Laptop)\b", "RTX 4090", 165.2e12),
)
# Sides of the square matrices that are multiplied where there is no vendor's figure.
_CPU_SIDE, _CUDA_SIDE = 2048, 8192
_MEASURED_S = 2.0


class Peak(NamedTuple):
    """How fast a device multiplies matrices, and how that is known."""

    flops_per_s: float
    source: str


def training_flops(
    config: AutoencoderConfig | DiTConfig, image_tokens: Iterable[float], part: Part | None = None
) -> float:
    """Return the floating-point operations of a forward and a backward pass over images.

    Matrix products only, with full attention inside each image: what the model asks for, so
    padding and recomputed activations count nothing, and neither does the loss. The backward pass
    counts as two forward passes, the first layer's too, which needs no gradient of the pixels.

    Args:
        image_tokens: real tokens of each image of one or more rows; empty slots may be among them.
        part: of this part of an autoencoder alone.
    """
    if isinstance(config, DiTConfig):
        return 3 * sum(n * config.flops_per_token(n) for n in image_tokens if n)
    return 3 * sum(n * config.flops_per_token(n, part) for n in image_tokens)


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Peak:
    """Return the peak of matrix products: the vendor's for known GPUs in bfloat16, else measured.

    Measuring takes some 2 s. On a CPU it is done with the threads that torch uses now.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for pattern, called, peak in _VENDOR_PEAKS:
            if re.search(pattern, name):
                return Peak(peak, f"{called} dense bf16, vendor")
    on_cuda = device.type == "cuda"
    side = _CUDA_SIDE if on_cuda else _CPU_SIDE
    product_s = statistics.median(_time_products(device, dtype, side))
    kind = "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    where = torch.cuda.get_device_name(device) if on_cuda else _threads()
    return Peak(2 * side**3 / product_s, f"measured {kind} matmul, {where}")


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread{'s' * (number > 1)}"


def _time_products(device: torch.device, dtype: torch.dtype, side: int) -> list[float]:
    """Return the seconds of each of at least three products of square matrices."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = left @ right  # the first one also chooses and loads its kernel
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _MEASURED_S:
        _wait_for(device)
        start = time.perf_counter()
        torch.matmul(left, right, out=out)
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
