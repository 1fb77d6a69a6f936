import random
from pathlib import Path

import pytest

from pipelines.caching.verify import require_intact, verify_here, verify_latents
from pipelines.latents import LatentCache
from tests.pipelines.small_caches import UNITS, write_small_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_small_cache(tmp_path / "cache")
    return tmp_path / "cache"


def files_of(cache: Path) -> list[Path]:
    return sorted(file for file in cache.rglob("*") if file.is_file())


def damage(cache: Path) -> str:
    """Return what is said of a damaged cache."""
    with pytest.raises((ValueError, OSError)) as caught:
        require_intact(verify_here(str(cache)), str(cache))
    return str(caught.value)


def test_a_flipped_bit_anywhere_is_found_and_the_file_named(cache: Path) -> None:
    intact = verify_here(str(cache))
    assert intact.bad == []
    assert intact.num_units == len(UNITS)
    assert intact.num_bytes == LatentCache(str(cache)).manifest.num_bytes
    generator = random.Random(0)
    assert len(files_of(cache)) == 2 * len(UNITS) + 3
    for file in files_of(cache):
        data = file.read_bytes()
        # All bits of the small files would take minutes: 40 of each.
        for offset in generator.sample(range(len(data)), 40):
            damaged = bytearray(data)
            damaged[offset] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            assert str(file) in damage(cache), (file, offset)
        file.write_bytes(data)
    assert verify_here(str(cache)).bad == []


def test_missing_and_shortened_files_are_named_with_the_remedy(cache: Path) -> None:
    file = cache / "units" / "cccc.safetensors"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1])
    assert f"{file} is damaged: sha256" in damage(cache)
    file.unlink()
    assert f"{file} is missing; delete its .json and run `vitok encode` again" in damage(cache)
    file.write_bytes(intact)
    book = file.with_suffix(".json")
    book.unlink()
    assert f"{book} is missing; run `vitok encode` again" in damage(cache)
    (cache / "cache.json").unlink()
    assert f"{cache}/cache.json is missing" in "; ".join(verify_here(str(cache)).bad)
    (cache / "manifest.json").unlink()
    assert "holds no finished latent cache" in damage(cache)


def test_units_exchanged_with_their_records_contradict_the_manifest(cache: Path) -> None:
    """A unit that is whole in itself, but not the one that the cache was made of."""
    units = cache / "units"
    for suffix in ("safetensors", "json"):
        (units / f"cccc.{suffix}").write_bytes((units / f"aaaa.{suffix}").read_bytes())
    assert "cccc.safetensors is damaged: sha256" in damage(cache)


def test_check_on_ray_finds_what_the_check_here_finds(ray_cluster: None, cache: Path) -> None:
    assert verify_latents(str(cache), cpus_per_task=0.5) == verify_here(str(cache))
    sampled = verify_latents(str(cache), sample=0.4, cpus_per_task=0.5)
    assert (sampled.num_units, sampled.bad) == (1, [])
    for name in UNITS:
        file = cache / "units" / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-2] + b"xy")
    found = verify_latents(str(cache), cpus_per_task=0.5)
    assert found == verify_here(str(cache))
    assert len(found.bad) == len(UNITS)
    with pytest.raises(ValueError, match=r"aaaa\.safetensors is damaged.*\(and 2 more\)"):
        require_intact(found, str(cache))
    with pytest.raises(ValueError, match="sample=0 must be a fraction"):
        verify_latents(str(cache), sample=0)
