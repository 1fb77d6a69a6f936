"""The Parquet files of a manifest, and how they are written.

The same shards give the same bytes, whoever indexed them and in whatever order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpora.size_histogram import NUM_CLASSES, count_sizes
from pipelines.reading.tar_index import ShardIndex

SAMPLES_PER_ROW_GROUP = 1024

SHARD_SCHEMA = pa.schema(
    {
        "uri": pa.string(),
        "num_bytes": pa.int64(),
        "num_samples": pa.int64(),
        "digest": pa.string(),
        "size_counts": pa.list_(pa.int32(), NUM_CLASSES),
    }
)
SAMPLE_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.int64(),
    }
)
SKIPPED_SCHEMA = pa.schema({"uri": pa.string(), "key": pa.string(), "reason": pa.string()})


def side_index_path(manifest_path: Path, shard_digest: str) -> Path:
    """Where a manifest keeps what it knows of the samples of a shard."""
    return manifest_path / "samples" / f"{shard_digest}.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardEntry:
    """What the tables of a manifest hold of a shard; its samples are in its side index.

    size_counts is int32 [NUM_CLASSES]; skipped holds (key, reason).
    """

    uri: str
    num_bytes: int
    num_samples: int
    digest: str
    size_counts: np.ndarray
    skipped: list[tuple[str, str]]

    @classmethod
    def of(cls, index: ShardIndex) -> "ShardEntry":
        """Return the entry of an indexed shard."""
        return cls(
            uri=index.uri,
            num_bytes=index.num_bytes,
            num_samples=index.num_samples,
            digest=index.digest,
            size_counts=count_sizes(index.height, index.width),
            skipped=index.skipped,
        )


def side_index_bytes(index: ShardIndex) -> bytes:
    """Return the file that a manifest keeps of the samples of a shard."""
    samples = pa.table({name: getattr(index, name) for name in SAMPLE_SCHEMA.names})
    sink = pa.BufferOutputStream()
    pq.write_table(samples.cast(SAMPLE_SCHEMA), sink, row_group_size=SAMPLES_PER_ROW_GROUP)
    return sink.getvalue().to_pybytes()


def write_tables(
    entries: Iterable[ShardEntry],
    folder: Path,
    max_skipped_fraction: float,
    left_out: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the tables of a manifest whose side indexes are there once the last entry has come.

    Args:
        left_out: (uri, reason) of shards that are not in the manifest.

    Raises:
        ValueError: as write_manifest.
    """
    shards: dict[str, tuple] = {}
    skipped: list[tuple[str, str, str]] = []
    for entry in entries:
        if entry.uri in shards:
            raise ValueError(f"{entry.uri}: this shard is listed twice; its samples would be too")
        counts = entry.size_counts
        shards[entry.uri] = entry.uri, entry.num_bytes, entry.num_samples, entry.digest, counts
        skipped += [(entry.uri, key, reason) for key, reason in entry.skipped]
    num_samples = sum(num_samples for _, _, num_samples, *_ in shards.values())
    _check_skipped(skipped, num_samples, len(shards), max_skipped_fraction)
    skipped += [(uri, "", reason) for uri, reason in left_out]
    write_rows(skipped, SKIPPED_SCHEMA, folder / "skipped.parquet")
    write_rows(list(shards.values()), SHARD_SCHEMA, folder / "shards.parquet")


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


def write_rows(rows: list[tuple], schema: pa.Schema, path: Path) -> None:
    """Write rows, each a tuple of the schema's columns, as one Parquet file."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    pq.write_table(pa.table(arrays, schema=schema), path)
