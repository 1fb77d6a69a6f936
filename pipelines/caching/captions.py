"""Captions of the samples of a shard: their `.txt` members, UTF-8 as WebDataset has them.

The members of a sample stand beside its image, whose place the manifest knows. Headers are walked
from the image before a slice of the shard to the one behind it. On a disk what lies between
captions is skipped, from a store it is read in large pieces.
"""

import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby, takewhile
from operator import itemgetter

import numpy as np

from pipelines.corpus import Manifest
from pipelines.reading.shards import is_remote, open_ranges
from pipelines.reading.tar_index import MAX_HEADER_BYTES, TAR_ERRORS, sample_members

MAX_CAPTION_BYTES = MAX_HEADER_BYTES
# Of a store, a request a caption would be waiting, and little else.
STORE_READ_BYTES = 8 * 2**20
_CHECKED_SHARDS, _CHECKED_SAMPLES = 8, 16

# Key, (offset, length) of the members, and of each caption its bytes or why it has none.
_Sample = tuple[str, list[tuple[int, int]], list[bytes | str]]


def read_captions(
    source: Manifest, shard: int, start: int, stop: int
) -> tuple[list[str | None], dict[str, str]]:
    """Read the captions of samples start to stop, counted in their shard.

    Returns:
        the caption of each, None where it is missing or empty; and why captions cannot be used, by
        the keys of their samples.

    Raises:
        OSError: the shard cannot be read, or is not the one that was indexed.
    """
    uri, num_bytes = source.uris[shard], int(source.num_bytes_per_shard[shard])
    before, behind = max(0, start - 1), min(stop + 1, int(source.num_samples_per_shard[shard]))
    records = source.records(int(source.first_sample[shard]) + np.arange(before, behind))
    begin = 0
    if start > 0:
        end_of_image = int(records.offset[0] + records.length[0])
        begin = -(-end_of_image // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    end = int(records.offset[-1]) if behind > stop else num_bytes
    wanted = records.take(range(start - before, stop - before))
    images = zip(wanted.offset.tolist(), wanted.length.tolist(), strict=True)
    place_of = {image: place for place, image in enumerate(images)}
    captions: list[str | None] = [None] * len(wanted)
    bad: dict[str, str] = {}
    seen = set()
    with open_ranges(uri, num_bytes) as read:
        reader = _PartReader(read, begin, num_bytes, STORE_READ_BYTES if is_remote(uri) else 0)
        try:
            for key, members, texts in _samples(reader, end):
                for place in (place_of[member] for member in members if member in place_of):
                    seen.add(place)
                    captions[place], reason = _usable_text(texts)
                    if reason:
                        bad[key] = reason
        except TAR_ERRORS as error:
            raise OSError(
                f"{uri}: {error}; the shard is not the one that was indexed: index it again"
            ) from error
    if len(seen) < len(wanted):
        lost = wanted.key[min(set(range(len(wanted))) - seen)]
        raise OSError(
            f"{uri}: {lost}: its image is not where it was; the shard is not the one that was "
            "indexed: index it again"
        )
    return captions, bad


def require_captions(source: Manifest) -> None:
    """Look at a few samples of some shards, so that a corpus without captions is found at once.

    Raises:
        OSError: a shard cannot be read.
        ValueError: none of them has a caption.
    """
    filled = np.flatnonzero(source.num_samples_per_shard)
    chosen = np.linspace(0, len(filled) - 1, _CHECKED_SHARDS).round().astype(int)
    for shard in filled[np.unique(chosen)].tolist():
        count = min(_CHECKED_SAMPLES, int(source.num_samples_per_shard[shard]))
        captions, bad = read_captions(source, shard, 0, count)
        if any(captions) or bad:
            return
    raise ValueError(
        f"{source.path}: no sample that was looked at has a caption (KEY.txt beside KEY.jpg), the "
        f"first being those of {source.uris[int(filled[0])]}; write captions into the shards, or "
        "leave text_encoder empty"
    )


def _samples(reader: "_PartReader", end: int) -> Iterator[_Sample]:
    """Yield what is there of samples before a place in the tar, in its order."""
    members = takewhile(lambda member: member[0].offset_data < end, sample_members(reader))
    for key, of_sample in groupby(members, key=itemgetter(1)):
        places, texts = [], []
        for member, _, suffix in of_sample:
            places.append((member.offset_data, member.size))
            if suffix == "txt":
                texts.append(_read_text(reader, member))
        yield key, places, texts


def _read_text(reader: "_PartReader", member: tarfile.TarInfo) -> bytes | str:
    """Return the bytes of a caption, or why there are none."""
    if member.issparse():
        return "caption stored as a sparse file"
    if member.size > MAX_CAPTION_BYTES:
        return f"caption of {member.size} bytes, the limit is {MAX_CAPTION_BYTES}"
    reader.seek(member.offset_data)
    data = reader.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError(f"truncated inside {member.name}")
    return data


def _usable_text(found: list[bytes | str]) -> tuple[str | None, str]:
    """Return the caption of a sample, None for none, and why it cannot be used."""
    if len(found) > 1:
        return None, f"{len(found)} captions where one is needed"
    for caption in found:
        if isinstance(caption, str):
            return None, caption
        try:
            return caption.decode().strip() or None, ""
        except UnicodeDecodeError as error:
            return None, f"caption is not UTF-8 at its byte {error.start}"
    return None, ""


class _PartReader:
    """What tarfile needs of a file: a shard, read from a place on, ahead by some bytes."""

    def __init__(
        self,
        read: Callable[[int, int], bytes | bytearray],
        begin: int,
        shard_bytes: int,
        ahead_bytes: int,
    ) -> None:
        self._read, self._shard_bytes, self._ahead_bytes = read, shard_bytes, ahead_bytes
        self._position = self._start = begin
        self._block: bytes | bytearray = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header at byte {self._position} claims {num_bytes} bytes")
        left = self._shard_bytes - self._position
        if left <= 0:
            return b""
        num_bytes = min(num_bytes, left)
        if not self._start <= self._position <= self._start + len(self._block) - num_bytes:
            self._start = self._position
            self._block = self._read(self._start, min(max(num_bytes, self._ahead_bytes), left))
        first = self._position - self._start
        self._position += num_bytes
        return bytes(self._block[first : first + num_bytes])
