"""Photographs that packages carry, as files of any format."""

import io

import numpy as np
from PIL import Image

from jobs.sample_corpus import EVAL_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, photograph_path


def photograph(name: str) -> Image.Image:
    [entry] = [e for e in TRAIN_PHOTOGRAPHS + EVAL_PHOTOGRAPHS if name in e[1]]
    return Image.open(photograph_path(*entry)).convert("RGB")


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)
