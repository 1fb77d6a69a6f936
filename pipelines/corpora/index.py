"""Indexing a corpus: a Ray batch job that continues where it stopped.

Tasks read the shards; the command that started them keeps what they found in a folder beside the
manifest, `MANIFEST.unfinished`, which becomes the manifest once every shard is in it:

    samples/DIGEST.parquet   side indexes, as in the manifest
    shards.jsonl             one line a shard, written after its side index: ShardEntry as JSON
    bad_shards.jsonl         {"uri", "reason"} of the shards that failed in the last run

A shard that is written again with the same size is not recognised as another; `vitok corpus check`
tells.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import ray

from pipelines.corpora.manifest_tables import (
    ShardEntry,
    side_index_bytes,
    side_index_path,
    write_tables,
)
from pipelines.corpus import Manifest, expand_shards, index_shard, refuse_existing
from pipelines.failures import root_cause
from pipelines.progress import progress_bar
from pipelines.reading.shards import shard_size

_MAX_LISTED = 20
_SIZE_THREADS = 32  # asking a store for the size of a shard is waiting, not work
# What a task fails with when the shard is at fault, or the machine it ran on. Anything else is our
# mistake, and stops the job.
TASK_FAILURES = (
    ValueError,
    OSError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)


def index_corpus(
    patterns: Sequence[str],
    path: str | Path,
    *,
    max_bad_shards: float = 0.0,
    max_skipped: float = 0.1,
    cpus_per_task: float = 1.0,
) -> Manifest:
    """Index shards on the connected Ray cluster and write their manifest.

    The manifest is that of build_manifest, byte for byte. If this is interrupted, or shards fail,
    the same call goes on: a shard whose URI and size are those of one that is indexed is not read
    again.

    Args:
        patterns: as expand_shards takes them.
        path: folder of the manifest; there must be none.
        max_bad_shards: up to this fraction of the shards is left out if it cannot be indexed.
        max_skipped: largest fraction of the samples that may be unusable.
        cpus_per_task: CPU cores that Ray sets aside for a task, which reads one shard.

    Raises:
        FileNotFoundError: a pattern names no shard.
        FileExistsError: there is something at this path already.
        ValueError: an option outside its range, or too many unusable samples.
        RuntimeError: too many shards cannot be indexed; all are named.
    """
    for name, fraction in (("max_bad_shards", max_bad_shards), ("max_skipped", max_skipped)):
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name}={fraction} must be a fraction from 0 to 1")
    if cpus_per_task <= 0:
        raise ValueError(f"cpus_per_task={cpus_per_task} must be above 0")
    path = refuse_existing(path)
    uris = expand_shards(patterns)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with _journal(unfinished) as journal:
        found = _unchanged(_read_entries(journal), uris, unfinished)
        bad = _index_missing(uris, found, unfinished, journal, cpus_per_task)
        _write_bad_shards(unfinished, bad)
        if len(bad) > max_bad_shards * len(uris):
            raise RuntimeError(_sentence(bad, len(uris), max_bad_shards, unfinished))
        entries = (found[uri] for uri in uris if uri in found)
        write_tables(entries, unfinished, max_skipped, left_out=sorted(bad.items()))
        _remove_other_side_indexes(unfinished, {entry.digest for entry in found.values()})
        os.replace(unfinished, path)
        for name in ("shards.jsonl", "bad_shards.jsonl"):
            (path / name).unlink()
    return Manifest.load(path)


def unordered(task: Any, arguments: dict[Any, tuple], in_flight: int) -> Iterator[tuple[Any, Any]]:
    """Run a Ray task for many arguments, so many at a time, and hand out what is finished.

    Yields:
        (key of the arguments, reference to the result), in the order in which they finish.
    """
    remaining = iter(arguments.items())
    running: dict[Any, Any] = {}
    try:
        while True:
            for key, given in remaining:
                running[task.remote(*given)] = key
                if len(running) >= in_flight:
                    break
            if not running:
                return
            # Not fetched here: results wait where they were made until it is their turn.
            (reference,), _ = ray.wait(list(running), fetch_local=False)
            yield running.pop(reference), reference
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def tasks_at_once(cpus_per_task: float) -> int:
    """How many tasks keep the connected cluster busy: those that run, and as many that wait."""
    # Here because it imports all of Ray Train, which tasks of this module should not wait for.
    from pipelines.launch import check_resources

    check_resources(num_cpus=cpus_per_task, num_gpus=0, remedy="lower cpus_per_task")
    return 2 * max(1, int(ray.cluster_resources()["CPU"] / cpus_per_task))


def _index_missing(
    uris: list[str],
    found: dict[str, ShardEntry],
    unfinished: Path,
    journal: TextIO,
    cpus_per_task: float,
) -> dict[str, str]:
    """Index what is not found yet, add it to found, and return why the rest could not be."""
    missing = {uri: (uri,) for uri in uris if uri not in found}
    bad: dict[str, str] = {}
    if not missing:
        return bad
    at_once = tasks_at_once(cpus_per_task)
    task = ray.remote(_index).options(num_cpus=cpus_per_task)
    with (
        progress_bar("index", len(uris), "shard", len(found)) as board,
        closing(unordered(task, missing, at_once)) as finished,
    ):
        for uri, reference in finished:
            try:
                entry, side_index = ray.get(reference)
            except TASK_FAILURES as error:
                bad[uri] = " ".join(root_cause(error).split())
            else:
                _write_whole(side_index_path(unfinished, entry.digest), side_index)
                document = asdict(entry) | {"size_counts": entry.size_counts.tolist()}
                journal.write(json.dumps(document) + "\n")
                journal.flush()
                found[uri] = entry
            board.advance.remote(1, f"{len(bad)} bad" if bad else "")
    return bad


def _index(uri: str) -> tuple[ShardEntry, bytes]:
    index = index_shard(uri)
    return ShardEntry.of(index), side_index_bytes(index)


@contextmanager
def _journal(unfinished: Path) -> Iterator[TextIO]:
    """Open shards.jsonl for reading and appending, by one process at a time.

    Raises:
        FileExistsError: another process has it open.
    """
    (unfinished / "samples").mkdir(parents=True, exist_ok=True)
    with (unfinished / "shards.jsonl").open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{unfinished}: another process indexes into this folder; wait for it, or write "
                "the manifest elsewhere"
            ) from error
        yield journal


def _read_entries(journal: TextIO) -> Iterator[ShardEntry]:
    """Yield what earlier runs left, and cut off a line that was not written to its end."""
    journal.seek(0)
    end = 0
    while (line := journal.readline()).endswith("\n"):
        end = journal.tell()
        document = json.loads(line)
        document["size_counts"] = np.array(document["size_counts"], np.int32)
        document["skipped"] = [tuple(entry) for entry in document["skipped"]]
        yield ShardEntry(**document)
    journal.seek(end)
    journal.truncate()


def _unchanged(
    entries: Iterator[ShardEntry], uris: list[str], unfinished: Path
) -> dict[str, ShardEntry]:
    """Return by URI the entries of shards that are asked for and still have their size."""
    wanted = set(uris)
    latest = {entry.uri: entry for entry in entries if entry.uri in wanted}
    with ThreadPoolExecutor(_SIZE_THREADS) as pool:
        sizes = dict(zip(latest, pool.map(_size_of, latest), strict=True))
    return {
        uri: entry
        for uri, entry in latest.items()
        if sizes[uri] == entry.num_bytes and side_index_path(unfinished, entry.digest).is_file()
    }


def _size_of(uri: str) -> int:
    """Bytes of a shard, or -1 where nobody knows: the task that reads it will say why."""
    with suppress(OSError, ValueError):
        return shard_size(uri)
    return -1


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)


def _write_bad_shards(unfinished: Path, bad: dict[str, str]) -> None:
    lines = [json.dumps({"uri": uri, "reason": bad[uri]}) + "\n" for uri in sorted(bad)]
    (unfinished / "bad_shards.jsonl").write_text("".join(lines))


def _sentence(bad: dict[str, str], num_shards: int, limit: float, unfinished: Path) -> str:
    listed = [
        reason if reason.startswith(uri) else f"{uri}: {reason}"
        for uri, reason in sorted(bad.items())
    ]
    rest = len(listed) - _MAX_LISTED
    more = f"; and {rest} more in {unfinished / 'bad_shards.jsonl'}" if rest > 0 else ""
    return (
        f"{len(bad)} of {num_shards} shards cannot be indexed, more than max_bad_shards={limit:g} "
        "allows; mend them or raise it, and run the same command again: what is indexed is kept. "
        f"{'; '.join(listed[:_MAX_LISTED])}{more}"
    )


def _remove_other_side_indexes(unfinished: Path, digests: set[str]) -> None:
    for file in (unfinished / "samples").iterdir():
        if file.name.removesuffix(".parquet") not in digests:
            file.unlink()
