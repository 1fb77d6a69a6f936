"""Checking a corpus against its manifest: a Ray batch job that reads every byte and every image."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray

from pipelines.corpora.index import TASK_FAILURES, tasks_at_once, unordered
from pipelines.corpus import Manifest, SampleRecords, read_samples
from pipelines.failures import root_cause
from pipelines.progress import progress_bar
from pipelines.reading.decode import UnreadableImage, decode_rgb
from pipelines.reading.shards import open_shard

_CHUNK_BYTES = 2**20
# What a task holds of the images that it reads together.
_MAX_READ_BYTES = 32 * 2**20
_MAX_READ_SAMPLES = 256


class Finding(NamedTuple):
    """Something that is not as the manifest says; the key is empty where it is a whole shard."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What a check found.

    Attributes:
        num_shards, num_samples: those of the manifest.
        num_bytes: bytes that were read of the shards.
        num_decoded: images that were decoded completely.
        bad: in the order of the manifest.
    """

    num_shards: int
    num_samples: int
    num_bytes: int
    num_decoded: int
    bad: list[Finding]


class _ShardReport(NamedTuple):
    num_bytes: int
    num_decoded: int
    bad: list[Finding]


def check_corpus(
    path: str | Path, *, decode: bool = True, cpus_per_task: float = 1.0
) -> CorpusReport:
    """Compare all shards of a manifest with it, on the connected Ray cluster; changes nothing.

    Every shard's size and sha256 are compared; every image is decoded at its full size, and this
    size compared. A shard that cannot be read is one finding, an image that cannot be decoded too.

    Args:
        path: folder of the manifest.
        decode: decode the images; without, a shard's bytes are all that is compared.
        cpus_per_task: CPU cores that Ray sets aside for a task, which checks one shard.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: an option outside its range.
    """
    if cpus_per_task <= 0:
        raise ValueError(f"cpus_per_task={cpus_per_task} must be above 0")
    manifest = Manifest.load(path)
    at_once = tasks_at_once(cpus_per_task)
    shard_bytes = manifest.num_bytes_per_shard.tolist()
    shared = ray.put(manifest)
    task = ray.remote(_check_shard).options(num_cpus=cpus_per_task)
    arguments = {
        shard: (shared, shard, num_bytes, decode) for shard, num_bytes in enumerate(shard_bytes)
    }
    reports: dict[int, _ShardReport] = {}
    num_bad = 0
    with (
        progress_bar("check", manifest.num_samples, "image") as board,
        closing(unordered(task, arguments, at_once)) as finished,
    ):
        for shard, reference in finished:
            uri = manifest.uris[shard]
            try:
                reports[shard] = ray.get(reference)
            except TASK_FAILURES as error:
                reason = " ".join(root_cause(error).split()).removeprefix(f"{uri}: ")
                reports[shard] = _ShardReport(0, 0, [Finding(uri, "", reason)])
            num_bad += len(reports[shard].bad)
            status = f"{num_bad} bad" if num_bad else ""
            board.advance.remote(int(manifest.num_samples_per_shard[shard]), status)
    return CorpusReport(
        num_shards=len(manifest.uris),
        num_samples=manifest.num_samples,
        num_bytes=sum(report.num_bytes for report in reports.values()),
        num_decoded=sum(report.num_decoded for report in reports.values()),
        bad=[finding for shard in sorted(reports) for finding in reports[shard].bad],
    )


def _check_shard(manifest: Manifest, shard: int, expected_bytes: int, decode: bool) -> _ShardReport:
    uri, expected_digest = manifest.uris[shard], str(manifest.shard_digests[shard])
    records = manifest.records(np.arange(*manifest.first_sample[shard : shard + 2]))
    ends = records.offset + records.length
    num_bytes, digest = _hash_shard(uri)
    if num_bytes != expected_bytes:
        # read_samples refuses a shard of another length.
        lost = int((ends > num_bytes).sum())
        reason = (
            f"{num_bytes} bytes, the manifest says {expected_bytes}: none of its {len(ends)} "
            f"samples is read, {lost} of them are not whole"
        )
        return _ShardReport(num_bytes, 0, [Finding(uri, "", reason)])
    bad = []
    if digest != expected_digest:
        reason = f"sha256 {digest}, the manifest says {expected_digest}"
        bad.append(Finding(uri, "", f"{reason}: it changed after it was indexed"))
    if not decode:
        return _ShardReport(num_bytes, 0, bad)

    num_decoded = 0
    for rows in _reads(records):
        faults = _faults(manifest, records.take(rows))
        bad += [Finding(uri, key, reason) for key, reason in faults]
        num_decoded += len(rows) - len(faults)
    return _ShardReport(num_bytes, num_decoded, bad)


def _hash_shard(uri: str) -> tuple[int, str]:
    digest, num_bytes = hashlib.sha256(), 0
    with open_shard(uri) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def _reads(records: SampleRecords) -> Iterator[list[int]]:
    """Cut samples into runs that may be in memory together, at least one each."""
    run: list[int] = []
    num_bytes = 0
    for row, length in enumerate(records.length.tolist()):
        if run and (num_bytes + length > _MAX_READ_BYTES or len(run) == _MAX_READ_SAMPLES):
            yield run
            run, num_bytes = [], 0
        run.append(row)
        num_bytes += length
    if run:
        yield run


def _faults(manifest: Manifest, records: SampleRecords) -> list[tuple[str, str]]:
    """Return (key, reason) of the samples that are not what the manifest says."""
    try:
        images = read_samples(manifest, records)
    except OSError as error:
        if len(records) == 1:
            return [(str(records.key[0]), str(error))]
        # One by one, to find out which.
        alone = (_faults(manifest, records.take([i])) for i in range(len(records)))
        return [fault for faults in alone for fault in faults]
    faults = []
    for key, height, width, image in zip(
        records.key.tolist(), records.height.tolist(), records.width.tolist(), images, strict=True
    ):
        try:
            found = decode_rgb(image).shape[:2]
        except UnreadableImage as error:
            faults.append((key, str(error)))
            continue
        if found != (height, width):
            reason = f"{found[0]}x{found[1]} pixels, the manifest says {height}x{width}"
            faults.append((key, reason))
    return faults
