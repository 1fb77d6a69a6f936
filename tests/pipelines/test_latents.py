import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from pipelines import latents as latents_module
from pipelines.caching.latent_corpus import LatentCorpus
from pipelines.caching.manifest import code_version, make_manifest, read_records, remove_old_indexes
from pipelines.caching.units import (
    claim_cache,
    commit_unit,
    committed_units,
    make_unit,
    read_record,
)
from pipelines.latents import CHUNK_LATENTS, LatentCache, LatentRow, LatentStream
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.whole_images import Transform
from tests.pipelines.small_caches import (
    CHANNELS,
    IDENTITY,
    ROWS,
    TEXT,
    UNITS,
    latent_rows,
    many_units,
    write_small_cache,
    write_small_unit,
)
from vitok.storage import Folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_small_cache(tmp_path / "cache")
    return tmp_path / "cache"


def unit_file(cache: Path, name: str) -> Path:
    return cache / "units" / f"{name}.safetensors"


def same(actual: LatentRow, expected: LatentRow) -> bool:
    """Whether a row came back, its values as bfloat16."""
    return (
        replace(actual, latent=None) == replace(expected, latent=None)
        and actual.latent.dtype == torch.bfloat16
        and torch.equal(actual.latent, expected.latent.bfloat16())
    )


def test_rows_come_back_in_order_with_their_exact_bf16_values(cache: Path) -> None:
    found = LatentCache(str(cache))
    assert len(found) == len(ROWS) == 7
    for actual, expected in zip(found, ROWS, strict=True):
        assert same(actual, expected)
        assert not torch.equal(actual.latent.float(), expected.latent), "bf16 rounds"
    assert same(found[5], ROWS[5]), "any image is found without those before it"
    for outside in (-1, 7):
        with pytest.raises(IndexError, match=rf"image {outside} of a cache of 7"):
            found[outside]


def test_batch_comes_in_the_order_asked_for(cache: Path) -> None:
    wanted = [6, 0, 3, 3, 1, 5, 2, 4]
    found = LatentCache(str(cache)).__getitems__(wanted)
    assert all(same(row, ROWS[i]) for row, i in zip(found, wanted, strict=True))
    loader = DataLoader(LatentCache(str(cache)), batch_size=3, collate_fn=list)
    assert [[row.key for row in batch] for batch in loader] == [
        [row.key for row in ROWS[start : start + 3]] for start in (0, 3, 6)
    ]


def test_only_the_table_and_the_rows_asked_for_are_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    from pipelines import corpus

    for module in (latents_module, corpus):
        real = module.open_ranges

        def watched(uri: str, num_bytes: int, real: Any = real) -> Any:
            manager = real(uri, num_bytes)

            class Watched:
                def __enter__(self) -> Any:
                    reader = manager.__enter__()
                    return lambda start, count: (read.append((start, count)), reader(start, count))[
                        1
                    ]

                def __exit__(self, *error: Any) -> Any:
                    return manager.__exit__(*error)

            return Watched()

        monkeypatch.setattr(module, "open_ranges", watched)
    latents_module._load_table.cache_clear()
    found = LatentCache(str(cache))
    record = read_record(Folder.of(str(cache)), "cccc")
    token = 2 * CHANNELS
    assert same(found[4], ROWS[4])
    assert read == [(0, record.table_bytes), (record.table_bytes + 64 * token, 64 * token)]
    read.clear()
    rows = found.__getitems__([5, 3, 4])
    assert all(same(row, ROWS[i]) for row, i in zip(rows, (5, 3, 4), strict=True))
    assert read == [(record.table_bytes, (64 + 64 + 10) * token)], "neighbours in one read"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_stored_as_they_are(tmp_path: Path, dtype: str) -> None:
    write_small_cache(tmp_path, {"aaaa": UNITS["aaaa"]}, replace(IDENTITY, dtype=dtype))
    found = [row.latent for row in LatentCache(str(tmp_path))]
    expected = torch.cat([row.latent for row in UNITS["aaaa"]]).to(getattr(torch, dtype))
    assert torch.equal(torch.cat(found), expected)


def test_log_variances_and_variants_come_back(tmp_path: Path) -> None:
    transforms = (Transform(token_budget=16), Transform(square=64))
    identity = replace(
        IDENTITY, transforms=transforms, flip=True, log_variance=True, dtype="float32"
    )
    rows = [
        replace(row, log_variance=row.latent - 3, transform=i // 2 % 2, flipped=bool(i % 2))
        for i, row in enumerate(latent_rows([(2, 3), (4, 4), (1, 2), (4, 4)], seed=3))
    ]
    manifest = write_small_cache(tmp_path, {"aaaa": rows}, identity)
    assert len(manifest.mean) == 2 * CHANNELS
    cache = LatentCache(str(tmp_path))
    assert identity.num_variants == 4
    for actual, expected in zip(cache, rows, strict=True):
        assert (actual.transform, actual.flipped) == (expected.transform, expected.flipped)
        assert torch.equal(actual.latent, expected.latent)
        assert torch.equal(actual.log_variance, expected.log_variance)
    values = torch.cat([cache.normalize(row.latent) for row in cache])
    torch.testing.assert_close(values.mean(0), torch.zeros(CHANNELS), rtol=0, atol=1e-6)


def test_same_rows_give_the_same_bytes_and_other_rows_others(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        write_small_cache(folder)
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert len(names) == 2 * len(UNITS) + 3
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    swapped = write_small_unit(Folder.of(str(tmp_path / "third")), "aaaa", UNITS["aaaa"][::-1])
    assert swapped.sha256 != read_record(Folder.of(str(first)), "aaaa").sha256


def test_statistics_are_those_of_all_stored_values_in_float64(cache: Path) -> None:
    manifest = LatentCache(str(cache)).manifest
    stored = torch.cat([row.latent.bfloat16() for row in ROWS]).double().numpy()
    assert manifest.num_tokens == len(stored) == 240
    assert (manifest.num_units, manifest.num_images, manifest.num_latents) == (3, 7, 7)
    assert manifest.num_skipped == 1
    assert manifest.num_bytes == sum(unit_file(cache, name).stat().st_size for name in UNITS)
    np.testing.assert_allclose(manifest.mean, stored.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(manifest.std, stored.std(axis=0), rtol=1e-12)
    assert min(manifest.std) > 0.5


def test_statistics_do_not_depend_on_the_order_of_units_and_bear_far_means(tmp_path: Path) -> None:
    units = {
        name: [replace(row, latent=row.latent + 1e5) for row in rows]
        for name, rows in many_units(40, 3).items()
    }
    identity = replace(IDENTITY, dtype="float32")
    folder = Folder.of(str(tmp_path))
    records = [write_small_unit(folder, name, rows, identity) for name, rows in units.items()]
    assert read_records(folder, list(units)) == records

    def statistics(order: list[int]) -> tuple[Any, Any]:
        found, _ = make_manifest(identity, "s", [], [])
        from pipelines.caching.manifest import _statistics

        tokens = sum(record.num_tokens for record in records)
        assert found.mean == (0.0,) * CHANNELS
        return _statistics([records[i] for i in order], tokens, CHANNELS)

    order = np.random.default_rng(0).permutation(40).tolist()
    assert order != sorted(order)
    mean, std = statistics(order)
    assert (mean, std) == statistics(sorted(order))
    stored = torch.cat([row.latent for rows in units.values() for row in rows]).double().numpy()
    np.testing.assert_allclose(mean, stored.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(std, stored.std(axis=0), rtol=1e-5)


def test_normalized_latents_have_mean_0_and_variance_1(cache: Path) -> None:
    found = LatentCache(str(cache))
    values = torch.cat([found.normalize(row.latent) for row in found]).double()
    torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(values.var(0, correction=0), torch.ones_like(values[0]))
    for row in found:
        there_and_back = found.denormalize(found.normalize(row.latent))
        torch.testing.assert_close(there_and_back, row.latent.float())


def test_manifest_stays_small_and_names_the_index(cache: Path, tmp_path: Path) -> None:
    write_small_cache(tmp_path / "many", many_units(300, 2))
    few, many = (tmp_path / name / "manifest.json" for name in ("cache", "many"))
    assert many.stat().st_size < few.stat().st_size + 100
    manifest = LatentCache(str(cache)).manifest
    index = (cache / manifest.index).read_bytes()
    assert manifest.index_sha256 == hashlib.sha256(index).hexdigest()
    assert manifest.code_version == code_version()
    assert manifest.source_digest == "s" * 64


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


def test_manifest_with_an_unknown_field_and_a_lost_index_are_refused(cache: Path) -> None:
    index = cache / LatentCache(str(cache)).manifest.index
    data = index.read_bytes()
    index.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    with pytest.raises(ValueError, match=r"index-\w+\.parquet is damaged: sha256.*run `vitok enc"):
        LatentCache(str(cache))
    index.unlink()
    with pytest.raises(ValueError, match=r"index-\w+\.parquet is missing; run `vitok encode`"):
        LatentCache(str(cache))
    file = cache / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"surplus": 1}))
    with pytest.raises(ValueError, match=r"manifest\.json is no LatentManifest: surplus"):
        LatentCache(str(cache))


def test_damaged_and_missing_units_are_named_by_the_reader(cache: Path) -> None:
    file = unit_file(cache, "cccc")
    data = file.read_bytes()
    latents_module._load_table.cache_clear()
    for damaged in (b"\xff" * 8 + data[8:], data[:8] + b"[" + data[9:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cccc\.safetensors is damaged: .*latents verify"):
            LatentCache(str(cache))[4]
    file.write_bytes(data[:-1])
    with pytest.raises(OSError, match=r"cccc\.safetensors: \d+ bytes long where \d+ are expected"):
        LatentCache(str(cache))[4]
    file.unlink()
    with pytest.raises(OSError, match=r"cccc\.safetensors.*cannot be opened"):
        LatentCache(str(cache))[4]
    assert same(LatentCache(str(cache))[1], ROWS[1]), "other units can be read"


def test_any_reader_of_safetensors_reads_a_unit(cache: Path) -> None:
    rows = UNITS["cccc"]
    with safe_open(unit_file(cache, "cccc"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        keys = json.loads(file.metadata()["keys"])
    assert torch.equal(tensors["latents"], torch.cat([row.latent for row in rows]).bfloat16())
    assert tensors["offsets"].tolist() == [0, 64, 128, 138, 154]
    assert tensors["grid"].tolist() == [list(row.grid) for row in rows]
    assert tensors["image_size"].tolist() == [list(row.image_size) for row in rows]
    assert tensors["label"].tolist() == [-1, 0, 1, 2]
    assert tensors["variant"].tolist() == [[0, 0]] * 4
    assert keys == [row.key for row in rows]


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
    assert [row.key for row in LatentCache(str(cache))] == [row.key for row in ROWS]


def test_unit_is_committed_once(cache: Path) -> None:
    folder = Folder.of(str(cache))
    before = (cache / "units/aaaa.json").stat().st_mtime_ns
    commit_unit(folder, *make_unit("aaaa", UNITS["aaaa"], IDENTITY))
    assert (cache / "units/aaaa.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"aaaa\.json: another job committed this unit with oth"):
        commit_unit(folder, *make_unit("aaaa", UNITS["aaaa"][1:], IDENTITY))


def test_record_says_what_is_in_the_file(cache: Path) -> None:
    record = read_record(Folder.of(str(cache)), "aaaa")
    data = unit_file(cache, "aaaa").read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.num_bytes, record.num_latents, record.num_tokens) == (len(data), 3, 86)
    assert record.num_bytes - record.table_bytes == 86 * CHANNELS * 2


def test_unit_name_depends_on_everything_that_its_bytes_depend_on() -> None:
    changes: list[dict[str, Any]] = [
        {"encoder_digest": "f" * 64},
        {"transforms": (Transform(token_budget=65),)},
        {"transforms": (Transform(square=64),)},
        {"flip": True},
        {"patch_size": 8},
        {"channels": 6},
        {"log_variance": True},
        {"dtype": "float32"},
        {"compute_dtype": "float32"},
        {"device": "cuda"},
        {"threads": 2},
        {"libraries": "torch 1"},
        {"row_tokens": 65},
        {"unit_samples": 9},
        {"text": TEXT},
    ]
    assert {name for change in changes for name in change} == set(vars(IDENTITY)) - {"digest"}
    names = {
        IDENTITY.unit_name("shard", 0, 10),
        IDENTITY.unit_name("another", 0, 10),
        IDENTITY.unit_name("shard", 1, 10),
        IDENTITY.unit_name("shard", 0, 11),
        *(replace(IDENTITY, **change).unit_name("shard", 0, 10) for change in changes),
    }
    assert len(names) == 4 + len(changes)
    assert IDENTITY.unit_name("shard", 0, 10) in names, "the same parts give the same name"


def test_another_cache_in_the_folder_is_refused_with_the_differences(cache: Path) -> None:
    folder = Folder.of(str(cache))
    claim_cache(folder, IDENTITY)
    other = replace(IDENTITY, dtype="float32", transforms=(Transform(token_budget=9),))
    with pytest.raises(ValueError, match=r"holds another cache \(dtype: 'bfloat16' -> 'float32'; "):
        claim_cache(folder, other)


def test_old_indexes_are_swept_and_the_current_one_stays(cache: Path) -> None:
    folder = Folder.of(str(cache))
    first = LatentCache(str(cache)).manifest.index
    units = {**UNITS, "dddd": latent_rows([(2, 2)], seed=4)}
    second = write_small_cache(cache, units).index
    assert {file.name for file in cache.glob("index-*")} == {first, second}
    remove_old_indexes(folder)
    assert {file.name for file in cache.glob("index-*")} == {second}
    assert len(LatentCache(str(cache))) == len(ROWS) + 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    location = tmp_path_factory.mktemp("many")
    write_small_cache(location, many_units(9, 7))
    return LatentCache(str(location))


def keys_of(stream: Any, num_batches: int) -> list[list[str]]:
    return [
        [row.key for row in batch] for batch, _ in zip(stream, range(num_batches), strict=False)
    ]


def test_stream_has_one_order_for_any_number_of_ranks_and_processes(many: LatentCache) -> None:
    def stream(**given: Any) -> LatentStream:
        return LatentStream(many, seed=5, chunk_latents=3, **given)

    alone = [key for batch in keys_of(stream(batch_size=6), 21) for key in batch]
    assert len(alone) == 126
    assert sorted(alone[:63]) == sorted(alone[63:]) == sorted(row.key for row in many)
    assert alone[:63] != alone[63:], "every epoch has an order of its own"
    ranks = [keys_of(stream(batch_size=3, rank=r, world_size=2), 21) for r in (0, 1)]
    assert [key for step in zip(*ranks, strict=True) for batch in step for key in batch] == alone
    loader = DataLoader(stream(batch_size=6), batch_size=None, num_workers=2)
    assert [key for batch in keys_of(loader, 21) for key in batch] == alone
    assert keys_of(LatentStream(many, batch_size=6, seed=6), 3) != keys_of(stream(batch_size=6), 3)


def test_stream_resumes_from_its_cursor_on_another_number_of_ranks(many: LatentCache) -> None:
    whole = [key for b in keys_of(LatentStream(many, batch_size=6, seed=5), 30) for key in b]
    two = LatentStream(many, batch_size=3, seed=5, world_size=2)
    cursor = json.loads(json.dumps(two.cursor(17)))
    assert cursor == {"images": 17 * 6}
    rest = keys_of(LatentStream(many, batch_size=6, seed=5, cursor=cursor), 13)
    assert [key for batch in rest for key in batch] == whole[17 * 6 :]
    far = LatentStream(many, batch_size=6, seed=5, cursor={"images": 10**12})
    assert len(keys_of(far, 1)[0]) == 6, "nothing is replayed"
    for wrong, sentence in (({"rank": 2, "world_size": 2}, "rank=2"), ({}, "batch_size=0")):
        with pytest.raises(ValueError, match=sentence):
            LatentStream(many, batch_size=0, seed=0, **wrong)


def test_plan_over_a_cache_sees_each_latent_at_exactly_its_grid(many: LatentCache) -> None:
    data = DataConfig(manifest="m", row_tokens=64, crop_area=1.0, crop_aspect=1.0, chunk_samples=4)
    stage = Stage(steps=3, images_per_step=21, token_budgets=(16,), rows_per_step=3)
    corpus = LatentCorpus(many.location)
    plan = Plan(corpus=corpus, data=data, stages=(stage,), patch_size=16, seed=3)
    rows = {row.key: row for row in many}
    seen: list[str] = []
    for step in range(3):
        planned = plan.step(step)
        found = dict(
            zip(planned.records.sample_id.tolist(), many.read(planned.records), strict=True)
        )
        for view in (view for row in planned.rows for view in row):
            latent = found[view.sample_id]
            assert same(latent, rows[latent.key])
            assert view.size == latent.image_size
            assert view.num_tokens(16) == len(latent.latent)
            seen.append(latent.key)
    assert sorted(seen) == sorted(rows), "an epoch holds every latent once"
    assert many.epochs(126) == {"": 2.0}
    assert many.uri(0).endswith(f"units/{0:040x}.safetensors")


def test_cache_travels_to_other_processes(many: LatentCache) -> None:
    again = pickle.loads(pickle.dumps(many))
    assert again.digest == many.digest
    assert [row.key for row in again] == [row.key for row in many]
    assert CHUNK_LATENTS > 1
