import io
import json
import re
import socket
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import local
from cluster.stack import CLUSTER_COMMANDS
from jobs.bench import BENCHMARKS
from jobs.cli import COMMANDS, main
from jobs.corpus import CORPUS_COMMANDS
from jobs.evaluations import EVALUATIONS
from jobs.latents import LATENT_COMMANDS
from jobs.recipes import TRAINING
from jobs.remote import JOBS_COMMANDS
from pipelines.corpus import Manifest
from pipelines.whole_images import Transform
from tests.pipelines.small_caches import CHANNELS, ROWS, write_small_cache
from vitok.config import to_dict


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def vitok(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command line in this process, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # how tyro ends after --help and after a wrong field
            status = leaving.code
        return Outcome(status, *capsys.readouterr())

    return run


def complaint(outcome: Outcome, status: int = 1) -> str:
    """Check that a command failed with one sentence, and return it."""
    assert outcome.status == status
    assert "Traceback" not in outcome.out + outcome.err
    progress = ("build:", "index:", "check:", "evaluate:", "\r")
    lines = [line for line in outcome.err.splitlines() if line and not line.startswith(progress)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("vitok: ")
    return lines[0].removeprefix("vitok: ")


def test_unknown_command_and_recipe_name_the_nearest(vitok) -> None:
    assert complaint(vitok("trian", "quickstart"), 2) == (
        "there is no command 'trian'; did you mean 'train'?"
    )
    assert complaint(vitok("train", "quickstrat"), 2) == (
        "there is no recipe 'quickstrat'; did you mean 'quickstart'?"
    )
    assert complaint(vitok("corpus", "indx"), 2) == (
        "there is no corpus command 'indx'; did you mean 'index'?"
    )
    sentence = complaint(vitok("zzz"), 2)
    assert all(name in sentence for name in COMMANDS), "nothing is near: all are listed"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "quickstart", "--optim.lrr", "3"], ["--optim.lrr", "--optim.lr"]),
        (["train", "quickstart", "--optim.lr", "much"], ["--optim.lr", "'much'"]),
        (["train", "quickstart", "--optim.lr", "-1"], ["lr=-1.0", "must be positive"]),
        (["train", "quickstart", "--freeze", "magic"], ["--freeze", "none", "encoder"]),
        (["export", "run", "folder", "--averaged"], ["--averaged", "--average"]),
        (["evaluate", "quickstart", "--subject", "m"], ["--subject", "--subjects"]),
        (["encode", "quickstart", "--modle", "m"], ["--modle", "--model"]),
        (["quickstart", "--frehs"], ["--frehs", "--fresh"]),
        (["corpus", "build", "a", "b", "--shard-mbs", "1"], ["--shard-mbs", "--shard-mb"]),
        (["corpus", "index", "a.tar", "--out", "m", "--max-bad-shards", "few"], ["'few'"]),
        (["corpus", "check", "m", "--decoded"], ["--decoded", "--decode"]),
    ],
)
def test_wrong_field_is_named(vitok, arguments: list[str], named: list[str]) -> None:
    outcome = vitok(*arguments)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    for name in named:
        assert name in outcome.err


EVALUATE = ["evaluate", "quickstart", "--subjects"]
HELPS = [
    *([name] for name in ("quickstart", "reconstruct", "models", "ui")),
    *([name] for name in ("sample", "generate", "judge", "curves")),
    ["flow", "flow-quickstart"],
    ["joint", "quickstart"],
    ["export"],
    # The other recipes have the same fields.
    *(["train", name] for name in ("quickstart", "finetune-350m-f16x64-decoder")),
    *(["evaluate", name] for name in EVALUATIONS),
    ["sweep", "quickstart"],
    ["sweep", "report"],
    *(["corpus", name] for name in CORPUS_COMMANDS),
    ["encode", "quickstart"],
    *(["latents", name] for name in LATENT_COMMANDS),
    ["submit"],
    ["doctor"],
    *(["jobs", name] for name in JOBS_COMMANDS),
    *(["cluster", name] for name in CLUSTER_COMMANDS),
    *(["bench", name] for name in BENCHMARKS),
]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_explains_every_field(vitok, command: list[str]) -> None:
    outcome = vitok(*command, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"usage: vitok {' '.join(command)}")
    text = re.sub(r"[─│╭╮╰╯]", " ", outcome.out)
    fields = re.split(r"\n\s+(?=-{1,2}[a-z])", text)[1:]
    assert len(fields) >= 1
    for field in fields:
        field = " ".join(field.split())
        explained = re.fullmatch(
            r"(-h, )?--\S+( --no-\S+)? ?"
            r"((\[?[A-Z]+( \[[A-Z]+ \.\.\.\]\])?|\{\S+\}) ?)*(?P<help>.*)",
            field,
        )
        assert explained, field
        assert len(explained["help"].partition("(default")[0]) > 8, f"not explained: {field}"
        assert field.startswith("-h") or re.search(
            r"\((default: .*|required|repeatable)\)", field
        ), field


def test_help_covers_every_command() -> None:
    assert {command[0] for command in HELPS} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(vitok, command: str) -> None:
    outcome = vitok(command, "--help")
    assert outcome.status == 0
    assert f"usage: vitok {command}" in outcome.out


def test_overview_lists_every_command(vitok) -> None:
    asked, empty = vitok("--help"), vitok()
    assert (asked.status, empty.status) == (0, 2)
    assert asked.out == empty.out
    assert all(re.search(rf"^  {name}\b", asked.out, re.MULTILINE) for name in COMMANDS)
    recipes = vitok("train")
    assert recipes.status == 2
    for name in TRAINING:
        assert re.search(rf"^  {name} +\S.*\.$", recipes.out, re.MULTILINE), name
    assert max(map(len, recipes.out.splitlines())) <= 110


def test_training_without_images_is_told_how_to_get_them(vitok, tmp_path: Path) -> None:
    sentence = complaint(vitok("train", "quickstart"))
    assert sentence.startswith("data.manifest is empty; make one with `vitok corpus index")
    sentence = complaint(vitok("train", "quickstart", "--data.manifest", tmp_path / "nowhere"))
    assert f"{tmp_path}/nowhere: no manifest in this folder; `vitok corpus index" in sentence
    assert not (tmp_path / "here" / "runs").exists(), "nothing was begun"


def test_start_without_weights_is_refused(
    vitok, sample_manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["train", "quickstart", "--data.manifest", sample_manifests[0], "--start", "350m"]
    sentence = complaint(vitok(*arguments))
    assert sentence.startswith("start='350m' is neither random nor pca, and there are no weights: ")
    assert "did you mean 350M-f16x" in sentence
    assert not (tmp_path / "here" / "runs").exists(), "nothing was begun"


def test_manifest_without_samples_is_refused(vitok, tiny_weights: Path, tmp_path: Path) -> None:
    columns = {"uri": pa.string(), "num_bytes": pa.int64(), "num_samples": pa.int64()}
    schema = pa.schema(columns | {"digest": pa.string()})
    (tmp_path / "manifest").mkdir()
    pq.write_table(schema.empty_table(), tmp_path / "manifest" / "shards.parquet")
    for command in (
        ["train", "quickstart", "--data.manifest", tmp_path / "manifest"],
        [*EVALUATE, tiny_weights, "--data", tmp_path / "manifest"],
    ):
        assert "this manifest holds no samples; index other shards" in complaint(vitok(*command))


def test_dino_weights_that_are_not_there_are_asked_for(
    vitok, sample_manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    sentence = complaint(
        vitok(
            *("train", "vitok-350m-f16x64", "--data.manifest", sample_manifests[0]),
            *("--loss.dino-weights", tmp_path / "nowhere"),
        )
    )
    assert f"no DINOv3 weights at '{tmp_path}/nowhere'; request access to" in sentence


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


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


def broken_models(tmp_path: Path, tiny_weights: Path) -> dict[Path, str]:
    """Folders that are no model, with what is said of each."""
    config = json.loads((tiny_weights / "config.json").read_text())
    decoder = (tiny_weights / "decoder.safetensors").read_bytes()
    encoder = (tiny_weights / "encoder.safetensors").read_bytes()
    folders: dict[str, tuple[dict[str, bytes], str]] = {
        "empty": ({}, "holds no encoder.safetensors; give the folder of exported weights"),
        "without-decoder": (
            {"config.json": json.dumps(config).encode(), "encoder.safetensors": encoder},
            "holds no decoder.safetensors; give the folder",
        ),
        "no-json": (
            {"config.json": b"{", "encoder.safetensors": encoder, "decoder.safetensors": decoder},
            "config.json is not JSON",
        ),
        "other-config": (
            {
                "config.json": json.dumps(config | {"surplus": 1}).encode(),
                "encoder.safetensors": encoder,
                "decoder.safetensors": decoder,
            },
            "config.json is no AutoencoderConfig: surplus",
        ),
        "other-architecture": (
            {
                "config.json": json.dumps(config | {"decoder_depth": 3}).encode(),
                "encoder.safetensors": encoder,
                "decoder.safetensors": decoder,
            },
            "does not hold the weights of its config: decoder_blocks.2",
        ),
        "garbage": (
            {
                "config.json": json.dumps(config).encode(),
                "encoder.safetensors": b"garbage" * 100,
                "decoder.safetensors": decoder,
            },
            "encoder.safetensors",
        ),
    }
    expected = {}
    for name, (files, sentence) in folders.items():
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        expected[tmp_path / name] = sentence
    expected[tmp_path / "nowhere"] = (
        "holds no encoder.safetensors; give the folder of exported weights"
    )
    return expected


def test_folder_that_is_no_model_is_named(
    vitok, sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg(40, 50))
    for folder, expected in broken_models(tmp_path, tiny_weights).items():
        for command in (
            [*EVALUATE, folder, "--data", sample_manifests[1], "--out", tmp_path / "out"],
            ["reconstruct", photo, "--model", folder],
        ):
            sentence = complaint(vitok(*command))
            assert str(folder) in sentence
            assert expected in sentence


def test_file_that_is_no_image_is_named(vitok, tiny_weights: Path, tmp_path: Path) -> None:
    whole = jpeg(200, 300)
    for name, data, expected in (
        ("notes.txt", b"some text\n" * 50, "not an image with an intact header (JPEG"),
        ("zero.jpg", b"", "zero bytes where an image should be"),
        ("cut.jpg", whole[: len(whole) // 2], "truncated image: "),
    ):
        (tmp_path / name).write_bytes(data)
        sentence = complaint(vitok("reconstruct", tmp_path / name, "--model", tiny_weights))
        assert sentence.startswith(f"{tmp_path / name}: {expected}")
    sentence = complaint(vitok("reconstruct", "nothing-*.jpg", "--model", tiny_weights))
    assert sentence == "nothing-*.jpg names no image; give image files, folders or globs"
    sentence = complaint(vitok("reconstruct", "--model", tiny_weights), status=2)
    assert "give image files, folders or globs" in sentence


def test_reconstruct_writes_original_reconstruction_and_error(
    vitok, tiny_weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name, height, width in (("one", 70, 150), ("two", 64, 32)):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(jpeg(height, width))
    out = tmp_path / "out"
    outcome = vitok("reconstruct", tmp_path / "photos", "--model", tiny_weights, "--out", out)
    assert outcome.status == 0, outcome.err
    for line, name, height, width in zip(
        outcome.out.splitlines(), ("one", "two"), (70, 64), (150, 32), strict=True
    ):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size == (3 * width + 2 * 4, height)
        tokens = -(-height // 16) * -(-width // 16)
        assert line.startswith(f"{out}/{name}.png: {width} x {height}, {tokens} tokens, PSNR ")
        assert 3 < float(re.search(r"PSNR (\S+) dB", line)[1]) < 30
    shrunk = vitok(
        *("reconstruct", tmp_path / "photos/one.jpg", "--model", tiny_weights),
        *("--out", out, "--resolution", 45, "--window", 1, "--json"),
    )
    assert shrunk.status == 0
    *_, line, document = shrunk.out.splitlines()
    assert " 8 tokens" in line
    (result,) = json.loads(document)
    assert result["num_tokens"] == 8
    assert result["seconds"] > 0
    assert Path(result["picture"]) == out / "one.png"


def test_an_unreadable_image_does_not_keep_the_others_from_being_reconstructed(
    vitok, tiny_weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos/more").mkdir(parents=True)
    for name, data in (("a", jpeg(32, 32)), ("b", b"no image"), ("c", jpeg(48, 32))):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(data)
    given = (tmp_path / "photos/*", "--model", tiny_weights, "--out", tmp_path / "out", "--json")
    outcome = vitok("reconstruct", *given)
    sentence = complaint(outcome)
    assert sentence.startswith(f"1 of 3 images are unreadable: {tmp_path}/photos/b.jpg: not an")
    assert [result["height"] for result in json.loads(outcome.out.splitlines()[-1])] == [32, 48]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_pictures_of_equal_file_names_do_not_overwrite_each_other(
    vitok, tiny_weights: Path, tmp_path: Path
) -> None:
    for folder, height in (("a", 32), ("b", 48)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "photo.jpg").write_bytes(jpeg(height, 32))
    (tmp_path / "a" / "photo.png").write_bytes(jpeg(64, 32))
    outcome = vitok(
        *("reconstruct", tmp_path / "a", tmp_path / "b", "--model", tiny_weights),
        *("--out", tmp_path / "out"),
    )
    assert outcome.status == 0
    written = {line.partition(": ")[0] for line in outcome.out.splitlines()}
    assert len(written) == 3
    heights = [Image.open(file).height for file in sorted(written)]
    assert sorted(heights) == [32, 48, 64]


def test_evaluate_prints_a_table_or_json(
    vitok, sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> None:
    command = [*EVALUATE, tiny_weights, "--data", sample_manifests[1]]
    command += ["--out", tmp_path / "evaluation", "--token-budget", 36]
    shown = vitok(*command)
    assert shown.status == 0
    assert f"results: {tmp_path}/evaluation" in shown.out
    (score,) = json.loads(vitok(*command, "--json").out.splitlines()[-1])
    assert score["num_images"] == 5
    assert f"| {tiny_weights} | token budget 36 | 5 | " in shown.out
    assert f" {score['psnr']:.2f} |" in shown.out
    written = json.loads((tmp_path / "evaluation/results.json").read_text())["scores"]
    assert [x["psnr"] for x in written] == [score["psnr"]]


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


def test_busy_port_and_folder_without_runs_are_named(
    vitok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = complaint(vitok("ui", "--storage", tmp_path / "nowhere"))
    assert sentence.startswith(f"{tmp_path}/nowhere holds no mlflow.db; give the folder of the")
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        sentence = complaint(vitok("ui", "--storage", tmp_path, "--port", port))
        assert sentence == f"port {port} is taken; choose another with --port"

    served: list[tuple[str, int]] = []
    # It shows the runs of this machine, whatever server new runs go to.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    monkeypatch.setattr(local, "serve_mlflow", lambda uri, port: served.append((uri, port)))
    assert vitok("ui", "--storage", tmp_path, "--port", port).status == 0
    assert served == [(f"sqlite:///{tmp_path}/mlflow.db", port)]


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


def test_interrupted_command_says_how_to_go_on(vitok, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "train", interrupted)
    assert "what is finished is kept" in complaint(vitok("train"), status=130)


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
