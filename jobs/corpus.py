"""`vitok corpus`: shards out of images, a manifest of shards, and a check of both."""

import json as json_format
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from jobs import positional

_MAX_LISTED = 20


def build(
    source: positional.Source,
    out: positional.Folder,
    /,
    *,
    shard_mb: int = 256,
    samples_per_shard: int = 0,
    labels: bool = True,
    prefix: str = "shard",
    json: bool = False,
) -> None:
    """Write a folder or Parquet files of images as WebDataset shards, the images unchanged.

    The same call goes on with a build that was interrupted.

    Args:
        source: folder of images, its sub-folders the classes; or a Parquet file or a folder of
            these, as img2dataset and Hugging Face write them.
        out: folder for the shards; must not exist.
        shard_mb: megabytes (10^6 bytes) of a shard.
        samples_per_shard: most samples of a shard; 0 for as many as fit.
        labels: write the labels that the source has.
        prefix: first part of the shards' names.
        json: print the result as JSON on the last line.
    """
    from tqdm import tqdm

    from pipelines.corpora.build import build_corpus

    with tqdm(desc="build", unit="image", dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.update(done - 1)
            bar.update(done - bar.n)

        report = build_corpus(
            source,
            out,
            shard_mb=shard_mb,
            samples_per_shard=samples_per_shard,
            labels=labels,
            prefix=prefix,
            progress=show,
        )
    folder = Path(out).expanduser().absolute()
    print(
        f"shards: {report.num_shards}, samples: {report.num_samples}, "
        f"classes: {report.num_classes}, {report.num_bytes / 1e6:.1f} MB of images"
    )
    skipped = [f"skipped {name}: {reason}" for _, name, reason in report.skipped]
    _print_list(skipped, folder / "build.json")
    if report.num_others:
        print(f"passed over: {report.num_others} files without an image's extension")
    print(f"shards in: {folder}\nnext: vitok corpus index '{folder}/*.tar' --out MANIFEST")
    if json:
        print(json_format.dumps(asdict(report) | {"path": str(folder)}))


def index(
    shards: positional.Shards,
    /,
    *,
    out: str,
    max_bad_shards: float = 0.0,
    max_skipped: float = 0.1,
    cpus_per_task: float = 1.0,
    json: bool = False,
) -> None:
    """Read WebDataset shards once, in parallel on Ray, and write their manifest.

    The same call goes on where it was stopped: what is indexed is not read again.

    Args:
        shards: tar files, folders of them, globs, brace ranges, s3:// URIs.
        out: folder for the manifest; must not exist.
        max_bad_shards: largest fraction of the shards that may be left out as unreadable.
        max_skipped: largest fraction of the samples that may be unusable.
        cpus_per_task: CPU cores for each shard that is being read; less than 1 where the store is
            slower than a core.
        json: print the result as JSON on the last line.
    """
    from cluster.local import ray_session
    from pipelines.corpora.index import index_corpus
    from pipelines.corpora.size_histogram import area_quantiles
    from pipelines.corpus import refuse_existing

    refuse_existing(out)  # before Ray is started for nothing
    with ray_session():
        manifest = index_corpus(
            shards,
            out,
            max_bad_shards=max_bad_shards,
            max_skipped=max_skipped,
            cpus_per_task=cpus_per_task,
        )
    skipped = manifest.skipped()
    print(f"shards: {len(manifest.uris)}, samples: {manifest.num_samples}")
    small, median, large = area_quantiles(manifest.size_counts.sum(axis=0), (0.05, 0.5, 0.95))
    print(
        f"sizes: half of the images have about {median:,.0f} pixels or less, 5% {small:,.0f} or "
        f"less, 5% {large:,.0f} or more"
    )
    for uri, key, reason in skipped:
        print(f"skipped {key} of {uri}: {reason}" if key else f"left out {uri}: {reason}")
    print(f"manifest: {manifest.path}")
    if json:
        document = {
            "manifest": str(manifest.path),
            "digest": manifest.digest,
            "num_shards": len(manifest.uris),
            "num_samples": manifest.num_samples,
            "num_bytes": int(manifest.num_bytes_per_shard.sum()),
            "median_pixels": round(median),
            "num_skipped": sum(key != "" for _, key, _ in skipped),
            "left_out": [uri for uri, key, _ in skipped if not key],
        }
        print(json_format.dumps(document))


def check(
    manifest: positional.Manifest,
    /,
    *,
    decode: bool = True,
    out: str = "",
    cpus_per_task: float = 1.0,
    json: bool = False,
) -> None:
    """Read every sample of a corpus, in parallel on Ray, and say what is unreadable, and where.

    Args:
        manifest: folder that `vitok corpus index` wrote.
        decode: decode every image at its full size; without, only the bytes of the shards are
            compared with the manifest.
        out: file for the list of what is unreadable, a line of JSON each; empty for none.
        cpus_per_task: CPU cores for each shard that is being checked.
        json: print the result as JSON on the last line.
    """
    from cluster.local import ray_session
    from pipelines.corpora.check import check_corpus
    from pipelines.corpus import Manifest

    Manifest.load(manifest)  # before Ray is started for nothing
    with ray_session():
        report = check_corpus(manifest, decode=decode, cpus_per_task=cpus_per_task)
    bad = [finding._asdict() for finding in report.bad]
    if out:
        Path(out).write_text("".join(json_format.dumps(entry) + "\n" for entry in bad))
    _print_list([_sentence(entry) for entry in bad], out)
    print(
        f"shards: {report.num_shards}, samples: {report.num_samples}, "
        f"read: {report.num_bytes / 1e6:.1f} MB, decoded: {report.num_decoded}, bad: {len(bad)}"
    )
    if json:
        print(json_format.dumps(asdict(report) | {"bad": bad}))
    if bad:
        raise ValueError(
            f"{manifest}: {len(bad)} faults in the corpus, the first: {_sentence(bad[0])}; bring "
            "the shards back as they were, or index them again without what is bad"
        )


def plan(
    manifest: positional.Manifest = "",
    /,
    *,
    world_size: int = 8,
    images_per_step: int = 8192,
    token_budgets: tuple[int, ...] = (256,),
    rows_per_step: int = 0,
    row_tokens: int = 8192,
    chunk_samples: int = 16,
    model: str = "Ld4-L/16x64",
    num_steps: int = 8,
    synthetic_shards: int = 0,
    synthetic_samples: int = 10_000,
    json: bool = False,
) -> None:
    """Plan some steps of an epoch as training would, and say what that costs and how good it is.

    No shard is opened.

    Args:
        manifest: folder that `vitok corpus index` wrote; none for a synthetic corpus.
        world_size: ranks that share every step.
        images_per_step: images of a global step.
        token_budgets: every image draws one of these as its most tokens.
        rows_per_step: packed rows of a global step; 0 takes what the images need.
        row_tokens: tokens of a packed row.
        chunk_samples: neighbouring samples that stay together and are read in one request.
        model: whose patch cuts the images, and whose work on a row is compared among ranks.
        num_steps: steps that are planned, spread over the epoch.
        synthetic_shards: plan over a corpus of so many shards that do not exist.
        synthetic_samples: samples of each of them.
        json: print JSON.
    """
    import tempfile

    from pipelines.corpora.simulate import SyntheticManifest, simulate, write_synthetic_manifest
    from pipelines.corpus import Manifest
    from pipelines.plan import DataConfig, Stage
    from vitok.variants import AutoencoderConfig

    if bool(manifest) == bool(synthetic_shards):
        raise ValueError("give the folder of a manifest, or --synthetic-shards N without one")
    if min(world_size, num_steps) < 1:
        raise ValueError(f"{world_size=} and {num_steps=} must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        if synthetic_shards:
            write_synthetic_manifest(Path(scratch), synthetic_shards, synthetic_samples)
        found = simulate(
            (lambda: SyntheticManifest.load(scratch))
            if synthetic_shards
            else (lambda: Manifest.load(manifest)),
            data=DataConfig(
                manifest=manifest or scratch, row_tokens=row_tokens, chunk_samples=chunk_samples
            ),
            stage=Stage(
                steps=1,
                images_per_step=images_per_step,
                token_budgets=token_budgets,
                rows_per_step=rows_per_step,
            ),
            model=AutoencoderConfig.from_name(model),
            world_size=world_size,
            num_steps=num_steps,
        )
    if json:
        print(json_format.dumps(asdict(found)))
        return
    print(
        f"{found.num_samples} samples in {found.num_shards} shards; "
        f"{world_size} ranks, {images_per_step} images a step\n"
        f"  start-up           {found.start_up_s:.2f} s, {found.driver_mb:.0f} MB; "
        f"planning a step {found.step_s:.2f} s\n"
        f"  rows a step        {found.rows_per_step} of {row_tokens} tokens, "
        f"{found.token_utilisation:.3f} used "
        f"(padded to the budget: {found.padded_utilisation:.3f})\n"
        f"  busiest rank       {found.imbalance:.1%} more work than the mean\n"
        f"  requests a step    {found.requests_per_step:.0f} ranged reads of "
        f"{found.images_per_request:.1f} images, {found.shards_per_step:.0f} shards\n"
        f"  shuffle            {found.unevenness:.4f} from uniform over the corpus; single images "
        f"drawn at random: {found.ideal_unevenness:.4f}"
    )
    spare = -found.rows_per_step % world_size
    if spare:
        images = images_per_step * (found.rows_per_step + spare) // found.rows_per_step
        print(
            f"{found.rows_per_step} rows are no multiple of {world_size} ranks: some wait. With "
            f"--images-per-step {images} --rows-per-step {found.rows_per_step + spare} all have as "
            "much to do."
        )


def _sentence(finding: dict[str, str]) -> str:
    places = (finding["shard"], finding["key"], finding["reason"])
    return ": ".join(part for part in places if part)


def _print_list(lines: Sequence[str], whole: object) -> None:
    """Print the beginning of a list, and where all of it stands if it does somewhere."""
    for line in lines[:_MAX_LISTED]:
        print(line)
    if len(lines) > _MAX_LISTED:
        where = f", all of them in {whole}" if whole else ""
        print(f"... and {len(lines) - _MAX_LISTED} more{where}")


CORPUS_COMMANDS: dict[str, Callable[..., None]] = {
    "build": build,
    "index": index,
    "check": check,
    "plan": plan,
}
