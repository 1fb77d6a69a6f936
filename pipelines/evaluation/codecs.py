"""JPEG and WebP at a given size of file: what everybody has, to compare autoencoders with."""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitok.images import to_pil

Codec = Literal["jpeg", "webp"]

_WORST, _BEST = 1, 100  # qualities


def compress(image: Image.Image, codec: Codec, max_bytes: float) -> bytes:
    """Encode an image at the best quality whose file has at most so many bytes.

    Raises:
        ValueError: even the worst quality has more.
    """
    encode = _encoder(image, codec)
    low, high, found = _WORST, _BEST, encode(_WORST)
    if len(found) > max_bytes:
        raise ValueError(
            f"{codec} takes at least {len(found)} bytes for {image.width} x {image.height} pixels, "
            f"and bits_per_pixel allows {max_bytes:.0f}; give it more"
        )
    while low < high:
        quality = (low + high + 1) // 2
        data = encode(quality)
        if len(data) <= max_bytes:
            low, found = quality, data
        else:
            high = quality - 1
    return found


def reconstruct_with_codec(codec: Codec, bits_per_pixel: float) -> Callable[[Tensor], Tensor]:
    """Return a function that takes an image [3, H, W] in [-1, 1] through a file and back."""

    def reconstruct(image: Tensor) -> Tensor:
        num_pixels = image.shape[1] * image.shape[2]
        data = compress(to_pil(image), codec, bits_per_pixel * num_pixels / 8)
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.array(opened.convert("RGB"))
        decoded = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        return decoded.to(image.device)

    return reconstruct


def _encoder(image: Image.Image, codec: Codec) -> Callable[[int], bytes]:
    def encode(quality: int) -> bytes:
        stream = io.BytesIO()
        if codec == "jpeg":
            image.save(stream, "JPEG", quality=quality, optimize=True)
        else:
            image.save(stream, "WEBP", quality=quality, method=4)
        return stream.getvalue()

    return encode
