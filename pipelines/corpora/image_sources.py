"""Collections of images as people keep them: folder trees, and Parquet files with image bytes.

Both become a stream of encoded images with keys that a WebDataset can have: the relative path of
an image without its extension; for a row that of its file, and its key or number in it.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpora.image_keys import Keys, folder_key, sample_key
from pipelines.reading.shards import MAX_IMAGE_BYTES, local_folder
from pipelines.reading.tar_index import IMAGE_EXTENSIONS

IMAGE_COLUMNS = ("image", "jpg", "bytes")
_KEY_COLUMNS = ("key", "__key__")
_LABEL_COLUMNS = ("label", "cls")
_CAPTION_COLUMNS = ("caption", "txt", "text")

_ROWS_PER_BATCH = 32
_READ_BYTES = 2**20
# First bytes of a file -> extension; what a Parquet file holds has no name.
_SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+"), "tif"),
    (re.compile(rb"BM"), "bmp"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "avif"),
)


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image of a source.

    Attributes:
        name: where it lies, for people.
        key: unique in its source, and allowed in a WebDataset.
        extension: of its member in a shard.
        data: the encoded image, or the reason why it cannot be used.
        label: number of its class, or None.
        caption: text that came with it, or None.
    """

    name: str
    key: str
    extension: str
    data: bytes | str
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class FolderSource:
    """A tree of image files; the sub-folders of its top are the classes, numbered by name.

    Names that begin with a dot are passed over, and so are links to folders.
    """

    root: Path
    classes: list[str]

    @classmethod
    def of(cls, root: Path) -> "FolderSource":
        """Look at a folder."""
        return cls(root, sorted(entry.name for entry in os.scandir(root) if _is_folder(entry)))

    def count(self) -> tuple[int, int]:
        """Count the image files, and the files that are passed over for their extension."""
        num_images = num_others = 0
        for folder in self._folders():
            num_images += len(folder.images)
            num_others += folder.num_others
        return num_images, num_others

    def has_images(self) -> bool:
        """Whether there is an image file; stops at the first."""
        return any(folder.images for folder in self._folders())

    def images(self, start: int) -> Iterator[SourceImage]:
        """Yield the images from number start on, sorted by folder and name; reads one at a time."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        number = -1
        for folder in self._folders():
            keys = Keys()
            for name in folder.images:
                stem, _, extension = name.rpartition(".")
                key = keys.claim(sample_key(stem), name)
                number += 1
                if number < start:
                    continue
                yield SourceImage(
                    name=_printable("/".join([*folder.parts, name])),
                    key=folder.key + key,
                    extension=extension.lower(),
                    data=_read_file(self.root.joinpath(*folder.parts, name)),
                    label=label_of.get(folder.parts[0]) if folder.parts else None,
                )

    def _folders(self) -> Iterator["_ImageFolder"]:
        """Yield every folder, each before those in it."""
        pending = [((), "")]
        while pending:
            parts, key = pending.pop()
            with os.scandir(self.root.joinpath(*parts)) as entries:
                visible = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
            folders = [entry.name for entry in visible if _is_folder(entry)]
            files = [entry.name for entry in visible if not _is_folder(entry)]
            images = [name for name in files if _has_image_name(name)]
            yield _ImageFolder(parts, key, images, len(files) - len(images))
            keys = Keys()
            below = [
                ((*parts, name), f"{key}{keys.claim(folder_key(name), name)}/") for name in folders
            ]
            pending += reversed(below)


class _ImageFolder(NamedTuple):
    parts: tuple[str, ...]  # names of the folders from the top down to this one
    key: str  # what the keys of its images begin with: empty, or it ends with a slash
    images: list[str]
    num_others: int


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with a column of encoded images, as img2dataset and `datasets` write them.

    The image column is the first of IMAGE_COLUMNS that is binary, or a struct with binary `bytes`.
    Other columns than those of images, keys, labels and captions are never decoded, and none that
    is of an extension type.
    """

    root: Path
    files: list[Path]
    classes: list[str]

    @classmethod
    def of(cls, root: Path, files: list[Path]) -> "ParquetSource":
        """Look at Parquet files below a folder.

        Raises:
            ValueError: a file is no Parquet, or has no column of images.
        """
        for file in files:
            _columns(file, _open_parquet(file).schema_arrow)
        return cls(root, files, _class_names(_open_parquet(files[0])))

    def count(self) -> tuple[int, int]:
        """Count the rows, and nothing that is passed over."""
        return sum(_open_parquet(file).metadata.num_rows for file in self.files), 0

    def images(self, start: int) -> Iterator[SourceImage]:
        """Yield the images from number start on, by file and row; reads a few rows at a time."""
        prefixes = Keys()
        number = 0
        for file in self.files:
            relative = file.relative_to(self.root)
            parts = [folder_key(part) for part in relative.with_suffix("").parts]
            prefix = prefixes.claim("/".join(parts), str(relative))
            num_rows = _open_parquet(file).metadata.num_rows
            if number + num_rows <= start:
                number += num_rows
                continue
            keys = Keys()
            for row, sample in enumerate(_rows(file)):
                number += 1
                name = f"{row:08d}" if sample["key"] in (None, "") else str(sample["key"])
                key = keys.claim(sample_key(name), f"{name} {row}")
                if number <= start:
                    continue
                data = sample["image"]
                if not data:
                    data = "no image bytes in this row"
                elif len(data) > MAX_IMAGE_BYTES:
                    data = f"image of {len(data)} bytes, the limit is {MAX_IMAGE_BYTES}"
                yield SourceImage(
                    name=f"{_printable(str(relative))} row {row}",
                    key=f"{prefix}/{key}",
                    extension=_extension(data) if isinstance(data, bytes) else "",
                    data=data,
                    label=sample["label"],
                    caption=sample["caption"],
                )


def open_source(location: str | Path) -> FolderSource | ParquetSource:
    """Look at a folder of images, a Parquet file, or a folder of these.

    A folder with image files is a tree of images, whatever else is in it.

    Raises:
        FileNotFoundError: nothing there, or no image and no Parquet file in it.
        ValueError: a Parquet file that holds no images.
    """
    root = local_folder(location)
    if root.is_file() and root.suffix == ".parquet":
        return ParquetSource.of(root.parent, [root])
    if not root.is_dir():
        raise FileNotFoundError(
            f"{location}: no such folder or .parquet file; give a folder of images, a Parquet "
            "file, or a folder of these"
        )
    source = FolderSource.of(root)
    if source.has_images():
        return source
    files = sorted(file for file in root.rglob("*.parquet") if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"{location}: neither images ({', '.join(IMAGE_EXTENSIONS)}) nor .parquet files in "
            "this folder"
        )
    return ParquetSource.of(root, files)


def _printable(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _has_image_name(name: str) -> bool:
    stem, _, extension = name.rpartition(".")
    return bool(stem) and extension.lower() in IMAGE_EXTENSIONS


def _read_file(path: Path) -> bytes | str:
    """The bytes of an image file, or why it is not one."""
    try:
        # Asked before it is opened: opening a pipe would wait for a writer.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        if status.st_size > MAX_IMAGE_BYTES:
            return f"file of {status.st_size} bytes, the limit is {MAX_IMAGE_BYTES}"
        return path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _extension(data: bytes) -> str:
    """The extension of encoded bytes; jpg where they are of no known kind and will be skipped."""
    return next((name for signature, name in _SIGNATURES if signature.match(data)), "jpg")


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        # A row group is read piece by piece, not whole.
        return pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: not a readable Parquet file ({error}); write it again or leave it out"
        ) from error


def _columns(path: Path, schema: pa.Schema) -> dict[str, str | None]:
    """Return the names of the columns that hold image, key, label and caption."""
    image = _column(schema, IMAGE_COLUMNS, _is_image)
    if image is None:
        raise ValueError(
            f"{path}: no column of image bytes; one of {', '.join(IMAGE_COLUMNS)} must be binary "
            f"or struct<bytes: binary>, the columns are {', '.join(schema.names)}"
        )
    return {
        "image": image,
        "key": _column(schema, _KEY_COLUMNS, lambda kind: _is_text(kind) or _is_integer(kind)),
        "label": _column(schema, _LABEL_COLUMNS, _is_integer),
        "caption": _column(schema, _CAPTION_COLUMNS, _is_text),
    }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield image, key, label and caption of every row, None where there is no such column."""
    parquet = _open_parquet(path)
    columns = _columns(path, parquet.schema_arrow)
    nested = pa.types.is_struct(parquet.schema_arrow.field(columns["image"]).type)
    leaves = [
        f"{name}.bytes" if nested and role == "image" else name
        for role, name in columns.items()
        if name is not None
    ]
    try:
        for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH, columns=leaves):
            for row in batch.to_pylist():
                sample = {role: row[name] if name else None for role, name in columns.items()}
                if nested and sample["image"] is not None:
                    sample["image"] = sample["image"]["bytes"]
                yield sample
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet file ({error}); write it again") from error


def _column(schema: pa.Schema, names: tuple[str, ...], fits: Any) -> str | None:
    return next(
        (name for name in names if name in schema.names and fits(schema.field(name).type)), None
    )


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind)


def _class_names(parquet: pq.ParquetFile) -> list[str]:
    """Names of the classes that `datasets` notes in the metadata of its files; empty for none."""
    note = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"null")
    try:
        features = json.loads(note)["info"]["features"]
        names = next(features[name]["names"] for name in _LABEL_COLUMNS if name in features)
    except (ValueError, TypeError, KeyError, StopIteration):
        return []
    return [str(name) for name in names]
