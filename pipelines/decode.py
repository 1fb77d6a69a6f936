"""Encoded image bytes to RGB pixels.

Coordinates and sizes are always those of the upright image, as a viewer shows it: the EXIF
orientation has been applied before anybody here counts a row.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitok.pillow import ORIENTATION_TAG, TRANSPOSITIONS, exif_orientation, to_rgb_or_gray

MAX_PIXELS = 512 * 2**20

# Everything else Pillow can open (EPS runs Ghostscript, PSD, FITS, ...) is never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF")

# Pillow refuses above twice this number, inside its plugins and before they allocate. Between the
# two it only warns; those images are refused in _open, so that the warning adds nothing.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Corrupt metadata is not worth a line per image: the pixels decide whether an image is used.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# EXIF orientation -> (stored axes are swapped, stored x runs backwards, stored y runs backwards).
_STORED_AXES = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_PNG_METADATA_NAMES = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


class UnreadableImage(ValueError):
    """The bytes are not an image that can be used; the message is one sentence that says why."""


def image_size(data: bytes) -> tuple[int, int]:
    """Read (height, width) of the upright image from its header, without decoding pixels.

    Raises:
        UnreadableImage: no image, or more than MAX_PIXELS.
    """
    with _unreadable_on_error():
        image = _open(data)
        return _upright_size(image, _orientation(image, data))


def decode_rgb(
    data: bytes,
    *,
    crop: tuple[int, int, int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode an image, or a crop of it, to RGB at the wanted size.

    Transparency is composited over mid gray, 16-bit gray is scaled to 8 bits, of an animation the
    first frame is taken. A JPEG that is to be shrunk by 2 or more is decoded at 1/2, 1/4 or 1/8
    of its resolution (never below the wanted one), and the bicubic resize does the rest.

    Args:
        crop: (top, left, height, width) in pixels of the upright image; the whole image if None.
        size: (height, width) of the result, antialiased bicubic; that of the crop if None.

    Returns:
        uint8 [height, width, 3], C-contiguous.

    Raises:
        UnreadableImage: the bytes cannot be decoded completely.
        ValueError: the crop does not lie inside the image, or the size is not positive.
    """
    with _unreadable_on_error():
        image = _open(data)
        orientation = _orientation(image, data)
        height, width = _upright_size(image, orientation)
    top, left, crop_height, crop_width = crop or (0, 0, height, width)
    if min(top, left) < 0 or min(crop_height, crop_width) < 1:
        raise ValueError(f"crop={crop} must be (top, left, height, width) with a positive size")
    if top + crop_height > height or left + crop_width > width:
        raise ValueError(f"crop={crop} does not lie inside the image of {height}x{width} pixels")
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} must be a positive (height, width)")
    upright_box = (left, top, left + crop_width, top + crop_height)
    out_height, out_width = size or (crop_height, crop_width)

    with _unreadable_on_error():
        if image.format == "TIFF":
            # Pillow turns a TIFF upright as it loads, and no other format.
            image.load()
            orientation = 1
        swapped = _STORED_AXES[orientation][0]
        box = _stored_box(upright_box, image.size, orientation)
        stored_size = (out_height, out_width) if swapped else (out_width, out_height)
        scale = _draft(image, box, stored_size)
        image = to_rgb_or_gray(image)
        if stored_size != (box[2] - box[0], box[3] - box[1]):
            scaled_box = tuple(edge / scale for edge in box)
            image = image.resize(stored_size, Image.Resampling.BICUBIC, box=scaled_box)
        elif stored_size != image.size:
            image = image.crop(box)
        if orientation in TRANSPOSITIONS:
            image = image.transpose(TRANSPOSITIONS[orientation])
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


@contextmanager
def _unreadable_on_error() -> Iterator[None]:
    """Turn whatever Pillow raises on malformed bytes into UnreadableImage."""
    try:
        yield
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        expected = ", ".join(FORMATS)
        raise UnreadableImage(f"not an image with an intact header ({expected})") from error
    except Image.DecompressionBombError as error:
        pixels = str(error).partition(" exceeds")[0]
        raise UnreadableImage(f"too many pixels: {pixels}, the limit is {MAX_PIXELS}") from error
    except Exception as error:
        # Not a list of types: beside OSError and SyntaxError, Pillow's plugins leak struct.error,
        # EOFError, KeyError, zlib.error and more, another set in every version.
        kind = "truncated image" if "truncated" in str(error).lower() else "damaged image"
        raise UnreadableImage(f"{kind}: {str(error) or type(error).__name__}") from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise UnreadableImage("zero bytes where an image should be")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"too many pixels: {height}x{width} = {height * width}, the limit is {MAX_PIXELS}"
        )
    if width * height == 0:
        raise UnreadableImage(f"no pixels: the header says {height}x{width}")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    # A PNG may carry its EXIF behind the pixels, and Pillow decodes them all to look for it. That
    # is paid only where one of the names under which it could stand occurs in the file.
    if image.format == "PNG" and not any(name in data for name in _PNG_METADATA_NAMES):
        return 1
    # Pillow reports the size of a TIFF as its own orientation tag turns it.
    if image.format == "TIFF" and ORIENTATION_TAG in image.tag_v2:
        return 1
    return exif_orientation(image)


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _STORED_AXES[orientation][0] else (height, width)


def _stored_box(
    upright_box: tuple[int, int, int, int], stored_size: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where a box (x0, y0, x1, y1) of the upright image lies in the image as it is stored."""
    swapped, flip_x, flip_y = _STORED_AXES[orientation]
    x0, y0, x1, y1 = upright_box
    width, height = stored_size
    if swapped:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if flip_x:
        x0, x1 = width - x1, width - x0
    if flip_y:
        y0, y1 = height - y1, height - y0
    return x0, y0, x1, y1


def _draft(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """Have a JPEG decoded at 1/scale, the smallest that still holds the box at the given size."""
    enlargement = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
    scale = next((scale for scale in (8, 4, 2) if enlargement >= scale), 1)
    width, height = image.size
    if scale == 1 or min(width, height) < scale:
        return 1
    # Pillow picks the scale from a size; this one leads to ours, whatever is left over.
    drafted = image.draft(None, (width // scale, height // scale))
    return 1 if drafted is None else scale
