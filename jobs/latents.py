"""`vitok latents`: what a cache holds, whether it is as it was written, and other formats of it."""

import json as json_format
from collections.abc import Callable
from dataclasses import asdict

import tyro

_MAX_LISTED = 20


def verify(
    cache: tyro.conf.Positional[str],
    /,
    *,
    sample: float = 1.0,
    cpus_per_task: float = 1.0,
    json: bool = False,
) -> None:
    """Compare every bit of a latent cache with its digests, in parallel on Ray.

    Args:
        cache: folder or s3:// prefix of the cache.
        sample: fraction of the units that are read; less than 1 for a quick look.
        cpus_per_task: CPU cores for each task that reads units.
        json: print the result as JSON on the last line.
    """
    from cluster.local import ray_session
    from pipelines.latent_manifest import read_manifest
    from pipelines.verify_latents import require_intact, verify_latents
    from vitok.storage import Folder

    folder = Folder.of(cache)
    manifest = read_manifest(folder)  # before Ray is started for nothing
    with ray_session():
        report = verify_latents(cache, sample=sample, cpus_per_task=cpus_per_task)
    for sentence in report.bad[:_MAX_LISTED]:
        print(sentence)
    if len(report.bad) > _MAX_LISTED:
        print(f"... and {len(report.bad) - _MAX_LISTED} more")
    if json:
        print(json_format.dumps(asdict(report)))
    require_intact(report, folder.uri)
    if not json:
        print(
            f"{folder.uri}: {report.num_units} of {manifest.num_units} units, "
            f"{report.num_bytes / 1e6:,.1f} MB, as they were written"
        )


def stats(cache: tyro.conf.Positional[str], /) -> None:
    """Print what a latent cache holds, as JSON.

    Args:
        cache: folder or s3:// prefix of the cache.
    """
    from pipelines.latent_manifest import read_manifest
    from vitok.storage import Folder

    print(json_format.dumps(asdict(read_manifest(Folder.of(cache))), indent=2))


def ls(
    cache: tyro.conf.Positional[str],
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
    from pipelines.latent_manifest import list_shards, list_skipped, read_index, read_manifest
    from vitok.storage import Folder

    folder = Folder.of(cache)
    index = read_index(folder, read_manifest(folder))
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


LATENT_COMMANDS: dict[str, Callable[..., None]] = {
    "verify": verify,
    "stats": stats,
    "ls": ls,
}
