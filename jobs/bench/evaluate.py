"""Benchmark of evaluation: a worker end to end, its parts alone, and the Fréchet distance."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.bench.data import indexed_shards
from jobs.bench.output import finish, rounded
from jobs.models import save_random
from pipelines.corpus import Manifest
from pipelines.evaluation.baselines import hush_torchao
from pipelines.evaluation.pool import InProcess, Slice, cut
from pipelines.evaluation.subjects import SubjectSpec, load_subject
from pipelines.evaluation.worker import Evaluator, ExtractorConfig, load_extractors
from pipelines.mixture import Corpus
from pipelines.reconstruction import judge
from pipelines.whole_images import Transform, iterate_rows
from vitok.frechet import FeatureMoments, Gaussian, frechet_distance
from vitok.packed import unpack_images
from vitok.variants import AutoencoderConfig

_PATCH_SIZE = 16
_SLICE_IMAGES = 32


def run(
    model: str = "Bd4-B/16x64",
    side: int = 256,
    dino: str = "",
    shards: tuple[str, ...] = (),
    num_images: int = 128,
    row_tokens: int = 8192,
    features: int = 2048,
    threads: int = 2,
    repeats: int = 3,
    json: bool = False,
) -> None:
    """A worker of an evaluation (PSNR, SSIM, Fréchet features), its parts, and a Fréchet distance.

    Args:
        model: architecture, with random weights.
        side: pixels of the squares that are evaluated.
        dino: DINOv3 that describes the reconstructions; random weights of the size S/16 if empty.
        shards: WebDataset shards: files, folders, globs or URIs; if empty those that the
            environment variable VITOK_SAMPLE names, else the quickstart's corpus.
        num_images: the first ones of them.
        row_tokens: patches of 16 pixels of one pass.
        features: numbers of an image in the distance that is timed; Inception-v3 has 2,048.
        threads: CPU threads; one more reads ahead.
        repeats: timed passes of everything; the medians count.
        json: print the JSON alone.
    """
    figures = measure_evaluation(
        shards=shards,
        model=model,
        dino=dino,
        side=side,
        num_images=num_images,
        row_tokens=row_tokens,
        num_features=features,
        threads=threads,
        repeats=repeats,
    )
    finish("evaluate", {"model": model, "side": side, **rounded(figures, quiet=json)}, threads)


def measure_evaluation(
    *,
    shards: Sequence[str],
    model: str,
    dino: str,
    side: int,
    num_images: int,
    row_tokens: int,
    num_features: int,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    """Evaluate the same squares as a worker does, and do each part of it alone.

    Args:
        model: architecture, with random weights.
        dino: DINOv3 that describes the reconstructions; one of the size S/16 with random weights if
            empty.
        num_images: the first ones of the corpus.

    Returns:
        images/s, medians of the repeats, and seconds of a distance, by name.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    AutoencoderConfig.from_name(model)  # a wrong name costs no corpus
    with (
        tempfile.TemporaryDirectory(prefix="vitok-bench-") as scratch,
        indexed_shards(shards) as source,
    ):
        networks = ExtractorConfig(dino=dino or _random_dino(Path(scratch, "dino")))
        save_random(model, Path(scratch, "weights"))
        spec = SubjectSpec(location=str(Path(scratch, "weights")))
        evaluator = Evaluator(
            spec,
            networks,
            manifest=str(source.path),
            patch_size=_PATCH_SIZE,
            row_tokens=row_tokens,
            repeats=0,
            device=device.type,
        )
        pool = InProcess(evaluator)
        transform = Transform(square=side)
        slices = _slices(source, num_images)
        list(pool.evaluate(slices[:1], transform))  # warms up
        parts = _parts(source, slices, transform, spec, networks, row_tokens, device)
        rates: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, part in parts.items():
                rates.setdefault(name, []).append(len(slices[0].keys) / _seconds(part))
            seconds = _seconds(lambda: _end_to_end(pool, slices, transform))
            images = sum(len(part.keys) for part in slices)
            rates.setdefault("end_to_end", []).append(images / seconds)
    figures = {name: statistics.median(found) for name, found in rates.items()}
    in_turn = 1 / sum(1 / figures[name] for name in parts)
    return {f"{name}_images_per_s": rate for name, rate in figures.items()} | {
        "images": float(images),
        "over_parts_in_turn": figures["end_to_end"] / in_turn,
        "over_bare_model": figures["end_to_end"] / figures["bare_model"],
        "frechet_distance_s": _distance_seconds(num_features, repeats),
    }


def _parts(
    source: Manifest,
    slices: Sequence[Slice],
    transform: Transform,
    spec: SubjectSpec,
    networks: ExtractorConfig,
    row_tokens: int,
    device: torch.device,
) -> dict[str, Callable[[], object]]:
    """Return what is done with the images of the first slice, one thing each."""
    corpus = Corpus.of(source)
    records = corpus.records(slices[0].sample_ids)

    def read() -> list[Tensor]:
        rows = iterate_rows(
            corpus,
            records,
            transform.views(records, _PATCH_SIZE),
            patch_size=_PATCH_SIZE,
            row_tokens=row_tokens,
        )
        return [
            image for row in rows for image in unpack_images(row.to_packed(device)[0], _PATCH_SIZE)
        ]

    images = read()
    subject = load_subject(spec, device)
    outputs = subject.reconstruct(images)
    (network,) = load_extractors(networks, device).values()
    pairs = list(zip(images, outputs, strict=True))
    return {
        "reading": read,
        "bare_model": lambda: subject.reconstruct(images),
        "psnr_and_ssim": lambda: [judge("", *pair, _PATCH_SIZE) for pair in pairs],
        "features": lambda: network(outputs),
    }


def _end_to_end(pool: InProcess, slices: Sequence[Slice], transform: Transform) -> FeatureMoments:
    found = [result for _, result in pool.evaluate(slices, transform)]
    return FeatureMoments.of(result.features["dino"] for result in found)


def _distance_seconds(num_features: int, repeats: int) -> float:
    """Return the median seconds of a distance between two sets of random features."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(num_features, num_features)) / num_features**0.5

    def draw() -> Gaussian:
        features = rng.normal(size=(2 * num_features, num_features)) @ mixing
        return FeatureMoments.of([np.maximum(features, 0)]).gaussian()

    a, b = draw(), draw()
    return statistics.median(_seconds(lambda: frechet_distance(a, b)) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _slices(source: Manifest, num_images: int) -> list[Slice]:
    sample_ids = np.arange(min(num_images, source.num_samples))
    return cut(sample_ids, source.records(sample_ids).key.tolist(), _SLICE_IMAGES)


def _random_dino(folder: Path) -> str:
    hush_torchao()
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = DINOv3ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        num_register_tokens=4,
        patch_size=16,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    return str(folder)
