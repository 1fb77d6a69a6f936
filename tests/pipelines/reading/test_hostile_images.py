"""What is broken, or made to hurt: named in a sentence, decoded within limits, or refused."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.reading import decode
from pipelines.reading.decode import UnreadableImage, decode_rgb, image_size
from tests.pipelines.reading.photographs import encode


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


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
