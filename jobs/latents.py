"""`vitok encode` and `vitok latents`: caches written, checked, listed, in other formats."""

import json as json_format
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from jobs import positional

if TYPE_CHECKING:
    from pipelines.caching.config import LatentCaching
    from pipelines.caching.estimate import CacheSize

_MAX_LISTED = 20


def run_encoding(settings: "LatentCaching") -> None:
    """Encode what is not encoded yet, or say what that would take, and print what came of it."""
    from cluster.local import ray_session
    from pipelines.cache_latents import cache_latents
    from vitok.config import to_dict

    with ray_session():
        if settings.dry_run:
            _dry_run(settings)
            return
        manifest = cache_latents(settings)
    print(
        f"{manifest.num_images} images, {manifest.num_latents} latents, {manifest.num_tokens} "
        f"tokens, {manifest.num_bytes / 1e6:,.1f} MB"
    )
    if manifest.identity.text is not None:
        print(f"{manifest.num_texts} texts, {manifest.num_text_tokens} tokens")
    if manifest.num_skipped:
        print(f"skipped {manifest.num_skipped}: vitok latents ls {settings.out} --skipped")
    print(f"cache: {settings.out}")
    if settings.json:
        print(json_format.dumps({"cache": settings.out, **to_dict(manifest)}))


def verify(
    cache: positional.Cache,
    /,
    *,
    sample: float = 1.0,
    model: str = "",
    manifest: str = "",
    images: int = 16,
    cpus_per_task: float = 1.0,
    json: bool = False,
) -> None:
    """Compare every bit of a latent cache with its digests, in parallel on Ray.

    With a model and the manifest of the corpus, some latents are also decoded, and compared with
    the images that they are of.

    Args:
        cache: folder or s3:// prefix of the cache.
        sample: fraction of the units that are read; less than 1 for a quick look.
        model: the model that encoded, with its decoder; none decodes nothing.
        manifest: folder that `vitok corpus index` wrote, of the images.
        images: latents that are decoded, spread over the cache.
        cpus_per_task: CPU cores for each task that reads units.
        json: print the result as JSON on the last line.
    """
    from cluster.local import ray_session
    from pipelines.caching.manifest import read_manifest
    from pipelines.caching.verify import require_intact, verify_latents
    from vitok.storage import Folder

    if bool(model) != bool(manifest):
        raise ValueError("give --model and --manifest, which decoding needs, or neither")
    folder = Folder.of(cache)
    found = read_manifest(folder)  # before Ray is started for nothing
    with ray_session():
        report = verify_latents(cache, sample=sample, cpus_per_task=cpus_per_task)
    for sentence in report.bad[:_MAX_LISTED]:
        print(sentence)
    if len(report.bad) > _MAX_LISTED:
        print(f"... and {len(report.bad) - _MAX_LISTED} more")
    document = asdict(report)
    if model and not report.bad:
        psnr = _mean_psnr(cache, model, manifest, images)
        document["psnr"] = psnr
        print(f"PSNR of {min(images, found.num_latents)} decoded latents: {psnr:.2f} dB")
    if json:
        print(json_format.dumps(document))
    require_intact(report, folder.uri)
    if not json:
        print(
            f"{folder.uri}: {report.num_units} of {found.num_units} units, "
            f"{report.num_bytes / 1e6:,.1f} MB, as they were written"
        )


def _mean_psnr(cache: str, model: str, manifest: str, images: int) -> float:
    from statistics import fmean

    from pipelines.autoencoder_weights import load_autoencoder
    from pipelines.caching.judge import judge_latents
    from pipelines.latents import LatentCache
    from vitok.pretrained import encoder_digest

    autoencoder = load_autoencoder(model)
    found = LatentCache(cache, encoder_digest(autoencoder))
    results = judge_latents(found, autoencoder, manifest, images)
    return fmean(result.metrics.psnr for result in results)


def stats(cache: positional.Cache, /) -> None:
    """Print what a latent cache holds, as JSON.

    Args:
        cache: folder or s3:// prefix of the cache.
    """
    from pipelines.caching.manifest import read_manifest
    from vitok.config import to_dict
    from vitok.storage import Folder

    print(json_format.dumps(to_dict(read_manifest(Folder.of(cache))), indent=2))


def ls(
    cache: positional.Cache,
    /,
    *,
    units: bool = False,
    skipped: bool = False,
    json: bool = False,
) -> None:
    """List the input shards of a latent cache, its units, or what it skipped.

    Args:
        cache: folder or s3:// prefix of the cache.
        units: a line for each unit.
        skipped: a line for each image that was unreadable, with the reason.
        json: print JSON.
    """
    from pipelines.caching.manifest import list_shards, list_skipped, read_index, read_manifest
    from vitok.storage import Folder

    folder = Folder.of(cache)
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    if skipped:
        rows = list_skipped(index)
    elif units:
        rows = index.drop_columns(["skipped", "keys_sha256"]).to_pylist()
    else:
        rows = list_shards(index)
    if json:
        print(json_format.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{value}" for value in row.values()))
    if manifest.identity.text is not None and not skipped:
        print(f"{manifest.num_texts} of {manifest.num_images} images have a text")


def export(
    cache: positional.Cache,
    out: positional.Folder,
    /,
    *,
    format: Literal["webdataset"] = "webdataset",
    latents_per_shard: int = 8192,
    cpus_per_task: float = 1.0,
    json: bool = False,
) -> None:
    """Write a latent cache as shards of another format, in parallel on Ray.

    The same call goes on with an export that was interrupted.

    Args:
        cache: folder or s3:// prefix of the cache.
        out: folder for the shards, which all nodes see.
        format: of the shards: WebDataset tars with latent.npy, text.npy, cls and json.
        latents_per_shard: at least so many, in whole units.
        cpus_per_task: CPU cores for each shard that is being written.
        json: print the result as JSON on the last line.
    """
    from cluster.local import ray_session
    from pipelines.caching.export import export_webdataset
    from pipelines.caching.manifest import read_manifest
    from vitok.storage import Folder

    read_manifest(Folder.of(cache))  # before Ray is started for nothing
    with ray_session():
        written = export_webdataset(
            cache, out, latents_per_shard=latents_per_shard, cpus_per_task=cpus_per_task
        )
    print(
        f"{written.num_latents} latents in {written.num_shards} shards, "
        f"{written.num_bytes / 1e6:,.1f} MB: {written.folder}"
    )
    if json:
        print(json_format.dumps(asdict(written)))


def plan(
    recipe: positional.Recipe,
    /,
    *,
    shards: int = 1420,
    samples_per_shard: int = 10_000,
    json: bool = False,
) -> None:
    """Plan the cache of a recipe over a corpus that does not exist: time, memory, bytes, requests.

    Without its weights; `vitok encode RECIPE --dry-run` measures a real corpus and model.

    Args:
        recipe: of `vitok encode`; its model a released one.
        shards: of the corpus; by default as many images as ImageNet-22k has.
        samples_per_shard: samples of each of them.
        json: print JSON.
    """
    import tempfile
    from pathlib import Path

    from jobs.encoding import ENCODING
    from pipelines.cache_latents import identity_with
    from pipelines.caching.estimate import estimate_size
    from pipelines.corpora.simulate import SyntheticManifest, write_synthetic_manifest
    from vitok.variants import AutoencoderConfig

    if recipe not in ENCODING:
        raise ValueError(f"there is no recipe {recipe!r}; there are: {', '.join(ENCODING)}")
    settings = ENCODING[recipe]()
    if not settings.model:
        raise ValueError(f"the recipe {recipe!r} names no model; take one that does")
    model = AutoencoderConfig.from_name(settings.model)
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic_manifest(Path(scratch), shards, samples_per_shard)
        size = estimate_size(
            settings,
            lambda: SyntheticManifest.load(scratch),
            identity_with(settings, model, "0" * 64),
        )
    if json:
        print(json_format.dumps(asdict(size)))
    else:
        print(_describe(size))


def _dry_run(settings: "LatentCaching") -> None:
    import ray

    from pipelines.cache_latents import identity_of
    from pipelines.caching.estimate import estimate_size, measure_rates
    from pipelines.corpus import Manifest

    source = Manifest.load(settings.manifest)
    identity = identity_of(settings)
    size = estimate_size(settings, lambda: Manifest.load(settings.manifest), identity)
    print(_describe(size))
    rates = measure_rates(settings, source, identity)
    num_cpus = ray.cluster_resources().get("CPU", 1.0)
    hours = rates.hours(size.num_images, settings, num_cpus)
    encoder = (
        f"an encoder {rates.encoder_images_per_s:,.1f}"
        if rates.encoder_images_per_s
        else "no GPU here, so that the encoder was not measured: the readers alone count"
    )
    print(
        f"  measured here      {rates.reader_images_per_s:,.1f} images/s a reader, {encoder}\n"
        f"  estimated time     {hours:.2f} hours with {settings.num_workers} encoders on "
        f"{num_cpus:g} cores"
    )
    if settings.json:
        print(json_format.dumps(asdict(size) | asdict(rates) | {"hours": hours}))


def _describe(size: "CacheSize") -> str:
    texts = f", and texts of {size.text_bytes / 1e9:,.3f} GB at most" if size.text_bytes else ""
    return (
        f"{size.num_images:,} images in {size.num_shards:,} shards\n"
        f"  units              {size.num_units:,}\n"
        f"  latents            {size.num_latents:,}, {size.num_tokens:,} tokens\n"
        f"  bytes              {size.num_bytes / 1e9:,.3f} GB{texts}\n"
        f"  requests           {size.num_reads:,} reads, {size.num_writes:,} writes\n"
        f"  planning           {size.planning_s:.2f} s, {size.planning_mb:.0f} MB"
    )


LATENT_COMMANDS: dict[str, Callable[..., None]] = {
    "verify": verify,
    "stats": stats,
    "ls": ls,
    "export": export,
    "plan": plan,
}
