from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.cache_latents import identity_of
from pipelines.caching import estimate as estimate_latents
from pipelines.caching.config import LatentCaching, complete
from pipelines.caching.estimate import Rates, estimate_size, measure_rates
from pipelines.corpus import Manifest
from pipelines.latents import LatentCache
from tests.pipelines.encoding_process import encode_all, small_caching


@pytest.fixture
def caching(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> LatentCaching:
    return small_caching(
        sample_manifests[0],
        tiny_weights,
        tmp_path / "cache",
        token_budgets=(30,),
        squares=(64,),
        buckets=(80,),
        flip=True,
        unit_samples=7,
        row_tokens=256,
        cpus_per_worker=1.0,
    )


def test_estimate_is_what_the_cache_then_holds(caching: LatentCaching) -> None:
    identity = identity_of(complete(caching))
    size = estimate_size(caching, lambda: Manifest.load(caching.manifest), identity)
    threads = torch.get_num_threads()
    encode_all(caching)
    torch.set_num_threads(threads)
    found = LatentCache(caching.out).manifest
    assert size.num_images == found.num_images == 60
    assert size.num_latents == found.num_latents == 360
    assert size.num_units == found.num_units == 9
    # Every unit is counted here; of a large corpus it is a sample.
    assert size.num_tokens == found.num_tokens
    assert size.num_bytes == found.num_tokens * 16 * 2 < found.num_bytes
    assert size.num_writes == 2 * 9 + 3


def test_tokens_are_counted_on_a_sample_of_the_units(
    caching: LatentCaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identity_of(complete(caching))
    whole = estimate_size(caching, lambda: Manifest.load(caching.manifest), identity)
    monkeypatch.setattr(estimate_latents, "_COUNTED_UNITS", 4)
    monkeypatch.setattr(estimate_latents, "_COUNTED_SAMPLES", 5)
    sampled = estimate_size(caching, lambda: Manifest.load(caching.manifest), identity)
    assert sampled.num_tokens != whole.num_tokens
    assert sampled.num_tokens == pytest.approx(whole.num_tokens, rel=0.1)


def test_rates_are_measured_and_the_slower_side_sets_the_hours(caching: LatentCaching) -> None:
    settings = complete(caching)
    rates = measure_rates(settings, Manifest.load(caching.manifest), identity_of(settings))
    assert rates.reader_images_per_s > 0
    assert rates.encoder_images_per_s > 0
    settings = replace(settings, num_workers=4, cpus_per_worker=2.0, cpus_per_reader=0.5)
    slow_readers = Rates(reader_images_per_s=10.0, encoder_images_per_s=100.0)
    # 12 - 4 * 2 cores are left for 8 readers of half a core.
    assert slow_readers.hours(288_000, settings, num_cpus=12) == pytest.approx(1.0)
    slow_encoders = Rates(reader_images_per_s=100.0, encoder_images_per_s=10.0)
    assert slow_encoders.hours(144_000, settings, num_cpus=12) == pytest.approx(1.0)
    unknown = Rates(reader_images_per_s=10.0, encoder_images_per_s=0.0)
    assert unknown.hours(288_000, settings, num_cpus=12) == pytest.approx(1.0)
