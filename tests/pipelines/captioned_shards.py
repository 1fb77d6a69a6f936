"""Shards of images with captions, for the tests of texts."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def jpeg(color: int = 0) -> bytes:
    """Return a small image of one color."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 18), (color % 256, 80, 160)).save(stream, format="JPEG")
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    """Write members, names and bytes, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)
