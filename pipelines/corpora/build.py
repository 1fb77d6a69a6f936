"""Writing a collection of images as WebDataset shards, their bytes unchanged.

The shards are collected in a folder beside the one they are meant for, `DST.unfinished`, which
becomes it at the end. Its build.json is the report up to the last complete shard: from there a
build that was interrupted goes on.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from pipelines.corpora.image_sources import FolderSource, ParquetSource, SourceImage, open_source
from pipelines.corpus import refuse_existing, write_shards
from pipelines.reading.decode import UnreadableImage, image_size

_TAR_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What decides the bytes of the shards, beside the images.

    Attributes:
        source: absolute path of the images.
        num_images: how many there are.
        shard_mb: a shard is closed before it has more than so many 10^6 bytes.
        samples_per_shard: a shard is closed after so many samples too; 0 for no limit.
        labels: write labels, where the source has some.
        prefix: first part of the shards' names.
    """

    source: str
    num_images: int
    shard_mb: int
    samples_per_shard: int
    labels: bool
    prefix: str

    def __post_init__(self) -> None:
        if self.shard_mb < 1:
            raise ValueError(f"shard_mb={self.shard_mb} must be at least 1")
        if self.samples_per_shard < 0:
            raise ValueError(
                f"samples_per_shard={self.samples_per_shard} must be at least 1, or 0 for no limit"
            )
        if not re.fullmatch("[A-Za-z0-9_-]+", self.prefix):
            raise ValueError(f"prefix={self.prefix!r} must be letters, digits, - and _")


@dataclass(kw_only=True)
class BuildReport:
    """What a build did; beside the shards as build.json.

    Attributes:
        num_read: images of the source that were looked at.
        num_shards, num_samples: what was written.
        num_bytes: bytes of the images in it.
        num_classes: classes that the labels number; 0 if there are no labels.
        num_others: files of the source that were passed over for their extension.
        skipped: (number, name, reason) of the images that cannot be used.
    """

    options: BuildOptions
    num_read: int = 0
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    num_classes: int = 0
    num_others: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)


def build_corpus(
    source: str | Path,
    path: str | Path,
    *,
    shard_mb: int = 256,
    samples_per_shard: int = 0,
    labels: bool = True,
    prefix: str = "shard",
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Write the images of a source as shards PREFIX-000000.tar, ... in a folder.

    The same source gives the same bytes. Labels go to `.cls`, captions to `.json`, the names of
    the classes, by their number, to classes.json. Of every image the header is read; what has none
    is skipped. Holds two images in memory at most, or a few rows of a Parquet file. The folder
    appears complete or not at all; the same call goes on with what was interrupted.

    Args:
        source: as open_source takes it.
        path: folder of the shards; there must be none, or an empty one.
        shard_mb, samples_per_shard, labels, prefix: as in BuildOptions.
        progress: gets (images done, images).

    Raises:
        FileNotFoundError: there is no such source.
        FileExistsError: there is something at the path already, or the beginning of another build.
        ValueError: an option outside its range, or no image that can be used.
    """
    images = open_source(source)
    path = refuse_existing(path, "shards")
    root = Path(source).expanduser().absolute()
    if path.is_relative_to(root):
        raise ValueError(f"{path} lies inside the source {root}; write the shards elsewhere")
    num_images, num_others = images.count()
    options = BuildOptions(
        source=str(root),
        num_images=num_images,
        shard_mb=shard_mb,
        samples_per_shard=samples_per_shard,
        labels=labels,
        prefix=prefix,
    )
    unfinished = path.with_name(f"{path.name}.unfinished")
    report = _load_report(unfinished, options)
    skipped = report.skipped
    samples = _samples(images, options, report.num_read, skipped, progress)
    for number, members in groupby(
        _shard_numbers(samples, options, report.num_shards), lambda member: member[0]
    ):
        content = _count(((position, sample) for _, position, sample in members), report)
        [shard] = write_shards(content, unfinished / "writing", prefix, sys.maxsize)
        os.replace(shard, unfinished / f"{prefix}-{number:06d}.tar")
        report.num_shards += 1
        # The shard's end was found by looking further, at images that are not in it.
        report.skipped = [entry for entry in skipped if entry[0] < report.num_read]
        _save(unfinished, report)
    report.num_read, report.num_others, report.skipped = num_images, num_others, skipped
    if report.num_samples == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        listed = "; ".join(f"{name}: {reason}" for _, name, reason in skipped[:10])
        raise ValueError(f"{source}: none of {num_images} images can be used; {listed}")
    if labels and images.classes:
        report.num_classes = len(images.classes)
        (unfinished / "classes.json").write_text(json.dumps(images.classes, indent=1) + "\n")
    _save(unfinished, report)
    shutil.rmtree(unfinished / "writing", ignore_errors=True)
    os.replace(unfinished, path)
    return report


def _load_report(unfinished: Path, options: BuildOptions) -> BuildReport:
    """Return how far a build of these options is."""
    note = unfinished / "build.json"
    if not note.is_file():
        return BuildReport(options=options)
    document = json.loads(note.read_text())
    if document["options"] != asdict(options):
        raise FileExistsError(
            f"{unfinished} holds the beginning of a build with {document['options']}, this one has "
            f"{asdict(options)}; remove it, or repeat that build"
        )
    skipped = [(number, name, reason) for number, name, reason in document["skipped"]]
    return BuildReport(**document | {"options": options, "skipped": skipped})


def _save(unfinished: Path, report: BuildReport) -> None:
    part = unfinished / "build.json.part"
    part.write_text(json.dumps(asdict(report), indent=1) + "\n")
    os.replace(part, unfinished / "build.json")


def _samples(
    images: FolderSource | ParquetSource,
    options: BuildOptions,
    start: int,
    skipped: list[tuple[int, str, str]],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, dict]]:
    """Yield (number in the source, sample for write_shards), and add to skipped what is none."""
    for number, image in enumerate(images.images(start), start=start):
        if progress is not None:
            progress(number + 1, options.num_images)
        try:
            sample = _sample(image, options.labels)
        except UnreadableImage as error:
            skipped.append((number, image.name, str(error)))
        else:
            yield number, sample


def _sample(image: SourceImage, labels: bool) -> dict:
    """Return an image as write_shards takes it.

    Raises:
        UnreadableImage: it is no image, or too large.
    """
    if isinstance(image.data, str):
        raise UnreadableImage(image.data)
    image_size(image.data)
    sample: dict = {"__key__": image.key, image.extension: image.data}
    if labels and image.label is not None:
        sample["cls"] = image.label
    if image.caption is not None:
        sample["json"] = {"caption": image.caption}
    return sample


def _shard_numbers(
    samples: Iterable[tuple[int, dict]], options: BuildOptions, first: int
) -> Iterator[tuple[int, int, dict]]:
    """Put the number of the shard into which a sample goes before it."""
    shard, num_samples, num_bytes = first, 0, 0
    for number, sample in samples:
        # Labels and captions have a block; images as many as they fill, and all a header.
        size = sum(
            _TAR_BLOCK * (1 + -(-len(value) // _TAR_BLOCK) if isinstance(value, bytes) else 2)
            for extension, value in sample.items()
            if extension != "__key__"
        )
        full = num_bytes + size > options.shard_mb * 10**6
        if num_samples and (full or num_samples == options.samples_per_shard):
            shard, num_samples, num_bytes = shard + 1, 0, 0
        num_samples += 1
        num_bytes += size
        yield shard, number, sample


def _count(members: Iterable[tuple[int, dict]], report: BuildReport) -> Iterator[dict]:
    """Hand samples on to be written, and say so in the report."""
    for number, sample in members:
        report.num_read = number + 1
        report.num_samples += 1
        report.num_bytes += sum(len(value) for value in sample.values() if isinstance(value, bytes))
        yield sample
