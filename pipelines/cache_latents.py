"""Encoding a corpus into a latent cache: a Ray batch job that continues where it stopped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus import Manifest
from pipelines.ingest import PackedRow
from pipelines.latents import (
    DTYPES,
    UNITS,
    CacheIdentity,
    LatentManifest,
    LatentRow,
    claim_cache,
    committed_units,
    read_record,
    write_manifest,
    write_unit,
)
from pipelines.launch import check_resources
from pipelines.mixture import Corpus
from pipelines.progress import progress_bar
from pipelines.train_autoencoder import load_autoencoder
from pipelines.whole_images import Transform, iterate_rows
from vitok.autoencoder import Autoencoder
from vitok.config import config
from vitok.packed import PackedTokens
from vitok.pretrained import encoder_digest
from vitok.storage import Folder


@config
class LatentCaching:
    """One latent cache.

    Attributes:
        manifest: folder that `vitok corpus index` wrote: the images.
        model: training run or folder of weights.
        out: the cache: a folder or `s3://` prefix.
        token_budget: images are resized to at most this many patches, aspect kept.
        dtype: of the stored latents: bfloat16, float16 or float32.
        unit_samples: samples of an input shard that make one file.
        row_tokens: tokens of a packed row, the unit of one forward pass.
        num_workers: encoder processes.
        cpus_per_worker: CPU cores that Ray sets aside for each of them.
        use_gpu: encode on GPUs.
        max_unreadable: the job fails if more than this fraction of the samples is unreadable.
    """

    manifest: str
    model: str
    out: str
    token_budget: int = 256
    dtype: str = "bfloat16"
    unit_samples: int = 512
    row_tokens: int = 8192
    num_workers: int = 8
    cpus_per_worker: float = 4.0
    use_gpu: bool = True
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if min(self.token_budget, self.unit_samples, self.num_workers) < 1:
            raise ValueError("token_budget, unit_samples and num_workers must be at least 1")


@dataclass(frozen=True)
class Unit:
    """A slice of an input shard: samples start to stop, counted in the shard."""

    shard: int
    start: int
    stop: int


def cache_latents(settings: LatentCaching) -> LatentManifest:
    """Encode what is not encoded yet on the connected Ray cluster, and write the manifest.

    Raises:
        FileNotFoundError: the corpus or the model is not there.
        ValueError: the cache holds latents of another encoder or transform.
        RuntimeError: too many samples were unreadable.
    """
    import ray.data

    # Workers run in other directories.
    settings = replace(
        settings,
        manifest=Folder.of(settings.manifest).uri,
        model=Folder.of(settings.model).uri,
        out=Folder.of(settings.out).uri,
    )
    source = Manifest.load(settings.manifest)
    cache = Folder(settings.out)
    identity = identity_of(settings)
    claim_cache(cache, identity)
    units = units_of(source, settings.unit_samples)
    names = [_name(identity, source, unit) for unit in units]
    committed = committed_units(cache)
    missing = [i for i, name in enumerate(names) if name not in committed]
    if missing:
        done = sum(unit.stop - unit.start for unit in units) - sum(
            units[i].stop - units[i].start for i in missing
        )
        num_workers = min(settings.num_workers, len(missing))
        check_resources(
            num_cpus=num_workers * settings.cpus_per_worker,
            num_gpus=num_workers * settings.use_gpu,
            remedy="lower num_workers or cpus_per_worker, or set use_gpu to False",
        )
        with progress_bar("encode", source.num_samples, "image", done) as board:
            results = ray.data.from_items(
                [{"unit": i} for i in missing], override_num_blocks=len(missing)
            ).map_batches(
                _EncodeUnits,
                batch_size=1,
                fn_constructor_args=(settings, identity, board),
                compute=ray.data.ActorPoolStrategy(size=num_workers),
                num_cpus=settings.cpus_per_worker,
                num_gpus=1 if settings.use_gpu else 0,
            )
            for _ in results.iter_batches(batch_size=None):
                pass
    cache.child(UNITS).remove_unfinished()
    records = [read_record(cache, name) for name in names]
    skipped = [
        (source.uris[unit.shard], *entry)
        for unit, record in zip(units, records, strict=True)
        for entry in record.skipped
    ]
    if len(skipped) > settings.max_unreadable * source.num_samples:
        listed = "; ".join(f"{shard} {key}: {reason}" for shard, key, reason in skipped[:20])
        raise RuntimeError(
            f"{len(skipped)} of {source.num_samples} samples were unreadable, more than "
            f"max_unreadable={settings.max_unreadable} allows; repair the shards or raise it: "
            f"{listed}"
        )
    return write_manifest(cache, identity, source.digest, records)


def units_of(source: Manifest, unit_samples: int) -> list[Unit]:
    """Cut every shard of a corpus into units."""
    return [
        Unit(shard, start, min(start + unit_samples, int(count)))
        for shard, count in enumerate(source.num_samples_per_shard)
        for start in range(0, int(count), unit_samples)
    ]


def _name(identity: CacheIdentity, source: Manifest, unit: Unit) -> str:
    return identity.unit_name(str(source.shard_digests[unit.shard]), unit.start, unit.stop)


def identity_of(settings: LatentCaching) -> CacheIdentity:
    """Return what the cache of these settings is of."""
    model = load_autoencoder(settings.model)
    return CacheIdentity(
        encoder_digest=encoder_digest(model),
        transform=Transform(token_budget=settings.token_budget),
        patch_size=model.config.patch_size,
        dtype=settings.dtype,
        channels=model.config.latent_channels,
        row_tokens=settings.row_tokens,
    )


class _EncodeUnits:
    """A Ray Data actor that holds the encoder and turns unit numbers into committed files."""

    def __init__(self, settings: LatentCaching, identity: CacheIdentity, board: Any) -> None:
        self._settings, self._identity, self._board = settings, identity, board
        self._source = Manifest.load(settings.manifest)
        self._units = units_of(self._source, settings.unit_samples)
        self._device = torch.device("cuda" if settings.use_gpu else "cpu")
        self._model = load_autoencoder(settings.model).to(self._device, torch.bfloat16)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        for index in batch["unit"].tolist():
            unit = self._units[index]
            rows, skipped = encode_unit(
                self._model, self._source, unit, self._settings, self._device
            )
            write_unit(
                Folder.of(self._settings.out),
                _name(self._identity, self._source, unit),
                rows,
                self._identity.channels,
                DTYPES[self._settings.dtype],
                skipped,
            )
            self._board.advance.remote(unit.stop - unit.start)
        return batch


def encode_unit(
    model: Autoencoder,
    source: Manifest,
    unit: Unit,
    settings: LatentCaching,
    device: torch.device,
) -> tuple[list[LatentRow], list[tuple[str, str]]]:
    """Encode the samples of one unit, packed among themselves alone.

    Returns:
        latents in the order of the shard, and (key, reason) of what was unreadable.
    """
    first = int(source.first_sample[unit.shard])
    records = source.records(np.arange(first + unit.start, first + unit.stop))
    patch_size = model.config.patch_size
    views = Transform(token_budget=settings.token_budget).views(records, patch_size)
    label_of = dict(zip(records.key.tolist(), records.label.tolist(), strict=True))
    found: dict[str, LatentRow] = {}
    skipped: list[tuple[str, str]] = []
    for row in iterate_rows(
        Corpus.of(source), records, views, patch_size=patch_size, row_tokens=settings.row_tokens
    ):
        skipped += [(key, reason) for _, key, reason in row.skipped]
        for latent in _encode_row(model, row, label_of, device):
            found[latent.key] = latent
    in_order: Sequence[str] = records.key.tolist()
    return [found[key] for key in in_order if key in found], sorted(skipped)


@torch.inference_mode()
def _encode_row(
    model: Autoencoder, row: PackedRow, label_of: dict[str, int], device: torch.device
) -> list[LatentRow]:
    packed, _ = row.to_packed(device)
    latents: PackedTokens = model.encode_packed(packed)
    tokens = latents.tokens.cpu()
    bounds = packed.cu_seqlens.tolist()
    grids, sizes = packed.grid.tolist(), packed.image_size.tolist()
    return [
        LatentRow(
            key=key,
            latent=tokens[bounds[i] : bounds[i + 1]],
            grid=(grids[i][0], grids[i][1]),
            image_size=(sizes[i][0], sizes[i][1]),
            label=label_of[key],
        )
        for i, key in enumerate(row.keys)
    ]
