"""Encoding a corpus into a latent cache: a Ray batch job that continues where it stopped.

    CPU tasks read, decode and pack units -> actors encode their rows -> CPU tasks write and commit

Ray Data keeps the three in step: what waits between them is bounded by the object store.
"""

from json import dumps, loads
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.caching.captions import require_captions
from pipelines.caching.config import LatentCaching, complete
from pipelines.caching.encode_units import (
    Encoder,
    Unit,
    embed_captions,
    finish_unit,
    labels_in_range,
    library_versions,
    prepare_unit,
    samples_of,
    units_of,
)
from pipelines.caching.manifest import (
    LatentManifest,
    UnitSource,
    read_records,
    remove_old_indexes,
    write_manifest,
)
from pipelines.caching.resources import Resources, resources_of
from pipelines.caching.units import (
    DTYPES,
    UNITS,
    CacheIdentity,
    TextIdentity,
    UnitRecord,
    claim_cache,
    commit_unit,
    committed_units,
)
from pipelines.corpus import Manifest
from pipelines.launch import check_resources
from pipelines.packed_rows import PackedRow
from pipelines.progress import progress_bar
from vitok.pretrained import encoder_digest
from vitok.storage import Folder
from vitok.texts import TextEncoder, text_libraries
from vitok.variants import AutoencoderConfig

# Input blocks are all made before the first task starts.
_MAX_INPUT_BLOCKS = 1000
_MAX_LISTED = 20


def cache_latents(settings: LatentCaching) -> LatentManifest:
    """Encode what is not encoded yet on the connected Ray cluster, and write the manifest.

    Raises:
        FileNotFoundError: the corpus or the model is not there.
        ValueError: the settings are incomplete or do not suit the model, or the cache holds latents
            of another encoder or transform.
        OSError: a shard cannot be read, or the cache not be written.
        RuntimeError: too many samples were unreadable.
    """
    settings = complete(settings)
    source = Manifest.load(settings.manifest)
    cache = Folder(settings.out)
    identity = identity_of(settings)
    claim_cache(cache, identity)
    remove_old_indexes(cache)
    units = units_of(source, settings.unit_samples)
    committed = committed_units(cache)
    missing = [
        i for i, unit in enumerate(units) if name_of(identity, source, unit) not in committed
    ]
    if missing:
        if identity.text is not None:
            require_captions(source)
        _encode_missing(settings, identity, source, units, missing)
    return finish_cache(settings, identity, source, units)


def finish_cache(
    settings: LatentCaching, identity: CacheIdentity, source: Manifest, units: list[Unit]
) -> LatentManifest:
    """Sweep up, and write index and manifest over all units, which are committed.

    Raises:
        RuntimeError: too many samples were unreadable.
    """
    cache = Folder(settings.out)
    if cache.is_local:
        for folder in (cache, cache.child(UNITS)):
            folder.remove_unfinished()
    records = read_records(cache, [name_of(identity, source, unit) for unit in units])
    _check_unreadable(settings, source, units, records)
    sources = [source_of(source, unit) for unit in units]
    return write_manifest(cache, identity, source.digest, sources, records, settings.text_encoder)


def identity_of(settings: LatentCaching) -> CacheIdentity:
    """Return what the cache of these settings is of.

    Raises:
        FileNotFoundError: the model or the text encoder is not there.
        ValueError: a square is no multiple of the model's patch, it has no log-variances, or the
            text encoder takes no texts of text_tokens.
    """
    text = None
    if settings.text_encoder:
        text = text_identity(load_text_encoder(settings), settings.text_tokens)
    model = load_autoencoder(settings.model, part="encoder")
    return identity_with(settings, model.config, encoder_digest(model), text)


def load_text_encoder(settings: LatentCaching) -> TextEncoder:
    """Load the text encoder of a cache; errors as those of TextEncoder.load."""
    return TextEncoder.load(settings.text_encoder, option="text_encoder")


def text_identity(encoder: TextEncoder, max_tokens: int) -> TextIdentity:
    """Return how texts are embedded by an encoder.

    Raises:
        ValueError: it takes no texts of so many tokens.
    """
    encoder.require_length(max_tokens)
    return TextIdentity(
        encoder_digest=encoder.digest,
        channels=encoder.channels,
        max_tokens=max_tokens,
        libraries=text_libraries(),
    )


def identity_with(
    settings: LatentCaching, model: AutoencoderConfig, digest: str, text: TextIdentity | None = None
) -> CacheIdentity:
    """Return what the cache of these settings is of, for a model; errors as those of identity_of.

    Args:
        digest: of the encoder's weights.
    """
    for transform in settings.transforms:
        transform.require_patch(model.patch_size)
    if settings.log_variance and model.latent != "kl":
        raise ValueError(
            f"log_variance is set, but the latents of {settings.model} are of the kind "
            f"{model.latent!r}; only those of 'kl' have one"
        )
    return CacheIdentity(
        encoder_digest=digest,
        transforms=settings.transforms,
        flip=settings.flip,
        patch_size=model.patch_size,
        channels=model.latent_channels,
        log_variance=settings.log_variance,
        dtype=settings.dtype,
        compute_dtype=settings.compute_dtype,
        device="cuda" if settings.use_gpu else "cpu",
        threads=0 if settings.use_gpu else max(1, int(settings.cpus_per_worker)),
        libraries=library_versions(),
        row_tokens=settings.row_tokens,
        unit_samples=settings.unit_samples,
        text=text,
    )


def name_of(identity: CacheIdentity, source: Manifest, unit: Unit) -> str:
    """Return the name of a unit of a corpus."""
    return identity.unit_name(str(source.shard_digests[unit.shard]), unit.start, unit.stop)


def source_of(source: Manifest, unit: Unit) -> UnitSource:
    """Return where a unit's images come from, for the index."""
    return UnitSource(
        shard=source.uris[unit.shard],
        shard_digest=str(source.shard_digests[unit.shard]),
        start=unit.start,
        stop=unit.stop,
    )


def _encode_missing(
    settings: LatentCaching,
    identity: CacheIdentity,
    source: Manifest,
    units: list[Unit],
    missing: list[int],
) -> None:
    """Encode and commit units, on all workers; draws the progress."""
    resources = resources_of(settings, len(missing))
    check_resources(
        num_cpus=resources.least_cpus,
        num_gpus=resources.least_gpus,
        remedy="lower num_workers or cpus_per_worker, or set use_gpu to False",
    )
    done = source.num_samples - sum(units[i].stop - units[i].start for i in missing)
    num_bytes = 0
    with progress_bar("encode", source.num_samples, "image", done) as board:
        results = _encoded(settings, identity, source, missing, resources)
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            num_bytes += int(batch["num_bytes"].sum())
            finished = int(batch["num_samples"].sum())
            board.advance.remote(finished, f"{num_bytes / 1e6:,.1f} MB written")


def _encoded(
    settings: LatentCaching,
    identity: CacheIdentity,
    source: Manifest,
    missing: list[int],
    resources: Resources,
) -> Any:
    """Return the Ray Dataset that encodes and commits units, with a record of each."""
    import pyarrow as pa
    import ray.data

    blocks = np.array_split(missing, min(len(missing), _MAX_INPUT_BLOCKS))
    steps = _Steps(settings, identity, source)
    # Not ray.data.range: its read tasks would each take a core.
    dataset = ray.data.from_blocks([pa.table({"unit": block}) for block in blocks])
    dataset = dataset.map_batches(steps.prepare, batch_size=None, num_cpus=resources.reader_cpus)
    dataset = dataset.map_batches(
        _EncoderActor,
        batch_size=None,
        fn_constructor_args=(settings, identity),
        compute=ray.data.ActorPoolStrategy(size=resources.num_encoders),
        num_cpus=resources.encoder_cpus,
        num_gpus=resources.encoder_gpus,
    )
    dataset = dataset.map_batches(
        steps.commit,
        batch_size=None,
        num_cpus=resources.writer_cpus,
        concurrency=resources.num_writers,
    )
    # One record, a unit, makes a block: units of different shapes are never joined.
    dataset.context.target_max_block_size = 1
    return dataset


class _Steps:
    """What tasks do before and after the encoder."""

    def __init__(self, settings: LatentCaching, identity: CacheIdentity, source: Manifest) -> None:
        self._settings, self._identity, self._source = settings, identity, source
        self._units = units_of(source, settings.unit_samples)

    def prepare(self, batch: dict[str, NDArray[Any]]) -> Any:
        """Yield the packed rows of units, a record each."""
        for number in batch["unit"].tolist():
            unit = self._units[number]
            if self._settings.num_classes:
                records = samples_of(self._source, unit)
                labels_in_range(self._source, unit, records, self._settings.num_classes)
            prepared = prepare_unit(self._source, unit, self._identity)
            yield {
                "unit": np.array([number]),
                "tokens": prepared.tokens[None],
                "image_size": np.stack([row.image_size for row in prepared.rows])[None],
                "max_seqlen": np.array([prepared.rows[0].max_seqlen]),
                "members": np.array([dumps(prepared.members)]),
                "skipped": np.array([dumps(prepared.skipped)]),
                "captions": np.array([dumps(prepared.captions)]),
            }

    def commit(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Make the unit of a record, and commit it."""
        identity = self._identity
        (number,) = batch["unit"].tolist()
        unit = self._units[number]
        values = torch.from_numpy(np.array(batch["values"][0])).view(DTYPES[identity.dtype])
        texts = load(batch["texts"][0])
        data, record = finish_unit(
            self._source,
            unit,
            identity,
            loads(str(batch["members"][0])),
            list(values),
            [(key, reason) for key, reason in loads(str(batch["skipped"][0]))],
            {int(place): text for place, text in texts.items()},
        )
        commit_unit(Folder(self._settings.out), data, record)
        return {
            "num_samples": np.array([unit.stop - unit.start]),
            "num_bytes": np.array([record.num_bytes]),
        }


class _EncoderActor:
    """A Ray Data actor that holds the encoders, and adds to a unit's record what they compute."""

    def __init__(self, settings: LatentCaching, identity: CacheIdentity) -> None:
        dtype = DTYPES[identity.compute_dtype]
        encoder = load_autoencoder(settings.model, part="encoder")
        _require_same(settings.model, encoder_digest(encoder), identity.encoder_digest)
        if identity.threads:
            torch.set_num_threads(identity.threads)
        self._encode = Encoder(encoder.to(dtype), identity)
        self._identity = identity
        if identity.text is not None:
            texts = load_text_encoder(settings)
            _require_same(settings.text_encoder, texts.digest, identity.text.encoder_digest)
            self._texts = texts.to(self._encode.device, dtype)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (tokens,) = batch["tokens"]
        rows = [
            PackedRow(
                step=0,
                # Blocks are read-only, which torch would warn about.
                tokens=np.array(tokens[i]),
                patch_size=self._identity.patch_size,
                image_size=np.array(image_size),
                tile_position=np.zeros(image_size.shape, np.float32),
                label=np.full(len(image_size), -1),
                keys=[],
                skipped=[],
                max_seqlen=int(batch["max_seqlen"][0]),
            )
            for i, image_size in enumerate(batch["image_size"][0])
        ]
        # As bytes: NumPy has no bfloat16.
        values = torch.stack(self._encode(rows)).view(torch.uint8).numpy()
        texts: dict[int, Tensor] = {}
        if self._identity.text is not None:
            captions = loads(str(batch["captions"][0]))
            texts = embed_captions(self._texts, self._identity, captions)
        return {
            "unit": batch["unit"],
            "values": values[None],
            "texts": np.array([save({str(i): text for i, text in texts.items()})], dtype=object),
            "members": batch["members"],
            "skipped": batch["skipped"],
        }


def _require_same(location: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{location}: the encoder is {found[:12]} here and {expected[:12]} where the job was "
            "started; give a model that all nodes see, and that stays"
        )


def _check_unreadable(
    settings: LatentCaching, source: Manifest, units: list[Unit], records: list[UnitRecord]
) -> None:
    skipped = [
        f"{source.uris[unit.shard]} {key}: {reason}"
        for unit, record in zip(units, records, strict=True)
        for key, reason in record.skipped
    ]
    if len(skipped) > settings.max_unreadable * source.num_samples:
        raise RuntimeError(
            f"{len(skipped)} of {source.num_samples} samples were unreadable, more than "
            f"max_unreadable={settings.max_unreadable} allows; repair the shards or raise it: "
            f"{'; '.join(skipped[:_MAX_LISTED])}"
        )
