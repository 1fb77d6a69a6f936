"""Reading a latent cache: image by image, in batches, or as the corpus of a training's plan.

The format is described in latent_units.py and latent_manifest.py. Of a unit only the table in front
of its latents is read, once, and then the latents that are asked for, neighbours in one read.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pipelines.caching.manifest import LatentManifest, read_index, read_manifest
from pipelines.caching.units import DTYPES, UNITS, CacheIdentity, LatentRow, read_header, read_keys
from pipelines.corpus import SampleRecords, read_samples
from pipelines.order import sample_order
from pipelines.reading.shards import open_ranges
from vitok.patches import grid_size
from vitok.storage import Folder

__all__ = ["LatentCache", "LatentManifest", "LatentRow", "LatentStream"]

# Neighbours stay together in a shuffled order, so that they are read in one request.
CHUNK_LATENTS = 16
# From a store, so many units are asked at the same time.
_STORE_THREADS = 16
_FLOOR = 1e-6  # a channel that never changes is not divided by less


class LatentCache(Dataset[LatentRow]):
    """A finished cache: a map-style Dataset, and what a Plan takes for its corpus.

    Latents are numbered 0 .. num_samples - 1 through all units, in the order of the corpus that was
    encoded; in a unit all images come at the first size, then mirrored, then at the next size. It
    can be sent to other processes, and used by several threads.

    Args:
        location: folder or `s3://` prefix.
        encoder_digest: refuse the cache of another encoder.
        texts: read the texts too, where the cache has some.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: it is of another encoder, or damaged.
    """

    def __init__(
        self, location: str, encoder_digest: str | None = None, *, texts: bool = True
    ) -> None:
        self._with_texts = texts
        self.folder = Folder.of(location)
        self.manifest = read_manifest(self.folder)
        found = self.identity.encoder_digest
        if encoder_digest is not None and encoder_digest != found:
            raise ValueError(
                f"{self.folder.uri} holds latents of the encoder {found[:12]}, not of "
                f"{encoder_digest[:12]}; encode again, or use the model that made them"
            )
        index = read_index(self.folder, self.manifest)
        self.unit_names: list[str] = index["name"].to_pylist()
        self.num_bytes_per_shard: NDArray[np.int64] = index["num_bytes"].to_numpy()
        self._table_bytes: NDArray[np.int64] = index["table_bytes"].to_numpy()
        # [units + 1]: number of each unit's first latent, closed by that of all.
        self.first_sample = np.append(index["first_latent"].to_numpy(), self.manifest.num_latents)

    @property
    def identity(self) -> CacheIdentity:
        """What the cache is of."""
        return self.manifest.identity

    @cached_property
    def uris(self) -> list[str]:
        """Where the units lie."""
        return [f"{self.folder.uri}/{UNITS}/{name}.safetensors" for name in self.unit_names]

    @property
    def num_samples(self) -> int:
        """Latents: every image at every size, mirrored or not."""
        return self.manifest.num_latents

    @property
    def digest(self) -> str:
        """sha256 (hex) of the index: the order of latents follows from it."""
        return self.manifest.index_sha256

    @property
    def location(self) -> str:
        """Where the cache lies, for messages."""
        return self.folder.uri

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> LatentRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LatentRow]:
        """Read several latents at once; DataLoader asks for a batch in this way."""
        return self.read(self.records(np.asarray(indices, np.int64)))

    def __iter__(self) -> Iterator[LatentRow]:
        for start in range(0, len(self), CHUNK_LATENTS):
            yield from self.__getitems__(range(start, min(start + CHUNK_LATENTS, len(self))))

    def order(
        self, start: int, count: int, *, chunk_samples: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the latents at places start to start + count of the endless shuffled stream.

        Returns:
            (epoch, number) of each, int64 [count].
        """
        return sample_order(
            np.arange(start, start + count, dtype=np.int64),
            num_samples=self.num_samples,
            chunk_samples=chunk_samples,
            seed=seed,
        )

    def epochs(self, num_images: int) -> dict[str, float]:
        """Return how often the cache was used after so many latents."""
        return {"": num_images / self.num_samples}

    def records(self, sample_ids: NDArray[np.int64]) -> SampleRecords:
        """Return where latents lie and what is known of them, in the order given.

        Width and height are those of the image that was encoded: cut into patches, its grid is
        that of the latent. Offset and length are bytes in the unit's file, and shard is the unit.
        """
        sample_ids = np.asarray(sample_ids, np.int64)
        outside = sample_ids[(sample_ids < 0) | (sample_ids >= len(self))]
        if outside.size:
            raise IndexError(f"image {outside[0]} of a cache of {len(self)}")
        unit = np.searchsorted(self.first_sample, sample_ids, side="right") - 1
        place = sample_ids - self.first_sample[unit]
        tables = self._tables(unit)
        rows = [(tables[u], i) for u, i in zip(unit.tolist(), place.tolist(), strict=True)]
        size = np.array([table.image_size[i] for table, i in rows]).reshape(-1, 2)
        bounds = np.array([table.offsets[i : i + 2] for table, i in rows]).reshape(-1, 2)
        num_bytes = bounds * self.identity.bytes_per_token
        key = np.empty(len(rows), dtype=object)
        key[:] = [table.keys[i] for table, i in rows]
        return SampleRecords(
            sample_id=sample_ids,
            shard=unit,
            key=key,
            offset=self._table_bytes[unit] + num_bytes[:, 0],
            length=num_bytes[:, 1] - num_bytes[:, 0],
            width=size[:, 1].astype(np.int32),
            height=size[:, 0].astype(np.int32),
            label=np.array([table.label[i] for table, i in rows], np.int64),
        )

    def read(self, records: SampleRecords) -> list[LatentRow]:
        """Read the latents of records, in their order.

        Raises:
            OSError: a unit is missing or cut off, or the store failed.
        """
        data = self._read_bytes(records)
        variants = self._variants(records)
        identity = self.identity
        texts: Sequence[Tensor | None] = [None] * len(records)
        if identity.text is not None and self._with_texts:
            texts = self.read_texts(records)
        rows = []
        for i, values in enumerate(data):
            size = int(records.height[i]), int(records.width[i])
            tokens = torch.frombuffer(bytearray(values), dtype=DTYPES[identity.dtype])
            tokens = tokens.reshape(-1, identity.values_per_token)
            latent, log_variance = tokens, None
            if identity.log_variance:
                latent, log_variance = tokens.split(identity.channels, dim=1)
            rows.append(
                LatentRow(
                    key=str(records.key[i]),
                    latent=latent,
                    grid=grid_size(*size, identity.patch_size),
                    image_size=size,
                    label=int(records.label[i]),
                    transform=variants[i][0],
                    flipped=bool(variants[i][1]),
                    log_variance=log_variance,
                    text=texts[i],
                )
            )
        return rows

    def read_texts(self, records: SampleRecords) -> list[Tensor | None]:
        """Read the embeddings [K, D] of the texts of records, in their order; None for no text.

        Raises:
            OSError: a unit is missing or cut off, or the store failed.
        """
        identity = self.identity
        assert identity.text is not None, f"{self.location} has no texts"
        tables = self._tables(records.shard)
        place = records.sample_id - self.first_sample[records.shard]
        rows = zip(records.shard.tolist(), place.tolist(), strict=True)
        bounds = np.array([tables[unit].text_bytes[i] for unit, i in rows]).reshape(-1, 2)
        of_texts = replace(records, offset=bounds[:, 0], length=bounds[:, 1] - bounds[:, 0])
        texts: list[Tensor | None] = [None] * len(records)
        there = np.flatnonzero(of_texts.length).tolist()
        for i, data in zip(there, self._read_bytes(of_texts.take(there)), strict=True):
            values = torch.frombuffer(bytearray(data), dtype=DTYPES[identity.dtype])
            texts[i] = values.reshape(-1, identity.text.channels)
        return texts

    def uri(self, shard: int) -> str:
        """Return where a unit lies."""
        return f"{self.folder.uri}/{UNITS}/{self.unit_names[shard]}.safetensors"

    def normalize(self, latent: Tensor) -> Tensor:
        """Give a latent [..., c] mean 0 and variance 1 in every channel, over the whole cache."""
        mean, std = self._statistics(latent)
        return (latent.float() - mean) / std

    def denormalize(self, latent: Tensor) -> Tensor:
        """Undo normalize."""
        mean, std = self._statistics(latent)
        return latent.float() * std + mean

    def _statistics(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.identity.channels
        mean = torch.tensor(self.manifest.mean[:channels], device=latent.device)
        std = torch.tensor(self.manifest.std[:channels], device=latent.device)
        return mean, std.clamp(min=_FLOOR)

    def _tables(self, units: NDArray[np.int64]) -> "dict[int, _Table]":
        wanted = np.unique(units).tolist()

        def load(unit: int) -> _Table:
            return _load_table(
                self.uri(unit),
                int(self.num_bytes_per_shard[unit]),
                int(self._table_bytes[unit]),
                int(self.first_sample[unit + 1] - self.first_sample[unit]),
            )

        if self.folder.is_local or len(wanted) == 1:
            return {unit: load(unit) for unit in wanted}
        with ThreadPoolExecutor(_STORE_THREADS) as pool:
            return dict(zip(wanted, pool.map(load, wanted), strict=True))

    def _read_bytes(self, records: SampleRecords) -> list[bytes]:
        units = np.unique(records.shard)
        if self.folder.is_local or len(units) < 2:
            return read_samples(self, records)
        parts = [np.flatnonzero(records.shard == unit).tolist() for unit in units]
        data = [b""] * len(records)
        with ThreadPoolExecutor(_STORE_THREADS) as pool:
            found = pool.map(lambda part: read_samples(self, records.take(part)), parts)
            for part, values in zip(parts, found, strict=True):
                for place, value in zip(part, values, strict=True):
                    data[place] = value
        return data

    def _variants(self, records: SampleRecords) -> list[Any]:
        if self.identity.num_variants == 1:
            return [(0, 0)] * len(records)
        tables = self._tables(records.shard)
        place = records.sample_id - self.first_sample[records.shard]
        pairs = zip(records.shard.tolist(), place.tolist(), strict=True)
        return [tables[unit].variant[i].tolist() for unit, i in pairs]


class LatentStream(IterableDataset[list[LatentRow]]):
    """The cache as an endless stream of batches, shuffled anew in every epoch.

    What comes when is a function of cache, seed and global batch: rank r of the world gets rows
    r * batch_size to (r + 1) * batch_size of each global batch, and however many processes a
    DataLoader(stream, batch_size=None, num_workers=...) has, it hands the batches out in order.

    Args:
        batch_size: latents of one rank's batch.
        cursor: {"images": n}, where to begin: behind so many latents of all ranks; see cursor().
        chunk_latents: neighbours that stay together.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: dict[str, int] | None = None,
        chunk_latents: int = CHUNK_LATENTS,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"{rank=} must be one of 0 to {world_size - 1}, as {world_size=}")
        if min(batch_size, chunk_latents) < 1:
            raise ValueError(f"{batch_size=} and {chunk_latents=} must be at least 1")
        if len(cache) == 0:
            raise ValueError(f"{cache.location} holds no latents; encode images that are readable")
        self.cache = cache
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._seed, self._chunk_latents = seed, chunk_latents
        self._first = (cursor or {"images": 0})["images"]

    def cursor(self, num_batches: int) -> dict[str, int]:
        """Return where the stream stands after every rank took so many batches of it."""
        return {"images": self._first + num_batches * self._batch_size * self._world_size}

    def __iter__(self) -> Iterator[list[LatentRow]]:
        process = get_worker_info()
        number, step = (process.id, process.num_workers) if process else (0, 1)
        while True:
            start = self.cursor(number)["images"] + self._rank * self._batch_size
            _, latents = self.cache.order(
                start, self._batch_size, chunk_samples=self._chunk_latents, seed=self._seed
            )
            yield self.cache.__getitems__(latents.tolist())
            number += step


@dataclass(frozen=True, eq=False)
class _Table:
    """What a unit says of its rows, in front of the latents; see latent_units.make_unit.

    text_bytes [n, 2]: the text of row i is bytes text_bytes[i, 0] to text_bytes[i, 1] of the file.
    """

    keys: list[str]
    offsets: NDArray[np.int64]
    image_size: NDArray[np.int64]
    label: NDArray[np.int64]
    variant: NDArray[np.int64]
    text_bytes: NDArray[np.int64]


# A table of 512 rows takes about 100 KB.
@lru_cache(maxsize=512)
def _load_table(uri: str, num_bytes: int, table_bytes: int, num_latents: int) -> _Table:
    """Read what lies in front of a unit's latents, in one request.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with open_ranges(uri, num_bytes) as read:
        data = bytes(read(0, table_bytes))
    try:
        header = read_header(data)
        # The values lie behind the header, and this behind its length.
        begin = 8 + int.from_bytes(data[:8], "little")
        tensors = memoryview(data)[begin:]

        def array(name: str) -> NDArray[np.int64]:
            start, stop = header[name]["data_offsets"]
            return np.frombuffer(tensors[start:stop], np.int64).reshape(header[name]["shape"])

        keys = read_keys(data)
        text_bytes = np.zeros((len(keys), 2), np.int64)
        if "text" in header:
            start, stop = header["text"]["data_offsets"]
            num_tokens = max(1, header["text"]["shape"][0])
            bounds = _bounds_of_images(keys, array("text_offsets"))
            text_bytes = begin + start + bounds * ((stop - start) // num_tokens)
        table = _Table(
            keys=keys,
            offsets=array("offsets"),
            image_size=array("image_size"),
            label=array("label"),
            variant=array("variant"),
            text_bytes=text_bytes,
        )
        if not len(table.keys) == len(table.label) == len(table.offsets) - 1 == num_latents:
            raise ValueError(f"{len(table.keys)} rows instead of {num_latents}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{uri} is damaged: {error}; `vitok latents verify` finds all that is, and says what "
            "to do"
        ) from error
    return table


def _bounds_of_images(keys: list[str], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the offsets [n, 2] around what each row has in common with the rows of its image."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    image = np.array([numbers[key] for key in keys], np.int64)
    return np.stack([offsets[image], offsets[image + 1]], axis=1)
