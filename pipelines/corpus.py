"""Manifests of WebDataset shards, and random access to their samples.

A manifest is a folder that is written once and never changed:

    shards.parquet           one row a shard, in order: uri, num_bytes, num_samples, digest
                             (sha256), size_counts (images of each class of size_histogram.py)
    samples/DIGEST.parquet   one file a shard: key, offset, length, width, height, label, in row
                             groups of 1,024, so that neighbours can be read without the rest
    skipped.parquet          uri, key, reason of the samples that cannot be used; a shard that was
                             left out as a whole has an empty key

Samples are numbered 0 .. num_samples - 1 through all shards in this order; what is skipped has no
number. Everything that plans or reads speaks of samples by this number.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq

from pipelines.corpora.manifest_tables import (
    SAMPLE_SCHEMA,
    SAMPLES_PER_ROW_GROUP,
    SHARD_SCHEMA,
    SKIPPED_SCHEMA,
    ShardEntry,
    side_index_bytes,
    side_index_path,
    write_tables,
)
from pipelines.corpora.size_histogram import NUM_CLASSES
from pipelines.reading.shards import (
    expand_shards,
    local_folder,
    open_ranges,
    open_shard,
    write_shards,
)
from pipelines.reading.tar_index import ShardIndex, index_shard

__all__ = [
    "Manifest",
    "SampleRecords",
    "ShardIndex",
    "ShardTable",
    "build_manifest",
    "expand_shards",
    "index_shard",
    "open_shard",
    "read_samples",
    "refuse_existing",
    "write_manifest",
    "write_shards",
]

# Ranges this near each other are fetched in one read: cheaper than a second request or seek.
MAX_GAP_BYTES = 64 * 2**10
# What one read may hold on top of the samples it is cut into.
MAX_READ_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRecords:
    """Where samples lie and what is known of them: arrays of one length, one entry a sample.

    sample_id, shard (an index into Manifest.uris), offset, length (bytes of the image inside its
    shard) and label (-1: none) are int64, width and height (upright) int32, key holds str objects.
    """

    sample_id: np.ndarray
    shard: np.ndarray
    key: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, places: Sequence[int]) -> "SampleRecords":
        """Return the records at some places, in that order."""
        index = np.asarray(places, dtype=np.int64)
        return SampleRecords(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


class ShardTable(Protocol):
    """What is read from: shards by number, each of a known length."""

    @property
    def uris(self) -> Sequence[str]: ...

    @property
    def num_bytes_per_shard(self) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The shard table of a manifest; the samples of a shard are loaded when they are asked for.

    first_sample [num_shards + 1] int64 is the number of the first sample of each shard, closed
    by the number of all samples.
    """

    path: Path
    uris: list[str]
    num_samples_per_shard: np.ndarray
    first_sample: np.ndarray
    shard_digests: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read the shard table.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError: the manifest holds no samples.
        """
        path = local_folder(path)
        table_path = path / "shards.parquet"
        if not table_path.is_file():
            raise FileNotFoundError(
                f"{path}: no manifest in this folder; `vitok corpus index SHARDS --out {path}` "
                "makes one"
            )
        columns = ["uri", "num_samples", "digest"]
        table = pq.read_table(table_path, schema=SHARD_SCHEMA, columns=columns)
        num_samples = table["num_samples"].to_numpy()
        if num_samples.sum() == 0:
            raise ValueError(
                f"{path}: this manifest holds no samples; index other shards with "
                f"`vitok corpus index SHARDS --out {path}`"
            )
        return cls(
            path=path,
            uris=table["uri"].to_pylist(),
            num_samples_per_shard=num_samples,
            first_sample=np.concatenate([[0], np.cumsum(num_samples)]).astype(np.int64),
            shard_digests=np.array(table["digest"].to_pylist(), dtype="U64"),
        )

    @property
    def num_samples(self) -> int:
        return int(self.first_sample[-1])

    @cached_property
    def num_bytes_per_shard(self) -> np.ndarray:
        """Bytes of each shard, int64 [num_shards]."""
        table = pq.read_table(self.path / "shards.parquet", columns=["num_bytes"])
        return table["num_bytes"].to_numpy()

    @cached_property
    def size_counts(self) -> np.ndarray:
        """Images of each size class of each shard, int32 [num_shards, NUM_CLASSES]."""
        table = pq.read_table(self.path / "shards.parquet", columns=["size_counts"])
        counts = table["size_counts"].combine_chunks().flatten().to_numpy()
        return counts.reshape(len(self.uris), NUM_CLASSES)

    @cached_property
    def digest(self) -> str:
        """sha256 over the shards' digests and sample counts: the same wherever the shards lie."""
        digest = hashlib.sha256(self.shard_digests.astype("S64").tobytes())
        digest.update(self.num_samples_per_shard.astype("<i8").tobytes())
        return digest.hexdigest()

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and position inside the shard of each sample, both int64.

        Raises:
            IndexError: a number outside 0 .. num_samples - 1.
        """
        sample_ids = np.asarray(sample_ids, np.int64)
        outside = sample_ids[(sample_ids < 0) | (sample_ids >= self.num_samples)]
        if outside.size:
            raise IndexError(
                f"{self.path}: no sample {outside[0]}, the manifest has {self.num_samples}"
            )
        shard = np.searchsorted(self.first_sample, sample_ids, side="right") - 1
        return shard, sample_ids - self.first_sample[shard]

    def records(self, sample_ids: np.ndarray) -> SampleRecords:
        """The records of the samples, in the order given."""
        sample_ids = np.asarray(sample_ids, np.int64)
        shard, index_in_shard = self.locate(sample_ids)
        columns = {
            name: np.empty(len(sample_ids), object if name == "key" else np.int64)
            for name in SAMPLE_SCHEMA.names
        }
        group, index_in_group = np.divmod(index_in_shard, SAMPLES_PER_ROW_GROUP)
        groups_per_shard = int(self.num_samples_per_shard.max()) // SAMPLES_PER_ROW_GROUP + 1
        for rows in _rows_of_each(shard * groups_per_shard + group):
            digest = str(self.shard_digests[shard[rows[0]]])
            found = _load_row_group(side_index_path(self.path, digest), int(group[rows[0]]))
            for name, column in columns.items():
                column[rows] = found[name][index_in_group[rows]]
        for name in ("width", "height"):
            columns[name] = columns[name].astype(np.int32)
        return SampleRecords(sample_id=sample_ids, shard=shard, **columns)

    def skipped(self) -> list[tuple[str, str, str]]:
        """(uri, key, reason) of every sample that the shards hold and the manifest does not."""
        table = pq.read_table(self.path / "skipped.parquet", schema=SKIPPED_SCHEMA)
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


# A step that does not fit its rows is planned again, and its neighbours in a task lie near. At
# about 200 bytes a sample, these groups take 200 MB at most.
@lru_cache(maxsize=1024)
def _load_row_group(path: Path, group: int) -> dict[str, np.ndarray]:
    """Read SAMPLES_PER_ROW_GROUP samples of a shard, as columns.

    Side indexes are named by their shard's digest: one is never outdated, even if a manifest is
    rebuilt in its place.
    """
    with pq.ParquetFile(path) as file:
        table = file.read_row_group(group, columns=SAMPLE_SCHEMA.names, use_threads=False)
    return {name: table[name].to_numpy() for name in SAMPLE_SCHEMA.names}


def _rows_of_each(values: np.ndarray) -> Iterator[np.ndarray]:
    """For each distinct value the positions where it stands."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    yield from (rows for rows in np.split(order, starts) if rows.size)


def build_manifest(
    patterns: Sequence[str],
    path: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Index shards one after the other in this process; progress gets (shards done, shards)."""
    uris = expand_shards(patterns)

    def indexes() -> Iterator[ShardIndex]:
        for num_done, uri in enumerate(uris, start=1):
            yield index_shard(uri)
            if progress is not None:
                progress(num_done, len(uris))

    return write_manifest(indexes(), path)


def write_manifest(
    indexes: Iterable[ShardIndex], path: str | Path, max_skipped_fraction: float = 0.1
) -> Manifest:
    """Write the manifest of shards in the order in which their indexes come.

    Holds one index at a time. The folder appears complete or not at all.

    Raises:
        FileExistsError: there is something at this path already.
        ValueError: no samples, a shard twice, or more than max_skipped_fraction of the samples
            cannot be used.
    """
    path = refuse_existing(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    (unfinished / "samples").mkdir(parents=True)

    def entries() -> Iterator[ShardEntry]:
        for index in indexes:
            side_index_path(unfinished, index.digest).write_bytes(side_index_bytes(index))
            yield ShardEntry.of(index)

    try:
        write_tables(entries(), unfinished, max_skipped_fraction)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Manifest.load(path)


def refuse_existing(path: str | Path, what: str = "manifest") -> Path:
    """Return the absolute path of a folder that is to be written.

    Raises:
        FileExistsError: there is something at this path already.
    """
    path = local_folder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; remove it or write the {what} elsewhere")
    return path


def read_samples(table: ShardTable, records: SampleRecords) -> list[bytes]:
    """Read the bytes of the records, in their order.

    Each shard is opened once and read front to back, neighbours in one read.

    Raises:
        ObjectChanged: a shard is not as long as it was, or was replaced in the meantime.
        OSError: a shard ends inside a sample, or the store failed.
    """
    images: list[bytes] = [b""] * len(records)
    for rows in _rows_of_each(records.shard):
        shard = int(records.shard[rows[0]])
        uri = table.uris[shard]
        rows = rows[np.argsort(records.offset[rows], kind="stable")]
        with open_ranges(uri, int(table.num_bytes_per_shard[shard])) as read:
            for span in _spans(rows, records):
                start = int(records.offset[span[0]])
                end = int((records.offset[span] + records.length[span]).max())
                block = memoryview(read(start, end - start))
                for row in span:
                    offset, length = int(records.offset[row]), int(records.length[row])
                    image = bytes(block[offset - start : offset - start + length])
                    if len(image) < length:
                        raise OSError(
                            f"{uri}: {records.key[row]}: read {len(image)} of {length} bytes at "
                            f"byte {offset}; the shard is not the one that was indexed"
                        )
                    images[row] = image
    return images


def _spans(rows: np.ndarray, records: SampleRecords) -> Iterator[np.ndarray]:
    """Cut rows, sorted by offset, into runs that one read can fetch."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop < len(rows):
            last, following = rows[stop - 1], rows[stop]
            gap = records.offset[following] - records.offset[last] - records.length[last]
            end = records.offset[following] + records.length[following]
            if gap <= MAX_GAP_BYTES and end - records.offset[rows[start]] <= MAX_READ_BYTES:
                continue
        yield rows[start:stop]
        start = stop
