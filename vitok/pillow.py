"""Pillow images of any mode and orientation to 8-bit RGB."""

import struct
from functools import cache

import numpy as np
from PIL import Image, ImageCms

TRANSPARENT_BACKGROUND = (128, 128, 128)

ORIENTATION_TAG = 0x0112

# EXIF orientation -> what turns the stored image upright. EXIF 2.32, tag 0x0112.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB and turn it as its EXIF orientation says."""
    image.load()  # a TIFF turns itself upright here, and forgets its orientation
    transposition = TRANSPOSITIONS.get(exif_orientation(image))
    converted = to_rgb_or_gray(image)
    if transposition is not None:
        converted = converted.transpose(transposition)
    return converted if converted.mode == "RGB" else converted.convert("RGB")


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright, and stands for none and for broken."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        return int(orientation) if orientation in TRANSPOSITIONS else 1
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError, struct.error):
        return 1  # broken metadata: viewers show such an image as it is stored


def to_rgb_or_gray(image: Image.Image) -> Image.Image:
    """Decode and convert to 8-bit RGB, or to L, which is cheaper to resize while it is gray.

    Transparency is composited over mid gray, 16-bit gray is scaled to 8 bits.
    """
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        samples = np.clip(np.asarray(image), 0, 65535).astype(np.int32, copy=False)
        samples += 128
        samples //= 257
        return Image.fromarray(samples.astype(np.uint8))
    if image.mode == "F":
        # In place: such an image takes four times the memory of what it becomes.
        intensity = np.nan_to_num(np.array(image), copy=False, nan=0.0)
        white = 1.0 if intensity.max() <= 1.0 else 255.0
        intensity /= white
        np.clip(intensity, 0.0, 1.0, out=intensity)
        intensity *= 255.0
        intensity += 0.5
        return Image.fromarray(intensity.astype(np.uint8))
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied, which Pillow converts to no other mode
            image = image.convert("LA")
        elif image.mode not in ("LA", "RGBA"):
            image = image.convert("RGBA")
        composed = Image.new("RGB", image.size, TRANSPARENT_BACKGROUND)
        composed.paste(image, mask=image)
        return composed
    if image.mode == "LAB":
        converted = ImageCms.applyTransform(image, _lab_to_srgb())
        assert converted is not None, "only a transform in place returns no image"
        return converted
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


@cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
