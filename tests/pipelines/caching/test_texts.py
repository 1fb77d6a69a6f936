"""Texts beside the latents of a cache: encoded, stored, read, checked, exported."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from pipelines import corpus as corpus_module
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.cache_latents import identity_of, load_text_encoder
from pipelines.caching.config import LatentCaching
from pipelines.caching.encode_units import (
    Encoder,
    Unit,
    embed_captions,
    finish_unit,
    prepare_unit,
    samples_of,
)
from pipelines.caching.estimate import estimate_size, measure_rates
from pipelines.caching.export import _write_part
from pipelines.caching.manifest import read_manifest
from pipelines.caching.units import LatentRow, UnitRecord, as_json, claim_cache, make_unit
from pipelines.caching.verify import verify_here
from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.latents import LatentCache
from pipelines.whole_images import Transform
from tests.pipelines.small_caches import (
    CHANNELS,
    IDENTITY,
    TEXT,
    latent_rows,
    with_texts,
    write_small_cache,
)
from tests.vitok.text_encoders import save_text_encoder
from vitok.storage import Folder

TEXTS = replace(IDENTITY, text=TEXT)
CAPTIONS = [
    "a dog near the sea",
    "",
    "two red cat of a house",
    None,
    "sea",
    "a blue dog of the sea",
]


@pytest.fixture
def caching(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> LatentCaching:
    """The cache of six photographs with CAPTIONS."""
    photographs = Manifest.load(sample_manifests[0])
    images = read_samples(photographs, photographs.records(np.arange(len(CAPTIONS))))
    samples: list[dict[str, Any]] = []
    for number, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True)):
        samples.append({"__key__": f"k{number}", "jpg": image, "cls": number})
        if caption is not None:
            samples[-1]["txt"] = caption.encode()
    shards = write_shards(samples, tmp_path / "shards", "s", len(samples))
    return LatentCaching(
        manifest=str(build_manifest(shards, tmp_path / "manifest").path),
        model=str(tiny_weights),
        text_encoder=str(save_text_encoder(tmp_path / "t5")),
        text_tokens=6,
        out=str(tmp_path / "cache"),
        token_budgets=(16,),
        squares=(32,),
        flip=True,
        dtype="float32",
        compute_dtype="float32",
        unit_samples=4,
        row_tokens=64,
        use_gpu=False,
    )


def encode_here(settings: LatentCaching, unit: Unit) -> tuple[bytes, UnitRecord]:
    """Make one unit in this process."""
    identity, source = identity_of(settings), Manifest.load(settings.manifest)
    prepared = prepare_unit(source, unit, identity)
    values = Encoder(load_autoencoder(settings.model, part="encoder"), identity)(prepared.rows)
    texts = embed_captions(load_text_encoder(settings), identity, prepared.captions)
    return finish_unit(source, unit, identity, prepared.members, values, prepared.skipped, texts)


def test_texts_of_a_unit_equal_those_of_each_caption_alone_and_are_stored_once(
    caching: LatentCaching,
) -> None:
    unit = Unit(shard=0, start=1, stop=6)
    data, record = encode_here(caching, unit)
    tensors = load(data)
    encoder = load_text_encoder(caching)
    offsets = tensors["text_offsets"].tolist()
    assert len(tensors["label"]) == record.num_latents == 4 * 5
    assert len(offsets) == 5 + 1
    for image, caption in enumerate(CAPTIONS[1:]):
        stored = tensors["text"][offsets[image] : offsets[image + 1]]
        if not caption:
            assert len(stored) == 0
            continue
        (alone,) = encoder([caption], 6)
        assert len(alone) == min(6, len(caption.split()) + 1)
        torch.testing.assert_close(stored, alone, rtol=1e-4, atol=1e-5)
    assert (record.num_texts, record.num_text_tokens) == (3, len(tensors["text"])) == (3, 14)
    without, plain = encode_without_texts(caching, unit)
    assert torch.equal(load(without)["latents"], tensors["latents"])
    assert plain.channel_sum == record.channel_sum, "statistics are those of latents alone"
    rounded, _ = encode_here(replace(caching, dtype="bfloat16"), unit)
    assert torch.equal(load(rounded)["text"], tensors["text"].bfloat16())


def encode_without_texts(settings: LatentCaching, unit: Unit) -> tuple[bytes, UnitRecord]:
    settings = replace(settings, text_encoder="")
    identity, source = identity_of(settings), Manifest.load(settings.manifest)
    prepared = prepare_unit(source, unit, identity)
    assert prepared.captions == []
    values = Encoder(load_autoencoder(settings.model, part="encoder"), identity)(prepared.rows)
    return finish_unit(source, unit, identity, prepared.members, values, prepared.skipped)


def test_embedding_that_is_not_finite_is_named(caching: LatentCaching) -> None:
    identity, source = identity_of(caching), Manifest.load(caching.manifest)
    unit = Unit(0, 0, 2)
    prepared = prepare_unit(source, unit, identity)
    values = Encoder(load_autoencoder(caching.model, part="encoder"), identity)(prepared.rows)
    texts = {0: torch.full((2, 12), torch.inf)}
    with pytest.raises(ValueError, match="k0: its text is not finite in float32, stored as fl"):
        finish_unit(source, unit, identity, prepared.members, values, prepared.skipped, texts)


def test_samples_with_bad_captions_are_skipped_by_name_in_all_their_variants(
    caching: LatentCaching, tmp_path: Path
) -> None:
    source = Manifest.load(caching.manifest)
    images = read_samples(source, source.records(np.arange(3)))
    captions = [b"a dog", b"\xff", b"sea"]
    samples = [
        {"__key__": f"k{i}", "jpg": image, "txt": caption}
        for i, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    shards = write_shards(samples, tmp_path / "bad", "s", 3)
    manifest = build_manifest(shards, tmp_path / "bad" / "manifest")
    settings = replace(caching, manifest=str(manifest.path))
    data, record = encode_here(settings, Unit(0, 0, 3))
    assert record.skipped == (("k1", "caption is not UTF-8 at its byte 0"),)
    assert json.loads(keys_of(data)) == ["k0", "k2"] * 4
    offsets = load(data)["text_offsets"].tolist()
    assert offsets == [0, 3, 5]
    (sea,) = load_text_encoder(caching)(["sea"], 6)
    torch.testing.assert_close(load(data)["text"][3:], sea, rtol=1e-4, atol=1e-5)
    assert len(samples_of(manifest, Unit(0, 0, 3))) == 3


def keys_of(data: bytes) -> str:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]["keys"]


def test_cache_without_texts_has_the_bytes_and_names_it_always_had() -> None:
    # Written by the version before there were texts.
    rows = [
        replace(row, latent=torch.arange(row.latent.numel()).reshape(row.latent.shape) / 4)
        for row in latent_rows([(1, 1), (2, 3)], seed=0)
    ]
    data, record = make_unit("name", rows, IDENTITY, [("k", "reason")])
    found = [hashlib.sha256(x).hexdigest()[:16] for x in (data, as_json(record))]
    found += [hashlib.sha256(as_json(IDENTITY)).hexdigest()[:16], IDENTITY.digest[:16]]
    assert found == GOLDEN
    assert IDENTITY.unit_name("shard", 0, 8) == GOLDEN_NAME


GOLDEN = ["321725fbdbbb5c30", "d88954ab18fa3ae6", "1555661044f45a86", "2d091f8a8488e9d0"]
GOLDEN_NAME = "b7c1cf8b8c5edad1cb053a5c82679c5230593a80"


def test_names_depend_on_the_text_encoder_and_the_length_of_texts(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"encoder_digest": "u" * 64},
        {"channels": 4},
        {"max_tokens": 5},
        {"libraries": "transformers 0"},
    ]
    assert {name for change in changes for name in change} == set(vars(TEXT))
    others = [replace(TEXTS, text=replace(TEXT, **change)) for change in changes]
    names = {identity.unit_name("shard", 0, 8) for identity in (IDENTITY, TEXTS, *others)}
    assert len(names) == 6
    claim_cache(Folder.of(str(tmp_path)), TEXTS)
    with pytest.raises(ValueError, match=r"another cache \(text\.max_tokens: 4 -> 5\); choose"):
        claim_cache(Folder.of(str(tmp_path)), others[2])
    with pytest.raises(ValueError, match=r"another cache \(text\.channels: 3 -> None; "):
        claim_cache(Folder.of(str(tmp_path)), IDENTITY)


def units_with_texts() -> dict[str, list[LatentRow]]:
    """Two units: one of images at two sizes, one of which no image has a text."""
    first = latent_rows([(1, 1), (3, 7), (8, 8), (2, 2)], seed=1)
    second = latent_rows([(1, 2), (2, 1), (4, 4), (3, 3)], seed=1)
    both = [*first, *(replace(row, transform=1) for row in second)]
    return {
        "aaaa": with_texts(both, seed=5),
        "bbbb": latent_rows([(2, 5)], seed=2),
        "cccc": with_texts(latent_rows([(1, 1), (2, 3)], seed=3), seed=6),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    identity = replace(TEXTS, transforms=(Transform(token_budget=64), Transform(square=32)))
    write_small_cache(tmp_path / "cache", units_with_texts(), identity)
    return tmp_path / "cache"


def same_text(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_rows_come_back_with_their_texts(cache: Path) -> None:
    expected = [row for rows in units_with_texts().values() for row in rows]
    found = LatentCache(str(cache))
    assert [row.key for row in found] == [row.key for row in expected]
    assert all(same_text(a.text, b.text) for a, b in zip(found, expected, strict=True))
    assert [len(row.text) if row.text is not None else 0 for row in expected] == [
        *[0, 1, 2, 3] * 2,
        0,
        *[0, 1],
    ]
    picked = [9, 3, 7, 7, 10, 1]
    for row, i in zip(found.__getitems__(picked), picked, strict=True):
        assert same_text(row.text, expected[i].text)
        assert torch.equal(row.latent, expected[i].latent.bfloat16())
    assert all(row.text is None for row in LatentCache(str(cache), texts=False))
    manifest = read_manifest(Folder.of(str(cache)))
    assert (manifest.num_texts, manifest.num_text_tokens) == (4, 7)


def test_only_the_texts_asked_for_are_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = corpus_module.read_samples

    def counted(table: Any, records: Any) -> Any:
        read.append(int(records.length.sum()))
        return real(table, records)

    monkeypatch.setattr("pipelines.latents.read_samples", counted)
    (row,) = LatentCache(str(cache)).__getitems__([2])
    assert row.text is not None
    assert read == [64 * CHANNELS * 2, 2 * TEXT.channels * 2]
    read.clear()
    LatentCache(str(cache), texts=False)[2]
    assert read == [64 * CHANNELS * 2]


def test_verify_finds_a_flipped_bit_of_a_text_and_of_its_place(cache: Path) -> None:
    assert verify_here(str(cache)).bad == []
    file = cache / "units" / "aaaa.safetensors"
    data = file.read_bytes()
    text_bytes = load(data)["text"].nbytes
    places = [len(data) - 1, len(data) - text_bytes, data.index(b"text_offsets")]
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        (found,) = verify_here(str(cache)).bad
        assert "aaaa.safetensors is damaged" in found
    file.write_bytes(data)
    assert verify_here(str(cache)).bad == []


def test_export_holds_the_texts(cache: Path, tmp_path: Path) -> None:
    found = LatentCache(str(cache))
    _write_part(found, 0, len(found), str(tmp_path / "a.tar"))
    dataset = webdataset.WebDataset(
        [str(tmp_path / "a.tar")], shardshuffle=False, empty_check=False
    )
    samples: Sequence[dict[str, Any]] = list(dataset.decode())
    assert len(samples) == len(found)
    for sample, row in zip(samples, found, strict=True):
        assert ("text.npy" in sample) == (row.text is not None)
        if row.text is not None:
            np.testing.assert_array_equal(sample["text.npy"], row.text.float().numpy())


def test_estimate_counts_what_texts_may_take(caching: LatentCaching) -> None:
    identity, source = identity_of(caching), Manifest.load(caching.manifest)
    with_texts = estimate_size(caching, lambda: source, identity)
    without = estimate_size(caching, lambda: source, replace(identity, text=None))
    assert with_texts.text_bytes == 6 * 6 * 12 * 4
    assert without.text_bytes == 0
    assert with_texts.num_bytes == without.num_bytes
    assert with_texts.num_reads > without.num_reads
    rates = measure_rates(caching, source, identity)
    assert rates.encoder_images_per_s > 0
