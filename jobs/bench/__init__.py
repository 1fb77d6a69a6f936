"""Benchmarks: `vitok bench NAME` is the function `run` of the module NAME."""

from collections.abc import Callable
from importlib import import_module

BENCHMARKS = {
    "attention": "Packed attention, forward and backward, against the other ways to compute it.",
    "inference": "Time, memory and PSNR of reconstruction over resolutions.",
    "ingest": "Images/s from bare decoding to packed rows, in one process and through Ray.",
    "encode": "Encoding into a latent cache, against the bare encoder and a plain loop.",
    "evaluate": "A worker of an evaluation, its parts, and a Fréchet distance.",
    "train": "The training step of one worker, part by part, and through Ray.",
    "flow": "Flow training on cached latents, and what the cache saves.",
    "quality": "PSNR and SSIM after a few minutes of training, beside those of a PCA.",
    "all": "Every benchmark with its defaults, beside what the project aims at.",
}


def load_benchmark(name: str) -> Callable[..., None]:
    """Import a benchmark: what it measures takes seconds to import, and is needed alone."""
    run: Callable[..., None] = import_module(f"jobs.bench.{name}").run
    return run
