from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipelines.caching.export import _write_part, export_webdataset
from pipelines.latents import LatentCache
from pipelines.whole_images import Transform
from tests.pipelines.small_caches import IDENTITY, ROWS, UNITS, many_units, write_small_cache


def read_by_webdataset(folder: str) -> list[dict]:
    """Every sample of an export, by the library that owns the format."""
    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return list(dataset.decode())


def test_webdataset_reads_the_export_and_it_goes_on_where_it_stopped(
    ray_cluster: None, tmp_path: Path
) -> None:
    write_small_cache(tmp_path / "cache", many_units(7, 5))
    cache = LatentCache(str(tmp_path / "cache"))
    out = tmp_path / "export"

    def export() -> object:
        return export_webdataset(
            str(tmp_path / "cache"), out, latents_per_shard=12, cpus_per_task=0.5
        )

    written = export()
    assert (written.num_shards, written.num_latents) == (3, 35)
    shards = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(shards) == [f"latents-{number:06d}.tar" for number in range(3)]
    assert written.num_bytes == sum(map(len, shards.values()))
    samples = read_by_webdataset(str(out))
    assert len(samples) == len(cache) == 35
    for sample, row in zip(samples, cache, strict=True):
        assert sample["__key__"] == row.key
        assert sample["cls"] == row.label if row.label >= 0 else "cls" not in sample
        assert sample["latent.npy"].dtype == np.float32
        np.testing.assert_array_equal(sample["latent.npy"], row.latent.float().numpy())
        assert sample["json"]["grid"] == list(row.grid)
        assert sample["json"]["image_size"] == list(row.image_size)
    assert {sample.get("cls") for sample in samples} >= {None, 0, 1}

    kept = (out / "latents-000000.tar").stat().st_mtime_ns
    (out / "latents-000001.tar").unlink()
    assert export() == written
    assert {path.name: path.read_bytes() for path in out.iterdir()} == shards
    assert (out / "latents-000000.tar").stat().st_mtime_ns == kept


def test_variants_of_an_image_have_keys_of_their_own(tmp_path: Path) -> None:
    rows = [
        replace(row, key="k", transform=i // 2, flipped=bool(i % 2))
        for i, row in enumerate(UNITS["cccc"])
    ]
    identity = replace(
        IDENTITY, transforms=(Transform(token_budget=64), Transform(square=32)), flip=True
    )
    write_small_cache(tmp_path / "cache", {"aaaa": rows}, identity)
    cache = LatentCache(str(tmp_path / "cache"))
    _write_part(cache, 0, 4, str(tmp_path / "a.tar"))
    samples = read_by_webdataset(str(tmp_path))
    assert [sample["__key__"] for sample in samples] == ["k_0", "k_0m", "k_1", "k_1m"]


def test_two_latents_of_one_key_are_named(tmp_path: Path) -> None:
    rows = [replace(row, key="twice") for row in ROWS[:2]]
    write_small_cache(tmp_path / "cache", {"aaaa": rows})
    with pytest.raises(ValueError, match="two latents have the key twice.*rename one"):
        _write_part(LatentCache(str(tmp_path / "cache")), 0, 2, str(tmp_path / "a.tar"))
    assert not (tmp_path / "a.tar").exists()
