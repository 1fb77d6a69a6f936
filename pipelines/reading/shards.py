"""Shards as files: which ones a pattern names, how one is opened, how one is written."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from pipelines.reading.objects import RemoteObject, check_length, list_objects

# The biggest encoded image that is used, and what one range may hold.
MAX_IMAGE_BYTES = 64 * 2**20


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Turn paths, folders, globs and brace ranges into the shards they name.

    A folder stands for all its *.tar, on s3:// one that ends in a slash. Local shards, those of
    file:// too, become absolute paths. A glob gives its shards sorted by name; URIs without one
    are brace-expanded and passed on unseen. A shard named twice is taken once.

    Raises:
        FileNotFoundError: a pattern, or a part of its brace range, names no shard.
        PermissionError, StoreUnavailable, OSError: a bucket cannot be listed.
        ValueError: a glob in a URI of another kind than s3://.
    """
    shards: dict[str, None] = {}
    for pattern in patterns:
        literal = not is_remote(pattern) and Path(pattern).exists()
        for name in [pattern] if literal else braceexpand(pattern):
            shards.update(dict.fromkeys(_matching_shards(name, pattern)))
    if not shards:
        raise FileNotFoundError("no shards given; name tars, folders of tars or URIs of tars")
    return list(shards)


def _matching_shards(name: str, pattern: str) -> list[str]:
    if name.startswith("s3://"):
        found = _matching_objects(name)
    elif is_remote(name) and not name.startswith("file://"):
        # The question mark of a query is none of a glob.
        if glob.has_magic(urlsplit(name).path):
            raise ValueError(
                f"{pattern}: a URI of this kind is not globbed; name its shards with a range such "
                "as train-{000000..000007}.tar"
            )
        found = [name]
    else:
        found = _matching_files(Path(os.path.abspath(_local_path(name))))
    if not found:
        which = pattern if name == pattern else f"{pattern}: {name}"
        raise FileNotFoundError(
            f"{which}: no shard matches; name existing .tar files, a folder that holds some, "
            "or a glob or brace range of them"
        )
    return found


def _matching_files(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(str(tar) for tar in path.glob("*.tar"))
    if path.exists():
        return [str(path)]
    return sorted(p for p in glob.glob(str(path), recursive=True) if not os.path.isdir(p))


def _matching_objects(uri: str) -> list[str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if glob.has_magic(bucket):
        raise ValueError(f"{uri}: a wildcard in the name of the bucket; name one bucket")
    if not key or key.endswith("/"):
        uri = f"s3://{bucket}/{key}*.tar"
    if not glob.has_magic(uri):
        return [uri]
    # Listed is what has the part before the first wildcard in common.
    prefix = re.split(r"[*?\[]", uri)[0]
    behind_prefix = uri[len(prefix) :]
    parts = uri.split("/")
    objects = list_objects(prefix, recursive="/" in behind_prefix or "**" in behind_prefix)
    return [found for found in objects if _matches(found.split("/"), parts)]


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """As glob.glob matches paths: a wildcard stays within a part, `**` is any number of parts."""
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":
        return any(_matches(parts[start:], patterns[1:]) for start in range(len(parts)))
    return fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def open_shard(uri: str) -> BinaryIO:
    """Open a shard to be read once, front to back: a local path, file://, s3:// or http(s)://.

    What a store does wrong is made good behind `read`, see pipelines/reading/objects.py.

    Raises:
        OSError: it cannot be opened; the shard is named. A remote one fails when it is read.
        ValueError: the URI is of no known kind.
    """
    return RemoteObject(uri).stream() if _is_in_store(uri) else _open_file(uri)


def shard_size(uri: str) -> int:
    """Return the length of a shard in bytes without reading it; errors as those of open_shard."""
    if _is_in_store(uri):
        return RemoteObject(uri).ask_length()
    with _open_file(uri) as stream:
        return os.fstat(stream.fileno()).st_size


@contextmanager
def open_ranges(uri: str, shard_bytes: int) -> Iterator[Callable[[int, int], bytes | bytearray]]:
    """Open a shard of a known length; gives read(start, num_bytes) for ranges of it.

    Raises:
        ObjectChanged: it has another length; a remote shard says so at its first range.
        OSError: it cannot be opened or read, or a range is not inside it; the shard is named.
        ValueError: the URI is of no known kind.
    """

    def check_range(start: int, num_bytes: int) -> None:
        if not 0 <= start <= start + num_bytes <= shard_bytes or num_bytes > MAX_IMAGE_BYTES:
            raise OSError(
                f"{uri}: {num_bytes} bytes from byte {start} are asked for, of a shard of "
                f"{shard_bytes} bytes and at most {MAX_IMAGE_BYTES} at a time; the manifest is "
                "damaged, index the shards anew"
            )

    if _is_in_store(uri):
        remote = RemoteObject(uri, shard_bytes)

        def read_remote(start: int, num_bytes: int) -> bytearray:
            check_range(start, num_bytes)
            return remote.read_range(start, num_bytes)

        yield read_remote
        return
    with _open_file(uri) as stream:
        check_length(uri, os.fstat(stream.fileno()).st_size, shard_bytes)

        def read_local(start: int, num_bytes: int) -> bytes:
            check_range(start, num_bytes)
            stream.seek(start)
            return stream.read(num_bytes)

        yield read_local


def _open_file(uri: str) -> BinaryIO:
    try:
        return Path(_local_path(uri)).open("rb")
    except OSError as error:
        raise OSError(
            f"{uri}: this shard cannot be opened ({error.strerror or error}); bring it back, or "
            "index the shards that are there"
        ) from error


def _is_in_store(uri: str) -> bool:
    if uri.startswith(("s3://", "http://", "https://")):
        return True
    if is_remote(uri) and not uri.startswith("file://"):
        raise ValueError(
            f"{uri}: no way to read this URI; use s3://, https://, http://, file:// or a path"
        )
    return False


def _local_path(uri: str) -> str:
    if not uri.startswith("file://"):
        return uri
    path = unquote(uri.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise ValueError(f"{uri}: names another machine; a local shard is file:///PATH")
    return path


def local_folder(location: str | Path) -> Path:
    """Return a folder on a disk of this machine as an absolute path.

    Raises:
        ValueError: it is a location in an object store.
    """
    if is_remote(str(location)):
        raise ValueError(
            f"{location} is not a local folder, which is needed here; use one on a disk, on a "
            "cluster one that all nodes share"
        )
    return Path(location).expanduser().absolute()


def is_remote(uri: str) -> bool:
    """Whether a URI names anything but a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri) is not None


def write_shards(
    samples: Iterable[dict], folder: str | Path, prefix: str, samples_per_shard: int
) -> list[str]:
    """Write samples as WebDataset shards PREFIX-000000.tar, ..., and return their paths.

    The same samples give the same bytes. A shard appears under its name when it is complete.

    Args:
        samples: dicts of "__key__" and one value an extension: "jpg" (or another image) bytes,
            "cls" an int, "json" a dict.

    Raises:
        ValueError: a key that a reader of the shard would not find again.
    """
    # Here because it imports torch, which nobody who only reads a corpus should wait for.
    from webdataset import TarWriter

    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
    paths: list[str] = []
    remaining = iter(samples)
    for first in remaining:
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        unfinished = path.with_name(f"{path.name}.unfinished")
        with (
            unfinished.open("wb") as stream,
            # PAX differs from the writer's default only where a name is too long for that.
            TarWriter(
                stream, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT"
            ) as tar,
        ):
            for sample in chain([first], islice(remaining, samples_per_shard - 1)):
                tar.write(_encode_sample(sample))
        os.replace(unfinished, path)
        paths.append(str(path))
    return paths


def _encode_sample(sample: dict) -> dict:
    key = sample["__key__"]
    if not re.fullmatch(r"(?!/)(.*/)?[^./]+", key) or ".." in key.split("/"):
        raise ValueError(
            f"{key!r}: a key is a relative path without a dot in its last part; rename the sample"
        )
    encoded: dict = {"__key__": key}
    for extension, value in sample.items():
        match value:
            case bytes():
                encoded[extension] = value
            case int():
                encoded[extension] = str(value).encode()
            case dict():
                encoded[extension] = json.dumps(value, sort_keys=True).encode()
            case _ if extension != "__key__":
                raise ValueError(
                    f"{key}.{extension}: {type(value).__name__} instead of bytes, int or dict"
                )
    return encoded
