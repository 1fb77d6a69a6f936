"""One unit of a latent cache, from the samples of a shard to its file: three steps, in order.

    prepare_unit   reads, decodes and packs, on any core
    Encoder        turns packed rows into latents, where the weights are (embed_captions: captions
                   into embeddings)
    finish_unit    cuts the rows into images and makes the unit

What a unit holds depends on the unit alone: it is packed by itself, in rows of one shape.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.caching.captions import read_captions
from pipelines.caching.units import DTYPES, CacheIdentity, LatentRow, UnitRecord, make_unit
from pipelines.corpus import Manifest, SampleRecords
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.plan import SampleView
from pipelines.whole_images import load_packing, pack_views
from vitok.autoencoder import Autoencoder
from vitok.packed import PackedTokens
from vitok.patches import grid_size
from vitok.texts import TextEncoder

_LIBRARIES = ("pillow", "simplejpeg", "torch")
_NO_TEXTS: Mapping[int, Tensor] = {}


@dataclass(frozen=True)
class Unit:
    """A slice of an input shard: samples start to stop, counted in the shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class PreparedUnit:
    """The packed rows of a unit.

    Attributes:
        tokens: of all rows, [R, T, 3P^2].
        members: of each row, the places among the unit's views of what lies in it.
        skipped: (key, reason) of the samples that were unreadable.
        captions: of each sample, None for none; empty for a cache without texts.
    """

    rows: list[PackedRow]
    tokens: NDArray[np.uint8]
    members: list[list[int]]
    skipped: list[tuple[str, str]]
    captions: list[str | None]


def units_of(source: Manifest, unit_samples: int) -> list[Unit]:
    """Cut every shard of a corpus into units."""
    return [
        Unit(shard, start, min(start + unit_samples, count))
        for shard, count in enumerate(source.num_samples_per_shard.tolist())
        for start in range(0, count, unit_samples)
    ]


def library_versions() -> str:
    """Return the versions of what decodes, resizes and computes: other ones may round otherwise."""
    return ", ".join(f"{name} {version(name)}" for name in _LIBRARIES) + f", {platform.machine()}"


def samples_of(source: Manifest, unit: Unit) -> SampleRecords:
    """Return the records of a unit's samples, in the order of the shard."""
    first = int(source.first_sample[unit.shard])
    return source.records(np.arange(first + unit.start, first + unit.stop))


def views_of(records: SampleRecords, identity: CacheIdentity) -> list[SampleView]:
    """Return all that a cache holds of some samples: all at one size, mirrored, at the next."""
    return [
        view
        for transform in identity.transforms
        for flip in ((False, True) if identity.flip else (False,))
        for view in transform.views(records, identity.patch_size, flip)
    ]


def prepare_unit(source: Manifest, unit: Unit, identity: CacheIdentity) -> PreparedUnit:
    """Read, decode and pack the samples of a unit.

    Raises:
        OSError: the shard cannot be read, or is not the one that was indexed.
    """
    records = samples_of(source, unit)
    views = views_of(records, identity)
    packing = pack_views(views, patch_size=identity.patch_size, row_tokens=identity.row_tokens)
    rows, tokens, members, unreadable = load_packing(
        Corpus.of(source), records, views, packing, patch_size=identity.patch_size
    )
    reasons: dict[str, str] = {}
    for place, reason in unreadable.items():
        reasons.setdefault(str(records.key[place % len(records)]), reason)
    captions: list[str | None] = []
    if identity.text is not None:
        captions, bad = read_captions(source, unit.shard, unit.start, unit.stop)
        reasons = bad | reasons
    return PreparedUnit(rows, tokens, members, sorted(reasons.items()), captions)


class Encoder:
    """The encoder on its device.

    Args:
        model: an Autoencoder with an encoder; it is moved.
    """

    def __init__(self, model: Autoencoder, identity: CacheIdentity) -> None:
        self.device = torch.device(identity.device)
        self._identity = identity
        self._model = model.to(self.device, DTYPES[identity.compute_dtype])
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, rows: Sequence[PackedRow]) -> list[Tensor]:
        """Return the values of each row's tokens [T, values_per_token], on the host, as stored."""
        encoded = [self._encode(packed) for packed in self._on_device(rows)]
        return [values.cpu() for values in encoded]

    def _encode(self, packed: PackedTokens) -> Tensor:
        posterior = self._model.posterior(packed)
        values = posterior.mean
        if self._identity.log_variance:
            assert posterior.std is not None
            values = torch.cat([values, 2 * posterior.std.log()], dim=1)
        return values.to(DTYPES[self._identity.dtype])

    def _on_device(self, rows: Sequence[PackedRow]) -> Iterator[PackedTokens]:
        """Copy rows to the device, each while the one before is computed."""
        if self._copies is None:
            yield from (row.to_packed(self.device)[0] for row in rows)
            return
        current = torch.cuda.current_stream(self.device)
        for row in rows:
            with torch.cuda.stream(self._copies):
                tokens = torch.as_tensor(row.tokens).pin_memory()
                tokens = tokens.to(self.device, non_blocking=True)
            current.wait_stream(self._copies)
            tokens.record_stream(current)
            yield replace(row, tokens=tokens).to_packed(self.device)[0]


def embed_captions(
    encoder: TextEncoder, identity: CacheIdentity, captions: Sequence[str | None]
) -> dict[int, Tensor]:
    """Return the embeddings [K, D] of a unit's captions, on the host, as stored; by their places.

    Args:
        encoder: on its device.
    """
    assert identity.text is not None
    places = [place for place, caption in enumerate(captions) if caption is not None]
    texts = [caption for caption in captions if caption is not None]
    states = encoder(texts, identity.text.max_tokens)
    dtype = DTYPES[identity.dtype]
    return {place: state.to(dtype) for place, state in zip(places, states, strict=True)}


def finish_unit(
    source: Manifest,
    unit: Unit,
    identity: CacheIdentity,
    members: Sequence[Sequence[int]],
    values: Sequence[Tensor],
    skipped: Sequence[tuple[str, str]],
    texts: Mapping[int, Tensor] = _NO_TEXTS,
) -> tuple[bytes, UnitRecord]:
    """Cut encoded rows into the latents of images, and make the unit of them.

    Args:
        members, skipped: of the PreparedUnit.
        values: what the Encoder made of its rows.
        texts: what embed_captions made of its captions.

    Raises:
        ValueError: a latent or an embedding is not finite.
    """
    records = samples_of(source, unit)
    views = views_of(records, identity)
    lost = {key for key, _ in skipped}
    found: dict[int, LatentRow] = {}
    for places, of_row in zip(members, values, strict=True):
        end = 0
        for place in places:
            grid = grid_size(*views[place].size, identity.patch_size)
            start, end = end, end + grid[0] * grid[1]
            row = _row(records, views, place, grid, of_row[start:end], identity)
            row = replace(row, text=texts.get(place % len(records)))
            if row.key not in lost:  # an image is there in all its variants, or not at all
                found[place] = row
    name = identity.unit_name(str(source.shard_digests[unit.shard]), unit.start, unit.stop)
    in_order = [found[place] for place in sorted(found)]
    for row in in_order:
        for what, stored in (("latent", row.latent), ("text", row.text)):
            if stored is not None and not stored.isfinite().all():
                raise ValueError(
                    f"{source.uris[unit.shard]}: {row.key}: its {what} is not finite in "
                    f"{identity.compute_dtype}, stored as {identity.dtype}; look at the weights, "
                    "or compute and store in float32"
                )
    return make_unit(name, in_order, identity, skipped)


def _row(
    records: SampleRecords,
    views: Sequence[SampleView],
    place: int,
    grid: tuple[int, int],
    values: Tensor,
    identity: CacheIdentity,
) -> LatentRow:
    variant, sample = divmod(place, len(records))
    latent, log_variance = values, None
    if identity.log_variance:
        latent, log_variance = values.split(identity.channels, dim=1)
    return LatentRow(
        key=str(records.key[sample]),
        latent=latent,
        log_variance=log_variance,
        grid=grid,
        image_size=views[place].size,
        label=int(records.label[sample]),
        transform=variant // 2 if identity.flip else variant,
        flipped=views[place].flip,
    )


def labels_in_range(source: Manifest, unit: Unit, records: SampleRecords, num_classes: int) -> None:
    """Check the labels of a unit.

    Raises:
        ValueError: one is missing, or is no class; the sample is named.
    """
    wrong: NDArray[np.int64] = np.flatnonzero((records.label < 0) | (records.label >= num_classes))
    if wrong.size:
        key, label = records.key[wrong[0]], int(records.label[wrong[0]])
        said = "no label: its .cls is missing or no integer" if label < 0 else f"label {label}"
        raise ValueError(
            f"{source.uris[unit.shard]}: {key}: {said}, where each must be 0 to {num_classes - 1}; "
            "mend the shard and index it again, or set num_classes to 0, which takes any"
        )
