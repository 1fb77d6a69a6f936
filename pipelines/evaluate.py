"""Evaluation of autoencoders: the same images through every subject, on many workers.

What is measured depends on the images and the subject alone. The samples, sorted by key, are cut
into slices; a slice is packed among itself, so that an image always shares its pass with the same
others; rows are sorted by key, means are rounded once, and features are summed exactly. With as
many threads a worker, results are the same to the last bit on any number of workers.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.corpus import Manifest
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.data import (
    choose_samples,
    digest_of,
    left_out,
    open_images,
    read_keys,
)
from pipelines.evaluation.pool import InProcess, Slice, WorkerPool, cut
from pipelines.evaluation.subjects import SOURCE, SubjectFacts, SubjectSpec
from pipelines.evaluation.worker import OK, EvaluatedImage, Evaluator, ExtractorConfig
from pipelines.failures import root_cause
from pipelines.reading.shards import local_folder
from pipelines.reconstruction import Metrics
from pipelines.whole_images import Transform
from vitok.frechet import FeatureMoments, Gaussian, few_samples, frechet_distance

# Adding the products of features to their sums takes as long for one image as for hundreds.
_FEATURES_AT_ONCE = 1024
# What a subject may fail with that has nothing to do with an image.
_NO_SUBJECT = (FileNotFoundError, ValueError, ImportError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a subject reached at a resolution; what is not known is None.

    Attributes:
        num_images: images that were reconstructed.
        num_failed: images that were not; their rows say why.
        metrics: means over images.
        rfid, rfdd: Fréchet distances of Inception-v3 and DINOv3 features.
        seconds, peak_mb: medians over images.
        compression_ratio, bits_per_pixel, digest, device: see SubjectFacts.
        warnings: why figures mean little.
    """

    subject: str
    resolution: str
    num_images: int
    num_failed: int
    metrics: Metrics | None
    rfid: float | None
    rfdd: float | None
    seconds: float | None
    peak_mb: float | None
    compression_ratio: float | None
    bits_per_pixel: float | None
    digest: str
    device: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """All that an evaluation found.

    Attributes:
        images: by subject and resolution, sorted by key.
        pictures: strips of original, reconstruction and error map by key, worst first, by subject
            and resolution.
        references: statistics of the sources, by resolution and network.
        keys: of the samples.
        left_out: (name, reason) of the images that are there and cannot be used.
        failed: why a subject could not be evaluated, by its name.
    """

    scores: list[Scores]
    images: dict[tuple[str, str], list[EvaluatedImage]]
    pictures: dict[tuple[str, str], dict[str, NDArray[np.uint8]]]
    references: dict[tuple[str, str], Gaussian]
    keys: list[str]
    left_out: list[tuple[str, str]]
    failed: dict[str, str]

    @property
    def samples_digest(self) -> str:
        """sha256 (hex) of the list of samples."""
        return digest_of(self.keys)


def evaluate(
    settings: EvaluationConfig, save: Callable[[EvaluationResult], None] | None = None
) -> EvaluationResult:
    """Evaluate every subject at every resolution; on the connected Ray cluster, if it has workers.

    Args:
        save: is given what is found so far after every subject, which may take hours.

    Raises:
        FileNotFoundError: the images, a network or its statistics are not there; or no subject is.
        ValueError: there is nothing to evaluate, or no subject that can be.
        RuntimeError: the cluster is too small.
    """
    if not settings.subjects or not settings.data:
        raise ValueError("give subjects, as in --subjects 350M-f16x64 sd-vae, and data, the images")
    run = _Run.of(settings)
    result = EvaluationResult([], {}, {}, {}, run.keys, left_out(run.manifest), {})
    with _progress(run) as done:
        _measure_references(run, result, done)
        bits_per_pixel = 0.0
        for spec in settings.specs():
            if spec.is_codec and not spec.bits_per_pixel:
                spec = replace(spec, bits_per_pixel=bits_per_pixel)
            try:
                facts = _evaluate_subject(run, spec, result, done)
            except _NO_SUBJECT as error:
                result.failed[spec.title] = root_cause(error)
                continue
            bits_per_pixel = bits_per_pixel or facts.bits_per_pixel or 0.0
            if save is not None:
                save(result)
    if not result.scores:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in result.failed.items()))
    if not any(score.num_images for score in result.scores):
        images = next(iter(result.images.values()))
        raise ValueError(
            f"not one of {len(images)} images could be evaluated; the first, {images[0].key}: "
            f"{images[0].status}"
        )
    return result


def statistics_name(network: str, resolution: str) -> str:
    """Return what the file of the sources' statistics is called."""
    return f"{network}-{resolution.replace(' ', '_')}.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """What all subjects of an evaluation share."""

    settings: EvaluationConfig
    manifest: Manifest
    keys: list[str]
    sample_ids: NDArray[np.int64]
    slices: list[Slice]

    @classmethod
    def of(cls, settings: EvaluationConfig) -> "_Run":
        manifest = open_images(settings.data, local_folder(settings.out) / "data")
        wanted = read_keys(settings.samples) if settings.samples else None
        sample_ids, keys = choose_samples(manifest, settings.max_images, settings.seed, wanted)
        slice_images = 1 if settings.repeats else settings.slice_images
        return cls(
            settings=settings,
            manifest=manifest,
            keys=keys,
            sample_ids=sample_ids,
            slices=cut(sample_ids, keys, slice_images),
        )

    @contextmanager
    def workers(
        self, spec: SubjectSpec, networks: ExtractorConfig
    ) -> Iterator[WorkerPool | InProcess]:
        """Start what evaluates a subject, and end it."""
        settings = self.settings
        given: dict[str, Any] = {
            "manifest": str(self.manifest.path),
            "patch_size": settings.patch_size,
            "row_tokens": settings.row_tokens,
            "repeats": settings.repeats,
            "device": "cuda" if settings.use_gpu else "cpu",
        }
        # Workers run in other directories.
        spec = spec.absolute()
        networks = networks.absolute()
        pool: WorkerPool | InProcess
        if settings.num_workers == 0:
            if settings.use_gpu and not torch.cuda.is_available():
                raise RuntimeError("this machine has no GPU; set use_gpu to False")
            pool = InProcess(Evaluator(spec, networks, **given))
        else:
            pool = _ray_pool(settings, len(self.slices), spec, networks, given)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _progress(run: _Run) -> Iterator[Callable[[int], object]]:
    """Draw a bar; gives the function that says how many images more are done."""
    settings = run.settings
    passes = len(settings.subjects) + _needs_sources(settings)
    total = passes * len(run.keys) * len(settings.transforms())
    with tqdm(total=total, desc="evaluate", unit="image") as bar:
        yield bar.update


def _ray_pool(
    settings: EvaluationConfig,
    num_slices: int,
    spec: SubjectSpec,
    networks: ExtractorConfig,
    given: dict[str, Any],
) -> WorkerPool:
    import ray

    from pipelines.launch import check_resources

    num_workers = min(settings.num_workers, num_slices)
    check_resources(
        num_cpus=num_workers * settings.cpus_per_worker,
        num_gpus=num_workers * settings.use_gpu,
        remedy="lower num_workers or cpus_per_worker, or set use_gpu to False",
    )
    actor = ray.remote(
        num_cpus=settings.cpus_per_worker, num_gpus=1 if settings.use_gpu else 0, max_restarts=0
    )(Evaluator)
    return WorkerPool(
        lambda: actor.remote(spec, networks, **given), num_workers, settings.timeout_s
    )


def _measure_references(run: _Run, result: EvaluationResult, done: Callable[[int], object]) -> None:
    """Find the statistics of the sources, which are those of a subject without a fault."""
    settings = run.settings
    given = {"inception": settings.inception_reference, "dino": settings.dino_reference}
    networks = settings.networks
    named = {"inception": networks.inception, "dino": networks.dino}
    for network, location in given.items():
        if location and not named[network]:
            raise ValueError(f"{network}_reference needs the network; set networks.{network}")
        for transform in settings.transforms() if location else ():
            file = Path(location)
            if file.is_dir():
                file /= statistics_name(network, transform.name)
            elif len(settings.transforms()) > 1:
                raise ValueError(
                    f"{network}_reference={location} is of one resolution, and there are "
                    f"{len(settings.transforms())}; give the folder `statistics` of an evaluation "
                    "that has them all, or one resolution"
                )
            result.references[transform.name, network] = Gaussian.load(file)
    if not _needs_sources(settings):
        return
    needed = replace(
        networks,
        inception="" if given["inception"] else networks.inception,
        dino="" if given["dino"] else networks.dino,
        lpips="",
    )
    with run.workers(SubjectSpec(location=SOURCE), needed) as pool:
        for transform in settings.transforms():
            _, moments = _collect(run, pool, transform, done)
            for network, found in moments.items():
                if found.count > 1:
                    gaussian = found.gaussian(pool.digests[network])
                    result.references[transform.name, network] = gaussian


def _needs_sources(settings: EvaluationConfig) -> bool:
    """Whether statistics of the sources are compared with."""
    networks = settings.networks
    return bool(
        (networks.inception and not settings.inception_reference)
        or (networks.dino and not settings.dino_reference)
    )


def _evaluate_subject(
    run: _Run, spec: SubjectSpec, result: EvaluationResult, done: Callable[[int], object]
) -> SubjectFacts:
    settings = run.settings
    with run.workers(spec, settings.networks) as pool:
        for transform in settings.transforms():
            place = (spec.title, transform.name)
            images, moments = _collect(run, pool, transform, done)
            gaussians = {
                network: found.gaussian(pool.digests[network])
                for network, found in moments.items()
                if found.count > 1
            }
            distances, warnings = _distances(result.references, transform.name, gaussians)
            result.images[place] = images
            result.scores.append(_score(place, images, distances, pool.facts, warnings))
            result.pictures[place] = _pictures(run, pool, transform, images)
        return pool.facts


def _collect(
    run: _Run, pool: WorkerPool | InProcess, transform: Transform, done: Callable[[int], object]
) -> tuple[list[EvaluatedImage], dict[str, FeatureMoments]]:
    """Evaluate all slices; returns images sorted by key, and the sums of their features."""
    images: list[EvaluatedImage] = []
    moments: dict[str, FeatureMoments] = {}
    waiting: dict[str, list[NDArray[np.float32]]] = {}

    def add(network: str) -> None:
        features = np.concatenate(waiting.pop(network))
        moments.setdefault(network, FeatureMoments(features.shape[1])).add(features)

    for part, found in pool.evaluate(run.slices, transform):
        images += found.images
        for network, features in found.features.items():
            waiting.setdefault(network, []).append(features)
            if sum(map(len, waiting[network])) >= _FEATURES_AT_ONCE:
                add(network)
        done(len(part.keys))
    for network in list(waiting):
        add(network)
    return sorted(images, key=lambda image: image.key), moments


def _distances(
    references: dict[tuple[str, str], Gaussian], resolution: str, found: dict[str, Gaussian]
) -> tuple[dict[str, float], tuple[str, ...]]:
    distances: dict[str, float] = {}
    warnings: list[str] = []
    for network, gaussian in found.items():
        reference = references.get((resolution, network))
        if reference is None:
            continue
        distances[network] = frechet_distance(gaussian, reference)
        count = min(gaussian.count, reference.count or gaussian.count)
        if warning := few_samples(count, len(gaussian.mean)):
            warnings.append(f"{network}: {warning}")
        if not reference.extractor:
            warnings.append(f"{network}: the reference does not say which weights it is of")
    return distances, tuple(warnings)


def _score(
    place: tuple[str, str],
    images: Sequence[EvaluatedImage],
    distances: dict[str, float],
    facts: SubjectFacts,
    warnings: tuple[str, ...],
) -> Scores:
    good = [image for image in images if image.status == OK]

    def median(name: str) -> float | None:
        found = [value for image in good if (value := getattr(image, name)) is not None]
        return statistics.median(found) if found else None

    return Scores(
        subject=place[0],
        resolution=place[1],
        num_images=len(good),
        num_failed=len(images) - len(good),
        metrics=Metrics.mean([image.metrics for image in good]) if good else None,
        rfid=distances.get("inception"),
        rfdd=distances.get("dino"),
        seconds=median("seconds"),
        peak_mb=median("peak_mb"),
        compression_ratio=facts.compression_ratio,
        bits_per_pixel=facts.bits_per_pixel,
        digest=facts.digest,
        device=facts.device,
        warnings=warnings,
    )


def _pictures(
    run: _Run,
    pool: WorkerPool | InProcess,
    transform: Transform,
    images: Sequence[EvaluatedImage],
) -> dict[str, NDArray[np.uint8]]:
    """Draw the images that came back worst and best, worst first."""
    good = sorted(
        (image for image in images if image.status == OK),
        key=lambda image: (image.metrics.psnr, image.key),
    )
    num_worst = (run.settings.num_pictures + 1) // 2
    num_best = min(run.settings.num_pictures, len(good)) - num_worst
    chosen = good[:num_worst] + (good[-num_best:] if num_best > 0 else [])
    if not chosen:
        return {}
    number_of = dict(zip(run.keys, run.sample_ids.tolist(), strict=True))
    # Each alone: a pass of what is shown may not be larger than those before it.
    found: dict[str, NDArray[np.uint8]] = {}
    for image in chosen:
        sample_ids = np.array([number_of[image.key]], np.int64)
        found |= pool.call("pictures", sample_ids, transform)
    return found
