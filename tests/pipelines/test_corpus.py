import gzip
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import corpus
from pipelines.corpora.manifest_tables import SHARD_SCHEMA, write_rows
from pipelines.corpus import (
    Manifest,
    ShardIndex,
    build_manifest,
    expand_shards,
    index_shard,
    read_samples,
    write_manifest,
    write_shards,
)
from pipelines.reading import shards as shard_files
from pipelines.reading import tar_index
from pipelines.reading.objects import ObjectChanged

EXIF_ORIENTATION = 0x0112


def encode(
    width: int, height: int, *, format: str = "JPEG", seed: int = 0, turned: bool = False
) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if turned:
        exif[EXIF_ORIENTATION] = 6
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format=format, exif=exif)
    return stream.getvalue()


def samples(num_samples: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "__key__": f"{seed:02d}{index:04d}",
            "jpg": encode(*rng.integers(8, 40, 2).tolist(), seed=index, turned=index % 3 == 0),
            "cls": index,
            "json": {"z": index, "a": "ü"},
        }
        for index in range(num_samples)
    ]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def empty_index(uri: str, num_samples: int) -> ShardIndex:
    zeros = np.zeros(num_samples, np.int64)
    return ShardIndex(
        uri=uri,
        num_bytes=1,
        digest=hashlib.sha256(uri.encode()).hexdigest(),
        key=[f"{uri}-{index}" for index in range(num_samples)],
        offset=np.arange(num_samples),
        length=zeros + 1,
        width=zeros.astype(np.int32),
        height=zeros.astype(np.int32),
        label=zeros,
        skipped=[],
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(samples(20), tmp_path_factory.mktemp("shards"), "train", 8)


@pytest.fixture(scope="module")
def manifest(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_manifest(shards, tmp_path_factory.mktemp("manifest") / "m")


def extracted_images(paths: list[str]) -> Iterator[tuple[str, str, bytes]]:
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    yield path, member.name.removesuffix(".jpg"), archive.extractfile(member).read()


def test_webdataset_reads_what_write_shards_wrote(shards: list[str]) -> None:
    from webdataset.tariterators import tarfile_samples

    read = list(tarfile_samples([{"url": path} for path in shards]))
    assert [Path(path).name for path in shards] == [f"train-{i:06d}.tar" for i in range(3)]
    assert len(read) == 20
    for sample, written in zip(read, samples(20), strict=True):
        assert sample["__key__"] == written["__key__"]
        assert sample["jpg"] == written["jpg"]
        assert int(sample["cls"]) == written["cls"]
        assert json.loads(sample["json"]) == written["json"]


def test_same_samples_give_the_same_shard_bytes(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 2e9)
    again = write_shards((dict(reversed(s.items())) for s in samples(20)), tmp_path, "train", 8)
    assert [Path(p).read_bytes() for p in again] == [Path(p).read_bytes() for p in shards]
    assert sorted(tmp_path.iterdir()) == [Path(path) for path in again]


def test_a_key_that_would_not_be_found_again_is_not_written(tmp_path: Path) -> None:
    for key in ("a.b", "../a", "/a", ""):
        with pytest.raises(ValueError, match="a key is a relative path"):
            write_shards([{"__key__": key, "jpg": b"x"}], tmp_path, "p", 1)
    with pytest.raises(ValueError, match="a.jpg: Image instead of bytes"):
        write_shards([{"__key__": "a", "jpg": Image.new("L", (1, 1))}], tmp_path, "p", 1)
    long_key = "folder/" + "k" * 300
    [path] = write_shards([{"__key__": long_key, "jpg": encode(8, 8)}], tmp_path, "p", 1)
    assert index_shard(path).key == [long_key]


def test_records_point_at_the_bytes_that_tarfile_extracts(
    manifest: Manifest, shards: list[str]
) -> None:
    records = manifest.records(np.arange(manifest.num_samples))
    expected = list(extracted_images(shards))
    assert manifest.num_samples == len(records) == len(expected) == 20
    for row, (path, key, data) in enumerate(expected):
        assert manifest.uris[records.shard[row]] == path
        assert records.key[row] == key
        start, length = int(records.offset[row]), int(records.length[row])
        assert Path(path).read_bytes()[start : start + length] == data
        stored = Image.open(io.BytesIO(data))
        size = stored.size[::-1] if row % 3 == 0 else stored.size
        assert (records.width[row], records.height[row]) == size
        assert records.label[row] == row
    assert {name: getattr(records, name).dtype for name in ("width", "height")} == {
        "width": np.int32,
        "height": np.int32,
    }
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in shards]
    assert manifest.shard_digests.tolist() == digests


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_samples_are_read_in_the_order_of_the_records(
    shards: list[str], tmp_path: Path, scheme: str
) -> None:
    manifest = build_manifest([scheme + path for path in shards], tmp_path / "m")
    order = np.random.default_rng(1).integers(0, 20, 50)
    expected = [data for _, _, data in extracted_images(shards)]
    assert read_samples(manifest, manifest.records(order)) == [expected[i] for i in order]
    assert read_samples(manifest, manifest.records(np.array([], np.int64))) == []


def test_each_shard_is_opened_once_and_near_ranges_are_read_together(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    reads: list[int] = []

    @contextmanager
    def open_counted(uri: str, shard_bytes: int) -> Iterator[Callable[[int, int], bytes]]:
        opened.append(uri)
        assert shard_bytes == Path(uri).stat().st_size

        def read(start: int, num_bytes: int) -> bytes:
            reads.append(num_bytes)
            return Path(uri).read_bytes()[start : start + num_bytes]

        yield read

    monkeypatch.setattr(corpus, "open_ranges", open_counted)
    records = manifest.records(np.random.default_rng(2).permutation(20))
    together = read_samples(manifest, records)
    assert opened == manifest.uris and len(reads) == 3

    reads.clear()
    monkeypatch.setattr(corpus, "MAX_GAP_BYTES", 0)
    assert read_samples(manifest, records) == together
    assert len(reads) == 20
    reads.clear()
    monkeypatch.setattr(corpus, "MAX_GAP_BYTES", 2**20)
    monkeypatch.setattr(corpus, "MAX_READ_BYTES", 10_000)
    assert read_samples(manifest, records) == together
    assert 3 < len(reads) < 20 and max(reads) <= 10_000


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_shard_of_another_length_than_indexed_is_named(tmp_path: Path, scheme: str) -> None:
    [path] = write_shards(samples(4), tmp_path, "s", 4)
    manifest = build_manifest([scheme + path], tmp_path / "m")
    records = manifest.records(np.arange(4))
    content = Path(path).read_bytes()
    for other in (content[: int(records.offset[3])], b"", content + bytes(512)):
        Path(path).write_bytes(other)
        with pytest.raises(
            ObjectChanged, match=rf"s-000000.tar: {len(other)} bytes long where {len(content)} are"
        ):
            read_samples(manifest, records)


def test_a_shard_that_shrinks_while_it_is_read_is_named_with_the_key(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = manifest.records(np.arange(4))

    @contextmanager
    def open_shrinking(uri: str, shard_bytes: int) -> Iterator[Callable[[int, int], bytes]]:
        end = int(records.offset[3]) + 10
        yield lambda start, num_bytes: Path(uri).read_bytes()[start : start + num_bytes][
            : end - start
        ]

    monkeypatch.setattr(corpus, "open_ranges", open_shrinking)
    with pytest.raises(OSError, match=r"train-000000.tar: 000003: read 10 of \d+ bytes"):
        read_samples(manifest, records)


def test_a_range_that_no_shard_can_have_is_refused_before_it_is_read(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = manifest.records(np.arange(1))
    for column, value in (("offset", -1), ("offset", 2**40), ("length", 2**40), ("length", -1)):
        damaged = replace(records, **{column: np.array([value])})
        with pytest.raises(OSError, match=r"train-000000.tar: .* bytes from byte .* damaged"):
            read_samples(manifest, damaged)
    monkeypatch.setattr(shard_files, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(OSError, match="and at most 10 at a time"):
        read_samples(manifest, records)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any))
def test_locate_equals_counting_through_the_shards(num_samples: list[int]) -> None:
    counts = np.array(num_samples, np.int64)
    manifest = Manifest(
        path=Path("m"),
        uris=[str(shard) for shard in range(len(counts))],
        num_samples_per_shard=counts,
        first_sample=np.concatenate([[0], np.cumsum(counts)]),
        shard_digests=np.array(["0" * 64] * len(counts)),
    )
    expected = [(shard, i) for shard, count in enumerate(num_samples) for i in range(count)]
    order = np.random.default_rng(0).permutation(manifest.num_samples)
    shard, index_in_shard = manifest.locate(order)
    assert list(zip(shard, index_in_shard, strict=True)) == [expected[i] for i in order]
    for outside in (-1, manifest.num_samples):
        with pytest.raises(IndexError, match=f"no sample {outside}, the manifest has"):
            manifest.locate(np.array([0, outside]))


def test_members_are_grouped_by_key_and_the_unusable_are_skipped_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg, png = encode(9, 7), encode(5, 6, format="PNG")
    big = encode(64, 64, format="BMP")
    monkeypatch.setattr(tar_index, "MAX_IMAGE_BYTES", 10_000)
    uri = write_tar(
        tmp_path / "x.tar",
        [
            ("README.md", b"hello"),
            ("._plain.jpg", b"AppleDouble"),
            ("__meta__/about.jpg", b"of the shard"),
            ("dir.v2/plain.JPG", jpeg),
            ("dir.v2/plain.pyd", pickle.dumps(print)),
            ("dir.v2/plain.cls", b" 7\n"),
            ("word.cls", b"cat"),
            ("word.png", png),
            ("masked.mask.png", png),
            ("masked.jpg", jpeg),
            ("long.input.webp", encode(11, 12, format="WEBP")),
            ("long.cls", b"1" * 40),
            ("plain.jpg", jpeg),
            ("nothing.cls", b"3"),
            ("void.jpg", b""),
            ("text.jpg", b"this is not an image"),
            ("two.jpg", jpeg),
            ("two.png", png),
            ("plain.jpg", jpeg),
            ("../up.jpg", jpeg),
            ("/etc/root.jpg", jpeg),
            ("a\\..\\b.jpg", jpeg),
            ("big.bmp", big),
            ("latin-\udce9.jpg", jpeg),
            ("last.jpg", jpeg),
        ],
    )
    index = index_shard(uri)
    rows = zip(index.key, index.width, index.height, index.label, strict=True)
    assert list(rows) == [
        ("dir.v2/plain", 9, 7, 7),
        ("word", 5, 6, -1),
        ("masked", 9, 7, -1),
        ("long", 11, 12, -1),
        ("plain", 9, 7, -1),
        ("last", 9, 7, -1),
    ]
    assert index.skipped == [
        ("nothing", "no image member"),
        ("void", "zero bytes where an image should be"),
        ("text", "not an image with an intact header (JPEG, PNG, WEBP, TIFF, GIF, BMP, AVIF)"),
        ("two", "2 image members where one is needed (jpg, png)"),
        ("plain", "duplicate key in this shard"),
        ("../up", "path leaves the archive"),
        ("/etc/root", "path leaves the archive"),
        ("a\\", "path leaves the archive"),
        ("big", f"image member of {len(big)} bytes, the limit is 10000"),
        ("latin-\\udce9", "key is not UTF-8"),
    ]
    assert pickle.loads(pickle.dumps(index)).key == index.key

    manifest = write_manifest([index], tmp_path / "m", max_skipped_fraction=0.7)
    assert manifest.num_samples == 6
    assert manifest.skipped() == [(uri, key, reason) for key, reason in index.skipped]
    images = read_samples(manifest, manifest.records(np.arange(6)))
    assert images == [jpeg, png, jpeg, encode(11, 12, format="WEBP"), jpeg, jpeg]


def test_links_and_sparse_members_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        sparse = tarfile.TarInfo("sparse.jpg")
        sparse.size = 512
        sparse.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.map": "0,512",
        }
        archive.addfile(sparse, io.BytesIO(bytes(512)))
    index = index_shard(str(tmp_path / "x.tar"))
    assert index.skipped == [("sparse", "stored as a sparse file, its bytes are not in one piece")]


def test_a_tar_cut_anywhere_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    [path] = write_shards(samples(3), tmp_path, "whole", 3)
    content = Path(path).read_bytes()
    with tarfile.open(path) as archive:
        end = max(-(-(m.offset_data + m.size) // 512) * 512 for m in archive)
    boundaries = range(0, end + 512, 512)
    anywhere = np.random.default_rng(0).integers(1, end + 512, 40).tolist()
    cut = tmp_path / "cut.tar"
    for position in (*boundaries, *anywhere):
        cut.write_bytes(content[:position])
        with pytest.raises(ValueError, match=r"cut.tar: not a readable tar archive \(.*write the"):
            index_shard(str(cut))
    cut.write_bytes(content[: end + 512])
    assert index_shard(str(cut)).num_samples == 3


def test_a_damaged_archive_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    [path] = write_shards(samples(3), tmp_path, "whole", 3)
    content = Path(path).read_bytes()
    index = index_shard(path)
    second_header = int(index.offset[1]) - 512
    negative = tarfile.TarInfo("n.jpg").tobuf(tarfile.GNU_FORMAT)
    negative = bytearray(negative)
    negative[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**33
    for damaged, reason in (
        (b"", "empty file"),
        (b"not a tar, but text of some length" * 40, "invalid header|bad checksum"),
        (gzip.compress(content), "invalid header|bad checksum|truncated header"),
        (content[: second_header + 3] + b"?" + content[second_header + 4 :], "damaged header"),
        (content[:second_header] + bytes(2**22), "nothing but zeros"),
        (content[:second_header] + bytes(512) + content[second_header + 512 :], "data behind"),
        (content + content, "data behind"),
        (bytes(negative) + content, "points backwards|claims -"),
        (long_name.tobuf(tarfile.GNU_FORMAT) + content, "claims 8589934592 bytes"),
    ):
        shard = tmp_path / "damaged.tar"
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"damaged.tar: not a readable .*({reason})"):
            index_shard(str(shard))


def test_a_shard_without_samples_is_an_error(tmp_path: Path) -> None:
    for members in ([], [("README.md", b"hello")]):
        uri = write_tar(tmp_path / "none.tar", members)
        with pytest.raises(ValueError, match="none.tar: no samples in this tar archive"):
            index_shard(uri)


def test_too_many_skipped_samples_stop_the_manifest_with_the_list(tmp_path: Path) -> None:
    good = [(f"{i:02d}.jpg", encode(8, 8)) for i in range(8)]
    uri = write_tar(tmp_path / "x.tar", [*good, ("bad.jpg", b"?"), ("void.jpg", b"")])
    with pytest.raises(ValueError, match=r"(?s)2 of 10 samples .*=0.1; .*bad: .*void: zero bytes"):
        build_manifest([uri], tmp_path / "m")
    assert write_manifest([index_shard(uri)], tmp_path / "m", 0.2).num_samples == 8
    uri = write_tar(tmp_path / "y.tar", [("bad.jpg", b"?")])
    with pytest.raises(ValueError, match=r"(?s)no usable sample in 1 shards.*y.tar: bad: not an"):
        write_manifest([index_shard(uri)], tmp_path / "n", 1.0)
    with pytest.raises(ValueError, match="no usable sample in 0 shards"):
        write_manifest([], tmp_path / "n")


def test_a_manifest_appears_complete_or_not_at_all(tmp_path: Path, shards: list[str]) -> None:
    path = tmp_path / "deep" / "m"

    def failing() -> Iterator[ShardIndex]:
        yield index_shard(shards[0])
        assert not path.exists()
        raise RuntimeError("the store went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_manifest(failing(), path)
    assert list(path.parent.iterdir()) == []

    steps: list[tuple[int, int]] = []
    build_manifest(shards, path, progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert [entry.name for entry in path.parent.iterdir()] == ["m"]
    with pytest.raises(FileExistsError, match="exists already; remove it"):
        build_manifest(shards, path)


def test_a_shard_listed_twice_is_refused(tmp_path: Path, shards: list[str]) -> None:
    index = index_shard(shards[0])
    with pytest.raises(ValueError, match="train-000000.tar: this shard is listed twice"):
        write_manifest([index, index], tmp_path / "m")


def test_digest_depends_on_the_shards_and_not_on_where_they_lie(
    manifest: Manifest, shards: list[str], tmp_path: Path
) -> None:
    indexes = [index_shard(path) for path in shards]
    moved = [replace(index, uri=f"s3://bucket/{index.uri[-10:]}") for index in indexes]
    assert write_manifest(moved, tmp_path / "moved").digest == manifest.digest
    assert write_manifest(moved[::-1], tmp_path / "other").digest != manifest.digest
    assert write_manifest(moved[:2], tmp_path / "fewer").digest != manifest.digest
    assert pickle.loads(pickle.dumps(manifest)).digest == manifest.digest


def test_a_manifest_rebuilt_in_the_same_place_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for seed in (1, 2):
        tars = write_shards(samples(3, seed=seed), tmp_path / str(seed), "s", 3)
        manifest = build_manifest(tars, path)
        keys = manifest.records(np.arange(3)).key.tolist()
        assert keys == [f"{seed:02d}000{i}" for i in range(3)]
        path.rename(tmp_path / f"old-{seed}")


def test_records_cross_shards_in_the_order_given(tmp_path: Path) -> None:
    counts = [3, 0, 2, 5]
    manifest = write_manifest(
        (empty_index(f"s{i}", count) for i, count in enumerate(counts)), tmp_path / "m"
    )
    keys = [f"s{i}-{j}" for i, count in enumerate(counts) for j in range(count)]
    order = np.array([9, 0, 3, 3, 8, 4, 1])
    records = manifest.records(order)
    assert records.key.tolist() == [keys[i] for i in order]
    assert records.sample_id.tolist() == order.tolist()
    assert records.shard.tolist() == [3, 0, 2, 2, 3, 2, 0]


def test_a_missing_or_empty_manifest_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no manifest .*`vitok corpus index"):
        Manifest.load(tmp_path / "nowhere")
    empty = ("a.tar", 1, 0, "0" * 64, [0] * 96)
    write_rows([empty], SHARD_SCHEMA, tmp_path / "shards.parquet")
    with pytest.raises(ValueError, match="holds no samples"):
        Manifest.load(tmp_path)


def test_patterns_expand_to_absolute_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b-000001.tar", "b-000000.tar", "a.tar", "notes.txt", "odd{1..2}.tar"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def expanded(*patterns: str) -> list[str]:
        found = expand_shards(patterns)
        assert all(Path(path).parent == tmp_path for path in found)
        return [Path(path).name for path in found]

    both = ["b-000000.tar", "b-000001.tar"]
    assert expanded(".") == ["a.tar", *both, "odd{1..2}.tar"]
    assert expanded("b-*.tar") == expanded("b-{000000..000001}.tar") == both
    assert expanded(str(tmp_path / "a.tar"), "b*", "a.tar") == ["a.tar", *both]
    assert expanded("b-000001.tar", "b-*.tar") == both[::-1]
    assert expanded("{a,b-000000}.tar") == ["a.tar", "b-000000.tar"]
    assert expanded("odd{1..2}.tar") == ["odd{1..2}.tar"]
    uris = ["s3://bucket/x-08.tar", "s3://bucket/x-09.tar", "s3://bucket/x-10.tar"]
    assert expand_shards(["s3://bucket/x-{08..10}.tar"]) == uris
    signed = "https://host/x.tar?signature=a*b"
    assert expand_shards([signed]) == [signed]
    assert expanded(f"file://{tmp_path}/b-*.tar") == both
    assert expanded((tmp_path / "odd{1..2}.tar").as_uri()) == ["odd{1..2}.tar"]


def test_a_pattern_that_names_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x-0.tar").touch()
    monkeypatch.chdir(tmp_path)
    for pattern, sentence in (
        ("gone.tar", r"^gone.tar: no shard matches; name existing"),
        ("gone-*.tar", r"gone-\*.tar: no shard matches"),
        ("empty", "empty: no shard matches"),
        ("x-{0..1}.tar", r"x-\{0..1\}.tar: x-1.tar: no shard matches"),
        ("pipe:cat x-0.tar", "pipe:cat x-0.tar: no shard matches"),
    ):
        with pytest.raises(FileNotFoundError, match=sentence):
            expand_shards([pattern])
    with pytest.raises(FileNotFoundError, match="no shards given"):
        expand_shards([])
    with pytest.raises(ValueError, match=r"http://b/\*.tar: a URI of this kind is not globbed"):
        expand_shards(["http://b/*.tar"])
    with pytest.raises(ValueError, match=r"s3://b\*/x.tar: a wildcard in the name of the bucket"):
        expand_shards(["s3://b*/x.tar"])
    with pytest.raises(ValueError, match="pipe://true: no way to read this URI"):
        index_shard("pipe://true")
    with pytest.raises(ValueError, match="file://host/x-0.tar: names another machine"):
        index_shard("file://host/x-0.tar")
