"""Benchmark of reconstruction over resolutions: time, memory and quality."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from jobs.bench.output import finish
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.evaluation.baselines import random_baseline, reconstruct_with
from pipelines.evaluation.peak_memory import memory_in_use, start_peak
from pipelines.reading.decode import decode_rgb
from vitok.autoencoder import Autoencoder
from vitok.images import to_tensor
from vitok.initialize import start_at_random, start_from_pca
from vitok.metrics import psnr
from vitok.packed import pack_images
from vitok.patches import grid_size, num_tokens
from vitok.variants import AutoencoderConfig, mean_window_keys

_MB = 2**20
# A case is repeated until it has taken so long, or often enough.
_ENOUGH_S = 10.0
# Convolutional baselines attend over all of their smallest grid: worse than linear in the pixels.
_BASELINE_TIME_EXPONENT = 1.5


@dataclass(frozen=True)
class Case:
    """One subject at one resolution.

    Attributes:
        subject: model or baseline.
        window: radius of sliding-window attention, "full", or "" for baselines.
        resolution: pixels of each side.
        seconds: of encoding and decoding, median.
        peak_mb: memory at its peak beyond what was in use before, weights included in the latter.
        process_mb: all memory of the process, or of the device, at the peak.
        psnr: in dB; None for baselines, whose weights are random.
        skipped: why there are no figures.
    """

    subject: str
    window: str
    resolution: int
    seconds: float | None = None
    peak_mb: float | None = None
    process_mb: float | None = None
    psnr: float | None = None
    skipped: str = ""


@dataclass(frozen=True)
class _Subject:
    name: str
    window: str
    reconstruct: Callable[[Tensor], Tensor]  # [3, H, W] in [-1, 1] to the same
    flops: Callable[[int], float]  # of a resolution, up to a factor
    has_psnr: bool


def run(
    model: str = "Bd4-B/16x64",
    windows: tuple[int | Literal["full"], ...] = (8, "full"),
    resolutions: tuple[int, ...] = (256, 512, 1024, 2048, 4096),
    baselines: tuple[str, ...] = (),
    image: str = "",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    threads: int = 2,
    repeats: int = 5,
    limit_s: float = 120.0,
    limit_gb: float | None = None,
    json: bool = False,
) -> None:
    """Time, memory and PSNR of reconstruction over resolutions, full and window attention.

    Args:
        model: a name, such as Ld4-L/16x64, for random blocks around a PCA of the photograph, or the
            location of trained weights.
        windows: radii in patches of sliding-window attention, or full.
        resolutions: pixels of each side.
        baselines: sd-vae, flux, dc-ae: their shapes with random weights (extra `baselines`).
        image: photograph to reconstruct; one that scikit-learn carries if empty.
        dtype: precision of the weights.
        threads: CPU threads.
        repeats: timed passes, fewer where they take long; the median counts.
        limit_s: a case expected to take longer is left out, and says so.
        limit_gb: likewise for memory; by default what is available.
        json: print the JSON alone.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def show(case: Case) -> None:
        if json:
            return
        figures = case.skipped
        if not figures:
            quality = "" if case.psnr is None else f"  {case.psnr:6.2f} dB"
            figures = f"{case.seconds:8.2f} s  {case.peak_mb:8.0f} MB{quality}"
        window = f"window {case.window}" if case.window else ""
        print(f"{case.subject:<14} {window:<11} {case.resolution:>5}p  {figures}", flush=True)

    cases = measure_inference(
        model=model,
        windows=windows,
        resolutions=resolutions,
        baselines=baselines,
        image=image,
        dtype=getattr(torch, dtype),
        device=device,
        repeats=repeats,
        limit_s=limit_s,
        limit_gb=_free_bytes() / 2**30 if limit_gb is None else limit_gb,
        show=show,
    )
    finish("inference", {"model": model, "dtype": dtype, **report(cases)}, threads)


def measure_inference(
    *,
    model: str,
    windows: tuple[int | Literal["full"], ...],
    resolutions: tuple[int, ...],
    baselines: tuple[str, ...],
    image: str,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    limit_s: float,
    limit_gb: float,
    show: Callable[[Case], None],
) -> list[Case]:
    """Reconstruct one square photograph at every resolution with every subject.

    A case that is expected to exceed a limit, judged by the resolution before it, is a row that
    says so.

    Args:
        model: a name, whose blocks are then random around a PCA of the photograph's patches, or the
            location of trained weights.
        image: a file, or "" for a photograph that scikit-learn carries.
        show: is given every case when it is done.
    """
    photograph = _photograph(image)
    loaded = _load(model, photograph).to(device, dtype)
    subjects: list[Callable[[], _Subject]] = [
        lambda window=window: _ours(model, loaded, window)  # type: ignore[misc]
        for window in windows
    ]
    subjects += [
        lambda name=name: _baseline(name, dtype, device)  # type: ignore[misc]
        for name in baselines
    ]
    cases: list[Case] = []
    for build in subjects:
        subject = build()
        # Outside of the timed passes: kernels are chosen and compiled.
        smallest = to_tensor(_square(photograph, min(resolutions)))
        subject.reconstruct(smallest.to(device, dtype))
        before: Case | None = None
        for resolution in sorted(resolutions):
            case = Case(subject=subject.name, window=subject.window, resolution=resolution)
            reason = _foresee(subject, before, resolution, limit_s, limit_gb)
            if reason:
                case = Case(**asdict(case) | {"skipped": reason})
            else:
                source = to_tensor(_square(photograph, resolution))
                case = _measure(subject, case, source.to(device, dtype), repeats)
                before = before if case.skipped else case
            show(case)
            cases.append(case)
    return cases


def growth(cases: list[Case], figure: Literal["seconds", "peak_mb"]) -> dict[str, float]:
    """Return a figure per pixel at 4096 over that at 1024, for each window of our model."""
    found = {
        (case.window, case.resolution): getattr(case, figure)
        for case in cases
        if case.window and not case.skipped
    }
    return {
        window: found[window, 4096] / found[window, 1024] / 16
        for window, resolution in found
        if resolution == 4096 and (window, 1024) in found
    }


def _load(model: str, photograph: np.ndarray) -> Autoencoder:
    try:
        config = AutoencoderConfig.from_name(model)
    except ValueError:
        return load_autoencoder(model)
    autoencoder = Autoencoder(config).eval().requires_grad_(False)
    start_at_random(autoencoder, seed=0)
    side = 40 * config.patch_size
    patches = pack_images([to_tensor(_square(photograph, side))], patch_size=config.patch_size)
    start_from_pca(autoencoder, patches.tokens)
    return autoencoder


def _ours(name: str, model: Autoencoder, window: int | Literal["full"]) -> _Subject:
    radius = None if window == "full" else window

    def reconstruct(image: Tensor) -> Tensor:
        return model.decode(model.encode(image, window=radius), window=radius)[0]

    def flops(resolution: int) -> float:
        tokens = num_tokens(resolution, resolution, model.config.patch_size)
        side = grid_size(resolution, resolution, model.config.patch_size)
        keys = mean_window_keys(*side, radius)
        return tokens * model.config.flops_per_token(keys)

    return _Subject(name, str(window), reconstruct, flops, has_psnr=True)


def _baseline(name: str, dtype: torch.dtype, device: torch.device) -> _Subject:
    reconstruct = reconstruct_with(random_baseline(name, dtype).to(device))

    def reconstruct_one(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return reconstruct(image[None])[0]

    return _Subject(
        name,
        "",
        reconstruct_one,
        lambda resolution: float(resolution) ** (2 * _BASELINE_TIME_EXPONENT),
        has_psnr=False,
    )


def _foresee(
    subject: _Subject, before: Case | None, resolution: int, limit_s: float, limit_gb: float
) -> str:
    """Say why a case would exceed a limit, or return nothing."""
    if before is None or before.seconds is None or before.peak_mb is None:
        return ""
    ratio = subject.flops(resolution) / subject.flops(before.resolution)
    seconds = before.seconds * ratio
    if seconds > limit_s:
        return f"about {seconds:.0f} s expected, more than --limit-s {limit_s:g}"
    gigabytes = before.peak_mb / 1024 * (resolution / before.resolution) ** 2
    if gigabytes > limit_gb:
        return f"about {gigabytes:.0f} GB expected, more than --limit-gb {limit_gb:.3g}"
    return ""


def _measure(subject: _Subject, case: Case, source: Tensor, repeats: int) -> Case:
    seconds: list[float] = []
    start_peak(source.device)
    rest = memory_in_use(source.device)[0]
    while len(seconds) < repeats and sum(seconds) < _ENOUGH_S:
        start = time.perf_counter()
        try:
            output = subject.reconstruct(source).cpu()  # waits for the device
        except torch.OutOfMemoryError:
            return Case(**asdict(case) | {"skipped": "the device ran out of memory"})
        seconds.append(time.perf_counter() - start)
    peak = memory_in_use(source.device)[1]
    quality = psnr(output, source.cpu()) if subject.has_psnr else None
    figures = {
        "seconds": statistics.median(seconds),
        "peak_mb": (peak - rest) / _MB,
        "process_mb": peak / _MB,
        "psnr": quality,
    }
    return Case(**asdict(case) | figures)


def _photograph(file: str) -> np.ndarray:
    if file:
        return decode_rgb(Path(file).read_bytes())
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")


def _square(photograph: np.ndarray, side: int) -> np.ndarray:
    """Return the middle of a photograph [side, side, 3], resized."""
    height, width = photograph.shape[:2]
    edge = min(height, width)
    left, top = (width - edge) // 2, (height - edge) // 2
    picture = Image.fromarray(photograph)
    box = (left, top, left + edge, top + edge)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=box))


def report(cases: list[Case]) -> dict[str, Any]:
    """Return the JSON of a benchmark: every case, and how figures grow with the image."""
    return {
        "cases": [asdict(case) for case in cases],
        "time_per_pixel_4096_over_1024": growth(cases, "seconds"),
        "memory_per_pixel_4096_over_1024": growth(cases, "peak_mb"),
    }


def _free_bytes() -> int:
    """Return the memory that models may still take: of the GPU, or without one of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
