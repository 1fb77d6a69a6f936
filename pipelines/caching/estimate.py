"""What a latent cache will take, before it is begun: units, bytes, requests, and hours."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.cache_latents import load_text_encoder, name_of
from pipelines.caching.captions import STORE_READ_BYTES
from pipelines.caching.config import LatentCaching
from pipelines.caching.encode_units import (
    Encoder,
    Unit,
    embed_captions,
    prepare_unit,
    samples_of,
    units_of,
    views_of,
)
from pipelines.caching.units import DTYPES, CacheIdentity
from pipelines.corpus import MAX_READ_BYTES, Manifest

# Tokens are counted in so many units, spread over the corpus, where they differ among images.
_COUNTED_UNITS = 64
_COUNTED_SAMPLES = 256
_MEASURED_SAMPLES = 64
_REQUESTS_PER_LISTING = 1000


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What a cache will hold.

    Attributes:
        num_shards, num_images: of the corpus.
        num_units: files.
        num_latents: rows: an image at one size, mirrored or not.
        num_tokens: of all rows; counted on a sample where images have different ones.
        num_bytes: of the latents.
        text_bytes: of the texts, at most: as if each had all tokens that it may have.
        num_reads, num_writes: requests to object stores.
        planning_s, planning_mb: from the manifest on disk to the name of every unit: time, memory.
    """

    num_shards: int
    num_images: int
    num_units: int
    num_latents: int
    num_tokens: int
    num_bytes: int
    text_bytes: int
    num_reads: int
    num_writes: int
    planning_s: float
    planning_mb: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured on this machine, in images (at all their sizes) a second.

    Attributes:
        reader_images_per_s: of one reader with one thread.
        encoder_images_per_s: of one encoder; 0 where there is no such device here.
    """

    reader_images_per_s: float
    encoder_images_per_s: float

    def hours(self, num_images: int, settings: LatentCaching, num_cpus: float) -> float:
        """Return the estimated hours of a job on a cluster of so many cores."""
        beside = num_cpus - settings.num_workers * settings.cpus_per_worker
        readers = max(1, int(beside / settings.cpus_per_reader))
        rates = [readers * self.reader_images_per_s]
        if self.encoder_images_per_s:
            rates.append(settings.num_workers * self.encoder_images_per_s)
        return num_images / min(rates) / 3600


def estimate_size(
    settings: LatentCaching, load: Callable[[], Manifest], identity: CacheIdentity
) -> CacheSize:
    """Plan a cache as the job does.

    Args:
        load: returns the manifest; its time is part of the planning.
    """
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    source = load()
    units = units_of(source, settings.unit_samples)
    names = {name_of(identity, source, unit) for unit in units}
    planning_s = time.perf_counter() - start
    planning_mb = (process.memory_info().rss - before) / 2**20
    assert len(names) == len(units), "two units of one name"
    tokens_per_image = _tokens_per_image(source, units, identity)
    num_images = source.num_samples
    num_tokens = round(num_images * tokens_per_image)
    unit_bytes = source.num_bytes_per_shard.sum() / len(units)
    text_tokens, caption_reads = 0, 0
    if identity.text is not None:
        text_tokens = identity.text.max_tokens
        caption_reads = -(-int(unit_bytes) // STORE_READ_BYTES)
    return CacheSize(
        num_shards=len(source.uris),
        num_images=num_images,
        num_units=len(units),
        num_latents=num_images * identity.num_variants,
        num_tokens=num_tokens,
        num_bytes=num_tokens * identity.bytes_per_token,
        text_bytes=num_images * text_tokens * identity.bytes_per_text_token,
        # Every record is read once more, for the index, and the folder is listed twice.
        num_reads=len(units) * (-(-int(unit_bytes) // MAX_READ_BYTES) + 1 + caption_reads)
        + 2 * -(-2 * len(units) // _REQUESTS_PER_LISTING),
        num_writes=2 * len(units) + 3,
        planning_s=planning_s,
        planning_mb=planning_mb,
    )


def measure_rates(settings: LatentCaching, source: Manifest, identity: CacheIdentity) -> Rates:
    """Prepare and encode a few images here, and take the time.

    Raises:
        OSError: a shard cannot be read.
    """
    unit = next(unit for unit in units_of(source, _MEASURED_SAMPLES) if unit.stop > unit.start)
    count = unit.stop - unit.start
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        prepare_unit(source, replace(unit, stop=unit.start + 1), identity)  # warms up
        start = time.perf_counter()
        prepared = prepare_unit(source, unit, identity)
        reader_s = time.perf_counter() - start
        if identity.device == "cuda" and not torch.cuda.is_available():
            return Rates(reader_images_per_s=count / reader_s, encoder_images_per_s=0.0)
        torch.set_num_threads(identity.threads or threads)
        encode = Encoder(load_autoencoder(settings.model, part="encoder"), identity)
        texts = load_text_encoder(settings) if identity.text else None
        if texts is not None:
            texts.to(encode.device, DTYPES[identity.compute_dtype])
            embed_captions(texts, identity, prepared.captions[:1])
        encode(prepared.rows[:1])
        start = time.perf_counter()
        encode(prepared.rows)
        if texts is not None:
            embed_captions(texts, identity, prepared.captions)
        encoder_s = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    return Rates(reader_images_per_s=count / reader_s, encoder_images_per_s=count / encoder_s)


def _tokens_per_image(source: Manifest, units: list[Unit], identity: CacheIdentity) -> float:
    """Return the tokens of an image at all its sizes, in the mean over a sample."""
    chosen = np.unique(np.linspace(0, len(units) - 1, _COUNTED_UNITS).round().astype(int))
    tokens, images = 0, 0
    for number in chosen.tolist():
        unit = units[number]
        stop = min(unit.stop, unit.start + _COUNTED_SAMPLES)
        records = samples_of(source, replace(unit, stop=stop))
        views = views_of(records, identity)
        tokens += sum(view.num_tokens(identity.patch_size) for view in views)
        images += len(records)
    return tokens / images
