"""Encoding a corpus into a latent cache: a Ray batch job that continues where it stopped.

    CPU tasks read, decode and pack units -> actors encode their rows -> CPU tasks write and commit

Ray Data keeps the three in step: what waits between them is bounded by the object store.
"""

from dataclasses import replace
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus import Manifest
from pipelines.encode_units import (
    Encoder,
    Unit,
    finish_unit,
    labels_in_range,
    library_versions,
    prepare_unit,
    samples_of,
    units_of,
)
from pipelines.ingest import PackedRow
from pipelines.latent_manifest import (
    LatentManifest,
    UnitSource,
    read_records,
    remove_old_indexes,
    write_manifest,
)
from pipelines.latent_units import (
    DTYPES,
    UNITS,
    CacheIdentity,
    UnitRecord,
    claim_cache,
    commit_unit,
    committed_units,
)
from pipelines.launch import check_resources
from pipelines.progress import progress_bar
from pipelines.train_autoencoder import load_autoencoder
from pipelines.whole_images import Transform
from vitok.config import config
from vitok.pretrained import encoder_digest
from vitok.storage import Folder
from vitok.variants import AutoencoderConfig

COMPUTE_DTYPES = ("bfloat16", "float32")
# Input blocks are all made before the first task starts.
_MAX_INPUT_BLOCKS = 1000
# Ray Data fuses steps that ask for the same resources, and then an encoder would read by itself. So
# much less of a core, the least that Ray counts, keeps readers apart from encoders.
_CPU_GRAIN = 1e-4
# Cores of a task that writes: most of its time it waits.
_CPUS_PER_WRITER = 0.25
_MIN_WRITERS = 2
_MAX_LISTED = 20


@config
class LatentCaching:
    """One latent cache.

    Attributes:
        manifest: folder that `vitok corpus index` wrote: the images.
        model: training run, folder of weights, released model; only the encoder is loaded.
        out: the cache: a folder or `s3://` prefix.
        token_budgets: at each of these, images are shrunk to at most so many patches, aspect kept.
        squares: at each of these, the centre of the image (ADM's crop), so many pixels a side.
        flip: every image a second time, mirrored.
        dtype: of the stored latents: bfloat16, float16 or float32.
        compute_dtype: of the encoder: bfloat16 or float32.
        log_variance: store the log-variances too; of encoders with KL latents.
        num_classes: labels must be 0 to num_classes - 1; 0 takes any, and none.
        unit_samples: samples of an input shard that make one file.
        row_tokens: tokens of a packed row, the unit of one forward pass.
        num_workers: encoder processes.
        cpus_per_worker: CPU cores that Ray sets aside for each of them. Without a GPU they compute,
            and a cache is finished with as many as it was begun with.
        use_gpu: encode on GPUs.
        cpus_per_reader: CPU cores of each task that decodes; there are as many as fit beside the
            encoders.
        max_unreadable: the job fails if more than this fraction of the samples is unreadable.
        dry_run: say what it would take, encode a few images to measure that, and write nothing.
        json: print the result as JSON on the last line.
    """

    manifest: str = ""
    model: str = ""
    out: str = ""
    token_budgets: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    flip: bool = False
    dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    log_variance: bool = False
    num_classes: int = 0
    unit_samples: int = 512
    row_tokens: int = 8192
    num_workers: int = 8
    cpus_per_worker: float = 2.0
    use_gpu: bool = True
    cpus_per_reader: float = 1.0
    max_unreadable: float = 0.01
    dry_run: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("dtype", tuple(DTYPES)), ("compute_dtype", COMPUTE_DTYPES)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
        for name in ("unit_samples", "row_tokens", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("cpus_per_worker", "cpus_per_reader"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be positive, or 0 for any")
        if len(set(self.transforms)) < len(self.transforms):
            raise ValueError(
                f"token_budgets={self.token_budgets} and squares={self.squares}: one is there twice"
            )

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """What is done to images: the budgets, then the squares."""
        budgets = [Transform(token_budget=budget) for budget in self.token_budgets]
        return (*budgets, *(Transform(square=side) for side in self.squares))


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
        cache.child(UNITS).remove_unfinished()
    records = read_records(cache, [name_of(identity, source, unit) for unit in units])
    _check_unreadable(settings, source, units, records)
    sources = [source_of(source, unit) for unit in units]
    return write_manifest(cache, identity, source.digest, sources, records)


def complete(settings: LatentCaching) -> LatentCaching:
    """Check that nothing is missing, and make the locations absolute: tasks run elsewhere.

    Raises:
        ValueError: a field that has no default is empty.
    """
    for name in ("manifest", "model", "out"):
        if not getattr(settings, name):
            raise ValueError(f"{name} is empty; set --{name}")
    if not settings.transforms:
        raise ValueError("token_budgets and squares are both empty; give the sizes of the images")
    return replace(
        settings,
        manifest=Folder.of(settings.manifest).uri,
        model=_absolute(settings.model),
        out=Folder.of(settings.out).uri,
    )


def _absolute(model: str) -> str:
    """Return a model's location for other processes; a name that is no folder stays a name."""
    folder = Folder.of(model)
    return folder.uri if "://" in model or Path(folder.uri).exists() else model


def identity_of(settings: LatentCaching) -> CacheIdentity:
    """Return what the cache of these settings is of.

    Raises:
        ValueError: a square is no multiple of the model's patch, or it has no log-variances.
    """
    model = load_autoencoder(settings.model, part="encoder")
    return identity_with(settings, model.config, encoder_digest(model))


def identity_with(settings: LatentCaching, model: AutoencoderConfig, digest: str) -> CacheIdentity:
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
    num_workers = min(settings.num_workers, len(missing))
    check_resources(
        # One more reads and decodes: without it nothing would ever come to the encoders.
        num_cpus=num_workers * settings.cpus_per_worker + settings.cpus_per_reader,
        num_gpus=num_workers * settings.use_gpu,
        remedy="lower num_workers or cpus_per_worker, or set use_gpu to False",
    )
    done = source.num_samples - sum(units[i].stop - units[i].start for i in missing)
    num_bytes = 0
    with progress_bar("encode", source.num_samples, "image", done) as board:
        results = _encoded(replace(settings, num_workers=num_workers), identity, source, missing)
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            num_bytes += int(batch["num_bytes"].sum())
            finished = int(batch["num_samples"].sum())
            board.advance.remote(finished, f"{num_bytes / 1e6:,.1f} MB written")


def _encoded(
    settings: LatentCaching, identity: CacheIdentity, source: Manifest, missing: list[int]
) -> Any:
    """Return the Ray Dataset that encodes and commits units, with a record of each."""
    import pyarrow as pa
    import ray.data

    blocks = np.array_split(missing, min(len(missing), _MAX_INPUT_BLOCKS))
    steps = _Steps(settings, identity, source)
    # Not ray.data.range: its read tasks would each take a core.
    dataset = ray.data.from_blocks([pa.table({"unit": block}) for block in blocks])
    reader_cpus = settings.cpus_per_reader
    reader_cpus -= _CPU_GRAIN if reader_cpus == settings.cpus_per_worker else 0.0
    dataset = dataset.map_batches(steps.prepare, batch_size=None, num_cpus=reader_cpus)
    dataset = dataset.map_batches(
        _EncoderActor,
        batch_size=None,
        fn_constructor_args=(settings.model, identity),
        compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if settings.use_gpu else 0,
    )
    # Ray Data divides what is free among the steps whose number of tasks has no limit: with one
    # here all of it is for the readers.
    dataset = dataset.map_batches(
        steps.commit,
        batch_size=None,
        num_cpus=_CPUS_PER_WRITER,
        concurrency=max(_MIN_WRITERS, settings.num_workers),
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
                "tokens": np.stack([row.tokens for row in prepared.rows])[None],
                "image_size": np.stack([row.image_size for row in prepared.rows])[None],
                "max_seqlen": np.array([prepared.rows[0].max_seqlen]),
                "members": np.array([dumps(prepared.members)]),
                "skipped": np.array([dumps(prepared.skipped)]),
            }

    def commit(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Make the unit of a record, and commit it."""
        identity = self._identity
        (number,) = batch["unit"].tolist()
        unit = self._units[number]
        values = torch.from_numpy(np.array(batch["values"][0])).view(DTYPES[identity.dtype])
        data, record = finish_unit(
            self._source,
            unit,
            identity,
            loads(str(batch["members"][0])),
            list(values),
            [(key, reason) for key, reason in loads(str(batch["skipped"][0]))],
        )
        commit_unit(Folder(self._settings.out), data, record)
        return {
            "num_samples": np.array([unit.stop - unit.start]),
            "num_bytes": np.array([record.num_bytes]),
        }


class _EncoderActor:
    """A Ray Data actor that holds the encoder, and adds to a unit's record what it computes."""

    def __init__(self, model: str, identity: CacheIdentity) -> None:
        dtype = DTYPES[identity.compute_dtype]
        encoder = load_autoencoder(model, part="encoder")
        found = encoder_digest(encoder)
        if found != identity.encoder_digest:
            raise ValueError(
                f"{model}: the encoder is {found[:12]} here and {identity.encoder_digest[:12]} "
                "where the job was started; give a model that all nodes see, and that stays"
            )
        if identity.threads:
            torch.set_num_threads(identity.threads)
        self._encode = Encoder(encoder.to(dtype), identity)
        self._patch_size = identity.patch_size

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (tokens,) = batch["tokens"]
        rows = [
            PackedRow(
                step=0,
                # Blocks are read-only, which torch would warn about.
                tokens=np.array(tokens[i]),
                patch_size=self._patch_size,
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
        return {
            "unit": batch["unit"],
            "values": values[None],
            "members": batch["members"],
            "skipped": batch["skipped"],
        }


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
