import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.cache_latents import _Steps, cache_latents, identity_of
from pipelines.caching.config import LatentCaching, complete
from pipelines.caching.encode_units import Encoder, Unit, finish_unit, prepare_unit, units_of
from pipelines.caching.manifest import list_skipped, read_index
from pipelines.caching.units import CacheIdentity, UnitRecord, claim_cache
from pipelines.caching.verify import verify_here
from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.latents import LatentCache
from pipelines.reading.decode import decode_rgb
from tests.conftest import tiny_model
from tests.pipelines.encoding_process import differing, encode_all, files_of, small_caching
from tests.vitok.text_encoders import save_text_encoder
from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.packed import pack_images
from vitok.patches import bucket_sizes, fit_to_budget, nearest_bucket
from vitok.pretrained import encoder_digest, save_pretrained
from vitok.storage import Folder
from vitok.variants import AutoencoderConfig

BUDGET = 36
UNIT_SAMPLES = 25


@pytest.fixture
def caching(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> LatentCaching:
    return small_caching(
        sample_manifests[0],
        tiny_weights,
        tmp_path / "cache",
        token_budgets=(BUDGET,),
        unit_samples=UNIT_SAMPLES,
    )


def times_of(cache: str) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (Path(cache) / "units").iterdir()}


def encode_here(
    settings: LatentCaching, unit: Unit, model: Autoencoder | None = None
) -> tuple[CacheIdentity, bytes, UnitRecord]:
    """Make one unit in this process."""
    identity = identity_of(settings)
    source = Manifest.load(settings.manifest)
    prepared = prepare_unit(source, unit, identity)
    encode = Encoder(model or load_autoencoder(settings.model, part="encoder"), identity)
    values = encode(prepared.rows)
    made = finish_unit(source, unit, identity, prepared.members, values, prepared.skipped)
    return identity, *made


def pixels_as_shown(
    data: bytes, size: tuple[int, int], is_cropped: bool, flipped: bool
) -> torch.Tensor:
    """Return [3, height, width] in [-1, 1] of an image, slowly: cut out, resized, mirrored."""
    whole = decode_rgb(data)
    height, width = whole.shape[:2]
    crop = None
    if is_cropped:
        tall, wide = width * size[0] / size[1], height * size[1] / size[0]
        cut = (min(height, int(tall + 0.5)), min(width, int(wide + 0.5)))
        crop = ((height - cut[0]) // 2, (width - cut[1]) // 2, *cut)
    pixels = torch.from_numpy(decode_rgb(data, crop=crop, size=size)).permute(2, 0, 1) / 127.5 - 1
    return pixels.flip(2) if flipped else pixels


UNIT = Unit(shard=0, start=7, stop=29)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"flip": True},
    {"token_budgets": (), "squares": (64,)},
    {"token_budgets": (BUDGET, 9), "squares": (48,), "flip": True},
    {"token_budgets": (9,), "buckets": (48, 96), "flip": True},
]


@pytest.mark.parametrize("change", VARIANTS)
def test_latents_of_a_unit_equal_those_of_each_image_alone(
    caching: LatentCaching, change: dict[str, Any]
) -> None:
    settings = replace(caching, compute_dtype="float32", dtype="float32", **change)
    identity, data, record = encode_here(settings, UNIT)
    tensors = load(data)
    source = Manifest.load(settings.manifest)
    records = source.records(np.arange(UNIT.start, UNIT.stop))
    count = len(records)
    assert (record.num_images, record.num_latents) == (count, count * identity.num_variants)
    model = load_autoencoder(settings.model)
    images = read_samples(source, records)
    bounds = tensors["offsets"].tolist()
    for row, (number, flipped) in enumerate(tensors["variant"].tolist()):
        transform = identity.transforms[number]
        height, width = decode_rgb(images[row % count]).shape[:2]
        size = (transform.square, transform.square)
        if transform.token_budget:
            size = fit_to_budget(height, width, patch_size=16, token_budget=transform.token_budget)
        if transform.bucket:
            size = nearest_bucket(height, width, bucket_sizes(transform.bucket, 16))
        is_cropped = not transform.token_budget
        pixels = pixels_as_shown(images[row % count], size, is_cropped, bool(flipped))
        with torch.no_grad():
            expected = model.encode_packed(pack_images([pixels], patch_size=16)).tokens
        latent = tensors["latents"][bounds[row] : bounds[row + 1]]
        assert tuple(tensors["image_size"][row].tolist()) == size
        assert tensors["grid"][row].prod() == len(latent)
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    keys = json.loads(_keys(data))
    assert keys == records.key.tolist() * identity.num_variants
    assert tensors["label"].tolist() == records.label.tolist() * identity.num_variants
    flips = 2 if identity.flip else 1
    assert tensors["variant"].tolist() == [
        [variant // flips, variant % flips]
        for variant in range(identity.num_variants)
        for _ in range(count)
    ]


def _keys(data: bytes) -> str:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]["keys"]


def test_bfloat16_rounds_what_float32_gives(caching: LatentCaching) -> None:
    exact = replace(caching, compute_dtype="float32", dtype="float32")
    (_, in_float32, _), (_, in_bf16, _) = encode_here(exact, UNIT), encode_here(caching, UNIT)
    expected, rounded = load(in_float32)["latents"], load(in_bf16)["latents"]
    assert rounded.dtype == torch.bfloat16
    # LayerNorm makes every latent's values about 1 in size; a few roundings of 1/256 each.
    torch.testing.assert_close(rounded.float(), expected, rtol=0, atol=0.1)
    assert 0 < (rounded.float() - expected).square().mean().sqrt() < 0.02
    half = load(encode_here(replace(exact, dtype="float16"), UNIT)[1])["latents"]
    assert torch.equal(half, expected.half())


def test_kl_latents_are_stored_with_their_log_variances(
    caching: LatentCaching, tmp_path: Path
) -> None:
    config = tiny_model(AutoencoderConfig(patch_size=16, latent_channels=4, latent="kl"))
    model = Autoencoder(config)
    start_at_random(model, seed=1)
    save_pretrained(tmp_path / "kl", config, model.state_dict())
    settings = replace(
        caching,
        model=str(tmp_path / "kl"),
        compute_dtype="float32",
        dtype="float32",
        log_variance=True,
    )
    identity, data, _ = encode_here(settings, UNIT)
    stored = load(data)["latents"]
    assert stored.shape[1] == identity.values_per_token == 8
    alone = load(encode_here(replace(settings, log_variance=False), UNIT)[1])["latents"]
    assert torch.equal(stored[:, :4], alone)
    prepared = prepare_unit(Manifest.load(settings.manifest), UNIT, identity)
    row = prepared.rows[0].to_packed(torch.device("cpu"))[0]
    with torch.no_grad():
        std = load_autoencoder(settings.model).posterior(row).std
    first = prepared.members[0][0]
    start, stop = load(data)["offsets"][first : first + 2].tolist()
    torch.testing.assert_close(stored[start:stop, 4:].exp().sqrt(), std[: stop - start])
    with pytest.raises(ValueError, match="log_variance is set, but .* of the kind 'layernorm'"):
        identity_of(replace(caching, log_variance=True))


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


def test_job_goes_on_where_it_was_stopped_with_the_bytes_of_one_process(
    ray_cluster: None, caching: LatentCaching, tmp_path: Path, one_thread: None
) -> None:
    encode_all(caching)
    assert len(files_of(caching.out)) == 3 + 2 * 3
    cache = LatentCache(caching.out, encoder_digest(load_autoencoder(caching.model)))
    source = Manifest.load(caching.manifest)
    records = source.records(np.arange(source.num_samples))
    assert [row.key for row in cache] == records.key.tolist()

    # As a kill leaves it: one unit without its record, one cut off in writing, one committed.
    other = replace(caching, out=str(tmp_path / "other"), num_workers=2)
    shutil.copytree(caching.out, other.out)
    units = Path(other.out) / "units"
    first, second, third = cache.unit_names
    (Path(other.out) / "manifest.json").unlink()
    (units / f"{first}.json").unlink()
    (units / f"{second}.json").unlink()
    (units / f"{second}.safetensors").rename(units / f"{second}.safetensors.part")
    (units / f"{second}.safetensors.part").write_bytes(b"half")
    (Path(other.out) / "manifest.json.part").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="goes on where it was stopped"):
        LatentCache(other.out)
    before = times_of(other.out)
    manifest = cache_latents(other)
    assert manifest.num_units == 3
    assert differing(other.out, caching.out) == []
    after = times_of(other.out)
    kept = {name for name in after if before.get(name) == after[name]}
    assert kept == {f"{third}.json", f"{third}.safetensors"}, "encoded again: what was missing"

    cache_latents(other)
    assert times_of(other.out) == after, "a finished cache is left as it is"
    assert verify_here(other.out).bad == []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """encode_all computes with one thread, which other tests need not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_shards_that_are_added_extend_the_cache(
    caching: LatentCaching, tmp_path: Path, one_thread: None
) -> None:
    source = Manifest.load(caching.manifest)
    records = source.records(np.arange(24))
    samples = [
        {"__key__": f"k{i:02d}", "jpg": data, "cls": i}
        for i, data in enumerate(read_samples(source, records))
    ]
    shards = write_shards(samples, tmp_path / "shards", "s", 12)
    few = build_manifest(shards[1:], tmp_path / "few")
    more = build_manifest(shards, tmp_path / "more")
    growing = replace(caching, manifest=str(few.path), unit_samples=5)
    encode_all(growing)
    before, first = times_of(growing.out), LatentCache(growing.out)
    assert first.manifest.source_digest == few.digest
    encode_all(replace(growing, manifest=str(more.path)))
    after, second = times_of(growing.out), LatentCache(growing.out)
    assert {name: after[name] for name in before} == before, "nothing is encoded again"
    assert len(after) == 2 * len(before) == 12
    assert second.unit_names[3:] == first.unit_names
    assert [row.key for row in second] == [sample["__key__"] for sample in samples]
    assert second.manifest.source_digest == more.digest
    whole = replace(growing, manifest=str(more.path), out=str(tmp_path / "whole"))
    encode_all(whole)
    assert differing(growing.out, whole.out) == [first.manifest.index]
    assert verify_here(growing.out).bad == []


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        ("fsync", OSError(28, "No space left on device"), "No space left on device"),
        ("replace", PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_cache_that_cannot_be_written_is_named_and_goes_on_later(
    caching: LatentCaching,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
    function: str,
    error: OSError,
    said: str,
) -> None:
    left = iter(range(4))  # cache.json, a unit, its record, and a part of the next
    real = getattr(os, function)

    def failing(*given: Any) -> Any:
        if next(left, None) is None:
            raise error
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, failing)
        with pytest.raises(type(error), match=rf"\.json: cannot be written \({said}\); make room"):
            encode_all(caching)
    units = Path(caching.out) / "units"
    assert len(list(units.glob("*.json"))) == 1
    assert list(units.glob("*.part")) == [], "nothing half-written is left"
    with pytest.raises(FileNotFoundError, match="holds no finished latent cache"):
        LatentCache(caching.out)
    before = times_of(caching.out)
    encode_all(caching)
    after = times_of(caching.out)
    kept = [name for name in before if name.endswith(".json")]
    assert [before[name] for name in kept] == [after[name] for name in kept]
    assert verify_here(caching.out).bad == []


def test_shard_that_disappears_is_named(caching: LatentCaching, tmp_path: Path) -> None:
    source = Manifest.load(caching.manifest)
    images = read_samples(source, source.records(np.arange(4)))
    samples = [{"__key__": f"k{i}", "jpg": data} for i, data in enumerate(images)]
    (shard,) = write_shards(samples, tmp_path / "shards", "s", 4)
    manifest = build_manifest([shard], tmp_path / "manifest")
    Path(shard).unlink()
    identity = identity_of(caching)
    with pytest.raises(OSError, match=rf"{shard}: this shard cannot be opened .*bring it back"):
        prepare_unit(manifest, Unit(0, 0, 4), identity)


def test_labels_that_are_missing_or_no_class_are_named(
    caching: LatentCaching, tmp_path: Path
) -> None:
    source = Manifest.load(caching.manifest)
    images = read_samples(source, source.records(np.arange(3)))
    identity = identity_of(caching)
    for labels, sentence in (
        ([{"cls": 0}, {}, {"cls": 4}], r"k1: no label: its \.cls is missing or no integer, where"),
        ([{"cls": 0}, {"cls": b"cat"}, {}], r"k1: no label"),
        ([{"cls": 0}, {"cls": 4}, {"cls": 5}], r"k2: label 5, where each must be 0 to 4; mend"),
        ([{"cls": 0}, {"cls": 4}, {"cls": 1}], ""),
    ):
        samples = [
            {"__key__": f"k{i}", "jpg": data, **label}
            for i, (data, label) in enumerate(zip(images, labels, strict=True))
        ]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        manifest = build_manifest(write_shards(samples, folder, "s", 3), folder / "manifest")
        steps = _Steps(replace(caching, num_classes=5), identity, manifest)
        batch = {"unit": np.array([0])}
        if sentence:
            with pytest.raises(ValueError, match=sentence):
                list(steps.prepare(batch))
        else:
            assert len(list(steps.prepare(batch))) == 1
        assert len(list(_Steps(caching, identity, manifest).prepare(batch))) == 1, "0 takes any"


def test_cache_of_another_transform_or_encoder_is_refused(caching: LatentCaching) -> None:
    # Refused before anything is encoded: no Ray here.
    identity = identity_of(caching)
    claim_cache(Folder.of(caching.out), identity)
    claimed = files_of(caching.out)
    assert list(claimed) == ["cache.json"]
    for change, difference in (
        ({"token_budgets": (64,)}, r"transforms\.0\.token_budget: 36 -> 64"),
        ({"flip": True}, r"flip: False -> True"),
        ({"cpus_per_worker": 3.5}, r"threads: 1 -> 3"),
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
    ray_cluster: None, caching: LatentCaching, tmp_path: Path, one_thread: None
) -> None:
    source = Manifest.load(caching.manifest)
    records = source.records(np.arange(12))
    samples = [
        # The header survives, so that the manifest lists it; the pixels are cut off.
        {"__key__": f"k{i:02d}", "jpg": data[: len(data) // 2] if i in (3, 7) else data, "cls": i}
        | {"txt": b"\xff" if i == 9 else b"red " * i}
        for i, data in enumerate(read_samples(source, records))
    ]
    shards = write_shards(samples, tmp_path / "shards", "damaged", 12)
    manifest = build_manifest(shards, tmp_path / "manifest")
    assert manifest.num_samples == 12
    damaged = replace(
        caching,
        manifest=str(manifest.path),
        text_encoder=str(save_text_encoder(tmp_path / "t5")),
        text_tokens=8,
        max_unreadable=0.1,
    )
    with pytest.raises(
        RuntimeError,
        match=r"3 of 12 samples were unreadable.*max_unreadable=0\.1.*k03: trunc.*k07.*k09: capt",
    ):
        cache_latents(damaged)
    with pytest.raises(FileNotFoundError):
        LatentCache(damaged.out)

    before = times_of(damaged.out)
    damaged = replace(damaged, max_unreadable=0.3)
    found = cache_latents(damaged)
    assert times_of(damaged.out) == before, "what is committed is never encoded again"
    left = [i for i in range(12) if i not in (3, 7, 9)]
    assert found.num_images == len(left)
    skipped = list_skipped(read_index(Folder.of(damaged.out), found))
    assert [row["key"] for row in skipped] == ["k03", "k07", "k09"]
    assert "truncated" in skipped[0]["reason"]
    assert found.num_skipped == 3
    rows = list(LatentCache(damaged.out))
    assert [row.key for row in rows] == [f"k{i:02d}" for i in left]
    assert [row.label for row in rows] == left
    lengths = [0 if row.text is None else len(row.text) for row in rows]
    assert lengths == [0, *(min(8, i + 1) for i in left[1:])]
    assert found.text_encoder == damaged.text_encoder
    alone = replace(damaged, out=str(tmp_path / "alone"))
    encode_all(alone)
    assert differing(alone.out, damaged.out) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be one of bfloat16, float16, float32"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16' must be one of bfloat16, float32"),
        ({"unit_samples": 0}, "unit_samples=0 must be at least 1"),
        ({"cpus_per_reader": 0.0}, r"cpus_per_reader=0\.0 must be above 0"),
        ({"num_classes": -1}, "num_classes=-1 must be positive"),
        ({"squares": (64, 64)}, "one is there twice"),
        ({"buckets": (64, 64)}, r"buckets=\(64, 64\): one is there twice"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LatentCaching(manifest="m", model="w", out="o", **change)


def test_incomplete_settings_and_a_patch_that_does_not_divide_are_refused(
    caching: LatentCaching,
) -> None:
    for name in ("manifest", "model", "out"):
        with pytest.raises(ValueError, match=f"{name} is empty; set --{name}"):
            complete(replace(caching, **{name: ""}))
    with pytest.raises(ValueError, match="token_budgets, squares and buckets are all empty"):
        complete(replace(caching, token_budgets=()))
    with pytest.raises(ValueError, match="square=250 is no multiple of the model's patch of 16"):
        identity_of(replace(caching, squares=(250,)))
    with pytest.raises(ValueError, match="bucket=250 is no multiple of the model's patch of 16"):
        identity_of(replace(caching, buckets=(250,)))
    named = complete(replace(caching, model="350M-f16x64"))
    assert named.model == "350M-f16x64", "a released model's name is no folder"
