"""One pass over a WebDataset shard: where its images lie, how big they are, and its digest.

A shard is an uncompressed tar. The key of a member is its path up to the first dot of its base
name; consecutive members of one key are a sample. Nothing is extracted and nothing is unpickled:
of every sample only the header of its image and its `.cls` are looked at.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.reading.decode import UnreadableImage, image_size
from pipelines.reading.shards import MAX_IMAGE_BYTES, open_shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp", "avif")

# The biggest tar header believed. tarfile reads long names and PAX records into memory whole,
# whatever size they claim.
MAX_HEADER_BYTES = 64 * 2**10
# Beside its own errors, tarfile leaks the others on headers made to confuse it.
TAR_ERRORS = (tarfile.TarError, ValueError, IndexError, RecursionError)
_MAX_CLS_BYTES = 32
# Writers fill up to one record (10 KiB, 1 MiB at the very most); more zeros are a hole.
_MAX_PADDING_BYTES = 2 * 2**20
_CHUNK_BYTES = 2**20

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
# As the webdataset library names members that describe the shard, not a sample.
_METADATA_NAME = re.compile(r"__[^/]*__($|/)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,18}\s*")


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The samples of a shard, as columns in the order of the tar.

    offset and length (int64) are those of the image's bytes inside the tar; width and height
    (int32) of the upright image; label (int64) is the integer of `.cls`, or -1. `skipped` holds
    (key, reason) of the samples that are in the shard but cannot be used.
    """

    uri: str
    num_bytes: int
    digest: str
    key: list[str]
    offset: np.ndarray
    length: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label: np.ndarray
    skipped: list[tuple[str, str]]

    @property
    def num_samples(self) -> int:
        return len(self.key)


class _Image(NamedTuple):
    suffix: str
    offset: int
    length: int
    size: tuple[int, int] | None
    reason: str  # why it has no size


@dataclass(kw_only=True)
class _Group:
    """Consecutive members of one key."""

    key: str
    images: list[_Image] = field(default_factory=list)
    label: int = -1
    leaves_archive: bool = False


def index_shard(uri: str) -> ShardIndex:
    """Read a shard once, from front to back, and index its samples.

    Holds one image in memory at a time, of at most MAX_IMAGE_BYTES.

    Raises:
        OSError: there is no such shard, or it cannot be read; the shard is named.
        ValueError: not a tar, truncated, damaged, or without any sample.
    """
    rows: list[tuple[str, int, int, int, int, int]] = []
    skipped: list[tuple[str, str]] = []
    seen: set[str] = set()
    with open_shard(uri) as stream:
        reader = _HashingReader(stream)
        try:
            for group in _groups(reader):
                image = _usable_image(group, seen)
                if isinstance(image, str):
                    printable_key = group.key.encode("utf-8", "backslashreplace").decode()
                    skipped.append((printable_key, image))
                else:
                    rows.append((group.key, image.offset, image.length, *image.size, group.label))
                seen.add(group.key)
        except TAR_ERRORS as error:
            raise ValueError(
                f"{uri}: not a readable tar archive ({error}); "
                "write the shard again, as an uncompressed tar, or leave it out"
            ) from error
    if not rows and not skipped:
        raise ValueError(
            f"{uri}: no samples in this tar archive; a sample is KEY.jpg (or another of "
            f"{', '.join(IMAGE_EXTENSIONS)}) with an optional KEY.cls"
        )
    key, offset, length, height, width, label = zip(*rows, strict=True) if rows else [()] * 6
    return ShardIndex(
        uri=uri,
        num_bytes=reader.tell(),
        digest=reader.hexdigest(),
        key=list(key),
        offset=np.array(offset, np.int64),
        length=np.array(length, np.int64),
        width=np.array(width, np.int32),
        height=np.array(height, np.int32),
        label=np.array(label, np.int64),
        skipped=skipped,
    )


def sample_members(reader: Any) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield the members of a tar that belong to samples, each with its key and its suffix.

    Args:
        reader: a file as tarfile takes it, at a header; its read refuses more than
            MAX_HEADER_BYTES.

    Raises:
        TAR_ERRORS: it is no readable tar.
    """
    with tarfile.open(fileobj=reader, mode="r:", encoding="utf-8") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # it would keep every header of the shard
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
            name = _MEMBER_NAME.fullmatch(member.name)
            if member.isreg() and name is not None and not _METADATA_NAME.match(member.name):
                yield member, name[1], name[2].lower()


def _groups(reader: "_HashingReader") -> Iterator[_Group]:
    """The samples of a tar in its order, then a check that the tar is whole."""
    group = None
    for member, key, suffix in sample_members(reader):
        is_image = suffix.rpartition(".")[2] in IMAGE_EXTENSIONS
        if not is_image and suffix not in ("cls", "json"):
            continue
        if group is not None and group.key != key:
            yield group
            group = None
        group = group or _Group(key=key)
        parts = re.split(r"[/\\]", member.name)
        group.leaves_archive |= ".." in parts or parts[0] == ""
        if is_image:
            group.images.append(_read_image(reader, member, suffix))
        elif suffix == "cls" and member.size <= _MAX_CLS_BYTES:
            text = reader.read_member(member)
            group.label = int(text) if _INTEGER.fullmatch(text) else -1
    if group is not None:
        yield group
    reader.check_end()


def _read_image(reader: "_HashingReader", member: tarfile.TarInfo, suffix: str) -> _Image:
    size, reason = None, ""
    if member.issparse():
        reason = "stored as a sparse file, its bytes are not in one piece"
    elif member.size > MAX_IMAGE_BYTES:
        reason = f"image member of {member.size} bytes, the limit is {MAX_IMAGE_BYTES}"
    else:
        try:
            size = image_size(reader.read_member(member))
        except UnreadableImage as error:
            reason = str(error)
    return _Image(suffix, member.offset_data, member.size, size, reason)


def _usable_image(group: _Group, seen: set[str]) -> _Image | str:
    """The image of a sample, or the reason why the sample is skipped."""
    if _SURROGATE.search(group.key):
        return "key is not UTF-8"
    if group.leaves_archive:
        return "path leaves the archive"
    if group.key in seen:
        return "duplicate key in this shard"
    # KEY.jpg goes before KEY.mask.png.
    images = [image for image in group.images if "." not in image.suffix] or group.images
    if not images:
        return "no image member"
    if len(images) > 1:
        suffixes = ", ".join(image.suffix for image in images[:4])
        return f"{len(images)} image members where one is needed ({suffixes})"
    return images[0] if images[0].size is not None else images[0].reason


class _HashingReader:
    """What tarfile needs of a file, read strictly forward so that one pass also hashes it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._position = 0
        self._last_read = b""

    def tell(self) -> int:
        return self._position

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header at byte {self._position} claims {num_bytes} bytes")
        self._last_read = self._advance(num_bytes)
        return self._last_read

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError(f"a header at byte {self._position} points backwards")
        while self._position < position:
            if not self._advance(min(position - self._position, _CHUNK_BYTES)):
                raise tarfile.ReadError(f"truncated at byte {self._position}")

    def read_member(self, member: tarfile.TarInfo) -> bytes:
        self.seek(member.offset_data)
        data = self._advance(member.size)
        if len(data) < member.size:
            raise tarfile.ReadError(f"truncated at byte {self._position}, inside {member.name}")
        return data

    def check_end(self) -> None:
        """Hash the rest and refuse a tar that stops early: tarfile takes any stop for the end."""
        end = self._position
        if len(self._last_read) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"truncated at byte {end}, without an end-of-archive marker")
        if any(self._last_read):
            raise tarfile.ReadError(f"damaged header before byte {end}")
        while chunk := self._advance(_CHUNK_BYTES):
            if chunk.count(0) < len(chunk):
                raise tarfile.ReadError(f"data behind the end-of-archive marker at byte {end}")
        if self._position - end > _MAX_PADDING_BYTES:
            raise tarfile.ReadError(f"nothing but zeros from byte {end} to {self._position}")

    def _advance(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        self._hash.update(data)
        self._position += len(data)
        return data
