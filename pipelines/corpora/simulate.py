"""What a training's data plan costs and how good it is, before anything is read.

Steps are planned as training plans them, from the manifest alone; no shard is opened.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpora.manifest_tables import SHARD_SCHEMA
from pipelines.corpora.size_histogram import NUM_CLASSES
from pipelines.corpus import Manifest, SampleRecords
from pipelines.mixture import Corpus
from pipelines.order import hash_of, uniform
from pipelines.plan import DataConfig, Plan, SampleView, Stage, StepPlan
from vitok.variants import AutoencoderConfig

_PURPOSE_SIZES = 9
_IMAGE_BYTES = 100_000


@dataclass(frozen=True)
class Simulation:
    """Figures of a data plan; means over the simulated steps where not said otherwise.

    Attributes:
        num_shards, num_samples: of the corpus.
        start_up_s: from the manifest on disk to the first planned step.
        driver_mb: memory that this took.
        step_s: of planning one step, which every ingest task pays.
        rows_per_step: packed rows of a global step.
        token_utilisation: real tokens for each token of a row.
        padded_utilisation: the same if every image were padded to its budget.
        imbalance: work of the busiest rank over the mean, minus 1; the largest of all steps. Work
            is the model's floating-point operations on the real tokens, attention included.
        requests_per_step: ranged reads, each of neighbouring samples of a shard.
        images_per_request: images that one of them brings.
        shards_per_step: distinct shards among a step's images.
        unevenness: how far a step's samples are from uniform over the corpus: the largest distance
            between the two distributions (Kolmogorov-Smirnov); about 1.2 / sqrt(chunks) if the
            chunks were drawn at random.
        ideal_unevenness: that figure for single images drawn at random.
    """

    num_shards: int
    num_samples: int
    start_up_s: float
    driver_mb: float
    step_s: float
    rows_per_step: int
    token_utilisation: float
    padded_utilisation: float
    imbalance: float
    requests_per_step: float
    images_per_request: float
    shards_per_step: float
    unevenness: float
    ideal_unevenness: float


def simulate(
    load: Callable[[], Manifest],
    *,
    data: DataConfig,
    stage: Stage,
    model: AutoencoderConfig,
    world_size: int,
    num_steps: int,
    seed: int = 0,
) -> Simulation:
    """Plan steps spread over an epoch and measure them.

    Args:
        load: returns the manifest; its time is part of the start-up.
        stage: its number of steps does not matter.
        world_size: ranks that share every step.
        num_steps: how many steps are planned.
    """
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    manifest = load()
    epoch_steps = max(num_steps, -(-manifest.num_samples // stage.images_per_step))
    stage = Stage(
        steps=epoch_steps,
        images_per_step=stage.images_per_step,
        token_budgets=stage.token_budgets,
        rows_per_step=stage.rows_per_step,
    )
    plan = Plan(
        corpus=Corpus.of(manifest),
        data=data,
        stages=(stage,),
        patch_size=model.patch_size,
        seed=seed,
    )
    plan.step(0)
    start_up_s = time.perf_counter() - start
    driver_mb = (process.memory_info().rss - before) / 2**20

    start = time.perf_counter()
    steps = [plan.step(epoch_steps * i // num_steps) for i in range(num_steps)]
    step_s = (time.perf_counter() - start) / num_steps
    views = [[view for row in step.rows for view in row] for step in steps]
    tokens = [sum(view.num_tokens(model.patch_size) for view in of_step) for of_step in views]
    rows_per_step = len(steps[0].rows)
    requests = [_num_requests(step.records, data.chunk_samples) for step in steps]
    budget = float(np.mean(stage.token_budgets))
    return Simulation(
        num_shards=len(manifest.uris),
        num_samples=manifest.num_samples,
        start_up_s=start_up_s,
        driver_mb=driver_mb,
        step_s=step_s,
        rows_per_step=rows_per_step,
        token_utilisation=float(np.mean(tokens)) / (rows_per_step * data.row_tokens),
        padded_utilisation=float(np.mean(tokens)) / (stage.images_per_step * budget),
        imbalance=max(_imbalance(step, model, world_size) for step in steps),
        requests_per_step=float(np.mean(requests)),
        images_per_request=stage.images_per_step / float(np.mean(requests)),
        shards_per_step=float(np.mean([len(np.unique(step.records.shard)) for step in steps])),
        unevenness=float(
            np.mean([_unevenness(step.records.sample_id, manifest.num_samples) for step in steps])
        ),
        # The mean of Kolmogorov's distribution.
        ideal_unevenness=0.8687 / stage.images_per_step**0.5,
    )


def _imbalance(step: StepPlan, model: AutoencoderConfig, world_size: int) -> float:
    """Return the work of the busiest rank over the mean, minus 1."""

    def work(row: Sequence[SampleView]) -> float:
        lengths = [view.num_tokens(model.patch_size) for view in row]
        return sum(n * model.flops_per_token(n) for n in lengths)

    of_rank = [sum(map(work, step.rows[rank::world_size])) for rank in range(world_size)]
    return max(of_rank) / (sum(of_rank) / world_size) - 1


def _num_requests(records: SampleRecords, chunk_samples: int) -> int:
    """Count runs of samples that lie behind each other in one shard."""
    order = np.argsort(records.sample_id)
    ids, shards = records.sample_id[order], records.shard[order]
    joined = (np.diff(ids) <= chunk_samples) & (np.diff(shards) == 0)
    return len(ids) - int(joined.sum())


def _unevenness(sample_ids: NDArray[np.int64], num_samples: int) -> float:
    place = np.sort(sample_ids) / num_samples
    steps = np.arange(len(place) + 1) / len(place)
    return float(max(np.abs(place - steps[1:]).max(), np.abs(place - steps[:-1]).max()))


class SyntheticManifest(Manifest):
    """A manifest of shards that do not exist: samples are drawn when they are asked for."""

    def records(self, sample_ids: NDArray[np.int64]) -> SampleRecords:
        """Draw sizes as photographs of the web have them, the same for a sample each time."""
        sample_ids = np.asarray(sample_ids, np.int64)
        shard, index_in_shard = self.locate(sample_ids)
        draws = [uniform(hash_of(_PURPOSE_SIZES, sample_ids, number)) for number in range(3)]
        # Box and Muller; a side of 450 pixels in the middle, aspect ratios between 1:2.5 and 2.5:1.
        normal = np.sqrt(-2 * np.log(1 - draws[0])) * np.cos(2 * np.pi * draws[1])
        side, stretch = 450 * np.exp(0.6 * normal), np.exp((draws[2] - 0.5) * np.log(2.5))
        length = np.full(len(sample_ids), _IMAGE_BYTES, np.int64)
        return SampleRecords(
            sample_id=sample_ids,
            shard=shard,
            key=sample_ids.astype(str).astype(object),
            offset=index_in_shard * _IMAGE_BYTES,
            length=length,
            width=np.clip(side * stretch, 16, 8000).astype(np.int32),
            height=np.clip(side / stretch, 16, 8000).astype(np.int32),
            label=np.full(len(sample_ids), -1, np.int64),
        )


def write_synthetic_manifest(folder: Path, num_shards: int, samples_per_shard: int) -> None:
    """Write the shard table of a corpus that does not exist.

    Raises:
        ValueError: there are no shards or no samples.
    """
    if min(num_shards, samples_per_shard) < 1:
        raise ValueError(f"{num_shards=} and {samples_per_shard=} must be at least 1")
    counts = np.zeros(num_shards * NUM_CLASSES, np.int32)
    counts[::NUM_CLASSES] = samples_per_shard
    columns = [
        pa.array([f"s3://synthetic/{i:06d}.tar" for i in range(num_shards)]),
        pa.array(np.full(num_shards, samples_per_shard * _IMAGE_BYTES)),
        pa.array(np.full(num_shards, samples_per_shard)),
        pa.array([hashlib.sha256(str(i).encode()).hexdigest() for i in range(num_shards)]),
        pa.FixedSizeListArray.from_arrays(pa.array(counts), NUM_CLASSES),
    ]
    pq.write_table(pa.table(columns, schema=SHARD_SCHEMA), folder / "shards.parquet")
