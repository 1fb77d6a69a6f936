"""Checking a latent cache: all that is in its books is made again from its units, and compared.

A unit's record is made again from the unit's file, the index and the manifest from the records:
whichever bit of whichever file is not as it was written, two of them contradict each other.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.caching.files import read_file
from pipelines.caching.manifest import (
    MANIFEST_FILE,
    LatentManifest,
    UnitSource,
    index_rows,
    make_manifest,
    read_index,
    read_manifest,
)
from pipelines.caching.units import CACHE_FILE, UNITS, UnitRecord, as_json, describe_unit
from vitok.storage import Folder

# Units that one task checks in turn, which is worth its start.
_UNITS_PER_TASK = 16


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What a check found.

    Attributes:
        num_units, num_bytes: that were read.
        bad: one sentence for each file that is not as it was written.
    """

    num_units: int
    num_bytes: int
    bad: list[str]


@dataclass(frozen=True)
class _Books:
    """Manifest and index of a cache, the index as a list of rows."""

    folder: Folder
    manifest: LatentManifest
    rows: list[dict[str, Any]]


def verify_latents(
    location: str, *, sample: float = 1.0, cpus_per_task: float = 1.0
) -> CacheReport:
    """Check a cache on the connected Ray cluster; changes nothing.

    Args:
        sample: fraction of the units that are read; without all of them, the manifest's statistics
            are not made again.
        cpus_per_task: CPU cores that Ray sets aside for a task.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: an option outside its range; or manifest or index are damaged.
    """
    import ray

    from pipelines.corpora.index import tasks_at_once, unordered
    from pipelines.progress import progress_bar

    if not 0 < sample <= 1:
        raise ValueError(f"sample={sample} must be a fraction above 0 and at most 1")
    if cpus_per_task <= 0:
        raise ValueError(f"cpus_per_task={cpus_per_task} must be above 0")
    books = _read_books(location)
    numbers = _spread(len(books.rows), sample)
    at_once = tasks_at_once(cpus_per_task)
    task = ray.remote(_check_units).options(num_cpus=cpus_per_task)
    parts = {
        start: (books.folder, [books.rows[i] for i in numbers[start : start + _UNITS_PER_TASK]])
        for start in range(0, len(numbers), _UNITS_PER_TASK)
    }
    found: dict[int, list[UnitRecord | str]] = {}
    num_bytes = 0
    with (
        progress_bar("verify", len(numbers), "unit") as board,
        closing(unordered(task, parts, at_once)) as finished,
    ):
        for start, reference in finished:
            found[start] = ray.get(reference)
            num_bytes += sum(x.num_bytes for x in found[start] if isinstance(x, UnitRecord))
            num_bad = sum(isinstance(x, str) for part in found.values() for x in part)
            status = f"{num_bytes / 1e6:,.1f} MB" + (f", {num_bad} bad" if num_bad else "")
            board.advance.remote(len(found[start]), status)
    return _report(books, [x for start in sorted(found) for x in found[start]])


def verify_here(location: str) -> CacheReport:
    """Check all of a cache in this process; as verify_latents."""
    books = _read_books(location)
    return _report(books, _check_units(books.folder, books.rows))


def require_intact(report: CacheReport, location: str) -> None:
    """Complain about what a check found.

    Raises:
        ValueError: something is damaged; the first file is named.
    """
    if report.bad:
        more = f" (and {len(report.bad) - 1} more)" if len(report.bad) > 1 else ""
        raise ValueError(f"{location} is not as it was written: {report.bad[0]}{more}")


def _read_books(location: str) -> _Books:
    folder = Folder.of(location)
    manifest = read_manifest(folder)
    if manifest.signed() != manifest or as_json(manifest) != read_file(folder, MANIFEST_FILE):
        raise ValueError(
            f"{folder.uri}/{MANIFEST_FILE} is damaged: it is not what its checksum is of; delete "
            "it and run `vitok encode` again, which writes it anew"
        )
    return _Books(folder, manifest, read_index(folder, manifest).to_pylist())


def _report(books: _Books, found: Sequence[UnitRecord | str]) -> CacheReport:
    bad = [x for x in found if isinstance(x, str)]
    records = [x for x in found if isinstance(x, UnitRecord)]
    bad += _damage_of_identity(books)
    if len(records) == len(books.rows):
        bad += _damage_of_sums(books, records)
    num_bytes = sum(record.num_bytes for record in records)
    return CacheReport(num_units=len(found), num_bytes=num_bytes, bad=bad)


def _damage_of_identity(books: _Books) -> Iterator[str]:
    uri = f"{books.folder.uri}/{CACHE_FILE}"
    remedy = "delete it and run `vitok encode` again, which writes it anew"
    try:
        found = read_file(books.folder, CACHE_FILE)
    except FileNotFoundError:
        yield f"{uri} is missing; run `vitok encode` again, which writes it"
        return
    if found != as_json(books.manifest.identity):
        yield f"{uri} is damaged: it contradicts {MANIFEST_FILE}; {remedy}"


def _damage_of_sums(books: _Books, records: list[UnitRecord]) -> Iterator[str]:
    names = ("shard", "shard_digest", "start", "stop")
    manifest = books.manifest
    sources = [UnitSource(**{name: row[name] for name in names}) for row in books.rows]
    again, _ = make_manifest(
        manifest.identity, manifest.source_digest, sources, records, manifest.code_version
    )
    # Rows are compared, not files: another version of Parquet writes the same rows otherwise.
    again = replace(
        again,
        index=manifest.index,
        index_sha256=manifest.index_sha256,
        text_encoder=manifest.text_encoder,
    ).signed()
    if again != manifest or index_rows(sources, records) != books.rows:
        yield (
            f"{books.folder.uri}/{MANIFEST_FILE} contradicts the units; delete it and run "
            "`vitok encode` again, which writes it anew"
        )


def _check_units(folder: Folder, rows: list[dict[str, Any]]) -> list[UnitRecord | str]:
    """Return of each unit its record, made again from its file, or what is wrong."""
    return [_check_unit(folder.child(UNITS), row) for row in rows]


def _check_unit(units: Folder, row: dict[str, Any]) -> UnitRecord | str:
    file, book = f"{units.uri}/{row['name']}.safetensors", f"{units.uri}/{row['name']}.json"
    remedy = "delete it and its .json and run `vitok encode` again"
    skipped = [(entry["key"], entry["reason"]) for entry in row["skipped"]]
    try:
        data = read_file(units, f"{row['name']}.safetensors")
    except FileNotFoundError:
        return f"{file} is missing; delete its .json and run `vitok encode` again"
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != row["sha256"]:
        return f"{file} is damaged: sha256 {sha256[:12]} instead of {row['sha256'][:12]}; {remedy}"
    record = describe_unit(row["name"], data, skipped)
    try:
        found = read_file(units, f"{row['name']}.json")
    except FileNotFoundError:
        return f"{book} is missing; run `vitok encode` again"
    if found != as_json(record):
        return f"{book} is damaged: it contradicts the unit's file; {remedy}"
    return record


def _spread(count: int, fraction: float) -> list[int]:
    """Return so large a part of range(count), evenly spread."""
    chosen = max(1, round(count * fraction)) if count else 0
    return np.unique(np.linspace(0, max(0, count - 1), chosen).round().astype(int)).tolist()
