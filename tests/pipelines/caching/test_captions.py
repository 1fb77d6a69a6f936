import itertools
from pathlib import Path
from typing import Any

import pytest

from pipelines.caching import captions as captions_module
from pipelines.caching.captions import MAX_CAPTION_BYTES, read_captions, require_captions
from pipelines.corpus import Manifest, index_shard, write_manifest
from tests.pipelines.captioned_shards import jpeg, write_tar

LONG = "folder/" * 40


def manifest_of(folder: Path, *shards: list[tuple[str, bytes]]) -> Manifest:
    uris = [write_tar(folder / f"{number}.tar", members) for number, members in enumerate(shards)]
    indexes = [index_shard(uri) for uri in uris]
    return write_manifest(indexes, folder / "manifest", max_skipped_fraction=0.5)


def members_in_every_order() -> tuple[list[tuple[str, bytes]], list[str | None]]:
    """Samples whose members come in all orders, and their captions; some are unusable images."""
    members: list[tuple[str, bytes]] = []
    expected: list[str | None] = []
    orders = itertools.cycle(itertools.permutations(["jpg", "txt", "json"]))
    for number in range(20):
        key = f"{LONG if number % 5 == 2 else ''}k{number:02d}"
        text = f"caption {number}, schön"
        parts = {"jpg": jpeg(number), "txt": f" {text}\n".encode(), "json": b"{}" * number}
        if number % 7 == 3:
            parts["jpg"] = b"no image" * 3000
        else:
            expected.append(None if number % 6 == 4 else text)
        if number % 6 == 4:
            parts["txt"] = b" \n"
        members += [(f"{key}.{suffix}", parts[suffix]) for suffix in next(orders)]
    return members, expected


@pytest.mark.parametrize("is_remote", [False, True])
def test_every_slice_of_a_shard_gives_the_captions_of_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    members, expected = members_in_every_order()
    source = manifest_of(tmp_path, [("before.jpg", jpeg())], members)
    monkeypatch.setattr(captions_module, "is_remote", lambda uri: is_remote)
    count = int(source.num_samples_per_shard[1])
    assert count == len(expected) == 17
    assert expected.count(None) == 2
    for start in range(count):
        for stop in range(start + 1, count + 1):
            found, bad = read_captions(source, 1, start, stop)
            assert (found, bad) == (expected[start:stop], {})
    assert read_captions(source, 0, 0, 1) == ([None], {})


def test_captions_that_cannot_be_used_are_named_with_the_reason(tmp_path: Path) -> None:
    image = jpeg()
    longest = b"x" * MAX_CAPTION_BYTES
    members = [
        *[("a.jpg", image), ("a.txt", b"gr\xfcn")],
        *[("b.jpg", image), ("b.txt", longest + b"x")],
        *[("c.txt", b"one"), ("c.jpg", image), ("c.txt", b"two")],
        *[("d.jpg", image), ("d.txt", longest)],
        *[("e.jpg", image), ("e.en.txt", b"another suffix"), ("e.cls", b"3")],
        *[("f.jpg", image), ("f.TXT", b"upper case")],
    ]
    found, bad = read_captions(manifest_of(tmp_path, members), 0, 0, 6)
    assert found == [None, None, None, longest.decode(), None, "upper case"]
    assert bad == {
        "a": "caption is not UTF-8 at its byte 2",
        "b": f"caption of {MAX_CAPTION_BYTES + 1} bytes, the limit is {MAX_CAPTION_BYTES}",
        "c": "2 captions where one is needed",
    }


def test_caption_of_a_skipped_duplicate_is_not_taken(tmp_path: Path) -> None:
    members = [
        *[("a.jpg", jpeg()), ("a.txt", b"first")],
        *[("b.jpg", jpeg()), ("b.txt", b"b")],
        *[("a.jpg", jpeg()), ("a.txt", b"second")],
    ]
    source = manifest_of(tmp_path, members)
    assert source.num_samples == 2
    assert read_captions(source, 0, 0, 2) == (["first", "b"], {})


def test_images_on_a_disk_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = manifest_of(
        tmp_path, [(f"k{i}.{suffix}", data) for i in range(9) for suffix, data in PARTS]
    )
    read: list[int] = []
    real = captions_module._PartReader

    def counting(read_range: Any, *given: Any) -> Any:
        def counted(start: int, num_bytes: int) -> bytes:
            read.append(num_bytes)
            return read_range(start, num_bytes)

        return real(counted, *given)

    monkeypatch.setattr(captions_module, "_PartReader", counting)
    assert read_captions(source, 0, 3, 6)[0] == ["text"] * 3
    assert 0 < sum(read) < 12_000 < len(PARTS[0][1])


PARTS = [("jpg", jpeg() + bytes(100_000)), ("txt", b"text")]


def test_shard_that_was_replaced_is_an_error_that_names_it(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg()), ("a.txt", b"text"), ("b.jpg", jpeg()), ("b.txt", b"text")]
    source = manifest_of(tmp_path, members)
    shard = Path(source.uris[0])
    length = shard.stat().st_size
    write_tar(tmp_path / "moved.tar", [members[1], members[0], *members[2:]])
    moved = (tmp_path / "moved.tar").read_bytes()
    for other in (b"\xff" * length, bytes(length), moved):
        assert len(other) == length
        shard.write_bytes(other)
        with pytest.raises(OSError, match=r"0\.tar: .*the shard is not the one that was indexed"):
            read_captions(source, 0, 0, 2)
    shard.write_bytes(bytes(length - 512))
    with pytest.raises(OSError, match=r"0\.tar: \d+ bytes long where \d+ are expected"):
        read_captions(source, 0, 0, 2)


def test_corpus_without_captions_is_refused_at_once(tmp_path: Path) -> None:
    images = [[(f"{shard}-{i}.jpg", jpeg()) for i in range(20)] for shard in range(3)]
    source = manifest_of(tmp_path / "without", *images)
    with pytest.raises(ValueError, match=r"no sample that was looked at has a caption .*0\.tar"):
        require_captions(source)
    some = [*images[:2], [*images[2], ("last.txt", b"of no image"), ("x.jpg", jpeg())]]
    with pytest.raises(ValueError, match="has a caption"):
        require_captions(manifest_of(tmp_path / "stray", *some))
    some = [*images[:2], [("x.txt", b"text"), ("x.jpg", jpeg()), *images[2]]]
    require_captions(manifest_of(tmp_path / "one", *some))
