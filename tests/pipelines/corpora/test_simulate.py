from pathlib import Path

import numpy as np
import pytest

from pipelines.corpora.simulate import (
    Simulation,
    SyntheticManifest,
    simulate,
    write_synthetic_manifest,
)
from pipelines.corpus import Manifest
from pipelines.plan import DataConfig, Stage
from vitok.variants import AutoencoderConfig

MODEL = AutoencoderConfig.from_name("Bd4-B/16x64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic_manifest(folder, num_shards=500, samples_per_shard=1000)
    return folder


def run(folder: Path, **changes: object) -> Simulation:
    settings = {
        "data": DataConfig(manifest=str(folder), row_tokens=4096),
        "stage": Stage(steps=1, images_per_step=512, token_budgets=(64, 256)),
        "model": MODEL,
        "world_size": 4,
        "num_steps": 3,
    }
    return simulate(lambda: SyntheticManifest.load(folder), **(settings | changes))


def test_a_synthetic_manifest_is_loaded_like_a_real_one_and_draws_the_same_samples(
    folder: Path,
) -> None:
    manifest = SyntheticManifest.load(folder)
    assert isinstance(manifest, SyntheticManifest)
    assert isinstance(manifest, Manifest)
    assert manifest.num_samples == 500_000
    ids = np.array([499_999, 0, 123_456])
    records = manifest.records(ids)
    assert records.shard.tolist() == [499, 0, 123]
    assert records.sample_id.tolist() == ids.tolist()
    again = manifest.records(ids[::-1])
    assert again.width.tolist() == records.width.tolist()[::-1]
    many = manifest.records(np.arange(0, 500_000, 100))
    assert 400 < np.median(np.sqrt(many.width * many.height.astype(float))) < 500
    assert (many.width / many.height).max() > 1.5


def test_figures_are_those_of_the_planned_steps(folder: Path) -> None:
    found = run(folder)
    assert (found.num_shards, found.num_samples) == (500, 500_000)
    assert found.start_up_s > 0 and found.step_s > 0
    # Chunks of 16 neighbours, each one request.
    assert found.requests_per_step == pytest.approx(512 / 16, abs=1)
    assert found.images_per_request == pytest.approx(16, rel=0.1)
    assert 25 < found.shards_per_step <= 33
    assert 0.9 < found.token_utilisation <= 1
    assert 0 < found.padded_utilisation <= 1
    assert 0 <= found.imbalance < 0.2
    assert found.unevenness < 0.35


def test_larger_chunks_cost_fewer_requests_and_shuffle_worse(folder: Path) -> None:
    small = run(folder, data=DataConfig(manifest=str(folder), row_tokens=4096, chunk_samples=1))
    large = run(folder, data=DataConfig(manifest=str(folder), row_tokens=4096, chunk_samples=128))
    assert small.requests_per_step > 500
    assert large.requests_per_step < 10
    assert small.unevenness < 2 * small.ideal_unevenness < large.unevenness


def test_ranks_without_rows_show_as_imbalance(folder: Path) -> None:
    alone = run(folder, world_size=1)
    assert alone.imbalance == 0
    many = run(folder, world_size=10 * alone.rows_per_step)
    assert many.imbalance > 8


def test_a_corpus_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_shards=0 and samples_per_shard=5 must be at least 1"):
        write_synthetic_manifest(tmp_path, 0, 5)
