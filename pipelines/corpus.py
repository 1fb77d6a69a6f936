"""Manifests of WebDataset shards, and random access to their samples.

A manifest is a folder that is written once and never changed:

    shards.parquet           one row a shard, in order: uri, num_bytes, num_samples, digest
    samples/000000.parquet   one file a shard: key, offset, length, width, height, label
    skipped.parquet          uri, key, reason of the samples that cannot be used

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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards import expand_shards, local_folder, open_shard, write_shards
from pipelines.tar_index import ShardIndex, index_shard

__all__ = [
    "Manifest",
    "SampleRecords",
    "ShardIndex",
    "build_manifest",
    "expand_shards",
    "index_shard",
    "read_samples",
    "write_manifest",
    "write_shards",
]

# Ranges this near each other are fetched in one read: cheaper than a second request or seek.
MAX_GAP_BYTES = 64 * 2**10
# What one read may hold on top of the samples it is cut into.
MAX_READ_BYTES = 32 * 2**20

_SHARD_SCHEMA = pa.schema(
    {"uri": pa.string(), "num_bytes": pa.int64(), "num_samples": pa.int64(), "digest": pa.string()}
)
_SAMPLE_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.int64(),
    }
)
_SKIPPED_SCHEMA = pa.schema({"uri": pa.string(), "key": pa.string(), "reason": pa.string()})


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
        table = pq.read_table(table_path, schema=_SHARD_SCHEMA)
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
            for name in _SAMPLE_SCHEMA.names
        }
        for rows in _rows_of_each(shard):
            table = self._side_index(int(shard[rows[0]])).take(pa.array(index_in_shard[rows]))
            for name, column in columns.items():
                column[rows] = table[name].to_numpy()
        for name in ("width", "height"):
            columns[name] = columns[name].astype(np.int32)
        return SampleRecords(sample_id=sample_ids, shard=shard, **columns)

    def skipped(self) -> list[tuple[str, str, str]]:
        """(uri, key, reason) of every sample that the shards hold and the manifest does not."""
        table = pq.read_table(self.path / "skipped.parquet", schema=_SKIPPED_SCHEMA)
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def _side_index(self, shard: int) -> pa.Table:
        table = _load_side_index(_side_index_path(self.path, shard), str(self.shard_digests[shard]))
        assert table.num_rows == self.num_samples_per_shard[shard], (self.path, shard)
        return table


@lru_cache(maxsize=32)
def _load_side_index(path: Path, shard_digest: str) -> pa.Table:
    """The digest is part of the cache's key alone: a manifest may be rebuilt in the same place."""
    return pq.read_table(path, schema=_SAMPLE_SCHEMA)


def _side_index_path(manifest_path: Path, shard: int) -> Path:
    return manifest_path / "samples" / f"{shard:06d}.parquet"


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
    path = local_folder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; remove it or write the manifest elsewhere")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        _write_tables(indexes, unfinished, max_skipped_fraction)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Manifest.load(path)


def _write_tables(indexes: Iterable[ShardIndex], folder: Path, max_skipped_fraction: float) -> None:
    shards: dict[str, tuple[str, int, int, str]] = {}
    skipped: list[tuple[str, str, str]] = []
    (folder / "samples").mkdir()
    for index in indexes:
        if index.uri in shards:
            raise ValueError(f"{index.uri}: this shard is listed twice; its samples would be too")
        samples = pa.table({name: getattr(index, name) for name in _SAMPLE_SCHEMA.names})
        pq.write_table(samples.cast(_SAMPLE_SCHEMA), _side_index_path(folder, len(shards)))
        shards[index.uri] = (index.uri, index.num_bytes, index.num_samples, index.digest)
        skipped += [(index.uri, key, reason) for key, reason in index.skipped]
    num_samples = sum(num_samples for _, _, num_samples, _ in shards.values())
    _check_skipped(skipped, num_samples, len(shards), max_skipped_fraction)
    _write_rows(skipped, _SKIPPED_SCHEMA, folder / "skipped.parquet")
    _write_rows(list(shards.values()), _SHARD_SCHEMA, folder / "shards.parquet")


def _check_skipped(
    skipped: list[tuple[str, str, str]],
    num_samples: int,
    num_shards: int,
    max_skipped_fraction: float,
) -> None:
    first_ones = "".join(f"\n  {uri}: {key}: {reason}" for uri, key, reason in skipped[:10])
    if num_samples == 0:
        raise ValueError(f"no usable sample in {num_shards} shards{first_ones}")
    fraction = len(skipped) / (num_samples + len(skipped))
    if fraction > max_skipped_fraction:
        raise ValueError(
            f"{len(skipped)} of {num_samples + len(skipped)} samples cannot be used, more than "
            f"max_skipped_fraction={max_skipped_fraction}; mend the shards or raise the limit. "
            f"The first ones:{first_ones}"
        )


def _write_rows(rows: list[tuple], schema: pa.Schema, path: Path) -> None:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    pq.write_table(pa.table(arrays, schema=schema), path)


def read_samples(manifest: Manifest, records: SampleRecords) -> list[bytes]:
    """Read the encoded images of the records, in their order.

    Each shard is opened once and read front to back, neighbours in one read.

    Raises:
        OSError: a shard ends inside a sample, or the store failed.
    """
    images: list[bytes] = [b""] * len(records)
    for rows in _rows_of_each(records.shard):
        uri = manifest.uris[records.shard[rows[0]]]
        rows = rows[np.argsort(records.offset[rows], kind="stable")]
        with open_shard(uri) as stream:
            for span in _spans(rows, records):
                start = int(records.offset[span[0]])
                stream.seek(start)
                end = int((records.offset[span] + records.length[span]).max())
                block = memoryview(stream.read(end - start))
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
