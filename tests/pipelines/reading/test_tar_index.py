import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.reading.tar_index import index_shard


def encode(format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(stream, format=format)
    return stream.getvalue()


def member(
    name: str, data: bytes = b"", *, type: bytes = tarfile.REGTYPE, **pax_headers: str
) -> bytes:
    """A header of a tar and its data."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), type, "/etc/passwd"
    info.pax_headers = pax_headers
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def with_size(header: bytes, size: int) -> bytes:
    """A header that claims another size, in base 256 as GNU tar writes big ones."""
    changed = bytearray(header)
    changed[124:136] = b"\x80" + size.to_bytes(11, "big")
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


def write(path: Path, members: Iterable[bytes]) -> str:
    path.write_bytes(b"".join(members) + bytes(10_240))
    return str(path)


class MakesAFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.path,)


def test_no_pickle_is_loaded_under_any_name(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    bomb = pickle.dumps(MakesAFolder(trap))
    names = [
        f"a.{suffix}" for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "cls", "json")
    ]
    members = [member(name, bomb) for name in names]
    uri = write(
        tmp_path / "x.tar", [*members, member("a.png", encode("PNG")), member("b.jpg", bomb)]
    )
    index = index_shard(uri)
    assert index.key == ["a"] and index.label.tolist() == [-1]
    assert [key for key, _ in index.skipped] == ["b"]
    assert not trap.exists()
    pickle.loads(bomb)
    assert trap.exists(), "the trap does not work"


@pytest.mark.parametrize("size", [2**40, 2**63, 2**80])
def test_a_size_beyond_the_shard_is_an_error_that_names_it(tmp_path: Path, size: int) -> None:
    lying = [
        with_size(member(name, b""), size) for name in ("a.jpg", "a.cls", "a.txt", "__meta__/a.jpg")
    ]
    lying.append(member("a.jpg", encode(), size=str(size)))
    for header in lying:
        uri = write(tmp_path / "x.tar", [member("0.jpg", encode()), header])
        with pytest.raises(ValueError, match="x.tar: not a readable tar archive .*truncated"):
            index_shard(uri)


def test_a_negative_size_in_a_pax_record_is_an_error(tmp_path: Path) -> None:
    for size in ("-1", "-1024", "-99999999999999"):
        uri = write(tmp_path / "x.tar", [member("a.jpg", encode(), size=size), member("b.jpg")])
        with pytest.raises(ValueError, match="x.tar: not a readable tar archive"):
            index_shard(uri)


def test_long_pax_names_are_read_and_endless_ones_refused(tmp_path: Path) -> None:
    long = "k" * 20_000
    uri = write(tmp_path / "x.tar", [member(f"{long}.jpg", encode())])
    assert index_shard(uri).key == [long]
    uri = write(tmp_path / "y.tar", [member("k" * 2**20 + ".jpg", encode())])
    with pytest.raises(ValueError, match=r"y.tar: .*a header at byte \d+ claims \d+ bytes"):
        index_shard(uri)


def test_links_devices_and_folders_are_no_images(tmp_path: Path) -> None:
    types = (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    )
    special = [member(f"s{i}.jpg", type=type) for i, type in enumerate(types)]
    index = index_shard(write(tmp_path / "x.tar", [*special, member("a.jpg", encode())]))
    assert index.key == ["a"] and index.skipped == []


def test_a_tar_of_zeros_is_an_error(tmp_path: Path) -> None:
    for num_bytes, reason in ((10_240, "no samples"), (2**22, "nothing but zeros")):
        path = tmp_path / "zeros.tar"
        path.write_bytes(bytes(num_bytes))
        with pytest.raises(ValueError, match=f"zeros.tar: .*{reason}"):
            index_shard(str(path))


def test_an_extension_that_names_another_format_is_read_by_its_bytes(tmp_path: Path) -> None:
    data = encode("PNG")
    index = index_shard(write(tmp_path / "x.tar", [member("a.jpg", data)]))
    assert (index.key, index.width.tolist(), index.height.tolist()) == (["a"], [9], [7])
    assert index.length.tolist() == [len(data)]
    assert index.offset.dtype == np.int64


def test_a_name_with_a_nul_is_read_as_tarfile_reads_it(tmp_path: Path) -> None:
    header = bytearray(member("aXb.jpg", encode()))
    header[1] = 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    index = index_shard(write(tmp_path / "x.tar", [bytes(header), member("c.jpg", encode())]))
    assert index.key == ["c"], "what stands before the NUL has no extension"
