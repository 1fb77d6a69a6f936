"""Encoded image bytes to RGB pixels.

Coordinates and sizes are always those of the upright image, as a viewer shows it: the EXIF
orientation has been applied before anybody here counts a row.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.reading.avif import MalformedAvif, stream_pixels
from vitok.pillow import ORIENTATION_TAG, TRANSPOSITIONS, exif_orientation, to_rgb_or_gray

# A task of ingest stays under 1 GB, of which one decoding may take 450 MiB. Measured peaks, in
# bytes a pixel of the image, whole or cropped and shrunk: 9 for a JPEG by libjpeg-turbo, where it
# is progressive (baseline and whole: 3); 13 for PNG, TIFF, BMP, GIF and CMYK in JPEG; 22 for
# WebP, whose decoder keeps two canvases; 15 for AVIF; 17 for 32 bits a sample. A result that is
# not smaller than a big JPEG takes 12.
MAX_PIXELS = 48 * 2**20
MAX_PIXELS_OTHER_THAN_JPEG = 32 * 2**20
MAX_PIXELS_COSTLY = 20 * 2**20

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
_TIFF_TILE_TAGS = (322, 323)  # TileWidth, TileLength
# TIFF 6.0, section 2, and the 64-bit types of BigTIFF.
_TIFF_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_PNG_METADATA_NAMES = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")

_JPEG_START = b"\xff\xd8\xff"
_JPEG_APP1, _JPEG_SCAN = 0xE1, 0xDA  # markers: EXIF or XMP; the compressed pixels
_JPEG_COLORS = ("YCbCr", "Gray", "RGB")
_JPEG_SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")


class UnreadableImage(ValueError):
    """The bytes are not an image that can be used; the message is one sentence that says why."""


def image_size(data: bytes) -> tuple[int, int]:
    """Read (height, width) of the upright image from its header, without decoding pixels.

    Raises:
        UnreadableImage: no image, or one of too many pixels.
    """
    with _unreadable_on_error():
        image = _open(data)
        return _upright_size(image.size, _orientation(image, data))


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
        jpeg_size = _jpeg_size(data)
        image = None if jpeg_size and not _has_metadata(data) else _open(data)
        orientation = 1 if image is None else _orientation(image, data)
        stored_size = jpeg_size or image.size
        height, width = _upright_size(stored_size, orientation)
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
        if image is not None and image.format == "TIFF":
            # Pillow turns a TIFF upright as it loads, and no other format.
            image.load()
            stored_size, orientation = image.size, 1
        swapped = _STORED_AXES[orientation][0]
        box = _stored_box(upright_box, stored_size, orientation)
        target_size = (out_height, out_width) if swapped else (out_width, out_height)
        pixels = _decode_jpeg(data, stored_size, box, target_size) if jpeg_size else None
        if pixels is None:
            image = image or _open(data)
            if image.width * image.height > MAX_PIXELS_OTHER_THAN_JPEG:
                raise UnreadableImage(
                    f"damaged image: of more than {MAX_PIXELS_OTHER_THAN_JPEG} pixels only a JPEG "
                    "without errors is decoded"
                )
            scale = _draft(image, box, target_size)
            # Bound to one name, each image goes as soon as the next is made of it.
            image = to_rgb_or_gray(image)
            image = _crop_and_resize(image, scale, box, target_size)
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        if orientation in TRANSPOSITIONS:
            pixels = np.array(Image.fromarray(pixels).transpose(TRANSPOSITIONS[orientation]))
        return pixels


def decode_adm_square(data: bytes, side: int) -> np.ndarray:
    """Decode the centre of an image as the evaluations of ADM (arXiv 2105.05233) do.

    The whole image is halved by a box filter as long as its shorter side stays at or above the
    wanted one, resized bicubically until it is that side, and then cropped. Published figures of
    256 x 256 ImageNet are of such squares.

    Returns:
        uint8 [side, side, 3]

    Raises:
        UnreadableImage: the bytes cannot be decoded completely, or are of an image so thin that it
            would have too many pixels at that size.
    """
    image = Image.fromarray(decode_rgb(data))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    if size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImage(
            f"too many pixels: {image.height}x{image.width} enlarged to a shorter side of {side}, "
            f"the limit is {MAX_PIXELS}"
        )
    left, top = ((edge - side) // 2 for edge in size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + side, top + side)))


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read (width, height) of a JPEG as stored; None where the decoding is left to Pillow."""
    if not data.startswith(_JPEG_START):
        return None
    try:
        height, width, colors, subsampling = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colors not in _JPEG_COLORS or subsampling not in _JPEG_SUBSAMPLINGS:
        return None  # CMYK, YCCK and what libjpeg-turbo has no name for
    return (width, height) if 0 < width * height <= MAX_PIXELS else None


def _has_metadata(data: bytes) -> bool:
    """Whether an APP1 segment stands before the pixels of a JPEG: it may hold an orientation."""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1]
        if marker in (_JPEG_APP1, _JPEG_SCAN):
            return marker == _JPEG_APP1
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # unusual bytes between segments: Pillow knows them


def _decode_jpeg(
    data: bytes,
    stored_size: tuple[int, int],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
) -> np.ndarray | None:
    """Decode a box of a JPEG at a size (width, height) by libjpeg-turbo.

    Returns:
        uint8 [height, width, 3]; None if the JPEG is not free of errors: Pillow then decides which
        of them it forgives.
    """
    scale = _scale(stored_size, box, size)
    if scale == 2 and any(edge % 2 for edge in box):
        # Its edges would lie between two pixels, where only Pillow's resize can begin; that costs
        # more than decoding half as many pixels a side saves. At 1/4 and 1/8 it does not.
        scale = 1
    width, height = (-(-side // scale) for side in stored_size)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    assert pixels.shape == (height, width, 3), (pixels.shape, stored_size, scale)
    x0, y0, x1, y1 = (edge / scale for edge in box)
    if not all(edge.is_integer() for edge in (x0, y0, x1, y1)):
        image = Image.fromarray(pixels)
        return np.array(image.resize(size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)))
    # Under the same name, so that the rest of the image goes before the resize takes memory.
    pixels = np.ascontiguousarray(pixels[int(y0) : int(y1), int(x0) : int(x1)])
    return _resize(pixels, size)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [height, width, 3] to (width, height), antialiased bicubic as Pillow's.

    torch computes what Pillow computes, up to a rounding, with vector instructions: five times
    faster.
    """
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    # Here because it takes seconds to import: who only reads headers should not wait for it.
    import torch

    # Channels stay fastest-varying; unsqueezed after the permutation, torch would not see it.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        image, size=(size[1], size[0]), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _crop_and_resize(
    image: Image.Image, scale: int, box: tuple[int, int, int, int], size: tuple[int, int]
) -> Image.Image:
    """Resize a box of an image that was decoded at 1/scale to (width, height), by Pillow."""
    if size != (box[2] - box[0], box[3] - box[1]):
        scaled_box = tuple(edge / scale for edge in box)
        return image.resize(size, Image.Resampling.BICUBIC, box=scaled_box)
    return image.crop(box) if size != image.size else image


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
    if data[:2] in (b"II", b"MM"):
        _check_tiff_tags(data)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    limit = _max_pixels(image)
    if image.format == "AVIF":
        _check_avif_streams(data, limit)
    if width * height > limit:
        raise UnreadableImage(
            f"too many pixels: {height}x{width} = {height * width}, the limit is {limit}"
        )
    if image.format == "TIFF":
        tile_width, tile_height = (image.tag_v2.get(tag, 1) for tag in _TIFF_TILE_TAGS)
        if tile_width * tile_height > limit:  # libtiff decodes whole tiles, however much is used
            raise UnreadableImage(
                f"too many pixels: tiles of {tile_height}x{tile_width}, the limit is {limit}"
            )
    if width * height == 0:
        raise UnreadableImage(f"no pixels: the header says {height}x{width}")
    return image


def _max_pixels(image: Image.Image) -> int:
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return MAX_PIXELS
    if image.format in ("WEBP", "AVIF") or image.mode in ("I", "F"):
        return MAX_PIXELS_COSTLY
    return MAX_PIXELS_OTHER_THAN_JPEG


def _check_avif_streams(data: bytes, limit: int) -> None:
    """Refuse an AVIF whose streams are larger than an image and its transparency may be."""
    try:
        pixels = stream_pixels(data)
    except MalformedAvif as error:
        raise UnreadableImage(f"damaged image: {error}") from error
    if max(pixels, default=0) > limit or sum(pixels) > 2 * limit:
        raise UnreadableImage(
            f"too many pixels: AV1 streams of up to {sum(pixels)}, the limit is {limit}"
        )


def _check_tiff_tags(data: bytes) -> None:
    """Refuse a TIFF whose tags claim more bytes than the file has.

    libtiff reads every tag into memory, and thousands may point at the same megabytes.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = b"\x2b" in data[2:4]
    start, count_format, entry_format = (8, "Q", "HHQ8x") if big else (4, "H", "HHL4x")
    (start,) = struct.unpack_from(order + ("Q" if big else "L"), data, start)
    (num_tags,) = struct.unpack_from(order + count_format, data, start)
    start += struct.calcsize(order + count_format)
    stop = start + num_tags * struct.calcsize(order + entry_format)
    num_bytes = sum(
        _TIFF_TYPE_BYTES.get(kind, 1) * count
        for _, kind, count in struct.iter_unpack(order + entry_format, data[start:stop])
    )
    if num_bytes > len(data):
        raise UnreadableImage(
            f"damaged image: its tags claim {num_bytes} bytes, the file has {len(data)}"
        )


def _orientation(image: Image.Image, data: bytes) -> int:
    # A PNG may carry its EXIF behind the pixels, and Pillow decodes them all to look for it. That
    # is paid only where one of the names under which it could stand occurs in the file.
    if image.format == "PNG" and not any(name in data for name in _PNG_METADATA_NAMES):
        return 1
    # Pillow reports the size of a TIFF as its own orientation tag turns it.
    if image.format == "TIFF" and ORIENTATION_TAG in image.tag_v2:
        return 1
    return exif_orientation(image)


def _upright_size(stored_size: tuple[int, int], orientation: int) -> tuple[int, int]:
    width, height = stored_size
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


def _scale(
    stored_size: tuple[int, int], box: tuple[int, int, int, int], size: tuple[int, int]
) -> int:
    """Return the largest s of 8, 4, 2, 1 at which 1/s still holds the box at the given size.

    libjpeg-turbo knows all of 1/8 to 7/8, but only at these its inverse transform is vectorised:
    7/8 takes longer than the whole.
    """
    enlargement = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
    scale = next((scale for scale in (8, 4, 2) if enlargement >= scale), 1)
    return scale if min(stored_size) >= scale else 1


def _draft(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """Have Pillow decode a JPEG at 1/scale."""
    scale = _scale(image.size, box, size)
    if scale == 1:
        return 1
    width, height = image.size
    # Pillow picks the scale from a size; this one leads to ours, whatever is left over.
    drafted = image.draft(None, (width // scale, height // scale))
    return 1 if drafted is None else scale
