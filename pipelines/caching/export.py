"""A latent cache as WebDataset shards, for readers that know nothing of caches."""

import io
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.latents import LatentCache, LatentRow
from pipelines.reading.shards import local_folder, write_shards

# Latents that one task writes as one shard, in whole units.
_LATENTS_PER_SHARD = 8192


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: str
    num_shards: int
    num_latents: int
    num_bytes: int


def export_webdataset(
    location: str,
    out: str | Path,
    *,
    latents_per_shard: int = _LATENTS_PER_SHARD,
    cpus_per_task: float = 1.0,
) -> Export:
    """Write a cache as shards of samples, on the connected Ray cluster; goes on where it stopped.

    A sample has `latent.npy` [N, c] (float32 for bfloat16, which NumPy does not know: the same
    values), `text.npy` [K, D] and `cls` where it has a text and a label, and `json` with grid and
    image size. Where the cache holds an image several times, its key ends in `_T` or `_Tm`: number
    of the transform, mirrored.

    Args:
        latents_per_shard: at least so many, in whole units, but for the last shard.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: the folder is not local, or two latents of a shard have one key.
    """
    import ray

    from pipelines.corpora.index import tasks_at_once, unordered
    from pipelines.progress import progress_bar

    cache = LatentCache(location)
    folder = local_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(cache, latents_per_shard))
    paths = [folder / f"latents-{number:06d}.tar" for number in range(len(parts))]
    missing = {i: part for i, part in enumerate(parts) if not paths[i].is_file()}
    if missing:
        at_once = tasks_at_once(cpus_per_task)
        task = ray.remote(_write_part).options(num_cpus=cpus_per_task)
        shared = ray.put(cache)
        arguments = {i: (shared, *part, str(paths[i])) for i, part in missing.items()}
        done = len(cache) - sum(stop - start for start, stop in missing.values())
        with (
            progress_bar("export", len(cache), "latent", done) as board,
            closing(unordered(task, arguments, at_once)) as finished,
        ):
            for i, reference in finished:
                ray.get(reference)
                board.advance.remote(parts[i][1] - parts[i][0])
    num_bytes = sum(path.stat().st_size for path in paths)
    return Export(
        folder=str(folder), num_shards=len(paths), num_latents=len(cache), num_bytes=num_bytes
    )


def _parts(cache: LatentCache, latents_per_shard: int) -> Iterator[tuple[int, int]]:
    """Yield the latents (start, stop) of each shard."""
    if latents_per_shard < 1:
        raise ValueError(f"{latents_per_shard=} must be at least 1")
    start = 0
    for stop in cache.first_sample[1:].tolist():
        if stop - start >= latents_per_shard or (stop == len(cache) and stop > start):
            yield start, stop
            start = stop


def _write_part(cache: LatentCache, start: int, stop: int, path: str) -> None:
    target = Path(path)
    unfinished = target.with_name(f".{target.stem}")
    seen: set[str] = set()

    def samples() -> Iterator[dict[str, Any]]:
        for index in range(start, stop, 16):
            for row in cache.__getitems__(range(index, min(stop, index + 16))):
                sample = _sample(cache, row)
                if sample["__key__"] in seen:
                    raise ValueError(
                        f"{cache.location}: two latents have the key {row.key}, which a shard "
                        "cannot hold; rename one in the corpus, or export with fewer "
                        "latents_per_shard"
                    )
                seen.add(sample["__key__"])
                yield sample

    (written,) = write_shards(samples(), unfinished, "part", stop - start)
    os.replace(written, target)
    unfinished.rmdir()


def _sample(cache: LatentCache, row: LatentRow) -> dict[str, Any]:
    variant = f"_{row.transform}{'m' if row.flipped else ''}"
    sample: dict[str, Any] = {
        "__key__": row.key + (variant if cache.identity.num_variants > 1 else ""),
        "latent.npy": _npy(row.latent),
        "json": {
            "grid": list(row.grid),
            "image_size": list(row.image_size),
            "transform": row.transform,
            "flipped": row.flipped,
        },
    }
    if row.log_variance is not None:
        sample["log_variance.npy"] = _npy(row.log_variance)
    if row.text is not None:
        sample["text.npy"] = _npy(row.text)
    if row.label >= 0:
        sample["cls"] = row.label
    return sample


def _npy(values: Tensor) -> bytes:
    stream = io.BytesIO()
    exact = values.float() if values.dtype == torch.bfloat16 else values
    np.save(stream, exact.numpy(), allow_pickle=False)
    return stream.getvalue()
