"""How large the AV1 streams of an AVIF file are, whatever the container around them claims.

Pillow shows the size that the container claims, and the decoder then takes what the stream says: a
few kilobytes may hold hundreds of millions of pixels. Read here are the boxes of ISO/IEC 14496-12
that lead to the streams of the images, and of a stream the sequence header (AV1 specification,
section 5.5).
"""

from collections.abc import Iterator

_SEQUENCE_HEADER = 1  # OBU type
_LEADING = (b"meta", b"iinf", b"iloc", b"idat")
_STREAM = b"av01"  # item type
_FILE, _ITEM_DATA = 0, 1  # construction methods: where the offsets of an item begin


class MalformedAvif(ValueError):
    """The file is not one that this module can vouch for; the message says why."""


def stream_pixels(data: bytes) -> list[int]:
    """Return the most pixels that each AV1 stream among the items of an AVIF file can decode to.

    Raises:
        MalformedAvif: the boxes are damaged, or it is an animation, or a stream has no header.
    """
    try:
        boxes = _box_table(data, 0, len(data))
        if b"moov" in boxes:
            raise MalformedAvif("an AVIF animation")
        meta = _box_table(data, boxes[b"meta"][0] + 4, boxes[b"meta"][1])
        types = _item_types(data, *meta[b"iinf"])
        streams = [
            b"".join(data[start:stop] for start, stop in extents)
            for item, extents in _item_extents(data, *meta[b"iloc"], meta.get(b"idat"))
            if types.get(item) == _STREAM
        ]
    except (KeyError, IndexError) as error:
        raise MalformedAvif("AVIF without the boxes of an image") from error
    return [_pixels_of(stream) for stream in streams]


def _box_table(data: bytes, start: int, stop: int) -> dict[bytes, tuple[int, int]]:
    """Return the boxes by type; those that are read here must be there once."""
    table: dict[bytes, tuple[int, int]] = {}
    for kind, place in _boxes(data, start, stop):
        if kind in table and kind in _LEADING:
            raise MalformedAvif(f"AVIF with more than one box {kind!r}")
        table[kind] = place
    return table


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield (type, (start, stop) of the content) of the boxes that lie between two places."""
    while start < stop:
        size, kind, content = _number(data, start, 4), data[start + 4 : start + 8], start + 8
        if size == 1:
            size, content = _number(data, content, 8), content + 8
        end = stop if size == 0 else start + size
        if not content <= end <= stop:
            raise MalformedAvif(f"AVIF whose box {kind!r} does not lie inside the file")
        yield kind, (content, end)
        start = end


def _item_types(data: bytes, start: int, stop: int) -> dict[int, bytes]:
    """Return the type of each item, from the box `iinf`."""
    wide = data[start] > 0
    types = {}
    for _, (entry, _) in _boxes(data, start + (8 if wide else 6), stop):
        id_bytes = 4 if data[entry] >= 3 else 2
        place = entry + 4 + id_bytes + 2  # version and flags, id, protection
        types[_number(data, entry + 4, id_bytes)] = data[place : place + 4]
    return types


def _item_extents(
    data: bytes, start: int, stop: int, item_data: tuple[int, int] | None
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield (item, places in the file where its bytes lie), from the box `iloc`."""
    version = data[start]
    offset_bytes, length_bytes = data[start + 4] >> 4, data[start + 4] & 15
    base_bytes, index_bytes = data[start + 5] >> 4, data[start + 5] & 15 if version else 0
    id_bytes = 4 if version == 2 else 2
    num_items, place = _number(data, start + 6, id_bytes), start + 6 + id_bytes

    def take(num_bytes: int) -> int:
        nonlocal place
        if place + num_bytes > stop:
            raise MalformedAvif("AVIF whose list of items is cut short")
        place += num_bytes
        return _number(data, place - num_bytes, num_bytes)

    for _ in range(num_items):
        item = take(id_bytes)
        method = take(2) & 15 if version else _FILE
        take(2)  # data reference
        base = take(base_bytes)
        if method not in (_FILE, _ITEM_DATA) or (method == _ITEM_DATA and item_data is None):
            raise MalformedAvif("AVIF whose items lie outside the file")
        first, last = item_data if method == _ITEM_DATA and item_data else (0, len(data))
        extents = []
        for _ in range(take(2)):
            take(index_bytes)
            begin = first + base + take(offset_bytes)
            end = begin + take(length_bytes) if length_bytes else last
            if not first <= begin <= (end or last) <= last:
                raise MalformedAvif("AVIF whose items lie outside the file")
            extents.append((begin, end))
        yield item, extents


def _pixels_of(stream: bytes) -> int:
    """Return the most pixels of a frame of an AV1 stream, after all of its sequence headers."""
    found = [_sequence_pixels(unit) for kind, unit in _units(stream) if kind == _SEQUENCE_HEADER]
    if not found:
        raise MalformedAvif("AVIF whose stream has no sequence header")
    return max(found)


def _units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, payload) of the open bitstream units of a stream."""
    place = 0
    while place < len(stream):
        header = stream[place]
        place += 2 if header & 4 else 1  # with an extension byte
        size = len(stream) - place
        if header & 2:
            size, shift = 0, 0
            while True:  # LEB128
                byte = stream[place] if place < len(stream) else 0
                size |= (byte & 127) << shift
                place, shift = place + 1, shift + 7
                if byte < 128 or shift > 56:
                    break
        yield header >> 3 & 15, stream[place : place + size]
        place += size


def _sequence_pixels(header: bytes) -> int:
    """Return the most pixels of a frame under a sequence header."""
    bits = int.from_bytes(header, "big")
    left = 8 * len(header)

    def take(num_bits: int) -> int:
        nonlocal left
        left -= num_bits
        if left < 0:
            raise MalformedAvif("AVIF whose sequence header is cut short")
        return bits >> left & (1 << num_bits) - 1

    take(4)  # profile, still picture
    is_reduced = take(1)
    if is_reduced:
        take(5)  # level
    else:
        if take(1):
            raise MalformedAvif("AVIF with the timing of a video")
        has_delay = take(1)
        for _ in range(take(5) + 1):  # operating points
            take(12)
            if take(5) > 7:  # level
                take(1)  # tier
            if has_delay and take(1):
                take(4)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    if is_reduced:
        return (take(width_bits) + 1) * (take(height_bits) + 1)
    # A frame may have another size than the sequence, as large as these bits can say.
    return 1 << width_bits + height_bits


def _number(data: bytes, start: int, num_bytes: int) -> int:
    if start + num_bytes > len(data):
        raise MalformedAvif("AVIF that is cut short")
    return int.from_bytes(data[start : start + num_bytes], "big")
