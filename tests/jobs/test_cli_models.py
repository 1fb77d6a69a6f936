import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.jobs.command_line import EVALUATE, complaint
from tests.noise import jpeg


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
