"""The books of a latent cache: one manifest, and an index with one row a unit.

    CACHE/manifest.json            LatentManifest: small, however many units there are
    CACHE/index-DIGEST.parquet     INDEX_SCHEMA: units in the order of the corpus

DIGEST begins the index's sha256, which the manifest holds: the manifest is written last, and names
all of what it speaks of. A cache that grows has both indexes for a while.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.caching.files import file_names, read_file, remove_file, write_file
from pipelines.caching.units import CacheIdentity, UnitRecord, as_json, read_record
from vitok.config import UNLESS_EMPTY, config, parse_json, to_dict
from vitok.storage import Folder

MANIFEST_FILE = "manifest.json"
# Reading the record of a unit is waiting, not work.
_RECORD_THREADS = 32

INDEX_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "shard": pa.string(),
        "shard_digest": pa.string(),
        "start": pa.int64(),
        "stop": pa.int64(),
        "first_latent": pa.int64(),
        "num_images": pa.int64(),
        "num_latents": pa.int64(),
        "num_tokens": pa.int64(),
        "num_bytes": pa.int64(),
        "table_bytes": pa.int64(),
        "sha256": pa.string(),
        "keys_sha256": pa.string(),
        "skipped": pa.list_(pa.struct({"key": pa.string(), "reason": pa.string()})),
    }
)


@config
class UnitSource:
    """Where the images of a unit come from: samples start to stop of a shard."""

    shard: str
    shard_digest: str
    start: int
    stop: int


@config
class LatentManifest:
    """All of a cache.

    Attributes:
        identity: what it is of.
        source_digest: of the corpus manifest.
        code_version: of the code that finished it.
        num_units, num_images: images that are in it, at whatever sizes.
        num_latents: rows: an image at one size, mirrored or not.
        num_tokens, num_bytes: of all units.
        num_skipped: unreadable images; the index names them, and the reasons.
        mean, std: of every stored channel over all tokens.
        index: name of the index.
        index_sha256: of the index.
        checksum: sha256 of all the rest, as JSON.
        num_texts, num_text_tokens: images that have a text, and the tokens of their texts.
        text_encoder: where the encoder of the texts was.
    """

    identity: CacheIdentity
    source_digest: str
    code_version: str
    num_units: int
    num_images: int
    num_latents: int
    num_tokens: int
    num_bytes: int
    num_skipped: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    index: str
    index_sha256: str
    checksum: str = ""
    num_texts: Annotated[int, UNLESS_EMPTY] = 0
    num_text_tokens: Annotated[int, UNLESS_EMPTY] = 0
    text_encoder: Annotated[str, UNLESS_EMPTY] = ""

    def signed(self) -> "LatentManifest":
        """Return the same manifest with its checksum."""
        text = json.dumps(to_dict(replace(self, checksum="")), sort_keys=True)
        return replace(self, checksum=hashlib.sha256(text.encode()).hexdigest())


def read_records(folder: Folder, names: Sequence[str]) -> list[UnitRecord]:
    """Read the commit records of units, many at a time; errors as those of read_record."""
    with ThreadPoolExecutor(_RECORD_THREADS) as pool:
        return list(pool.map(lambda name: read_record(folder, name), names))


def write_manifest(
    folder: Folder,
    identity: CacheIdentity,
    source_digest: str,
    sources: Sequence[UnitSource],
    records: Sequence[UnitRecord],
    text_encoder: str = "",
) -> LatentManifest:
    """Write index and manifest over all units: from here on the cache can be read."""
    manifest, index = make_manifest(identity, source_digest, sources, records)
    manifest = replace(manifest, text_encoder=text_encoder).signed()
    write_file(folder, manifest.index, index)
    write_file(folder, MANIFEST_FILE, as_json(manifest))
    return manifest


def make_manifest(
    identity: CacheIdentity,
    source_digest: str,
    sources: Sequence[UnitSource],
    records: Sequence[UnitRecord],
    version: str = "",
) -> tuple[LatentManifest, bytes]:
    """Merge the commit records of a cache, in the order of the corpus.

    Args:
        version: of the code; that of this code if empty.

    Returns:
        the manifest and the index; the same units give the same bytes.
    """
    index = _index_bytes(sources, records)
    digest = hashlib.sha256(index).hexdigest()
    num_tokens = sum(record.num_tokens for record in records)
    mean, std = _statistics(records, num_tokens, identity.values_per_token)
    manifest = LatentManifest(
        identity=identity,
        source_digest=source_digest,
        code_version=version or code_version(),
        num_units=len(records),
        num_images=sum(record.num_images for record in records),
        num_latents=sum(record.num_latents for record in records),
        num_tokens=num_tokens,
        num_bytes=sum(record.num_bytes for record in records),
        num_skipped=sum(len(record.skipped) for record in records),
        mean=mean,
        std=std,
        index=f"index-{digest[:16]}.parquet",
        index_sha256=digest,
        num_texts=sum(record.num_texts for record in records),
        num_text_tokens=sum(record.num_text_tokens for record in records),
    )
    return manifest.signed(), index


def read_manifest(folder: Folder) -> LatentManifest:
    """Read the manifest of a finished cache.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        text = read_file(folder, MANIFEST_FILE).decode(errors="replace")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder.uri} holds no finished latent cache (no {MANIFEST_FILE}); "
            "`vitok encode` makes one, and goes on where it was stopped"
        ) from error
    return parse_json(LatentManifest, text, f"{folder.uri}/{MANIFEST_FILE}")


def read_index(folder: Folder, manifest: LatentManifest) -> pa.Table:
    """Read the index that a manifest names.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        data = read_file(folder, manifest.index)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder.uri}/{manifest.index} is missing; run `vitok encode` again, which writes it"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.index_sha256:
        raise ValueError(
            f"{folder.uri}/{manifest.index} is damaged: sha256 {found[:12]} instead of "
            f"{manifest.index_sha256[:12]}; run `vitok encode` again, which writes it anew"
        )
    return pq.read_table(pa.BufferReader(data), schema=INDEX_SCHEMA)


def list_shards(index: pa.Table) -> list[dict[str, Any]]:
    """Return what is there of each input shard: uri, units, images, latents, tokens, bytes."""
    summed = ("num_images", "num_latents", "num_tokens", "num_bytes")
    shards: dict[str, dict[str, Any]] = {}
    for row in index.select(["shard", *summed]).to_pylist():
        shard = shards.setdefault(
            row["shard"], {"shard": row["shard"], "num_units": 0} | dict.fromkeys(summed, 0)
        )
        shard["num_units"] += 1
        for name in summed:
            shard[name] += row[name]
    return list(shards.values())


def list_skipped(index: pa.Table) -> list[dict[str, str]]:
    """Return shard, key and reason of every image that was unreadable."""
    rows = index.select(["shard", "skipped"]).to_pylist()
    return [{"shard": row["shard"], **entry} for row in rows for entry in row["skipped"]]


def remove_old_indexes(folder: Folder) -> None:
    """Delete the indexes that the manifest does not name, if there is a manifest."""
    names = file_names(folder)
    if MANIFEST_FILE not in names:
        return
    current = read_manifest(folder).index
    for name in names:
        if name.startswith("index-") and name != current:
            remove_file(folder, name)


@cache
def code_version() -> str:
    """Return the version of this code, and a digest of all of its sources."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in ("pipelines", "vitok"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{version_of('vitok')}+{digest.hexdigest()[:12]}"


def _statistics(
    records: Iterable[UnitRecord], num_tokens: int, num_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of every channel, whatever the order of the units.

    Sums are rounded once, and what is subtracted from each other not at all.
    """
    records = list(records)
    if num_tokens == 0:
        return (0.0,) * num_channels, (0.0,) * num_channels
    means, deviations = [], []
    for channel in range(num_channels):
        total = Fraction(math.fsum(record.channel_sum[channel] for record in records))
        squares = Fraction(math.fsum(record.channel_square_sum[channel] for record in records))
        mean = total / num_tokens
        variance = squares / num_tokens - mean**2
        means.append(float(mean))
        deviations.append(math.sqrt(max(0, variance)))
    return tuple(means), tuple(deviations)


def index_rows(
    sources: Sequence[UnitSource], records: Sequence[UnitRecord]
) -> list[dict[str, Any]]:
    """Return the rows of the index."""
    rows = []
    first_latent = 0
    for source, record in zip(sources, records, strict=True):
        known = vars(source) | vars(record) | {"first_latent": first_latent}
        known["skipped"] = [{"key": key, "reason": reason} for key, reason in record.skipped]
        rows.append({name: known[name] for name in INDEX_SCHEMA.names})
        first_latent += record.num_latents
    return rows


def _index_bytes(sources: Sequence[UnitSource], records: Sequence[UnitRecord]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(index_rows(sources, records), schema=INDEX_SCHEMA), stream)
    return stream.getvalue()
