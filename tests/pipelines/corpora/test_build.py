import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.corpora import build as module
from pipelines.corpora import image_sources
from pipelines.corpora.build import build_corpus
from pipelines.corpora.image_keys import Keys, folder_key, sample_key
from pipelines.corpora.image_sources import open_source
from pipelines.corpus import build_manifest, read_samples


def encode(seed: int, format: str = "JPEG", side: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=format)
    return stream.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read_back(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Image bytes and label of every key, as an index and a reader of the shards find them."""
    manifest = build_manifest([str(folder)], folder.with_name(f"{folder.name}-manifest"))
    assert manifest.skipped() == []
    records = manifest.records(np.arange(manifest.num_samples))
    images = read_samples(manifest, records)
    found = zip(records.key, images, records.label.tolist(), strict=True)
    by_key = {key: (image, label) for key, image, label in found}
    assert len(by_key) == manifest.num_samples, "keys are unique in the whole corpus"
    return by_key


def test_a_tree_comes_back_with_its_bytes_and_the_numbers_of_its_sorted_folders(
    tmp_path: Path,
) -> None:
    files = {f"{name}/{i}.{ext}": encode(i, form) for i, (name, ext, form) in enumerate(
        [("dog", "jpg", "JPEG"), ("cat", "PNG", "PNG"), ("dog", "JPEG", "JPEG"),
         ("ant", "webp", "WEBP"), ("dog", "gif", "GIF"), ("cat", "bmp", "BMP")]
    )}  # fmt: skip
    files |= {"dog/deep/er/6.tiff": encode(6, "TIFF"), "top.jpg": encode(7)}
    source = write_tree(tmp_path / "images", files)
    report = build_corpus(source, tmp_path / "shards")

    labels = {"ant": 0, "cat": 1, "dog": 2}
    assert read_back(tmp_path / "shards") == {
        name.rpartition(".")[0]: (data, labels.get(name.partition("/")[0], -1))
        for name, data in files.items()
    }
    assert json.loads((tmp_path / "shards/classes.json").read_text()) == ["ant", "cat", "dog"]
    assert (report.num_shards, report.num_samples, report.num_classes) == (1, 8, 3)
    assert report.num_bytes == sum(map(len, files.values()))

    build_corpus(source, tmp_path / "bare", labels=False)
    assert {label for _, label in read_back(tmp_path / "bare").values()} == {-1}
    assert not (tmp_path / "bare/classes.json").exists()


@pytest.mark.parametrize("style", ["datasets", "img2dataset", "bytes", "large"])
def test_parquet_comes_back_with_its_bytes_labels_and_captions(tmp_path: Path, style: str) -> None:
    images = [encode(i, ("JPEG", "PNG", "WEBP")[i % 3]) for i in range(9)]
    numbers = list(range(9))
    columns: dict[str, object] = {
        "datasets": {
            "image": pa.array(
                [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
            ),
            "label": numbers,
        },
        "img2dataset": {
            "key": [f"00001{i:04d}" for i in numbers],
            "jpg": images,
            "caption": [f"Bild {i} ü" for i in numbers],
            "url": ["https://example.org"] * 9,
        },
        "bytes": {"bytes": images, "cls": numbers, "txt": ["t"] * 9},
        "large": {"image": pa.array(images, pa.large_binary()), "label": numbers},
    }[style]
    table = pa.table(columns)
    if style == "datasets":
        names = {"names": [f"class {i}" for i in numbers], "_type": "ClassLabel"}
        note = json.dumps({"info": {"features": {"label": names}}})
        table = table.replace_schema_metadata({"huggingface": note})
    source = tmp_path / "data"
    (source / "train").mkdir(parents=True)
    pq.write_table(table.slice(0, 6), source / "train/a-00000.parquet", row_group_size=4)
    pq.write_table(table.slice(6), source / "train/a-00001.parquet")
    report = build_corpus(source, tmp_path / "shards", samples_per_shard=5)
    assert (report.num_shards, report.num_samples) == (2, 9)

    found = read_back(tmp_path / "shards")
    assert [image for image, _ in found.values()] == images
    labelled = style != "img2dataset"
    assert [label for _, label in found.values()] == (numbers if labelled else [-1] * 9)
    names = [f"00001{i:04d}" for i in numbers] if not labelled else None
    rows = [*(f"{i:08d}" for i in range(6)), *(f"{i:08d}" for i in range(3))]
    files = ["train/a-00000"] * 6 + ["train/a-00001"] * 3
    assert list(found) == [f"{f}/{n}" for f, n in zip(files, names or rows, strict=True)]
    if style == "datasets":
        classes = json.loads((tmp_path / "shards/classes.json").read_text())
        assert classes == [f"class {i}" for i in numbers]
    if style == "img2dataset":
        from webdataset.tariterators import tarfile_samples

        [first, *_] = tarfile_samples([{"url": str(tmp_path / "shards/shard-000000.tar")}])
        assert json.loads(first["json"]) == {"caption": "Bild 0 ü"}


def test_hostile_names_become_keys_that_are_found_again(tmp_path: Path) -> None:
    names = [
        "a.b.c.jpg",
        "a_b_c.jpg",
        "twice.jpg",
        "twice.png",
        "twice.JPG",
        "back\\..\\slash.jpg",
        "new\nline.jpg",
        "ünï çødé 🐈.jpg",
        "latin-\udce9.jpg",
        "...jpg",
        "..hidden/kept-out.jpg",
        "__meta__/about.jpg",
        "__meta__.jpg",
        "v1.5/dots.in.folder.jpg",
        "x" * 200 + ".jpg",
        "x" * 201 + ".jpg",
        " .jpg",
    ]
    source = write_tree(tmp_path / "images", {name: encode(i) for i, name in enumerate(names)})
    visible = [name for name in names if not name.startswith(".")]
    build_corpus(source, tmp_path / "shards")
    found = read_back(tmp_path / "shards")
    assert sorted(image for image, _ in found.values()) == sorted(
        encode(names.index(name)) for name in visible
    )
    by_image = {image: key for key, (image, _) in found.items()}
    assert by_image[encode(1)] == "a_b_c"
    assert by_image[encode(7)] == "ünï çødé 🐈"
    assert by_image[encode(0)].startswith("a_b_c-")
    assert by_image[encode(13)].startswith("v1.5/dots_in_folder-")


def test_hostile_parquet_keys_become_keys_that_are_found_again(tmp_path: Path) -> None:
    keys = [
        "../up",
        "/etc/passwd",
        "a",
        "a",
        "a.b",
        "",
        None,
        "..",
        "a/../../b",
        "C:\\x",
        "k" * 999,
    ]
    images = [encode(i) for i in range(len(keys))]
    pq.write_table(pa.table({"key": keys, "image": images}), tmp_path / "x.y.parquet")
    build_corpus(tmp_path / "x.y.parquet", tmp_path / "shards")
    found = read_back(tmp_path / "shards")
    assert [image for image, _ in found.values()] == images
    assert all(key.startswith("x.y/") and key.count("/") == 1 for key in found)


@given(st.lists(st.text(max_size=12), unique=True, max_size=30))
def test_keys_are_valid_and_different_for_any_names(names: list[str]) -> None:
    keys = Keys()
    claimed = [keys.claim(sample_key(name), name) for name in names]
    assert len(set(claimed)) == len(names)
    for key in (*claimed, *map(folder_key, names)):
        assert key
        assert "/" not in key
        assert "\\" not in key
        assert not key.startswith((".", "__"))
        key.encode()
    assert not any("." in key for key in claimed)


def test_a_taken_key_is_resolved_even_if_somebody_foresaw_the_digest() -> None:
    keys = Keys()
    first = [keys.claim("a", "a.jpg"), keys.claim("a", "a.png")]
    again = Keys()
    again.claim(first[1], "x")
    second = [again.claim("a", "a.jpg"), again.claim("a", "a.png")]
    assert len({*first, *second}) == 3
    assert first[0] == second[0] == "a"


def test_unreadable_images_are_skipped_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sources, "MAX_IMAGE_BYTES", 3000)
    files = {
        "a/good.jpg": encode(0),
        "a/empty.jpg": b"",
        "a/text.jpg": b"hello",
        "a/big.bmp": encode(1, "BMP", 40),
        "a/notes.txt": b"hello",
        ".git/x.jpg": encode(0),
    }
    source = write_tree(tmp_path / "images", files)
    os.mkfifo(source / "a/pipe.jpg")
    (source / "a/dangling.jpg").symlink_to(tmp_path / "nowhere")
    (source / "loop").symlink_to(source)
    report = build_corpus(source, tmp_path / "shards")
    reasons = {name: reason for _, name, reason in report.skipped}
    assert reasons.pop("a/text.jpg").startswith("not an image with an intact header")
    assert reasons == {
        "a/empty.jpg": "zero bytes where an image should be",
        "a/big.bmp": f"file of {len(files['a/big.bmp'])} bytes, the limit is 3000",
        "a/pipe.jpg": "not a file",
        "a/dangling.jpg": "cannot be read (No such file or directory)",
    }
    assert report.num_others == 2, "the notes and the link to a folder"
    assert list(read_back(tmp_path / "shards")) == ["a/good"]
    noted = json.loads((tmp_path / "shards/build.json").read_text())
    assert len(noted["skipped"]) == 5

    table = {"image": [None, b"", b"x" * 3001, encode(3)]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    report = build_corpus(tmp_path / "rows.parquet", tmp_path / "rows")
    assert [(number, name) for number, name, _ in report.skipped] == [
        (i, f"rows.parquet row {i}") for i in range(3)
    ]
    assert "3001 bytes, the limit is 3000" in report.skipped[2][2]


@pytest.fixture(params=["folder", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Thirty images, some of them unusable, under names of which some collide."""
    images = [b"no image" if i % 7 == 3 else encode(i) for i in range(30)]
    if request.param == "folder":
        names = [f"c{i // 10}/{i // 2}.{('jpg', 'png')[i % 2]}" for i in range(30)]
        return write_tree(tmp_path / "images", dict(zip(names, images, strict=True)))
    (tmp_path / "images").mkdir()
    table = pa.table({"image": images, "key": [f"{i // 2}" for i in range(30)]})
    for file in range(3):
        pq.write_table(table.slice(10 * file, 10), tmp_path / "images" / f"{file}.parquet")
    return tmp_path / "images"


def fail_at(number: int, error: type[BaseException]) -> Callable[[bytes], tuple[int, int]]:
    calls = iter(range(10**6))
    image_size = module.image_size

    def fail(data: bytes) -> tuple[int, int]:
        if next(calls) == number:
            raise error
        return image_size(data)

    return fail


@pytest.mark.parametrize("stop", [0, 4, 5, 17, 29])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = build_corpus(source, tmp_path / "whole", samples_per_shard=4)
    assert (whole.num_samples, whole.num_shards, len(whole.skipped)) == (26, 7, 4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "image_size", fail_at(stop, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_corpus(source, tmp_path / "again", samples_per_shard=4)
    assert not (tmp_path / "again").exists()
    finished = {path.name for path in (tmp_path / "again.unfinished").glob("*.tar")}
    assert bool(finished) == (stop > 5)

    written: list[str] = []
    write_shards = module.write_shards

    def write_counted(*arguments: object) -> list[str]:
        written.extend(paths := write_shards(*arguments))
        return paths

    monkeypatch.setattr(module, "write_shards", write_counted)
    build_corpus(source, tmp_path / "again", samples_per_shard=4)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert len(written) == 7 - len(finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "images", "whole"]


def test_a_build_with_other_options_does_not_go_on_with_this_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "image_size", fail_at(12, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_corpus(source, tmp_path / "out", samples_per_shard=4)
    with pytest.raises(FileExistsError, match=r"out.unfinished holds the beginning of a build"):
        build_corpus(source, tmp_path / "out", samples_per_shard=5)


def test_shards_keep_to_both_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encode(i, "BMP", 100 + 10 * i) for i in range(30)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    build_corpus(tmp_path / "x.parquet", tmp_path / "shards", shard_mb=1)
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")]
    assert len(sizes) > 3
    assert max(sizes) <= 10**6 + 10240, "and the end of the archive"
    assert np.mean(sizes) > 0.7 * 10**6
    assert len(read_back(tmp_path / "shards")) == 30
    monkeypatch.setattr(module, "_TAR_BLOCK", 10**6)
    build_corpus(tmp_path / "x.parquet", tmp_path / "singles", shard_mb=1)
    assert len(list((tmp_path / "singles").glob("*.tar"))) == 30, "one sample at least"


def test_what_cannot_be_built_is_named(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", {"a.jpg": encode(0)})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="shard_mb=0 must be at least 1"):
        build_corpus(images, out, shard_mb=0)
    with pytest.raises(ValueError, match="samples_per_shard=-1 must be at least 1, or 0"):
        build_corpus(images, out, samples_per_shard=-1)
    with pytest.raises(ValueError, match=r"prefix='\.\./x' must be letters"):
        build_corpus(images, out, prefix="../x")
    with pytest.raises(ValueError, match="out lies inside the source"):
        build_corpus(images, images / "out")
    with pytest.raises(ValueError, match="s3://b/x is not a local folder"):
        build_corpus(images, "s3://b/x")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or .parquet file"):
        build_corpus(tmp_path / "nowhere", out)
    with pytest.raises(FileNotFoundError, match="empty: neither images"):
        build_corpus(write_tree(tmp_path / "empty", {"x.txt": b""}), out)
    bad = write_tree(tmp_path / "bad", {"a.jpg": b"?"})
    with pytest.raises(ValueError, match=r"bad: none of 1 images can be used; a.jpg: not an image"):
        build_corpus(bad, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(FileExistsError, match="full: exists already; remove it or write the shard"):
        build_corpus(images, tmp_path / "full")
    assert not list(tmp_path.glob("out*"))


def test_parquet_without_plain_image_bytes_is_refused(tmp_path: Path) -> None:
    import ray.data  # noqa: F401  (registers extension types, one of which would unpickle)
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    def refused(table: pa.Table, sentence: str) -> None:
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=sentence):
            build_corpus(tmp_path / "x.parquet", tmp_path / "out")

    plain = "x.parquet: no column of image bytes; one of image, jpg, bytes must be binary"
    refused(pa.table({"image": ["a.jpg"], "url": ["u"]}), f"{plain}.*the columns are image, url")
    refused(pa.table({"image": pa.array([{"path": "a.jpg"}])}), plain)
    pickled = ArrowPythonObjectArray.from_objects([object])
    refused(pa.table({"image": pickled}), plain)
    (tmp_path / "y.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="y.parquet: not a readable Parquet file"):
        build_corpus(tmp_path / "y.parquet", tmp_path / "out")

    # Beside an image, nothing of such a column is decoded.
    pq.write_table(
        pa.table({"image": [encode(0)], "label": pickled, "caption": pickled}),
        tmp_path / "z.parquet",
    )
    [image] = open_source(tmp_path / "z.parquet").images(0)
    assert (image.label, image.caption) == (None, None)
