import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipelines.latents import (
    CacheIdentity,
    LatentCache,
    LatentRow,
    UnitRecord,
    claim_cache,
    committed_units,
    read_record,
    write_manifest,
    write_unit,
)
from pipelines.whole_images import Transform
from vitok.storage import Folder

CHANNELS = 5
IDENTITY = CacheIdentity(
    encoder_digest="e" * 64,
    transform=Transform(token_budget=64),
    patch_size=16,
    dtype="bfloat16",
    channels=CHANNELS,
    row_tokens=64,
)


def latent_rows(grids: Sequence[tuple[int, int]], seed: int) -> list[LatentRow]:
    """Rows in float32 whose channels have different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.arange(1.0, CHANNELS + 1), torch.arange(CHANNELS) - 2.5
    return [
        LatentRow(
            key=f"folder/schlüssel-{seed}-{index}",
            latent=torch.randn(rows * columns, CHANNELS, generator=generator) * scale + shift,
            grid=(rows, columns),
            image_size=(rows * 16 - index, columns * 16),
            label=index - 1,
        )
        for index, (rows, columns) in enumerate(grids)
    ]


UNITS = {
    "aaaa": latent_rows([(1, 1), (3, 7), (8, 8)], seed=1),
    "bbbb": [],  # a slice of which nothing was readable
    "cccc": latent_rows([(64, 1), (1, 64), (2, 5), (4, 4)], seed=2),
}
ROWS = [row for rows in UNITS.values() for row in rows]


def write(folder: Folder, name: str, dtype: torch.dtype = torch.bfloat16) -> UnitRecord:
    skipped = [] if UNITS[name] else [("lost", "truncated image")]
    return write_unit(folder, name, UNITS[name], CHANNELS, dtype, skipped)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = Folder.of(str(tmp_path / "cache"))
    claim_cache(folder, IDENTITY)
    write_manifest(folder, IDENTITY, "s" * 64, [write(folder, name) for name in UNITS])
    return tmp_path / "cache"


def unit_file(cache: Path, name: str) -> Path:
    return cache / "units" / f"{name}.safetensors"


def test_rows_come_back_in_order_with_their_exact_bf16_values(cache: Path) -> None:
    found = LatentCache(str(cache))
    assert len(found) == len(ROWS) == 7
    for actual, expected in zip(found, ROWS, strict=True):
        assert (actual.key, actual.grid, actual.image_size, actual.label) == (
            expected.key,
            expected.grid,
            expected.image_size,
            expected.label,
        )
        assert actual.latent.dtype == torch.bfloat16
        assert torch.equal(actual.latent, expected.latent.bfloat16())
        assert not torch.equal(actual.latent.float(), expected.latent), "bf16 rounds"
    assert found[5].key == ROWS[5].key, "any image is found without those before it"
    for outside in (-1, 7):
        with pytest.raises(IndexError, match=rf"image {outside} of a cache of 7"):
            found[outside]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_stored_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = Folder.of(str(tmp_path))
    identity = replace(IDENTITY, dtype=str(dtype).removeprefix("torch."))
    write_manifest(folder, identity, "s" * 64, [write(folder, "aaaa", dtype)])
    latents = [row.latent for row in LatentCache(str(tmp_path))]
    assert all(latent.dtype == dtype for latent in latents)
    assert torch.equal(torch.cat(latents), torch.cat([r.latent for r in UNITS["aaaa"]]).to(dtype))


def test_same_rows_give_the_same_bytes_and_other_rows_others(tmp_path: Path) -> None:
    first, second = Folder.of(str(tmp_path / "first")), Folder.of(str(tmp_path / "second"))
    for name in UNITS:
        assert write(first, name) == write(second, name)
        for suffix in (".safetensors", ".json"):
            data = (tmp_path / "first/units" / (name + suffix)).read_bytes()
            assert data == (tmp_path / "second/units" / (name + suffix)).read_bytes()
    swapped = write_unit(second, "aaaa", UNITS["aaaa"][::-1], CHANNELS, torch.bfloat16, [])
    assert swapped.sha256 != read_record(first, "aaaa").sha256


def test_statistics_are_those_of_all_stored_values_in_float64(cache: Path) -> None:
    manifest = LatentCache(str(cache)).manifest
    stored = torch.cat([row.latent.bfloat16() for row in ROWS]).double().numpy()
    assert manifest.num_tokens == len(stored) == 240
    assert manifest.num_images == len(ROWS)
    assert manifest.num_bytes == sum(unit_file(cache, name).stat().st_size for name in UNITS)
    np.testing.assert_allclose(manifest.mean, stored.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(manifest.std, stored.std(axis=0), rtol=1e-12)
    assert min(manifest.std) > 0.5
    assert manifest.units[1].skipped == (("lost", "truncated image"),)


def test_normalized_latents_have_mean_0_and_variance_1(cache: Path) -> None:
    found = LatentCache(str(cache))
    values = torch.cat([found.normalize(row.latent) for row in found]).double()
    torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(values.var(0, correction=0), torch.ones_like(values[0]))


def test_verify_finds_any_single_flipped_bit(cache: Path) -> None:
    found = LatentCache(str(cache))
    found.verify()
    generator = random.Random(0)
    for name in UNITS:
        file = unit_file(cache, name)
        intact = file.read_bytes()
        for _ in range(12):
            offset, bit = generator.randrange(len(intact)), generator.randrange(8)
            damaged = bytearray(intact)
            damaged[offset] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged: sha256"):
                found.verify()
        file.write_bytes(intact)
    found.verify()


def test_verify_finds_missing_and_shortened_files(cache: Path) -> None:
    file = unit_file(cache, "cccc")
    intact = file.read_bytes()
    file.write_bytes(intact[:-1])
    with pytest.raises(ValueError, match=r"cccc\.safetensors is damaged"):
        LatentCache(str(cache)).verify()
    file.unlink()
    with pytest.raises(
        ValueError, match=r"cccc\.safetensors is missing; delete its \.json and run"
    ):
        LatentCache(str(cache)).verify()
    unit_file(cache, "cccc").with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"cccc\.json is missing; run `vitok encode` again"):
        LatentCache(str(cache)).verify()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("manifest.json", '"mean": [\n  ', '"mean": [\n  1'),
        ("manifest.json", '"num_tokens": ', '"num_tokens": 1'),
        ("cache.json", "eeee", "eeef"),
        ("units/aaaa.json", '"num_images": ', '"num_images": 1'),
        ("units/aaaa.json", '"channel_sum": [', '"channel_sum": [1'),
    ],
)
def test_verify_finds_a_changed_digit_in_the_books(
    cache: Path, name: str, old: str, new: str
) -> None:
    LatentCache(str(cache)).verify()
    text = (cache / name).read_text()
    assert old in text
    (cache / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"contradict each other|is not JSON"):
        LatentCache(str(cache)).verify()


def test_cache_of_another_encoder_is_refused(cache: Path) -> None:
    assert len(LatentCache(str(cache), "e" * 64)) == len(ROWS)
    sentence = "holds latents of the encoder eeeeeeeeeeee, not of ffffffffffff; encode again"
    with pytest.raises(ValueError, match=sentence):
        LatentCache(str(cache), "f" * 64)


def test_unfinished_cache_is_named_with_the_remedy(cache: Path, tmp_path: Path) -> None:
    (cache / "manifest.json").unlink()  # as it is while `vitok encode` runs
    for location in (cache, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{location} holds no finished latent cache"):
            LatentCache(str(location))


def test_manifest_with_an_unknown_field_is_refused(cache: Path) -> None:
    file = cache / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"surplus": 1}))
    with pytest.raises(ValueError, match=r"manifest\.json is no LatentManifest: surplus"):
        LatentCache(str(cache))


def test_any_reader_of_safetensors_reads_a_unit(cache: Path) -> None:
    rows = UNITS["cccc"]
    with safe_open(unit_file(cache, "cccc"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert torch.equal(tensors["latents"], torch.cat([row.latent for row in rows]).bfloat16())
    assert tensors["offsets"].tolist() == [0, 64, 128, 138, 154]
    assert tensors["grid"].tolist() == [list(row.grid) for row in rows]
    assert tensors["image_size"].tolist() == [list(row.image_size) for row in rows]
    assert tensors["label"].tolist() == [-1, 0, 1, 2]
    assert json.loads(bytes(tensors["keys"].tolist())) == [row.key for row in rows]


def test_what_is_half_written_does_not_exist(cache: Path) -> None:
    units = cache / "units"
    data = unit_file(cache, "aaaa").read_bytes()
    (units / "dddd.safetensors.part").write_bytes(data[:100])
    (units / "eeee.safetensors").write_bytes(data)  # killed before the record
    (units / "ffff.safetensors").write_bytes(data)
    (units / "ffff.json.part").write_text("{")
    folder = Folder.of(str(cache))
    assert committed_units(folder) == set(UNITS)
    for name in ("dddd", "eeee", "ffff"):
        with pytest.raises(FileNotFoundError):
            read_record(folder, name)
    found = LatentCache(str(cache))
    assert [row.key for row in found] == [row.key for row in ROWS]
    found.verify()


def test_record_says_what_is_in_the_file(cache: Path) -> None:
    record = read_record(Folder.of(str(cache)), "aaaa")
    data = unit_file(cache, "aaaa").read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.num_bytes, record.num_images, record.num_tokens) == (len(data), 3, 86)


def test_unit_name_depends_on_everything_that_its_bytes_depend_on() -> None:
    other_transform = Transform(token_budget=65)
    names = {
        IDENTITY.unit_name("shard", 0, 10),
        IDENTITY.unit_name("another", 0, 10),
        IDENTITY.unit_name("shard", 1, 10),
        IDENTITY.unit_name("shard", 0, 11),
        replace(IDENTITY, encoder_digest="f" * 64).unit_name("shard", 0, 10),
        replace(IDENTITY, transform=other_transform).unit_name("shard", 0, 10),
        replace(IDENTITY, dtype="float32").unit_name("shard", 0, 10),
    }
    assert len(names) == 7
    assert IDENTITY.unit_name("shard", 0, 10) in names, "the same parts give the same name"
