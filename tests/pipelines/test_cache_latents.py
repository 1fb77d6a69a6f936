import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.cache_latents import LatentCaching, Unit, cache_latents, encode_unit, units_of
from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.decode import decode_rgb
from pipelines.latents import LatentCache
from pipelines.train_autoencoder import load_autoencoder
from vitok.packed import pack_images
from vitok.patches import fit_to_budget
from vitok.pretrained import encoder_digest

BUDGET = 36
UNIT_SAMPLES = 25


@pytest.fixture
def caching(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> LatentCaching:
    return LatentCaching(
        manifest=str(sample_manifests[0]),
        model=str(tiny_weights),
        out=str(tmp_path / "cache"),
        token_budget=BUDGET,
        unit_samples=UNIT_SAMPLES,
        row_tokens=128,
        num_workers=1,
        cpus_per_worker=0.5,
        use_gpu=False,
    )


def files_of(cache: str) -> dict[str, bytes]:
    """Every file of a folder with its bytes, by its path in the folder."""
    root = Path(cache)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def times_of(cache: str) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (Path(cache) / "units").iterdir()}


def test_latents_of_a_unit_equal_those_of_each_image_alone(caching: LatentCaching) -> None:
    source = Manifest.load(caching.manifest)
    model = load_autoencoder(caching.model)
    unit = Unit(shard=0, start=7, stop=29)
    in_float32, skipped = encode_unit(model, source, unit, caching, torch.device("cpu"))
    in_bf16, _ = encode_unit(
        load_autoencoder(caching.model).bfloat16(), source, unit, caching, torch.device("cpu")
    )
    records = source.records(np.arange(unit.start, unit.stop))
    assert skipped == []
    assert [row.key for row in in_float32] == records.key.tolist()
    assert [row.label for row in in_float32] == records.label.tolist()
    assert len({row.grid for row in in_float32}) > 5
    images = read_samples(source, records)
    for data, row, rounded in zip(images, in_float32, in_bf16, strict=True):
        whole = decode_rgb(data)
        size = fit_to_budget(*whole.shape[:2], patch_size=16, token_budget=BUDGET)
        pixels = torch.from_numpy(decode_rgb(data, size=size)).permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            expected = model.encode_packed(pack_images([pixels], patch_size=16)).tokens
        assert row.image_size == size
        assert row.grid[0] * row.grid[1] == len(row.latent) <= BUDGET
        torch.testing.assert_close(row.latent, expected, rtol=1e-4, atol=1e-4)
        # LayerNorm makes every latent's values about 1 in size; a few roundings of 1/256 each.
        torch.testing.assert_close(rounded.latent.float(), expected, rtol=0, atol=0.1)
        assert (rounded.latent.float() - expected).square().mean().sqrt() < 0.02


def test_units_cover_every_sample_once(caching: LatentCaching) -> None:
    source = Manifest.load(caching.manifest)
    for unit_samples in (1, 7, 25, 1000):
        units = units_of(source, unit_samples)
        covered = [
            int(source.first_sample[unit.shard]) + place
            for unit in units
            for place in range(unit.start, unit.stop)
        ]
        assert covered == list(range(source.num_samples))
        assert max(unit.stop - unit.start for unit in units) <= unit_samples


def test_cache_is_the_same_for_any_number_of_actors_and_after_a_kill(
    ray_cluster: None, caching: LatentCaching, tmp_path: Path
) -> None:
    manifest = cache_latents(caching)
    alone = files_of(caching.out)
    assert len(manifest.units) == 3
    assert len(alone) == 2 + 2 * 3
    cache = LatentCache(caching.out, encoder_digest(load_autoencoder(caching.model)))
    cache.verify()
    source = Manifest.load(caching.manifest)
    records = source.records(np.arange(source.num_samples))
    assert [row.key for row in cache] == records.key.tolist()

    other = replace(caching, out=str(tmp_path / "other"), num_workers=2)
    cache_latents(other)
    assert files_of(other.out) == alone

    # As a kill leaves it: one unit without its record, one cut off in writing, one not begun.
    units = Path(other.out) / "units"
    first, second, third = (unit.name for unit in manifest.units)
    (Path(other.out) / "manifest.json").unlink()
    (units / f"{first}.json").unlink()
    (units / f"{second}.json").unlink()
    (units / f"{second}.safetensors").rename(units / f"{second}.safetensors.part")
    (units / f"{second}.safetensors.part").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="goes on where it was stopped"):
        LatentCache(other.out)
    before = times_of(other.out)
    cache_latents(other)
    assert files_of(other.out) == alone
    after = times_of(other.out)
    kept = {name for name in after if before.get(name) == after[name]}
    assert kept == {f"{third}.json", f"{third}.safetensors"}, "encoded again: what was missing"

    cache_latents(other)
    assert times_of(other.out) == after, "a finished cache is left as it is"


def test_cache_of_another_transform_or_encoder_is_refused(
    caching: LatentCaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Refused before anything is encoded: no Ray here.
    from pipelines import cache_latents as module

    identity = module.identity_of(caching)
    module.claim_cache(module.Folder.of(caching.out), identity)
    assert identity.transform.token_budget == BUDGET
    claimed = files_of(caching.out)
    assert list(claimed) == ["cache.json"]
    for change, difference in (
        ({"token_budget": 64}, r"transform\.token_budget: 36 -> 64"),
        ({"dtype": "float32"}, r"dtype: 'bfloat16' -> 'float32'"),
    ):
        with pytest.raises(ValueError, match=rf"holds another cache \({difference}\); choose"):
            cache_latents(replace(caching, **change))
    cache_file = Path(caching.out) / "cache.json"
    cache_file.write_text(
        json.dumps(json.loads(claimed["cache.json"]) | {"encoder_digest": "f" * 64})
    )
    with pytest.raises(ValueError, match=r"holds another cache \(encoder_digest: 'ffff"):
        cache_latents(caching)


def test_unreadable_samples_are_recorded_and_too_many_fail_with_their_names(
    ray_cluster: None, caching: LatentCaching, tmp_path: Path
) -> None:
    source = Manifest.load(caching.manifest)
    records = source.records(np.arange(12))
    samples = [
        # The header survives, so that the manifest lists it; the pixels are cut off.
        {"__key__": f"k{i:02d}", "jpg": data[: len(data) // 2] if i in (3, 7) else data, "cls": i}
        for i, data in enumerate(read_samples(source, records))
    ]
    shards = write_shards(samples, tmp_path / "shards", "damaged", 12)
    manifest = build_manifest(shards, tmp_path / "manifest")
    assert manifest.num_samples == 12
    damaged = replace(caching, manifest=str(manifest.path), max_unreadable=0.1)
    with pytest.raises(
        RuntimeError, match=r"2 of 12 samples were unreadable.*max_unreadable=0\.1.*k03: trunc.*k07"
    ):
        cache_latents(damaged)
    with pytest.raises(FileNotFoundError):
        LatentCache(damaged.out)

    before = times_of(damaged.out)
    found = cache_latents(replace(damaged, max_unreadable=0.2))
    assert times_of(damaged.out) == before, "what is committed is never encoded again"
    assert found.num_images == 10
    ((first, reason), (second, _)) = found.units[0].skipped
    assert (first, second) == ("k03", "k07")
    assert "truncated" in reason
    rows = list(LatentCache(damaged.out))
    assert [row.key for row in rows] == [f"k{i:02d}" for i in range(12) if i not in (3, 7)]
    assert [row.label for row in rows] == [i for i in range(12) if i not in (3, 7)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be one of bfloat16, float16, float32"),
        ({"unit_samples": 0}, "must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LatentCaching(manifest="m", model="w", out="o", **change)
