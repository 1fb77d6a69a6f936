"""Files of a latent cache, on a disk or in an object store: whole or not there, read by ranges.

Stores are asked as pipelines/reading/objects.py asks them: a request is repeated until it is
whole.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from pipelines.reading.objects import RemoteObject, delete_object, list_objects, put_object
from vitok.storage import Folder


def read_file(folder: Folder, name: str) -> bytes:
    """Return the contents of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read; the file is named.
    """
    uri = f"{folder.uri}/{name}"
    if not folder.is_local:
        with RemoteObject(uri).stream() as stream:
            return stream.read()
    return Path(uri).read_bytes()


def write_file(folder: Folder, name: str, data: bytes) -> None:
    """Write a file, creating the folder; a reader sees all of it or nothing.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    if folder.is_local:
        _write_local(Path(folder.uri, name), data)
    else:
        put_object(f"{folder.uri}/{name}", data)


def create_file(folder: Folder, name: str, data: bytes) -> bool:
    """Write a file if there is none of its name, as write_file does; returns whether it did."""
    if not folder.is_local:
        return put_object(f"{folder.uri}/{name}", data, only_new=True)
    path = Path(folder.uri, name)
    if path.exists():
        return False
    _write_local(path, data)
    return True


def file_names(folder: Folder) -> list[str]:
    """Return the names of the files in a folder, sorted; none where there is no folder."""
    if folder.is_local:
        return folder.names()
    prefix = f"{folder.uri}/"
    return [uri.removeprefix(prefix) for uri in list_objects(prefix, recursive=False)]


def remove_file(folder: Folder, name: str) -> None:
    """Delete a file, if it is there."""
    if folder.is_local:
        Path(folder.uri, name).unlink(missing_ok=True)
    else:
        delete_object(f"{folder.uri}/{name}")


def _write_local(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # what is committed outlives a power failure
        os.replace(unfinished, path)
    except OSError as error:
        raise type(error)(
            f"{path}: cannot be written ({error.strerror or error}); make room, or get permission "
            "to write, and run the same command again: what is finished is kept"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
