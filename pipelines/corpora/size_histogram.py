"""How many images of which size a shard holds: enough to estimate its tokens, in 384 bytes.

A size class is half an octave of area and a range of aspect ratio; height and width play the same
part, for patches are square. Class `area_class * NUM_ASPECTS + aspect_class` holds the images with
    area_class    round(2 * log2(height * width / 64^2)), clipped to 0 .. NUM_AREAS - 1,
    aspect_class  how many of ASPECT_BOUNDS the longer side over the shorter one reaches.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_AREAS = 24  # 64^2 up to 3444^2 pixels; the first and the last are open
ASPECT_BOUNDS = (1.2, 1.6, 2.4)
NUM_ASPECTS = len(ASPECT_BOUNDS) + 1
NUM_CLASSES = NUM_AREAS * NUM_ASPECTS

_SMALLEST_AREA = 64**2
_TYPICAL_ASPECTS = (1.0, 4 / 3, 16 / 9, 3.0)


def count_sizes(height: NDArray[np.int32], width: NDArray[np.int32]) -> NDArray[np.int32]:
    """Count the images of each size class.

    Args:
        height, width: [num_images] pixels.

    Returns:
        int32 [NUM_CLASSES].
    """
    longer = np.maximum(np.maximum(height, width), 1).astype(np.float64)
    shorter = np.maximum(np.minimum(height, width), 1).astype(np.float64)
    octaves = 2 * np.log2(longer * shorter / _SMALLEST_AREA)
    area_class = np.clip(np.rint(octaves), 0, NUM_AREAS - 1).astype(np.int64)
    aspect_class = np.searchsorted(ASPECT_BOUNDS, longer / shorter, side="right")
    classes = area_class * NUM_ASPECTS + aspect_class
    return np.bincount(classes, minlength=NUM_CLASSES).astype(np.int32)


def area_quantiles(counts: NDArray[np.int32], shares: Sequence[float]) -> list[float]:
    """Return the area in pixels below which each share of the images lies, to half an octave.

    Args:
        counts: [NUM_CLASSES] images of each class, at least one in all.
        shares: between 0 and 1.
    """
    by_area = counts.reshape(NUM_AREAS, NUM_ASPECTS).sum(axis=1).cumsum()
    classes = np.searchsorted(by_area, np.array(shares) * by_area[-1])
    return (_SMALLEST_AREA * 2 ** (classes / 2)).tolist()


def typical_sizes() -> NDArray[np.int32]:
    """Return one (height, width) in pixels that stands for each size class, [NUM_CLASSES, 2]."""
    area = _SMALLEST_AREA * 2 ** (np.repeat(np.arange(NUM_AREAS), NUM_ASPECTS) / 2)
    aspect = np.tile(_TYPICAL_ASPECTS, NUM_AREAS)
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=1)
    return np.rint(sides).astype(np.int32)
