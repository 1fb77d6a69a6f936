"""A corpus: one manifest, or a weighted mixture of several under one numbering of samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus import Manifest, SampleRecords, read_samples
from pipelines.order import mixture_places, mixture_shares, sample_order
from pipelines.reading.decode import UnreadableImage, decode_adm_square, decode_rgb
from pipelines.views import SampleView, Texts, write_patches
from vitok.config import config


@config
class Source:
    """One part of a mixture.

    Attributes:
        name: what logs call it.
        manifest: folder that `vitok corpus index` wrote.
        weight: its share of the images of a training, in proportion to the other weights, whatever
            its size: a small source begins its next epoch sooner.
    """

    name: str
    manifest: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} of a source must be a plain name")
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} of {self.name} must be positive; leave it out")


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Manifests in a row: samples and shards are numbered through all of them.

    Attributes:
        names: of the sources; a single one needs none.
        manifests: of the sources.
        shares: positions of each source in every block of the mixture, see `mixture_shares`.
    """

    names: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    shares: tuple[int, ...]
    resizes: ClassVar[bool] = True
    text_bytes: ClassVar[int] = 0

    @classmethod
    def of(cls, manifest: Manifest) -> "Corpus":
        """Return the corpus of one manifest."""
        return cls(names=("",), manifests=(manifest,), shares=tuple(mixture_shares([1.0])))

    @classmethod
    def mix(cls, sources: Sequence[Source]) -> "Corpus":
        """Load the manifests of a mixture.

        Raises:
            FileNotFoundError: a manifest is not there.
            ValueError: a name is used twice, or a weight is too small to count.
        """
        names = tuple(source.name for source in sources)
        if len(set(names)) < len(names):
            raise ValueError(f"the sources {', '.join(names)} need different names")
        return cls(
            names=names,
            manifests=tuple(Manifest.load(source.manifest) for source in sources),
            shares=tuple(mixture_shares([source.weight for source in sources])),
        )

    @cached_property
    def first_sample(self) -> NDArray[np.int64]:
        """[sources + 1]: number of each source's first sample, closed by that of all samples."""
        return np.cumsum([0, *(manifest.num_samples for manifest in self.manifests)])

    @cached_property
    def first_shard(self) -> NDArray[np.int64]:
        """[sources + 1]: number of each source's first shard, closed by that of all shards."""
        return np.cumsum([0, *(len(manifest.uris) for manifest in self.manifests)])

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return int(self.first_sample[-1])

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the manifests and shares: the order of samples follows from it."""
        if len(self.manifests) == 1:
            return self.manifests[0].digest
        digest = hashlib.sha256()
        for manifest, share in zip(self.manifests, self.shares, strict=True):
            digest.update(f"{manifest.digest} {share}\n".encode())
        return digest.hexdigest()

    @property
    def location(self) -> str:
        """Where the manifests lie, for messages."""
        return ", ".join(str(manifest.path) for manifest in self.manifests)

    def order(
        self, start: int, count: int, *, chunk_samples: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the samples at places start to start + count of the endless training stream.

        Returns:
            (epoch of its source, sample) of each, int64 [count].
        """
        source, place = mixture_places(start, count, shares=self.shares, seed=seed)
        epochs, samples = np.empty_like(place), np.empty_like(place)
        for number, manifest in enumerate(self.manifests):
            here = source == number
            epochs[here], found = sample_order(
                place[here],
                num_samples=manifest.num_samples,
                chunk_samples=chunk_samples,
                seed=seed,
                source=number,
            )
            samples[here] = found + self.first_sample[number]
        return epochs, samples

    def epochs(self, num_images: int) -> dict[str, float]:
        """Return how often each source was used after so many images, by its name."""
        total = sum(self.shares)
        return {
            name: num_images * share / total / manifest.num_samples
            for name, manifest, share in zip(self.names, self.manifests, self.shares, strict=True)
        }

    def records(self, sample_ids: NDArray[np.int64]) -> SampleRecords:
        """Return the records of samples, in the order given."""
        sample_ids = np.asarray(sample_ids, np.int64)
        if len(self.manifests) == 1:
            return self.manifests[0].records(sample_ids)
        source = np.searchsorted(self.first_sample, sample_ids, side="right") - 1
        order = np.argsort(source, kind="stable")
        parts = []
        for number, manifest in enumerate(self.manifests):
            mine = sample_ids[order][source[order] == number] - self.first_sample[number]
            found = vars(manifest.records(mine))
            found |= {
                "sample_id": found["sample_id"] + self.first_sample[number],
                "shard": found["shard"] + self.first_shard[number],
            }
            parts.append(SampleRecords(**found))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        joined = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(SampleRecords)
        }
        return SampleRecords(**joined).take(back.tolist())

    def read(self, records: SampleRecords) -> list[bytes]:
        """Read the encoded images of records, in their order; see `read_samples`."""
        if len(self.manifests) == 1:
            return read_samples(self.manifests[0], records)
        source = np.searchsorted(self.first_shard, records.shard, side="right") - 1
        images = [b""] * len(records)
        for number, manifest in enumerate(self.manifests):
            mine = np.flatnonzero(source == number).tolist()
            part = records.take(mine)
            part = replace(part, shard=part.shard - self.first_shard[number])
            for place, image in zip(mine, read_samples(manifest, part), strict=True):
                images[place] = image
        return images

    def uri(self, shard: int) -> str:
        """Return where a shard lies."""
        source = int(np.searchsorted(self.first_shard, shard, side="right")) - 1
        return self.manifests[source].uris[shard - int(self.first_shard[source])]

    def texts(self, records: SampleRecords) -> Texts | None:
        """Return None: what trains on images needs no texts."""
        return None

    def show(
        self, sample: bytes, views: Sequence[SampleView]
    ) -> dict[SampleView, NDArray[np.uint8] | UnreadableImage]:
        """Decode an encoded image to what each view sees of it: pixels [H, W, 3]."""
        shown: dict[SampleView, NDArray[np.uint8] | UnreadableImage] = {}
        decoded: dict[tuple[Any, ...], NDArray[np.uint8] | UnreadableImage] = {}
        for view in views:
            part = view.crop, view.size, view.adm
            if part not in decoded:
                try:
                    decoded[part] = (
                        decode_adm_square(sample, view.size[0])
                        if view.adm
                        else decode_rgb(sample, crop=view.crop, size=view.size)
                    )
                except UnreadableImage as error:
                    decoded[part] = error
            pixels = decoded[part]
            is_mirrored = view.flip and isinstance(pixels, np.ndarray)
            shown[view] = pixels[:, ::-1] if is_mirrored else pixels
        return shown

    def token_format(self, patch_size: int) -> tuple[int, np.dtype[Any]]:
        """Return the values of a patch, and their type."""
        return 3 * patch_size**2, np.dtype(np.uint8)

    def write(self, shown: NDArray[np.uint8], tokens: NDArray[np.uint8], patch_size: int) -> None:
        """Cut pixels into patches, in their place in a row."""
        write_patches(shown, tokens, patch_size)
