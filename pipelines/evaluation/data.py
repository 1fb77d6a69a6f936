"""The images of an evaluation: opened wherever they are, and chosen by key and seed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.corpora.build import build_corpus
from pipelines.corpora.image_sources import open_source
from pipelines.corpus import Manifest, build_manifest
from pipelines.reading.shards import local_folder

_NOTE = "source.json"


def open_images(location: str, scratch: Path) -> Manifest:
    """Return the manifest of some images, after making one where there is none.

    Args:
        location: folder that `vitok corpus index` wrote; shards, as it takes them; a folder of
            images; Parquet files with images.
        scratch: folder for a manifest that is made, with a copy of the images unless they are
            shards; used again as long as the images stay what they are.

    Raises:
        FileNotFoundError: there are none of these.
    """
    local = "://" not in location or location.startswith("file://")
    if local and (local_folder(location) / "shards.parquet").is_file():
        return Manifest.load(location)
    shards = _are_shards(location, local)
    if not shards:
        open_source(location)  # before anything is written
    note = {"location": location, "files": _fingerprint(local_folder(location)) if local else ""}
    if _read_note(scratch) != note:
        _clear(scratch)
        scratch.mkdir(parents=True)
        (scratch / _NOTE).write_text(json.dumps(note) + "\n")
    if not (scratch / "manifest").exists():
        if not shards and not (scratch / "shards").exists():
            build_corpus(location, scratch / "shards", labels=False)
        build_manifest([location if shards else str(scratch / "shards")], scratch / "manifest")
    return Manifest.load(scratch / "manifest")


def choose_samples(
    manifest: Manifest, max_images: int = 0, seed: int = 0, keys: list[str] | None = None
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the samples to evaluate, and their keys, sorted by key.

    Neither depends on the order in which the manifest holds them.

    Args:
        max_images: choose so many at random, the same for the same seed; 0 takes all.
        keys: take these, whatever max_images says.

    Raises:
        ValueError: a key occurs twice in the manifest, or one that is wanted does not.
    """
    number_of: dict[str, int] = {}
    for number, key in enumerate(manifest.records(np.arange(manifest.num_samples)).key.tolist()):
        if number_of.setdefault(key, number) != number:
            raise ValueError(
                f"{manifest.path}: the key {key!r} occurs twice; results are told apart by key, so "
                "build the shards with keys of their own"
            )
    chosen = list(number_of)
    if keys is not None:
        if missing := [key for key in keys if key not in number_of]:
            raise ValueError(
                f"{manifest.path} has no sample {missing[0]!r}, nor {len(missing) - 1} others of "
                "the list; take the list that belongs to these images"
            )
        chosen = keys
    elif max_images:
        chosen = sorted(chosen, key=lambda key: _draw(seed, key))[:max_images]
    chosen = sorted(set(chosen))
    return np.array([number_of[key] for key in chosen], np.int64), chosen


def read_keys(path: str) -> list[str]:
    """Read a list of samples, one key a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lists nothing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"no list of samples at {path}; give samples a file with one key a line, such as "
            "samples.txt of an evaluation"
        )
    keys = file.read_text().split("\n")
    if not any(keys):
        raise ValueError(f"{path} lists no samples; leave samples empty to take all")
    return [key for key in keys if key]


def left_out(manifest: Manifest) -> list[tuple[str, str]]:
    """Return (name, reason) of the images that are there and cannot be used."""
    found = [(key or uri, reason) for uri, key, reason in manifest.skipped()]
    scratch = manifest.path.parent
    report = scratch / "shards" / "build.json"
    if _read_note(scratch) is not None and report.is_file():
        skipped = json.loads(report.read_text())["skipped"]
        found += [(name, reason) for _, name, reason in skipped]
    return found


def digest_of(keys: list[str]) -> str:
    """Return the sha256 (hex) of a list of samples."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()


def _are_shards(location: str, local: bool) -> bool:
    if not local or any(letter in location for letter in "*?{[") or location.endswith(".tar"):
        return True
    folder = local_folder(location)
    return folder.is_dir() and any(file.suffix == ".tar" for file in folder.iterdir())


def _fingerprint(root: Path) -> str:
    """Return a digest of the names, sizes and times of all files below a folder."""
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    for file in files:
        status = file.stat()
        name = os.fsencode(file.relative_to(root))
        digest.update(name + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _clear(scratch: Path) -> None:
    """Remove what was made of other images; never what an evaluation did not make."""
    if not scratch.exists():
        return
    if _read_note(scratch) is None:
        raise FileExistsError(f"{scratch} was not made by an evaluation; give another out")
    shutil.rmtree(scratch)


def _read_note(scratch: Path) -> dict[str, str] | None:
    file = scratch / _NOTE
    return json.loads(file.read_text()) if file.is_file() else None
