"""Latent caches of made-up rows, for the tests of what reads them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.caching.manifest import LatentManifest, UnitSource, write_manifest
from pipelines.caching.units import (
    CacheIdentity,
    LatentRow,
    TextIdentity,
    UnitRecord,
    claim_cache,
    commit_unit,
    make_unit,
)
from pipelines.whole_images import Transform
from vitok.storage import Folder

CHANNELS = 5
IDENTITY = CacheIdentity(
    encoder_digest="e" * 64,
    transforms=(Transform(token_budget=64),),
    patch_size=16,
    dtype="bfloat16",
    channels=CHANNELS,
    row_tokens=64,
    unit_samples=8,
)


def latent_rows(grids: Sequence[tuple[int, int]], seed: int) -> list[LatentRow]:
    """Rows in float32 whose channels have different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.arange(1.0, CHANNELS + 1), torch.arange(CHANNELS) - 2.5
    return [
        LatentRow(
            key=f"folder/schlüssel-{seed}-{index}",
            latent=torch.randn(rows * columns, CHANNELS, generator=generator) * scale + shift,
            grid=(rows, columns),
            image_size=(rows * 16 - index, columns * 16),
            label=index - 1,
        )
        for index, (rows, columns) in enumerate(grids)
    ]


TEXT = TextIdentity(encoder_digest="t" * 64, channels=3, max_tokens=4)


def with_texts(rows: Sequence[LatentRow], seed: int, text: TextIdentity = TEXT) -> list[LatentRow]:
    """Give images texts of 0 (none) to max_tokens tokens in turn; rows of one key have one text."""
    generator = torch.Generator().manual_seed(seed)
    texts: dict[str, torch.Tensor | None] = {}
    for number, key in enumerate(dict.fromkeys(row.key for row in rows)):
        length = number % (text.max_tokens + 1)
        values = torch.randn(length, text.channels, generator=generator)
        texts[key] = values.bfloat16() if length else None
    return [replace(row, text=texts[row.key]) for row in rows]


UNITS = {
    "aaaa": latent_rows([(1, 1), (3, 7), (8, 8)], seed=1),
    "bbbb": [],  # a slice of which nothing was readable
    "cccc": latent_rows([(64, 1), (1, 64), (2, 5), (4, 4)], seed=2),
}
ROWS = [row for rows in UNITS.values() for row in rows]


def write_small_unit(
    folder: Folder, name: str, rows: Sequence[LatentRow], identity: CacheIdentity = IDENTITY
) -> UnitRecord:
    """Commit one unit."""
    skipped = [] if rows else [("lost", "truncated image")]
    data, record = make_unit(name, rows, identity, skipped)
    commit_unit(folder, data, record)
    return record


def write_small_cache(
    location: str | Path,
    units: dict[str, list[LatentRow]] = UNITS,
    identity: CacheIdentity = IDENTITY,
    text_encoder: str = "",
) -> LatentManifest:
    """Write a finished cache of some units."""
    folder = Folder.of(str(location))
    claim_cache(folder, identity)
    records = [write_small_unit(folder, name, rows, identity) for name, rows in units.items()]
    sources = [
        UnitSource(shard=f"s3://shards/{name}.tar", shard_digest="d" * 64, start=0, stop=8)
        for name in units
    ]
    return write_manifest(folder, identity, "s" * 64, sources, records, text_encoder)


def many_units(num_units: int, rows_per_unit: int) -> dict[str, list[LatentRow]]:
    """Units of small rows, each with keys of its own."""
    return {
        f"{number:040x}": [
            replace(row, key=f"{number}/{place}")
            for place, row in enumerate(
                latent_rows([(1 + (number + i) % 3, 2) for i in range(rows_per_unit)], number)
            )
        ]
        for number in range(num_units)
    }
