"""Benchmark of ingest: from bare decoding to packed rows, in one process and through Ray."""

import io
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image

from cluster.local import ray_session
from jobs.bench.data import indexed_shards
from jobs.bench.output import finish, rounded
from pipelines import ingest
from pipelines.ingest import object_store_bytes
from pipelines.mixture import Corpus
from pipelines.packed_rows import iterate_steps
from pipelines.plan import DataConfig, Plan, SampleView, Stage
from pipelines.reading.decode import decode_rgb

_PATCH_SIZE = 16
# Before the images through Ray are timed, so large a part of them starts the workers.
_WARM_UP = 0.25
# Steps of a plan whose utilisation is averaged.
_PLANNED_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Real tokens over all tokens of a batch.

    Attributes:
        packed: in the rows of the plan.
        padded: with every image padded to the smallest of the budgets that holds it.
    """

    packed: float
    padded: float


def run(
    shards: tuple[str, ...] = (),
    token_budgets: tuple[int, ...] = (256,),
    packed_budgets: tuple[int, ...] = (64, 128, 256, 512, 1024),
    packed_images: int = 8192,
    images_per_step: int = 256,
    row_tokens: int = 8192,
    num_images: int = 0,
    ray_images: int = 8192,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Images/s from bare decoding to packed rows in one process, and through Ray; utilisation.

    Args:
        shards: WebDataset shards: files, folders, globs or URIs; those that the environment
            variable VITOK_SAMPLE names if empty, else the corpus of the quickstart.
        token_budgets: token budgets of the crops that are decoded.
        packed_budgets: token budgets of the training stream whose utilisation is planned.
        packed_images: images of a step of that stream.
        images_per_step: images that are decoded and packed together.
        row_tokens: tokens of a packed row.
        num_images: images of a pass in one process; one epoch if 0.
        ray_images: images through Ray, on all cores; 0 leaves Ray out.
        repeats: timed passes in one process, on one thread; the median counts.
        json: print the JSON alone.
    """
    torch.set_num_threads(1)
    figures = measure_ingest(
        shards=shards,
        token_budgets=token_budgets,
        packed_budgets=packed_budgets,
        packed_images=packed_images,
        images_per_step=images_per_step,
        row_tokens=row_tokens,
        num_images=num_images,
        ray_images=ray_images,
        repeats=repeats,
    )
    finish("ingest", rounded(figures, quiet=json), threads=1)


def measure_ingest(
    *,
    shards: Sequence[str],
    token_budgets: tuple[int, ...],
    packed_budgets: tuple[int, ...],
    packed_images: int,
    images_per_step: int,
    row_tokens: int,
    num_images: int,
    ray_images: int,
    repeats: int,
) -> dict[str, float]:
    """Read, decode, resize and pack the same random crops again and again.

    Returns:
        the figures of the benchmark by name; those of Ray are missing if ray_images is 0.
    """
    data = DataConfig(row_tokens=row_tokens)

    def plan(budgets: tuple[int, ...], per_step: int, steps: int) -> Plan:
        stage = Stage(steps=steps, images_per_step=per_step, token_budgets=budgets)
        return Plan(corpus=corpus, data=data, stages=(stage,), patch_size=_PATCH_SIZE, seed=0)

    with indexed_shards(shards) as manifest:
        corpus = Corpus.of(manifest)
        num_images = num_images or corpus.num_samples
        per_step = min(images_per_step, num_images)
        steps = num_images // per_step
        figures: dict[str, float] = {"images": steps * per_step}
        figures |= _one_process(plan(token_budgets, per_step, steps), repeats)
        if ray_images:
            steps = max(1, ray_images // per_step)
            figures |= _through_ray(plan(token_budgets, per_step, steps))
        mixed = utilisation(plan(packed_budgets, packed_images, _PLANNED_STEPS))
        single = utilisation(plan(token_budgets, packed_images, _PLANNED_STEPS))
    return figures | {
        "token_utilisation": mixed.packed,
        "padded_utilisation": mixed.padded,
        "one_stage_token_utilisation": single.packed,
        "one_stage_padded_utilisation": single.padded,
    }


def utilisation(plan: Plan) -> Utilisation:
    """Return how full the rows of a plan are, and how full padded batches would be."""
    tokens, row_tokens, padded_tokens = 0, 0, 0
    for step in range(plan.num_steps):
        rows = plan.step(step).rows
        lengths = [view.num_tokens(plan.patch_size) for row in rows for view in row]
        budgets = np.sort(plan.stage_of(step).token_budgets)
        tokens += sum(lengths)
        row_tokens += len(rows) * plan.data.row_tokens
        padded_tokens += int(budgets[np.searchsorted(budgets, lengths)].sum())
    return Utilisation(packed=tokens / row_tokens, padded=tokens / padded_tokens)


def _one_process(plan: Plan, repeats: int) -> dict[str, float]:
    """Return images/s of each part of the way, medians of passes that take turns."""
    images: list[tuple[bytes, SampleView]] = []
    for step in range(plan.num_steps):
        planned = plan.step(step)
        contents = plan.corpus.read(planned.records)
        encoded = dict(zip(planned.records.sample_id.tolist(), contents, strict=True))
        images += [(encoded[view.sample_id], view) for row in planned.rows for view in row]

    def resize(encoded: bytes, view: SampleView) -> None:
        decode_rgb(encoded, crop=view.crop, size=view.size)

    def each(function: Callable[[bytes, SampleView], object]) -> Callable[[], None]:
        def run() -> None:
            for encoded, view in images:
                function(encoded, view)

        return run

    def pipeline() -> None:
        for step in range(plan.num_steps):
            rows = ingest.load_step(plan, step)
            assert sum(len(row.keys) + len(row.skipped) for row in rows) == per_step

    per_step = len(images) // plan.num_steps
    passes = {
        "pillow_decode": each(lambda encoded, view: _pillow_decode(encoded)),
        "decode": each(lambda encoded, view: _bare_decode(encoded)),
        "resize": each(resize),
        "pipeline": pipeline,
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):
        for name, run in passes.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first pass warms up
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    cpu_median = {name: statistics.median(taken) for name, taken in cpu_seconds.items()}
    figures = {f"{name}_images_per_s": len(images) / taken for name, taken in median.items()}
    return figures | {
        "pipeline_over_decode": median["decode"] / median["pipeline"],
        # In processor time, which other work on the machine disturbs less.
        "pipeline_over_decode_cpu": cpu_median["decode"] / cpu_median["pipeline"],
    }


@contextmanager
def _watched_object_store() -> Iterator[list[float]]:
    """Give the bytes in use in Ray's object store, a few times a second while it is open."""
    found = [0.0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            found.append(object_store_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def _pillow_decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _bare_decode(encoded: bytes) -> np.ndarray:
    """Decode a whole image by the decoder that `decode_rgb` uses for it."""
    try:
        return simplejpeg.decode_jpeg(encoded)
    except ValueError:
        return _pillow_decode(encoded)


def _through_ray(plan: Plan) -> dict[str, float]:
    """Return images/s of a training's dataset on all cores, at a reader that does nothing else."""

    def read(first_step: int) -> tuple[int, float]:
        start = time.perf_counter()
        dataset = ingest.training_dataset(plan, first_step, num_workers=1)
        dataset.context.execution_options = ingest.execution_options(plan)
        (iterator,) = dataset.streaming_split(1, equal=True)
        records = iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        steps = iterate_steps(records, first_step)
        num_images = sum(len(row.keys) for step in steps for row in step.rows)
        return num_images, time.perf_counter() - start

    with ray_session():
        warm_up = max(1, int(_WARM_UP * plan.num_steps))
        _, start_s = read(plan.num_steps - warm_up)  # starts the workers, which then stay
        with _watched_object_store() as peak_bytes:
            num_images, taken_s = read(0)
    return {
        "object_store_peak_mb": max(peak_bytes) / 1e6,
        "ray_images_per_s": num_images / taken_s,
        "ray_warm_up_s": start_s,
        "ray_cores": os.cpu_count() or 1,
    }
