"""Benchmark of encoding: the job through Ray, the bare encoder, and a plain loop, in one run."""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.local import ray_session
from jobs.bench.data import indexed_shards
from jobs.bench.output import finish, rounded
from jobs.models import save_random
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.cache_latents import cache_latents, identity_of
from pipelines.caching.config import LatentCaching, complete
from pipelines.caching.encode_units import Encoder, Unit, prepare_unit, samples_of, units_of
from pipelines.caching.units import DTYPES, UNITS, CacheIdentity
from pipelines.corpus import Manifest, build_manifest, read_samples
from pipelines.reading.shards import write_shards
from vitok.packed import pack_images

_BATCH = 32  # images of a batch of the plain loop
_MEASURED_S = 4.0  # at least, of the ways that are no job
_SAMPLES_PER_READ = 256


def run(
    model: str = "Bd4-B/16x64",
    side: int = 256,
    shards: tuple[str, ...] = (),
    copies: int = 2,
    unit_samples: int = 128,
    row_tokens: int = 4096,
    threads: int = 2,
    cpus_per_reader: float = 0.5,
    json: bool = False,
) -> None:
    """Encoding into a latent cache through Ray, against the bare encoder and a plain loop.

    Args:
        model: architecture, with random weights; with linear-B/16x64 decoding is what takes time.
        side: pixels of the squares that are encoded.
        shards: WebDataset shards: files, folders, globs or URIs; if empty those that the
            environment variable VITOK_SAMPLE names, else the quickstart's corpus.
        copies: every image is there so often, under other keys.
        unit_samples: images of a unit.
        row_tokens: tokens of a packed row.
        threads: CPU threads of the encoder.
        cpus_per_reader: logical cores of each task that decodes; there are as many of them as the
            machine has cores.
        json: print the JSON alone.
    """
    figures = measure_encoding(
        shards=shards,
        copies=copies,
        model=model,
        side=side,
        unit_samples=unit_samples,
        row_tokens=row_tokens,
        threads=threads,
        cpus_per_reader=cpus_per_reader,
    )
    finish("encode", {"model": model, "side": side, **rounded(figures, quiet=json)}, threads)


def measure_encoding(
    *,
    shards: Sequence[str],
    copies: int,
    model: str,
    side: int,
    unit_samples: int,
    row_tokens: int,
    threads: int,
    cpus_per_reader: float,
) -> dict[str, float]:
    """Encode the same squares in three ways: the two others before and after the job.

    The job is timed from the first unit that it commits to the last, as its start, once for many
    hours, would weigh on a run of seconds; `whole_job_images_per_s` counts it.

    Args:
        copies: every image is there so often, under other keys: a job of seconds tells nothing.
        model: architecture, with random weights.
        threads: of the encoder, in each of the three ways.
        cpus_per_reader: of the job, which may have more logical cores than the machine has.

    Returns:
        images/s by name.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vitok-bench-") as scratch,
        indexed_shards(shards) as photographs,
    ):
        source = _repeated(photographs, copies, Path(scratch) / "shards")
        weights = Path(scratch) / "weights"
        save_random(model, weights)
        settings = complete(
            LatentCaching(
                manifest=str(source.path),
                model=str(weights),
                out=str(Path(scratch) / "cache"),
                squares=(side,),
                unit_samples=unit_samples,
                row_tokens=row_tokens,
                num_workers=1,
                cpus_per_worker=threads,
                use_gpu=torch.cuda.is_available(),
                cpus_per_reader=cpus_per_reader,
            )
        )
        identity = identity_of(settings)
        units = units_of(source, unit_samples)

        def others() -> tuple[float, float]:
            return (
                _bare_encoder(settings, source, units, identity),
                _plain_loop(settings, source, units, identity),
            )

        before = others()
        with ray_session(num_cpus=threads + (os.cpu_count() or 1)):
            whole, steady = _job(settings, units)
        bare, plain = (fmean(pair) for pair in zip(before, others(), strict=True))
    return {
        "bare_encoder_images_per_s": bare,
        "plain_loop_images_per_s": plain,
        "end_to_end_images_per_s": steady,
        "whole_job_images_per_s": whole,
        "images": float(source.num_samples),
        "over_bare_encoder": steady / bare,
        "over_plain_loop": steady / plain,
    }


def _repeated(source: Manifest, copies: int, folder: Path) -> Manifest:
    """Return a corpus that holds every image of another so often."""
    if copies == 1:
        return source

    def samples() -> Iterator[dict[str, Any]]:
        for copy in range(copies):
            for first in range(0, source.num_samples, _SAMPLES_PER_READ):
                last = min(first + _SAMPLES_PER_READ, source.num_samples)
                records = source.records(np.arange(first, last))
                for key, data in zip(records.key, read_samples(source, records), strict=True):
                    yield {"__key__": f"{copy}/{key}", "jpg": data}

    write_shards(samples(), folder, "copy", max(1, source.num_samples))
    return build_manifest([str(folder)], folder / "manifest")


def _images_per_s(encode_all: Callable[[], object], num_images: int) -> float:
    """Return the rate of passes over some images, for some seconds."""
    passes, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < _MEASURED_S:
        encode_all()
        passes += 1
    return passes * num_images / taken


def _bare_encoder(
    settings: LatentCaching,
    source: Manifest,
    units: Sequence[Unit],
    identity: CacheIdentity,
) -> float:
    """Return images/s of the encoder alone, on packs that lie in memory."""
    torch.set_num_threads(int(settings.cpus_per_worker))
    encode = Encoder(load_autoencoder(settings.model, part="encoder"), identity)
    # Packs of all units would not fit into memory; a few of them tell.
    chosen = list(units[:4])
    rows = [row for unit in chosen for row in prepare_unit(source, unit, identity).rows]
    encode(rows[:1])
    return _images_per_s(lambda: encode(rows), sum(unit.stop - unit.start for unit in chosen))


def _plain_loop(
    settings: LatentCaching,
    source: Manifest,
    units: Sequence[Unit],
    identity: CacheIdentity,
) -> float:
    """Return images/s of what extraction scripts do: decode a batch, resize it, encode it, save it.

    With Pillow, in one process, at one size, a last batch padded with its own images.
    """
    torch.set_num_threads(int(settings.cpus_per_worker))
    (transform,) = identity.transforms
    model = load_autoencoder(settings.model, part="encoder")
    model = model.to(torch.device(identity.device), DTYPES[identity.compute_dtype])
    chosen = units[: max(4, _BATCH // settings.unit_samples)]
    images = [data for unit in chosen for data in read_samples(source, samples_of(source, unit))]

    def encode(batch: list[bytes]) -> torch.Tensor:
        pixels = [_centre_crop(data, transform.square) for data in batch]
        pixels += [pixels[-1]] * (_BATCH - len(pixels))
        with torch.inference_mode():
            packed = pack_images(pixels, patch_size=identity.patch_size).to(identity.device)
            return model.encode_packed(packed).tokens[: len(batch) * packed.max_seqlen].cpu()

    def encode_all() -> None:
        latents = [encode(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
        with tempfile.TemporaryFile() as stream:
            np.save(stream, torch.cat(latents).float().numpy())

    encode(images[:_BATCH])
    return _images_per_s(encode_all, len(images))


def _centre_crop(data: bytes, side: int) -> torch.Tensor:
    """Return [3, side, side] in [-1, 1]: the shorter side shrunk to it, the middle cut out."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(edge * scale)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def _job(settings: LatentCaching, units: Sequence[Unit]) -> tuple[float, float]:
    """Return images/s of the whole job, and of all that it committed after its first unit."""
    start = time.time()
    cache_latents(settings)
    books = Path(settings.out, UNITS).glob("*.json")
    first, *_, last = sorted(book.stat().st_mtime for book in books)
    num_images = sum(unit.stop - unit.start for unit in units)
    mean_unit = num_images / len(units)
    return num_images / (last - start), (num_images - mean_unit) / (last - first)
