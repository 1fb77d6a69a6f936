from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest

from vitok import storage
from vitok.storage import Folder, absolute_if_local


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path / "not" / "there yet"))
    data = bytes(range(256)) * 3
    folder.write_bytes("data.bin", data)
    folder.write_text("text.json", "größe\n")
    folder.child("below").write_bytes("empty", b"")
    assert (
        folder.read_bytes("data.bin") == data == (tmp_path / "not/there yet/data.bin").read_bytes()
    )
    assert folder.read_text("text.json") == "größe\n"
    assert folder.child("below").read_bytes("empty") == b""
    folder.write_text("text.json", "new")
    assert folder.read_text("text.json") == "new", "written again, it is replaced"


def test_names_are_those_of_files_alone_in_order(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path / "folder"))
    assert folder.names() == []
    for name in ("b", "a.json", "c"):
        folder.write_text(name, "x")
    folder.child("below").write_text("d", "x")
    assert folder.names() == ["a.json", "b", "c"]
    assert folder.exists("b")
    assert not folder.exists("below"), "a folder is no file"
    assert not folder.exists("d")


def test_missing_file_reads_as_none_or_raises(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    assert folder.read_text("nothing") is None
    assert folder.child("no folder").read_text("nothing") is None
    with pytest.raises(FileNotFoundError, match="nothing"):
        folder.read_bytes("nothing")


class _FullDisk:
    """A local filesystem whose disk is full after the first bytes."""

    def __init__(self) -> None:
        self._real = pyarrow.fs.LocalFileSystem()
        self.opened: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def open_output_stream(self, path: str) -> "_FullDisk":
        self.opened.append(path)
        Path(path).write_bytes(b"ne")
        return self

    def __enter__(self) -> "_FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_failing_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.of(str(tmp_path))
    folder.write_bytes("record", b"old content")
    disk = _FullDisk()
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "_locate", lambda self, name: (disk, f"{self.uri}/{name}"))
        with pytest.raises(OSError, match="No space left"):
            folder.write_bytes("record", b"new content")
        with pytest.raises(OSError, match="No space left"):
            folder.write_bytes("another", b"new content")
    assert len(disk.opened) == 2, "both writes had begun"
    assert folder.read_bytes("record") == b"old content"
    assert not folder.exists("another")
    folder.write_bytes("record", b"new content")  # what was left of it does not disturb
    assert folder.read_bytes("record") == b"new content"


def test_file_is_replaced_and_never_written_into(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    folder.write_bytes("record", b"old")
    with (tmp_path / "record").open("rb") as reader:
        folder.write_bytes("record", b"new")
        assert reader.read() == b"old", "who reads it while it is written gets all of the old"
    assert folder.read_bytes("record") == b"new"
    assert folder.names() == ["record"], "no leftovers"


def test_upload_and_download_copy_a_whole_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "below" / "two").write_bytes(b"22")
    folder = Folder.of(str(tmp_path / "run"), "export")
    folder.upload(source)
    assert folder.read_bytes("one") == b"1"
    assert folder.child("below").read_bytes("two") == b"22"
    scratch = tmp_path / "scratch"
    assert folder.download(scratch) == tmp_path / "run" / "export", "local: used where it is"
    assert not scratch.exists()


def test_file_uri_is_the_local_folder_that_it_names(tmp_path: Path) -> None:
    folder = Folder.of(f"file://{tmp_path}/with%20space/", "units")
    assert folder == Folder.of(str(tmp_path / "with space"), "units")
    assert folder.is_local
    folder.write_text("note", "x")
    assert (tmp_path / "with space" / "units" / "note").read_text() == "x"
    assert folder.names() == ["note"]


@pytest.mark.parametrize("name", ["100%25", "a#b?c", "ünïcode", "key=value;x", "c:d"])
def test_odd_characters_of_a_local_path_mean_themselves(tmp_path: Path, name: str) -> None:
    folder = Folder.of(str(tmp_path / name))
    folder.write_text(f"{name}.txt", "x")
    assert (tmp_path / name / f"{name}.txt").read_text() == "x"
    assert folder.names() == [f"{name}.txt"]
    assert folder.read_text(f"{name}.txt") == "x"


def test_object_store_gets_and_gives_whole_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder on disk in place of the bucket: what is not local goes through pyarrow's filesystem.
    bucket = pyarrow.fs.SubTreeFileSystem(str(tmp_path / "bucket"), pyarrow.fs.LocalFileSystem())
    (tmp_path / "bucket" / "prefix").mkdir(parents=True)

    def from_uri(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        return bucket, uri.removeprefix("s3://bucket/")

    replaced = vars(pyarrow.fs) | {"FileSystem": SimpleNamespace(from_uri=from_uri)}
    monkeypatch.setattr(storage, "pyarrow", SimpleNamespace(fs=SimpleNamespace(**replaced)))
    folder = Folder.of("s3://bucket/prefix/")
    assert not folder.is_local
    folder.write_text("note", "x")
    assert (tmp_path / "bucket/prefix/note").read_text() == folder.read_text("note") == "x"
    assert folder.read_text("nothing") is None
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    folder.child("export").upload(source)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert folder.child("export").download(scratch) == scratch
    assert (scratch / "weights").read_bytes() == b"w"


def test_relative_location_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Folder.of("runs", "name").uri == f"{tmp_path}/runs/name"
    assert Folder.of("~/runs").uri == "/home/someone/runs"
    assert Folder.of("s3://bucket/prefix/", "name").uri == "s3://bucket/prefix/name"


def test_only_a_path_that_is_there_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "weights.pt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in ("runs", "./runs", "~/runs", f"file://{tmp_path}/runs"):
        assert absolute_if_local(location) == f"{tmp_path}/runs"
    assert absolute_if_local("weights.pt") == f"{tmp_path}/weights.pt"
    for name in ("", "350M-f16x64", "owner/name", "s3://bucket/runs", "https://host/weights.pt"):
        assert absolute_if_local(name) == name
