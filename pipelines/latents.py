"""The latent cache on disk: units of ragged latents, their commit records, one manifest.

    CACHE/cache.json               what the cache is of: encoder digest, transform, its digest
    CACHE/units/NAME.safetensors   latents [sum N, c], offsets [n+1], grid, image_size, label
    CACHE/units/NAME.json          commit record; a unit without one does not exist
    CACHE/manifest.json            all of it: units in order, counts, exact statistics

NAME is a function of the input shard's digest, the slice of it, the encoder and the transform.
"""

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipelines.whole_images import Transform
from vitok.config import config, describe_difference, parse_json, to_dict
from vitok.storage import Folder

CACHE_FILE = "cache.json"
MANIFEST_FILE = "manifest.json"
UNITS = "units"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@config
class CacheIdentity:
    """What all units of a cache have in common.

    Attributes:
        encoder_digest: of the encoder's weights.
        transform: how images were prepared.
        patch_size: pixels along each side of a patch.
        dtype: of the stored latents.
        channels: c of a latent.
        row_tokens: of the packed rows that were encoded; kernels may round differently at another.
    """

    encoder_digest: str
    transform: Transform
    patch_size: int
    dtype: str
    channels: int
    row_tokens: int

    def unit_name(self, shard_digest: str, start: int, stop: int) -> str:
        """Return the name of the unit that holds samples start to stop of an input shard."""
        transform = json.dumps(to_dict(self.transform), sort_keys=True)
        parts = (shard_digest, start, stop, self.encoder_digest, transform, self.patch_size)
        parts += (self.dtype, self.row_tokens)
        return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:40]


@config
class UnitRecord:
    """The commit record of one unit.

    Attributes:
        name: of the unit.
        num_images, num_tokens: in it.
        num_bytes, sha256: of its file.
        channel_sum, channel_square_sum: float64 moments of its latents, for each channel.
        skipped: (key, reason) of the samples that were unreadable.
    """

    name: str
    num_images: int
    num_tokens: int
    num_bytes: int
    sha256: str
    channel_sum: tuple[float, ...]
    channel_square_sum: tuple[float, ...]
    skipped: tuple[tuple[str, str], ...]


@config
class LatentManifest:
    """All of a cache.

    Attributes:
        identity: encoder, transform and dtype.
        source_digest: of the corpus manifest.
        mean, std: of every channel over all tokens.
        units: in the order of the corpus.
    """

    identity: CacheIdentity
    source_digest: str
    num_images: int
    num_tokens: int
    num_bytes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    units: tuple[UnitRecord, ...]


@dataclass(frozen=True)
class LatentRow:
    """One image's latent.

    Attributes:
        key: of the image in its corpus.
        latent: [N, c], row-major over the grid.
        grid: (rows, columns), N = rows * columns.
        image_size: pixels (height, width) that were encoded.
        label: class, -1 for none.
    """

    key: str
    latent: Tensor
    grid: tuple[int, int]
    image_size: tuple[int, int]
    label: int


def write_unit(
    cache: Folder,
    name: str,
    rows: Sequence[LatentRow],
    channels: int,
    dtype: torch.dtype,
    skipped: Sequence[tuple[str, str]],
) -> UnitRecord:
    """Write one unit and commit it; the same rows give the same bytes."""
    latents = torch.cat([row.latent for row in rows]) if rows else torch.empty(0, channels)
    latents = latents.to(dtype)
    lengths = torch.tensor([len(row.latent) for row in rows], dtype=torch.int64)
    tensors = {
        "latents": latents,
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "grid": torch.tensor([row.grid for row in rows], dtype=torch.int32).reshape(-1, 2),
        "image_size": torch.tensor([row.image_size for row in rows], dtype=torch.int32).reshape(
            -1, 2
        ),
        "label": torch.tensor([row.label for row in rows], dtype=torch.int64),
        # Keys as bytes, so that any reader of safetensors finds them among the tensors.
        "keys": _encode_keys([row.key for row in rows]),
    }
    data = save(tensors)
    values = latents.double()
    record = UnitRecord(
        name=name,
        num_images=len(rows),
        num_tokens=len(latents),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        channel_sum=tuple(values.sum(0).tolist()),
        channel_square_sum=tuple(values.square().sum(0).tolist()),
        skipped=tuple(skipped),
    )
    units = cache.child(UNITS)
    units.write_bytes(f"{name}.safetensors", data)
    units.write_text(f"{name}.json", json.dumps(to_dict(record)))
    return record


def read_record(cache: Folder, name: str) -> UnitRecord:
    """Read the commit record of a unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        ValueError: the record is damaged.
    """
    text = cache.child(UNITS).read_bytes(f"{name}.json").decode()
    return parse_json(UnitRecord, text, f"{cache.uri}/{UNITS}/{name}.json")


def committed_units(cache: Folder) -> set[str]:
    """Return the names of the units that have a commit record."""
    return {
        name.removesuffix(".json") for name in cache.child(UNITS).names() if name.endswith(".json")
    }


def claim_cache(cache: Folder, identity: CacheIdentity) -> None:
    """Note in a new cache's folder what it is of, or check that the cache there is of the same.

    Raises:
        ValueError: it is another cache; the differences are listed.
    """
    found = _read_identity(cache)
    if found is None:
        cache.write_text(CACHE_FILE, json.dumps(to_dict(identity), indent=2) + "\n")
    elif differences := describe_difference(found, identity):
        raise ValueError(
            f"{cache.uri} holds another cache ({'; '.join(differences)}); choose another folder"
        )


def _read_identity(cache: Folder) -> CacheIdentity | None:
    text = cache.read_text(CACHE_FILE)
    return parse_json(CacheIdentity, text, f"{cache.uri}/{CACHE_FILE}") if text else None


def _merge(
    identity: CacheIdentity, source_digest: str, records: Sequence[UnitRecord]
) -> LatentManifest:
    """Merge the commit records of a cache, in the order of the corpus.

    Moments are added in float64 in that order, whoever computed them and when.
    """
    count = sum(record.num_tokens for record in records)
    total = torch.zeros(identity.channels, dtype=torch.float64)
    squares = torch.zeros(identity.channels, dtype=torch.float64)
    for record in records:
        total += torch.tensor(record.channel_sum, dtype=torch.float64)
        squares += torch.tensor(record.channel_square_sum, dtype=torch.float64)
    mean = total / max(1, count)
    std = (squares / max(1, count) - mean.square()).clamp(min=0).sqrt()
    return LatentManifest(
        identity=identity,
        source_digest=source_digest,
        num_images=sum(record.num_images for record in records),
        num_tokens=count,
        num_bytes=sum(record.num_bytes for record in records),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        units=tuple(records),
    )


def write_manifest(
    cache: Folder, identity: CacheIdentity, source_digest: str, records: Sequence[UnitRecord]
) -> LatentManifest:
    """Write the manifest over all commit records: from here on the cache can be read."""
    manifest = _merge(identity, source_digest, records)
    cache.write_text(MANIFEST_FILE, json.dumps(to_dict(manifest), indent=1) + "\n")
    return manifest


class LatentCache:
    """A finished cache, read image by image.

    Args:
        location: folder or `s3://` prefix.
        encoder_digest: refuse the cache of another encoder.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: it is of another encoder.
    """

    def __init__(self, location: str, encoder_digest: str | None = None) -> None:
        self.folder = Folder.of(location)
        text = self.folder.read_text(MANIFEST_FILE)
        if text is None:
            raise FileNotFoundError(
                f"{self.folder.uri} holds no finished latent cache (no {MANIFEST_FILE}); "
                "`vitok encode` makes one, and goes on where it was stopped"
            )
        source = f"{self.folder.uri}/{MANIFEST_FILE}"
        self.manifest = parse_json(LatentManifest, text, source)
        found = self.manifest.identity.encoder_digest
        if encoder_digest is not None and encoder_digest != found:
            raise ValueError(
                f"{self.folder.uri} holds latents of the encoder {found[:12]}, not of "
                f"{encoder_digest[:12]}; encode again, or use the model that made them"
            )
        self._last_of_unit: list[int] = []
        for unit in self.manifest.units:
            before = self._last_of_unit[-1] if self._last_of_unit else 0
            self._last_of_unit.append(before + unit.num_images)

    def __len__(self) -> int:
        return self.manifest.num_images

    def __getitem__(self, index: int) -> LatentRow:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a cache of {len(self)}")
        unit = bisect.bisect_right(self._last_of_unit, index)
        first = self._last_of_unit[unit - 1] if unit else 0
        return _row(*_load_unit(self.folder, self.manifest.units[unit].name), index - first)

    def __iter__(self) -> Iterator[LatentRow]:
        return (self[index] for index in range(len(self)))

    def normalize(self, latent: Tensor) -> Tensor:
        """Give a latent [N, c] mean 0 and variance 1 in every channel, over the whole cache."""
        mean = torch.tensor(self.manifest.mean, dtype=torch.float32)
        std = torch.tensor(self.manifest.std, dtype=torch.float32)
        return (latent.float() - mean) / std.clamp(min=1e-6)

    def verify(self) -> None:
        """Compare every file of the cache with what the others say of it.

        Raises:
            ValueError: a file is damaged or missing; the first is named.
        """
        identity = _read_identity(self.folder)
        records = []
        for unit in self.manifest.units:
            name = f"{unit.name}.safetensors"
            units = self.folder.child(UNITS)
            if not units.exists(f"{unit.name}.json"):
                raise ValueError(
                    f"{units.uri}/{unit.name}.json is missing; run `vitok encode` again"
                )
            if not units.exists(name):
                raise ValueError(
                    f"{units.uri}/{name} is missing; delete its .json and run `vitok encode` again"
                )
            found = hashlib.sha256(units.read_bytes(name)).hexdigest()
            if found != unit.sha256:
                raise ValueError(
                    f"{units.uri}/{name} is damaged: sha256 {found[:12]} instead of "
                    f"{unit.sha256[:12]}; delete it and its .json and run `vitok encode` again"
                )
            records.append(read_record(self.folder, unit.name))
        rebuilt = _merge(identity or self.manifest.identity, self.manifest.source_digest, records)
        if identity is None or rebuilt != self.manifest:
            raise ValueError(
                f"{self.folder.uri}: {MANIFEST_FILE}, {CACHE_FILE} and the records of the units "
                "contradict each other; one of them is damaged. Delete the manifest and run "
                "`vitok encode` again"
            )


@lru_cache(maxsize=4)
def _load_unit(cache: Folder, name: str) -> tuple[dict[str, Tensor], list[str]]:
    unit = load(cache.child(UNITS).read_bytes(f"{name}.safetensors"))
    return unit, json.loads(unit["keys"].numpy().tobytes())


def _row(unit: dict[str, Tensor], keys: list[str], index: int) -> LatentRow:
    start, stop = unit["offsets"][index : index + 2].tolist()
    rows, columns = unit["grid"][index].tolist()
    height, width = unit["image_size"][index].tolist()
    return LatentRow(
        key=keys[index],
        latent=unit["latents"][start:stop],
        grid=(rows, columns),
        image_size=(height, width),
        label=int(unit["label"][index]),
    )


def _encode_keys(keys: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(list(keys)).encode()), dtype=torch.uint8)
