"""Shards as files: which ones a pattern names, how one is opened, how one is written."""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from braceexpand import braceexpand
from pyarrow import fs


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Turn paths, folders, globs and brace ranges into the shards they name.

    A folder stands for all its *.tar. Local shards become absolute paths, sorted within a pattern;
    URIs such as s3://... are brace-expanded and passed on. A shard named twice is taken once.

    Raises:
        FileNotFoundError: a pattern, or a part of its brace range, names no shard.
        ValueError: a glob in a URI.
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
    if is_remote(name):
        if glob.has_magic(name):
            raise ValueError(
                f"{pattern}: a URI is not globbed; name its shards with a range such as "
                "train-{000000..000007}.tar"
            )
        return [name]
    path = Path(os.path.abspath(name))
    if path.is_dir():
        found = sorted(str(tar) for tar in path.glob("*.tar"))
    elif path.exists():
        found = [str(path)]
    else:
        found = sorted(p for p in glob.glob(str(path), recursive=True) if not os.path.isdir(p))
    if not found:
        which = pattern if name == pattern else f"{pattern}: {name}"
        raise FileNotFoundError(
            f"{which}: no shard matches; name existing .tar files, a folder that holds some, "
            "or a glob or brace range of them"
        )
    return found


def open_shard(uri: str) -> BinaryIO | pa.NativeFile:
    """Open a shard for seeking and reading: a local path, or a URI that pyarrow.fs knows.

    Raises:
        OSError: it cannot be opened; the shard is named.
        ValueError: the URI is of no known kind.
    """
    try:
        if not is_remote(uri):
            return Path(uri).open("rb")
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem.open_input_file(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{uri}: no way to read this URI ({error}); use s3:// or a path"
        ) from error
    except OSError as error:
        raise OSError(
            f"{uri}: this shard cannot be opened ({error.strerror or error}); bring it back, or "
            "index the shards that are there"
        ) from error


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
