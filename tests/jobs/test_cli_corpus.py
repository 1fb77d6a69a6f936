import json
import re
from pathlib import Path

import numpy as np

from pipelines.corpus import Manifest
from tests.jobs.command_line import complaint, tar_of
from tests.noise import jpeg


def test_shard_that_is_no_whole_tar_is_named(vitok, ray_cluster: None, tmp_path: Path) -> None:
    text = tmp_path / "text.tar"
    text.write_text("this is no archive\n" * 100)
    empty = tmp_path / "empty.tar"
    empty.touch()
    whole = tar_of(tmp_path / "whole.tar", {f"k{i}.jpg": jpeg(40, 50, i) for i in range(4)})
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:3000])
    for shard in (text, empty, cut):
        sentence = complaint(vitok("corpus", "index", shard, "--out", tmp_path / "manifest"))
        assert f"{shard}: not a readable tar archive (" in sentence
        assert "write the shard again" in sentence
        assert not (tmp_path / "manifest").exists()


def test_corpus_that_is_not_there_is_named(vitok, ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for pattern in ("nowhere", "nowhere/*.tar", "train-{000..002}.tar", tmp_path / "empty"):
        sentence = complaint(vitok("corpus", "index", pattern, "--out", tmp_path / "manifest"))
        assert f"{pattern}" in sentence
        assert "no shard matches; name existing .tar files" in sentence
    none = complaint(vitok("corpus", "index", "--out", tmp_path / "manifest"))
    assert none.startswith("no shards given")
    texts = tar_of(tmp_path / "texts.tar", {"a.txt": b"1", "b.txt": b"2"})
    sentence = complaint(vitok("corpus", "index", texts, "--out", tmp_path / "manifest"))
    assert f"{texts}: no samples in this tar archive; a sample is KEY.jpg" in sentence


def test_index_counts_samples_and_lists_what_it_skips(
    vitok, ray_cluster: None, tmp_path: Path
) -> None:
    members = {f"k{i:02d}.jpg": jpeg(40 + i, 50, i) for i in range(20)}
    members |= {"zero.jpg": b"", "lonely.cls": b"3"}
    shard = tar_of(tmp_path / "shard.tar", members)
    manifest = tmp_path / "manifest"
    outcome = vitok("corpus", "index", tmp_path / "*.tar", "--out", manifest)
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "shards: 1, samples: 20"
    assert lines[1].startswith("sizes: half of the images have about 4,096 pixels or less, ")
    assert lines[2] == f"skipped zero of {shard}: zero bytes where an image should be"
    assert lines[3] == f"skipped lonely of {shard}: no image member"
    assert lines[-1] == f"manifest: {manifest}"
    assert Manifest.load(manifest).num_samples == 20
    again = complaint(vitok("corpus", "index", shard, "--out", manifest))
    assert f"{manifest}: exists already; remove it or write the manifest elsewhere" in again


def test_shards_are_built_indexed_and_checked(vitok, ray_cluster: None, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for i in range(12):
        (images / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
        (images / f"class {i % 3}" / f"{i}.jpg").write_bytes(jpeg(40 + i, 50, i))
    (images / "notes.txt").touch()
    (images / "zero.jpg").touch()
    shards, manifest = tmp_path / "shards", tmp_path / "manifest"
    built = vitok("corpus", "build", images, shards, "--samples-per-shard", 5, "--json")
    assert built.status == 0, built.err
    first, skipped, others, where, following, document = built.out.splitlines()
    assert first.startswith("shards: 3, samples: 12, classes: 3, ")
    assert skipped == "skipped zero.jpg: zero bytes where an image should be"
    assert others == "passed over: 1 files without an image's extension"
    assert where == f"shards in: {shards}"
    assert following == f"next: vitok corpus index '{shards}/*.tar' --out MANIFEST"
    assert json.loads(document)["num_samples"] == 12
    assert f"{shards}: exists already; remove it" in complaint(
        vitok("corpus", "build", images, shards)
    )

    indexed = vitok("corpus", "index", f"{shards}/*.tar", "--out", manifest, "--json")
    assert indexed.status == 0, indexed.err
    summary = json.loads(indexed.out.splitlines()[-1])
    assert (summary["num_shards"], summary["num_samples"], summary["left_out"]) == (3, 12, [])
    assert summary["digest"] == Manifest.load(manifest).digest
    assert (
        Manifest.load(manifest).records(np.arange(12)).label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )

    checked = vitok("corpus", "check", manifest, "--json")
    assert checked.status == 0, checked.err
    line, document = checked.out.splitlines()
    assert line.startswith("shards: 3, samples: 12, read: ")
    assert line.endswith("decoded: 12, bad: 0")
    assert json.loads(document)["bad"] == []

    shard = shards / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 255
    shard.write_bytes(content)
    damaged = vitok("corpus", "check", manifest, "--no-decode", "--out", tmp_path / "bad.jsonl")
    sentence = complaint(damaged)
    assert sentence.startswith(f"{manifest}: 1 faults in the corpus, the first: {shard}: sha256 ")
    (listed,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert json.loads(listed)["shard"] == str(shard)
    assert "it changed after it was indexed" in damaged.out


def test_wrong_arguments_of_corpus_commands_are_named(
    vitok, ray_cluster: None, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    sentence = complaint(vitok("corpus", "build", nowhere, tmp_path / "out"))
    assert sentence.startswith(f"{nowhere}: no such folder or .parquet file; give a folder of")
    sentence = complaint(vitok("corpus", "check", nowhere))
    assert sentence.startswith(f"{nowhere}: no manifest in this folder; `vitok corpus index")
    sentence = complaint(
        vitok("corpus", "index", "x.tar", "--out", nowhere, "--max-bad-shards", "2")
    )
    assert sentence == "max_bad_shards=2.0 must be a fraction from 0 to 1"
    assert not (tmp_path / "out").exists()


def test_corpus_plan_shows_a_synthetic_corpus_and_how_to_balance_its_ranks(vitok) -> None:
    given = ("corpus", "plan", "--synthetic-shards", 50, "--synthetic-samples", 400)
    given += ("--images-per-step", 256, "--row-tokens", 2048, "--num-steps", 2, "--world-size", 8)
    outcome = vitok(*given)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("20000 samples in 50 shards; 8 ranks, 256 images a step")
    advice = re.search(r"With (--images-per-step \d+ --rows-per-step \d+)", outcome.out)
    assert advice is not None
    followed = vitok(*given, *advice[1].split(), "--json")
    found = json.loads(followed.out)
    assert found["rows_per_step"] % 8 == 0
    assert found["imbalance"] < 0.05
    assert found["num_samples"] == 20000


def test_corpus_plan_reads_a_manifest(vitok, sample_manifests: tuple[Path, Path]) -> None:
    outcome = vitok(
        *("corpus", "plan", sample_manifests[0], "--images-per-step", 20, "--row-tokens", 512),
        *("--world-size", 1, "--num-steps", 2, "--json"),
    )
    assert json.loads(outcome.out)["num_samples"] == 60
    for wrong in (("corpus", "plan"), ("corpus", "plan", "m", "--synthetic-shards", 3)):
        assert "give the folder of a manifest, or --synthetic-shards" in complaint(vitok(*wrong))
