import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from jobs.sample_corpus import EVAL_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, photograph_path
from pipelines.reading import decode
from pipelines.reading.decode import UnreadableImage, decode_adm_square, decode_rgb, image_size

ORIENTATION_TAG = 0x0112


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def photograph(name: str) -> Image.Image:
    [entry] = [e for e in TRAIN_PHOTOGRAPHS + EVAL_PHOTOGRAPHS if name in e[1]]
    return Image.open(photograph_path(*entry)).convert("RGB")


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return photograph("chelsea")


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


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


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


def test_unreadable_bytes_are_named_in_one_sentence(
    cat: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg, png = encode(cat, "JPEG"), encode(cat, "PNG")
    monkeypatch.setattr(decode, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(decode, "MAX_PIXELS_OTHER_THAN_JPEG", 100_000)
    for data, sentence in (
        (b"", "zero bytes where an image should be"),
        (b"it was a dark and stormy night", "not an image with an intact header"),
        (png[:12], "not an image with an intact header"),
        (jpeg[:12], "truncated image: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png_of_header(400, 300), r"too many pixels: 300x400 = 120000, the limit is 100000"),
        (png_of_header(60_000, 60_000), r"too many pixels: .*3600000000.*, the limit is 100000"),
    ):
        with pytest.raises(UnreadableImage, match=sentence) as from_header:
            image_size(data)
        with pytest.raises(UnreadableImage, match=sentence):
            decode_rgb(data)
        assert "\n" not in str(from_header.value)


def test_a_truncated_image_has_a_size_but_no_pixels(cat: Image.Image) -> None:
    for format, sentence in (
        ("JPEG", "truncated image"),
        ("PNG", "truncated image"),
        ("TIFF", "(truncated|damaged) image"),
    ):
        data = encode(cat, format)
        data = data[: len(data) // 2]
        assert image_size(data) == (cat.height, cat.width)
        with pytest.raises(UnreadableImage, match=sentence):
            decode_rgb(data)
        with pytest.raises(UnreadableImage, match=sentence):
            decode_rgb(data, size=(32, 32))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_is_decoded_or_named_and_nothing_else(cat: Image.Image) -> None:
    rng = np.random.default_rng(0)
    num_unreadable = 0
    for format in decode.FORMATS:
        intact = encode(cat.resize((48, 32)), format)
        for _ in range(40):
            damaged = bytearray(intact)
            for position in rng.integers(len(intact), size=4):
                damaged[position] = rng.integers(256)
            try:
                decode_rgb(bytes(damaged[: int(rng.integers(1, len(damaged) + 1))]))
            except UnreadableImage:
                num_unreadable += 1
    assert num_unreadable > 100


def test_pixel_limit_is_checked_without_decoding_and_without_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    allowed, refused = png_of_header(2**13, 2**12), png_of_header(2**13, 2**12 + 1)
    assert image_size(allowed) == (2**12, 2**13)
    assert not recwarn.list
    with pytest.raises(UnreadableImage, match=f"the limit is {2**25}"):
        decode_rgb(refused)


def test_a_jpeg_that_claims_too_many_pixels_is_not_decoded(
    cat: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(encode(cat, "JPEG"))
    frame = data.index(b"\xff\xc0")
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", None)
    for height, width in ((60_000, 60_000), (2**13, 6 * 2**10 + 1)):
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
        with pytest.raises(UnreadableImage, match=f"too many pixels: .* limit is {48 * 2**20}"):
            decode_rgb(bytes(data), crop=(0, 0, 8, 8), size=(8, 8))
    data[frame + 5 : frame + 9] = struct.pack(">HH", 2**13, 6 * 2**10)
    assert image_size(bytes(data)) == (2**13, 6 * 2**10)


def test_a_crop_outside_the_image_is_refused(cat: Image.Image) -> None:
    data = encode(cat, "PNG")
    for crop in ((0, 0, 301, 10), (0, 442, 10, 10), (-1, 0, 10, 10), (0, 0, 0, 10)):
        with pytest.raises(ValueError, match="crop=") as error:
            decode_rgb(data, crop=crop)
        assert not isinstance(error.value, UnreadableImage)
    with pytest.raises(ValueError, match="size="):
        decode_rgb(data, size=(0, 10))


DECODE_AND_PRINT_PEAKS = """
import os
import sys
from pathlib import Path

import torch  # which the resize imports

from pipelines.reading.decode import decode_rgb


def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


for path, options in eval(sys.argv[1]):
    if os.fork():  # each image in a process of its own, and all after one import
        os.wait()
        continue
    torch.set_num_threads(1)
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    pixels = decode_rgb(data, **options)
    print(resident("VmHWM") - before, *pixels.shape, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_the_biggest_images_are_decoded_within_the_memory_of_a_task(tmp_path: Path) -> None:
    slow_jpeg = {"progressive": True, "subsampling": 0}
    shrunk = {"crop": (1, 1, 6142, 8189), "size": (4000, 5333)}
    cases: tuple[tuple[str, str, tuple[int, int], dict, dict], ...] = (
        ("JPEG", "RGB", (8192, 6144), slow_jpeg, {}),
        ("JPEG", "RGB", (8192, 6144), {}, shrunk),
        ("JPEG", "CMYK", (8192, 4096), slow_jpeg, {}),
        ("PNG", "RGBA", (8192, 4096), {"compress_level": 1}, {}),
        ("PNG", "I;16", (8192, 4096), {"compress_level": 1}, {}),
        ("WEBP", "RGB", (5120, 4096), {"method": 0}, {}),
        ("TIFF", "F", (5120, 4096), {}, {}),
        ("TIFF", "I", (5120, 4096), {}, {}),
    )
    files = []
    for number, (format, mode, size, encoding, options) in enumerate(cases):
        data = encode(Image.new(mode, size, 1), format, **encoding)
        limit = decode._max_pixels(Image.open(io.BytesIO(data)))
        assert size[0] * size[1] == limit, "not the biggest image of its kind"
        path = tmp_path / str(number)
        path.write_bytes(data)
        files.append((str(path), options))
    command = [sys.executable, "-c", DECODE_AND_PRINT_PEAKS, repr(files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for line, (format, mode, size, _, options) in zip(lines, cases, strict=True):
        peak, *shape = map(int, line.split())
        assert shape == [*options.get("size", size[::-1]), 3]
        assert 3 * size[0] * size[1] <= peak < 450 * 2**20, (format, mode, peak)


def tiff(tags: dict[int, int | tuple[int, int, int]], behind: bytes = b"") -> bytes:
    """A gray TIFF of 64x64 pixels; a tag is a long, or its (type, count, offset)."""
    tags = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1, **tags}
    entries = {
        tag: (4, 1, value) if isinstance(value, int) else value for tag, value in tags.items()
    }
    directory = b"".join(struct.pack("<HHLL", tag, *entries[tag]) for tag in sorted(entries))
    start = struct.pack("<2sHLH", b"II", 42, 8, len(entries))
    return start + directory + bytes(4) + behind


def test_tiff_tags_that_point_at_the_same_bytes_are_refused_before_they_are_read() -> None:
    pixels = {278: 64, 273: 2000, 279: 4096}
    assert decode_rgb(tiff(pixels, bytes(10_000))).shape == (64, 64, 3)
    overlapping = {40_000 + i: (7, 10_000, 16) for i in range(100)}
    claims_too_much = {273: (4, 2**31 - 1, 200)}
    for tags in (overlapping, claims_too_much):
        data = tiff(pixels | tags, bytes(20_000))
        for read in (image_size, decode_rgb):
            with pytest.raises(UnreadableImage, match="its tags claim .* bytes, the file has"):
                read(data)


def test_a_tiff_of_few_pixels_in_a_huge_tile_is_refused() -> None:
    tags = {259: 5, 322: 10_000, 323: 10_000, 324: 300, 325: 1000}
    with pytest.raises(UnreadableImage, match="too many pixels: tiles of 10000x10000"):
        image_size(tiff(tags, bytes(2000)))


def test_compressed_metadata_of_a_png_that_explodes_is_refused(cat: Image.Image) -> None:
    png = encode(cat.resize((16, 8)), "PNG")
    bomb = zlib.compress(bytes(2**24), 9)
    for kind, name in ((b"zTXt", b"Comment"), (b"iCCP", b"profile")):
        data = png[:33] + chunk(kind, name + b"\0\0" + bomb) + png[33:]
        with pytest.raises(UnreadableImage, match="too large"):
            image_size(data)
    many = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 80
    with pytest.raises(UnreadableImage, match="memory"):
        image_size(png[:33] + many + png[33:])


def test_later_frames_of_an_animation_are_not_decoded(cat: Image.Image) -> None:
    first, second = cat.resize((40, 30)), Image.effect_noise((40, 30), 90).convert("RGB")
    for format, damaged in (("GIF", 40), ("PNG", 60)):
        data = encode(first, format, save_all=True, append_images=[second])
        expected = decode_rgb(data)
        assert len(data) > 1000
        np.testing.assert_array_equal(decode_rgb(data[:-damaged] + bytes(damaged)), expected)


def test_the_bytes_decide_what_an_image_is_and_what_stands_behind_it_is_nothing(
    cat: Image.Image,
) -> None:
    jpeg = encode(cat.resize((40, 30)), "JPEG")
    expected = decode_rgb(jpeg)
    for behind in (b"PK\x03\x04" + bytes(40), b"<html><script>alert(1)</script></html>"):
        np.testing.assert_array_equal(decode_rgb(jpeg + behind), expected)
        with pytest.raises(UnreadableImage, match="not an image with an intact header"):
            decode_rgb(behind + jpeg)


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
