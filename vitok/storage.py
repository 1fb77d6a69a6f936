"""Folders on a local disk or in an object store, and the small files in them."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow.fs


@dataclass(frozen=True)
class Folder:
    """A folder by URI.

    Attributes:
        uri: absolute local path, or `s3://bucket/prefix`; without a slash at its end.
    """

    uri: str

    @classmethod
    def of(cls, location: str, *parts: str) -> "Folder":
        """Return a folder below a URI or local path; a relative path is made absolute.

        Workers run in other directories: only absolute locations may travel to them. A `file://`
        URI is the local path that it names.
        """
        if location.startswith("file://"):
            location = unquote(location.removeprefix("file://"))
        if "://" not in location:
            location = str(Path(location).expanduser().absolute())
        return cls("/".join([location.rstrip("/"), *parts]))

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on a local disk."""
        return "://" not in self.uri

    def child(self, name: str) -> "Folder":
        """Return a folder below this one."""
        return Folder(f"{self.uri}/{name}")

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        filesystem, path = self._locate(name)
        return filesystem.get_file_info(path).type == pyarrow.fs.FileType.File

    def names(self) -> list[str]:
        """Return the names of the files in it, sorted; none where there is no folder."""
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.uri)
        selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
        infos = filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.File)

    def read_bytes(self, name: str) -> bytes:
        """Return the contents of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        filesystem, path = self._locate(name)
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.read())

    def read_text(self, name: str) -> str | None:
        """Return the contents of a small file, or None where there is none."""
        return self.read_bytes(name).decode() if self.exists(name) else None

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, creating the folder; a reader sees all of it or nothing."""
        filesystem, path = self._locate(name)
        if not self.is_local:
            # An object appears when its upload is complete.
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        unfinished = f"{path}.{uuid.uuid4().hex}.part"
        with filesystem.open_output_stream(unfinished) as stream:
            stream.write(data)
        filesystem.move(unfinished, path)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file, as write_bytes does."""
        self.write_bytes(name, text.encode())

    def remove_unfinished(self) -> None:
        """Delete what writers that died in the middle left in a local folder."""
        for name in self.names():
            if name.endswith(".part"):
                filesystem, path = self._locate(name)
                filesystem.delete_file(path)

    def download(self, target: Path) -> Path:
        """Copy all files of the folder into a local one; a local folder is used where it is."""
        if self.is_local:
            return Path(self.uri)
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.uri)
        pyarrow.fs.copy_files(path, str(target), source_filesystem=filesystem)
        return target

    def upload(self, source: Path) -> None:
        """Copy all files of a local folder into this one."""
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.uri)
        filesystem.create_dir(path, recursive=True)
        pyarrow.fs.copy_files(str(source), path, destination_filesystem=filesystem)

    def _locate(self, name: str) -> tuple[pyarrow.fs.FileSystem, str]:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(f"{self.uri}/{name}")
        return filesystem, path


def absolute_if_local(location: str) -> str:
    """Return a path that is there as an absolute one, for processes in other directories.

    All else stays as it is: it may be a name, a repository id or a URI.
    """
    if not location:
        return location
    folder = Folder.of(location)
    return folder.uri if folder.is_local and Path(folder.uri).exists() else location
