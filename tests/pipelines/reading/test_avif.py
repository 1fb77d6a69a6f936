import io
import random
import struct

import numpy as np
import pytest
from PIL import Image, features

from pipelines.reading import decode
from pipelines.reading.avif import MalformedAvif, stream_pixels
from pipelines.reading.decode import UnreadableImage, decode_rgb, image_size

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")

SIZES = [(1, 1), (16, 64), (333, 200), (640, 1024), (1500, 2000)]


def encoded(height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    image.save(buffer, "AVIF", speed=10, quality=20, **options)
    return buffer.getvalue()


def claiming(data: bytes, width: int, height: int) -> bytes:
    """Return the file with another size in its container, the stream as it is."""
    place = data.index(b"ispe") + 8
    assert place > 8
    return data[:place] + struct.pack(">II", width, height) + data[place + 8 :]


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_has_the_pixels_of_its_image(size: tuple[int, int]) -> None:
    height, width = size
    assert stream_pixels(encoded(height, width)) == [height * width]
    assert stream_pixels(encoded(height, width, "RGBA")) == [height * width] * 2


def test_a_header_as_of_a_video_is_bounded_by_what_its_frames_may_say() -> None:
    data = encoded(300, 500)
    fields = [
        (0, 3), (0, 1), (0, 1),  # profile, still picture, reduced header
        (0, 1), (1, 1), (1, 5),  # no timing, display delay, two operating points
        (0, 12), (8, 5), (1, 1), (1, 1), (9, 4),  # a level with a tier, a delay
        (0, 12), (3, 5), (0, 1),
        (8, 4), (8, 4), (499, 9), (299, 9),  # bits of width and height less one; both less one
    ]  # fmt: skip
    text = "".join(f"{value:0{bits}b}" for value, bits in fields)
    header = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    # At the place of the stream's own header: type 1, with its size.
    place = data.index(b"mdat") + 4
    assert data[place] == 0x12 and data[place + 2] == 0x0A, "temporal delimiter, sequence header"
    video = data[: place + 2] + bytes([0x0A, len(header)]) + header
    assert stream_pixels(video.ljust(len(data), b"\0")) == [512 * 512]


def test_what_the_container_claims_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(640, 1024)
    lying = claiming(data, 64, 32)
    with Image.open(io.BytesIO(lying)) as image:
        assert image.size == (64, 32)
    assert stream_pixels(lying) == [640 * 1024]
    monkeypatch.setattr(decode, "MAX_PIXELS_COSTLY", 640 * 1024)
    assert image_size(data) == (640, 1024)
    assert decode_rgb(data).shape == (640, 1024, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS_COSTLY", 640 * 1024 - 1)
    for hostile in (lying, data):
        with pytest.raises(UnreadableImage, match="too many pixels: .*655360, the limit is 655359"):
            image_size(hostile)


def test_an_image_of_many_streams_is_bounded_by_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(100, 100, "RGBA")
    monkeypatch.setattr(decode, "MAX_PIXELS_COSTLY", 100 * 100)
    assert image_size(data) == (100, 100)
    monkeypatch.setattr(decode, "stream_pixels", lambda data: [100 * 100] * 3)
    with pytest.raises(UnreadableImage, match="AV1 streams of up to 30000, the limit is 10000"):
        image_size(data)


def test_an_animation_is_refused() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(buffer, "AVIF", save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableImage, match="an AVIF animation"):
        image_size(buffer.getvalue())


def test_damaged_files_are_refused_and_nothing_else_is_raised() -> None:
    data = encoded(64, 48)
    draw = random.Random(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
        for _ in range(draw.randrange(4)):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            found = stream_pixels(bytes(damaged))
        except MalformedAvif:
            refused += 1
        else:
            assert all(pixels >= 1 for pixels in found)
    assert 300 < refused < 2000


def test_a_second_list_of_items_is_refused() -> None:
    data = encoded(16, 16)
    start = data.index(b"meta") - 4
    (size,) = struct.unpack_from(">I", data, start)
    with pytest.raises(MalformedAvif, match="more than one box b'meta'"):
        stream_pixels(data + data[start : start + size])
