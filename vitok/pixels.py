"""One image of any kind to checked pixels, and back to a Pillow image."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitok.pillow import upright_rgb

ImageLike = Image.Image | NDArray[Any] | Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Interpolation and rounding step over the ends of [-1, 1] by about this much.
_MAX_OVERSHOOT = 1e-3
_DTYPE_REMEDY = "give uint8 in 0..255 or floats in [-1, 1]"


def to_tensor(image: ImageLike) -> Tensor:
    """Return an image of any kind as pixels [3, H, W], float32 in [-1, 1].

    A Pillow image is turned as its EXIF orientation says, transparency is composited over mid
    gray, gray is repeated. uint8 is scaled; floats are taken to be in [-1, 1] (not [0, 1]) and
    clamped to it.

    Args:
        image: Pillow image of any mode, array [H, W, 3], or tensor [3, H, W]; uint8 or floats.

    Raises:
        TypeError: no image.
        ValueError: an image that has no pixels, or of another shape, type or range.
    """
    pixels = checked_pixels(image, "the image")
    return normalized(pixels, pixels.device)


def to_pil(image: Tensor) -> Image.Image:
    """Round pixels [3, H, W] in [-1, 1] to an RGB image; what lies outside is clamped.

    Raises:
        ValueError: another shape, a NaN, or integers.
    """
    pixels = image.detach()
    _require_shape(pixels.shape, "the image", channels_last=False)
    if pixels.dtype not in FLOAT_DTYPES:
        raise ValueError(f"the image has dtype {pixels.dtype}; give floats in [-1, 1]")
    if pixels.isnan().any():
        raise ValueError("the image holds NaN; look for where it was computed")
    levels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def checked_pixels(image: object, where: str) -> Tensor:
    """Return the pixels [3, H, W] of one image, uint8 or floats near [-1, 1]; a view if possible.

    Args:
        where: what error messages call the image.

    Raises:
        TypeError, ValueError: see `to_tensor`.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{where} has no pixels: {image.height} x {image.width}; drop it")
        try:
            # Pillow decodes only now what was opened from a file.
            return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)
        except MemoryError:
            raise
        except Exception as error:  # plugins leak struct.error, SyntaxError, EOFError and more
            raise ValueError(f"{where} cannot be decoded: {error}; drop it") from error
    if isinstance(image, np.ndarray):
        _require_shape(image.shape, where, channels_last=True)
        native = image.dtype.newbyteorder("=")
        if native not in (np.uint8, np.float16, np.float32, np.float64):
            raise ValueError(f"{where} has dtype {image.dtype}; {_DTYPE_REMEDY}")
        # torch takes neither read-only memory nor negative strides.
        owned = np.require(image, native, ["C_CONTIGUOUS", "WRITEABLE"])
        pixels = torch.from_numpy(owned).permute(2, 0, 1)
    elif isinstance(image, Tensor):
        _require_shape(image.shape, where, channels_last=False)
        if image.dtype != torch.uint8 and image.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{where} has dtype {image.dtype}; {_DTYPE_REMEDY}")
        pixels = image.detach()
    else:
        remedy = "give a Pillow image, an array [H, W, 3] or a tensor [3, H, W]"
        if isinstance(image, str | os.PathLike):
            remedy = f"open it: PIL.Image.open({str(image)!r})"
        elif isinstance(image, bytes):
            remedy = "open it: PIL.Image.open(io.BytesIO(data))"
        raise TypeError(f"{where} is of type {type(image).__name__}; {remedy}")
    if pixels.dtype != torch.uint8:
        _require_range(pixels, where)
    return pixels


def normalized(pixels: Tensor, device: torch.device) -> Tensor:
    """Move checked pixels, then map them to float32 in [-1, 1]."""
    moved = pixels.to(device)
    if moved.dtype == torch.uint8:
        return moved.float() / 127.5 - 1.0
    return moved.float().clamp(-1, 1)


def _require_shape(shape: Sequence[int], where: str, *, channels_last: bool) -> None:
    """Refuse what is not [H, W, 3] or [3, H, W], with a guess at what it is instead."""
    wanted, ours, other = ("[H, W, 3]", 2, 0) if channels_last else ("[3, H, W]", 0, 2)
    if len(shape) == 3 and shape[ours] == 3:
        if 0 in shape:
            raise ValueError(f"{where} has no pixels: its shape is {list(shape)}; drop it")
        return
    remedy = "make it RGB"
    if len(shape) == 4:
        remedy = "give its images one by one; only a whole batch may have 4 dimensions"
    elif len(shape) == 3 and shape[other] == 3:
        turn = "image.transpose(1, 2, 0)" if channels_last else "image.permute(2, 0, 1)"
        remedy = f"its channels seem to stand {'first' if channels_last else 'last'}: {turn}"
    elif len(shape) == 2 or (len(shape) == 3 and shape[ours] == 1):
        remedy = "it seems to be gray: repeat it over 3 channels"
    elif len(shape) == 3 and shape[ours] == 4:
        remedy = "its 4th channel seems to be alpha: composite it, or give a Pillow image"
    raise ValueError(f"{where} has shape {list(shape)} instead of {wanted}; {remedy}")


def _require_range(pixels: Tensor, where: str) -> None:
    """Refuse floats that are not finite or not in [-1, 1]."""
    low, high = (extreme.item() for extreme in pixels.aminmax())
    if not np.isfinite([low, high]).all():  # aminmax passes NaN on
        count = pixels.numel() - int(pixels.isfinite().sum())
        raise ValueError(f"{where} holds {count} values that are NaN or infinite; drop or mend it")
    # The slack is the rounding of the limit itself to float32.
    if max(-low, high) > 1 + _MAX_OVERSHOOT + 1e-6:
        remedy = "scale them to [-1, 1]"
        if low >= 0 and 2 < high <= 255:
            remedy = "they look like 0..255: give uint8, or divide by 127.5 and subtract 1"
        raise ValueError(f"{where} holds values from {low:g} to {high:g}, not in [-1, 1]; {remedy}")
