"""Images of noise."""

import io

import numpy as np
from PIL import Image


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    """Return a JPEG whose pixels a seed draws."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG")
    return stream.getvalue()
