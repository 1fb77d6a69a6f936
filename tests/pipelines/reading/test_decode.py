import hashlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from pipelines.reading import decode
from pipelines.reading.decode import UnreadableImage, decode_adm_square, decode_rgb, image_size
from tests.pipelines.reading.photographs import encode, photograph, psnr

ORIENTATION_TAG = 0x0112


def oriented(image: Image.Image, format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return encode(image, format, exif=exif)


def upright(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.format == "TIFF":
        image.load()
        return image.convert("RGB")
    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_decodes_as_exif_transpose_of_the_full_image(
    cat: Image.Image, format: str, orientation: int
) -> None:
    data = oriented(cat.crop((100, 50, 171, 90)), format, orientation)
    expected = np.asarray(upright(data))
    assert image_size(data) == expected.shape[:2] == ((40, 71) if orientation < 5 else (71, 40))
    np.testing.assert_array_equal(decode_rgb(data), expected)
    top, left, height, width = crop = (3, 11, 30, 25)
    expected_crop = expected[top : top + height, left : left + width]
    np.testing.assert_array_equal(decode_rgb(data, crop=crop), expected_crop)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_cropped_and_resized_as_the_upright_one(
    cat: Image.Image, orientation: int
) -> None:
    data = oriented(cat, "PNG", orientation)
    top, left, height, width = crop = (20, 70, 200, 110)
    box = (left, top, left + width, top + height)
    expected = upright(data).resize((60, 90), Image.Resampling.BICUBIC, box=box)
    difference = decode_rgb(data, crop=crop, size=(90, 60)).astype(int) - np.asarray(expected)
    # Pillow resizes rows before columns, and rounds to 8 bits between.
    assert np.abs(difference).max() <= 2


def test_exif_behind_the_pixels_of_a_png_is_found(cat: Image.Image) -> None:
    data = oriented(cat, "PNG", 6)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    moved = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    assert image_size(moved) == image_size(data) == (cat.width, cat.height)
    np.testing.assert_array_equal(decode_rgb(moved), decode_rgb(data))


def test_result_is_contiguous_writable_uint8(cat: Image.Image) -> None:
    for orientation in (1, 6):
        pixels = decode_rgb(oriented(cat, "JPEG", orientation), size=(64, 48))
        assert pixels.shape == (64, 48, 3) and pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous and pixels.flags.writeable


def test_jpeg_crops_stay_near_full_decode_and_pillows_bicubic() -> None:
    qualities: dict[float, list[float]] = {}
    for name in ("chelsea", "motorcycle", "rocket", "flower", "china", "coffee", "astronaut"):
        image = photograph(name)
        data = encode(image, "JPEG", quality=92)
        full = Image.open(io.BytesIO(data)).convert("RGB")
        for shrink in (0.7, 1.4, 2.0, 2.7, 4.4):
            top, left = full.height // 7, full.width // 5
            height, width = full.height - 2 * top, full.width - 2 * left
            size = int(height / shrink), int(width / shrink)
            box = (left, top, left + width, top + height)
            expected = full.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
            pixels = decode_rgb(data, crop=(top, left, height, width), size=size)
            qualities.setdefault(shrink, []).append(psnr(pixels, np.asarray(expected)))
    for shrink in (0.7, 1.4):  # decoded whole: only the crop's edges see other neighbours
        assert min(qualities[shrink]) >= 45.0
    shrunk = [quality for shrink in (2.0, 2.7, 4.4) for quality in qualities[shrink]]
    assert np.mean(shrunk) >= 38.0
    # Half a pixel of misplacement would cost far more than this.
    assert min(shrunk) >= 30.0
    assert max(qualities[4.4]) < 45.0, "not everything was decoded at a reduced scale"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_decoded_at_the_smallest_scale_that_holds_the_crop(
    cat: Image.Image, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(cat.convert(mode), "JPEG")
    decoded: list[tuple[int, int]] = []
    plugin = type(Image.open(io.BytesIO(data)))
    decode_jpeg, load = decode.simplejpeg.decode_jpeg, plugin.load

    def recorded_decode(*args: object, **kwargs: object) -> np.ndarray:
        pixels = decode_jpeg(*args, **kwargs)
        decoded.append(pixels.shape[1::-1])
        return pixels

    def recorded_load(self: Image.Image) -> object:
        if not decoded or decoded[-1] != self.size:
            decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", recorded_decode)
    monkeypatch.setattr(plugin, "load", recorded_load)
    assert (cat.height, cat.width) == (300, 451)
    for crop, size, expected in (
        ((0, 0, 256, 256), (129, 128), (451, 300)),
        ((0, 0, 100, 100), None, (451, 300)),
        ((0, 0, 256, 256), (128, 128), (226, 150)),
        ((0, 0, 256, 256), (64, 33), (113, 75)),
        (None, (8, 8), (57, 38)),
    ):
        decoded.clear()
        decode_rgb(data, crop=crop, size=size)
        assert decoded == [expected]


def test_half_size_decoding_is_left_out_where_its_crop_would_begin_between_two_pixels(
    cat: Image.Image,
) -> None:
    data = encode(cat, "JPEG")
    top, left, height, width = crop = (1, 2, 240, 240)
    full = decode_rgb(data)
    expected = Image.fromarray(full[top : top + height, left : left + width])
    expected = expected.resize((100, 100), Image.Resampling.BICUBIC)
    assert psnr(decode_rgb(data, crop=crop, size=(100, 100)), np.asarray(expected)) > 60


def test_jpegs_are_decoded_as_pillow_decodes_them(cat: Image.Image) -> None:
    gray = cat.convert("L")
    progressive = {"progressive": True}
    cases = [encode(gray, "JPEG"), encode(cat, "JPEG", **progressive)]
    cases += [encode(cat, "JPEG", subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")]
    cases += [encode(cat.crop((0, 0, width, 3)), "JPEG") for width in (1, 7, 33)]
    cases += [encode(cat, "JPEG", keep_rgb=True), encode(cat.convert("CMYK"), "JPEG")]
    cases += [b"\xff\xd8\xff\xfe\x00\x05abc" + encode(cat, "JPEG")[2:]]
    for data in cases:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode_rgb(data), expected)


def test_the_orientation_of_a_jpeg_is_found_behind_other_segments(cat: Image.Image) -> None:
    data = oriented(cat, "JPEG", 6)
    comment = b"\xff\xfe\x00\x05abc"
    start = data.index(b"\xff\xe1")
    for moved in (
        data[:2] + comment * 3 + data[2:],
        data[:start] + b"\xff" + data[start:],  # fill bytes may stand before a marker
    ):
        assert image_size(moved) == (cat.width, cat.height)
        np.testing.assert_array_equal(decode_rgb(moved), decode_rgb(data))


def test_a_jpeg_is_complete_or_unreadable_or_what_pillow_forgives(cat: Image.Image) -> None:
    intact = encode(cat.resize((200, 120)), "JPEG", quality=90)
    whole = decode_rgb(intact)
    rng = np.random.default_rng(1)
    outcomes = {"whole": 0, "as pillow": 0, "unreadable": 0}
    for trial in range(120):
        data = bytearray(intact)
        if trial % 2:
            del data[int(rng.integers(2, len(data))) :]
        else:
            data[int(rng.integers(600, len(data)))] = int(rng.integers(256))
        try:
            pixels = decode_rgb(bytes(data))
        except UnreadableImage:
            outcomes["unreadable"] += 1
            continue
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(pixels, expected)
        outcomes["whole" if np.array_equal(pixels, whole) else "as pillow"] += 1
    assert outcomes["unreadable"] >= 50 and outcomes["as pillow"] >= 5, outcomes


def test_resize_without_scaled_decode_is_pillows_bicubic(cat: Image.Image) -> None:
    data = encode(cat, "PNG")
    for size in ((111, 170), (450, 600)):
        expected = cat.resize(size[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(decode_rgb(data, size=size), np.asarray(expected))


def adm_centre_crop(image: Image.Image, side: int) -> np.ndarray:
    """Follow center_crop_arr of openai/guided-diffusion's image_datasets.py."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(edge // 2 for edge in image.size), Image.Resampling.BOX)
    scale = side / min(*image.size)
    image = image.resize(
        tuple(round(edge * scale) for edge in image.size), Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 90))
def test_squares_are_those_of_adm(height: int, width: int, side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = decode_adm_square(encode(image, "PNG"), side)
    assert found.shape == (side, side, 3)
    assert np.array_equal(found, adm_centre_crop(image, side))


def test_an_adm_square_shows_what_the_crop_shows_and_upright(cat: Image.Image) -> None:
    data = oriented(cat, "PNG", 6)
    turned = upright(data)
    edge = min(turned.size)
    box = ((turned.height - edge) // 2, (turned.width - edge) // 2, edge, edge)
    cropped = decode_rgb(data, crop=box, size=(64, 64))
    assert 25 < psnr(decode_adm_square(data, 64), cropped) < 60


def test_a_line_of_pixels_does_not_become_a_picture_of_any_size() -> None:
    line = encode(Image.new("RGB", (2000, 1)), "PNG")
    with pytest.raises(UnreadableImage, match="1x2000 enlarged to a shorter side of 256, the lim"):
        decode_adm_square(line, 256)


def test_transparency_is_composited_over_mid_gray(cat: Image.Image) -> None:
    image = cat.resize((64, 32))
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))
    weight = alpha[..., None] / 255
    rgba = np.dstack([np.asarray(image), alpha])
    expected = np.asarray(image) * weight + 128 * (1 - weight)
    pixels = decode_rgb(encode(Image.fromarray(rgba), "PNG"))
    assert np.abs(pixels - expected).max() <= 1.0

    gray = np.asarray(image.convert("L"))
    gray_alpha = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    expected = gray[..., None] * weight + 128 * (1 - weight)
    assert np.abs(decode_rgb(encode(gray_alpha, "PNG")) - expected).max() <= 1.0

    palette = image.quantize(16)
    index = int(np.asarray(palette)[5, 5])
    pixels = decode_rgb(encode(palette, "PNG", transparency=index))
    transparent = np.asarray(palette) == index
    assert transparent.any() and not transparent.all()
    assert (pixels[transparent] == 128).all()
    opaque = np.asarray(palette.convert("RGB"))[~transparent]
    np.testing.assert_array_equal(pixels[~transparent], opaque)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_sixteen_bit_gray_is_scaled_and_not_clipped(byte_order: str) -> None:
    samples = np.linspace(0, 65535, 64 * 40).reshape(40, 64).astype(np.uint16)
    expected = np.round(samples / 257).astype(np.uint8)
    tiff = encode(Image.fromarray(samples.astype(f"{byte_order}u2")), "TIFF")
    for data in (tiff, encode(Image.fromarray(samples), "PNG")):
        pixels = decode_rgb(data)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[..., channel], expected)


def test_thirty_two_bit_gray_is_scaled_as_sixteen_bit_gray() -> None:
    samples = np.linspace(-1000, 70000, 64 * 40).reshape(40, 64).astype(np.int32)
    expected = np.clip(np.round(samples / 257), 0, 255)
    pixels = decode_rgb(encode(Image.fromarray(samples), "TIFF"))
    np.testing.assert_array_equal(pixels[..., 1], expected)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_gray_is_read_in_the_range_it_is_stored_in(white: float) -> None:
    samples = np.linspace(-0.1 * white, white, 600).reshape(20, 30).astype(np.float32)
    samples[0, 0] = np.nan
    expected = np.round(np.clip(np.nan_to_num(samples) / white, 0, 1) * 255)
    pixels = decode_rgb(encode(Image.fromarray(samples), "TIFF"))
    assert np.abs(pixels[..., 0] - expected).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pillow_converts_them(cat: Image.Image, mode: str) -> None:
    image = cat.resize((90, 60)).convert(mode)
    data = encode(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(data), expected)
    if mode != "1":
        original = np.asarray(image.convert("RGB"))
        assert psnr(expected, original) > 25, "the reference itself is no longer the photograph"
    shrunk = np.asarray(Image.fromarray(expected).resize((45, 30), Image.Resampling.BICUBIC))
    assert psnr(decode_rgb(data, size=(30, 45)), shrunk) > 35


def test_lab_is_converted_through_colour_profiles(cat: Image.Image) -> None:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    image = cat.resize((90, 60))
    to_lab = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    data = encode(ImageCms.applyTransform(image, to_lab), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "LAB"
    assert psnr(decode_rgb(data), np.asarray(image)) > 35


def test_the_first_frame_of_an_animation_is_decoded(cat: Image.Image) -> None:
    first, second = cat.resize((40, 30)), Image.new("RGB", (40, 30), "blue")
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(first, format, save_all=True, append_images=[second], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert psnr(decode_rgb(data), np.asarray(first)) > 25


def test_pixels_are_the_same_whatever_the_processor_can(cat: Image.Image, tmp_path: Path) -> None:
    # Plans, packed rows and latent caches promise the same bytes on every machine.
    sizes = [(40, 56), (113, 97), (16, 200), (333, 250)]
    (tmp_path / "image.jpg").write_bytes(encode(cat, "JPEG"))
    code = f"""
import hashlib, pathlib, torch
from pipelines.reading.decode import decode_rgb
data = pathlib.Path({str(tmp_path / "image.jpg")!r}).read_bytes()
digests = [hashlib.sha256(decode_rgb(data, size=size).tobytes()).hexdigest() for size in {sizes}]
print(torch.backends.cpu.get_cpu_capability(), *digests)
"""
    plain = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert plain[0] == "DEFAULT", "torch's kernels without vector instructions"
    data = encode(cat, "JPEG")
    found = [hashlib.sha256(decode_rgb(data, size=size).tobytes()).hexdigest() for size in sizes]
    assert found == plain[1:]
