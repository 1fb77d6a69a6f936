import json
from pathlib import Path

import pytest

from pipelines.whole_images import Transform
from tests.jobs.command_line import complaint
from tests.pipelines.small_caches import CHANNELS, ROWS, write_small_cache
from vitok.config import to_dict


@pytest.fixture
def small_cache(tmp_path: Path) -> Path:
    write_small_cache(tmp_path / "cache")
    return tmp_path / "cache"


def test_latents_commands_show_and_check_a_cache(
    vitok, ray_cluster: None, small_cache: Path
) -> None:
    stats = vitok("latents", "stats", small_cache)
    assert stats.status == 0
    shown = json.loads(stats.out)
    assert (shown["num_images"], shown["num_tokens"]) == (len(ROWS), 240)
    assert len(shown["mean"]) == len(shown["std"]) == CHANNELS
    assert shown["identity"]["transforms"] == [to_dict(Transform(token_budget=64))]

    shards = json.loads(vitok("latents", "ls", small_cache, "--json").out)
    assert [(row["shard"], row["num_latents"]) for row in shards] == [
        ("s3://shards/aaaa.tar", 3),
        ("s3://shards/bbbb.tar", 0),
        ("s3://shards/cccc.tar", 4),
    ]
    units = vitok("latents", "ls", small_cache, "--units").out.splitlines()
    assert [line.split()[0] for line in units] == ["aaaa", "bbbb", "cccc"]
    skipped = vitok("latents", "ls", small_cache, "--skipped").out
    assert skipped == "s3://shards/bbbb.tar  lost  truncated image\n"

    checked = vitok("latents", "verify", small_cache, "--cpus-per-task", "0.5")
    assert checked.status == 0
    assert checked.out.startswith(f"{small_cache}: 3 of 3 units, ")
    assert checked.out.endswith(" MB, as they were written\n")
    unit = small_cache / "units" / "cccc.safetensors"
    damaged = bytearray(unit.read_bytes())
    damaged[-1] ^= 1
    unit.write_bytes(damaged)
    found = vitok("latents", "verify", small_cache, "--json", "--cpus-per-task", "0.5")
    assert found.status == 1
    (sentence,) = json.loads(found.out.splitlines()[-1])["bad"]
    assert sentence.startswith(f"{unit} is damaged: sha256")
    assert sentence in found.err


def test_folder_that_is_no_cache_is_named(vitok, small_cache: Path, tmp_path: Path) -> None:
    for command in ("verify", "stats", "ls"):
        sentence = complaint(vitok("latents", command, tmp_path / "nowhere"))
        assert f"{tmp_path}/nowhere holds no finished latent cache" in sentence
    (small_cache / "manifest.json").write_text("{")
    sentence = complaint(vitok("latents", "stats", small_cache))
    assert f"{small_cache}/manifest.json is not JSON" in sentence


def test_encode_without_corpus_or_model_fails_before_it_encodes(
    vitok, ray_cluster: None, sample_manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "cache"]
    nowhere = tmp_path / "nowhere"
    given = ["encode", "quickstart", "--model", nowhere]
    assert complaint(vitok(*given, *out)) == "manifest is empty; set --manifest"
    sentence = complaint(vitok(*given, "--manifest", nowhere, *out))
    assert f"{nowhere}: no manifest in this folder" in sentence
    sentence = complaint(vitok(*given, "--manifest", sample_manifests[0], *out))
    assert (
        f"{nowhere} holds no encoder.safetensors; give the folder of exported weights" in sentence
    )
    assert not (tmp_path / "cache").exists()
