"""Units of a latent cache: files of ragged latents, and the records that commit them.

    CACHE/cache.json               what the cache is of (CacheIdentity)
    CACHE/units/NAME.safetensors   the latents of some samples of an input shard, and their texts;
                                   see make_unit
    CACHE/units/NAME.json          its commit record; a unit without one does not exist
    CACHE/index-DIGEST.parquet, CACHE/manifest.json     all of it; see latent_manifest.py

NAME is a function of the input shard's digest, the slice of it, and of what the cache is of.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from pipelines.caching.files import create_file, file_names, read_file, write_file
from pipelines.whole_images import Transform
from vitok.config import UNLESS_EMPTY, config, describe_difference, parse_json, to_dict
from vitok.storage import Folder

CACHE_FILE = "cache.json"
UNITS = "units"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@config
class TextIdentity:
    """How the texts of a cache were embedded.

    Attributes:
        encoder_digest: of the text encoder's weights and of its tokenizer.
        channels: of an embedding.
        max_tokens: of a text; longer ones were cut.
        libraries: versions of what makes tokens and computes.
    """

    encoder_digest: str
    channels: int
    max_tokens: int
    libraries: str = ""


@config
class CacheIdentity:
    """What all units of a cache have in common: with the input shards, all that shapes a byte.

    Attributes:
        encoder_digest: of the encoder's weights.
        transforms: how images were prepared; every image is there once for each.
        flip: every image is there a second time, mirrored.
        patch_size: pixels along each side of a patch.
        channels: c of a latent.
        log_variance: behind its c values a token has c more, the log-variance of its posterior.
        dtype: of the stored latents.
        compute_dtype: in which the encoder computed.
        device: kind of device that computed: cpu or cuda. Kernels of others round differently.
        threads: of each encoder on CPUs, as their products are cut by it; 0 on GPUs.
        libraries: versions of what decodes, resizes and computes.
        row_tokens: of the packed rows that were encoded.
        unit_samples: samples of an input shard that make one unit, which is packed by itself.
        text: of the texts that are stored beside the latents; None for a cache without.
    """

    encoder_digest: str
    transforms: tuple[Transform, ...]
    flip: bool = False
    patch_size: int
    channels: int
    log_variance: bool = False
    dtype: str
    compute_dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    libraries: str = ""
    row_tokens: int
    unit_samples: int
    text: Annotated[TextIdentity | None, UNLESS_EMPTY] = None

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all of it."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()

    @property
    def values_per_token(self) -> int:
        """Numbers that are stored of a token."""
        return self.channels * (2 if self.log_variance else 1)

    @property
    def num_variants(self) -> int:
        """How often each image is there."""
        return len(self.transforms) * (2 if self.flip else 1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that are stored of a token."""
        return self.values_per_token * DTYPES[self.dtype].itemsize

    @property
    def bytes_per_text_token(self) -> int:
        """Bytes that are stored of a token of a text; 0 without texts."""
        return self.text.channels * DTYPES[self.dtype].itemsize if self.text else 0

    def unit_name(self, shard_digest: str, start: int, stop: int) -> str:
        """Return the name of the unit that holds samples start to stop of an input shard."""
        text = f"{shard_digest}:{start}:{stop}:{self.digest}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]


@config
class UnitRecord:
    """The commit record of one unit.

    Attributes:
        name: of the unit.
        num_images: different images in it.
        num_latents: rows: an image at one size, mirrored or not.
        num_tokens: of all rows.
        num_bytes, sha256: of its file.
        table_bytes: where the latents begin in the file; in front of them lies what is known of
            each row, behind them the texts.
        keys_sha256: of the rows' keys.
        channel_sum, channel_square_sum: moments of what is stored, in float64, for each channel.
        skipped: (key, reason) of the samples that were unreadable.
        num_texts, num_text_tokens: images that have a text, and the tokens of their texts.
    """

    name: str
    num_images: int
    num_latents: int
    num_tokens: int
    num_bytes: int
    sha256: str
    table_bytes: int
    keys_sha256: str
    channel_sum: tuple[float, ...]
    channel_square_sum: tuple[float, ...]
    skipped: tuple[tuple[str, str], ...]
    num_texts: Annotated[int, UNLESS_EMPTY] = 0
    num_text_tokens: Annotated[int, UNLESS_EMPTY] = 0


@dataclass(frozen=True, kw_only=True)
class LatentRow:
    """One image's latent.

    Attributes:
        key: of the image in its corpus.
        latent: [N, c], row-major over the grid.
        grid: (rows, columns), N = rows * columns.
        image_size: pixels (height, width) that were encoded.
        label: class, -1 for none.
        transform: which of the cache's transforms prepared the image.
        flipped: left and right were exchanged.
        log_variance: [N, c] of the posterior around the latent, where the cache holds it.
        text: [K, D], embeddings of the tokens of the image's text; None where there is none.
    """

    key: str
    latent: Tensor
    grid: tuple[int, int]
    image_size: tuple[int, int]
    label: int
    transform: int = 0
    flipped: bool = False
    log_variance: Tensor | None = None
    text: Tensor | None = None


def describe_unit(name: str, data: bytes, skipped: Sequence[tuple[str, str]] = ()) -> UnitRecord:
    """Return the record of a unit by what its file holds.

    Raises:
        SafetensorError, KeyError, ValueError: it is no file of a unit.
    """
    tensors = load(data)
    keys = read_keys(data)
    latents = tensors["latents"]
    table_bytes = len(data) - latents.nbytes
    text_tokens = torch.zeros(0, dtype=torch.int64)
    if "text" in tensors:
        table_bytes -= tensors["text"].nbytes
        text_tokens = tensors["text_offsets"].diff()
    # Row after row, as NumPy adds along the slowest axis: no number of threads changes the sums.
    exact = latents.double().numpy()
    return UnitRecord(
        name=name,
        num_images=len(set(keys)),
        num_latents=len(keys),
        num_tokens=len(latents),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        table_bytes=table_bytes,
        keys_sha256=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        channel_sum=tuple(exact.sum(axis=0).tolist()),
        channel_square_sum=tuple(np.square(exact).sum(axis=0).tolist()),
        skipped=tuple(skipped),
        num_texts=int((text_tokens > 0).sum()),
        num_text_tokens=int(text_tokens.sum()),
    )


def read_keys(data: bytes | memoryview) -> list[str]:
    """Return the keys of a unit's rows, by the beginning of its file."""
    return json.loads(read_header(data)["__metadata__"]["keys"])


def read_header(data: bytes | memoryview) -> dict[str, Any]:
    """Return the header of a safetensors file, by the beginning of it.

    Raises:
        ValueError: it is none.
    """
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(bytes(data[8 : 8 + length]))


def make_unit(
    name: str,
    rows: Sequence[LatentRow],
    identity: CacheIdentity,
    skipped: Sequence[tuple[str, str]] = (),
) -> tuple[bytes, UnitRecord]:
    """Return the file of a unit and its record; the same rows give the same bytes.

    The file is one of safetensors, with these tensors of n rows:

        offsets [n + 1]     row i holds tokens offsets[i] to offsets[i + 1]
        grid [n, 2]         patches (rows, columns)
        image_size [n, 2]   pixels (height, width)
        label [n]           class, -1 for none
        variant [n, 2]      index of the transform, and 1 if the image was mirrored
        latents             [sum N, c], or [sum N, 2c] with log-variances

    in a cache with texts, of m images in the order of their first rows, these too:

        text_offsets [m + 1]    image j has text tokens text_offsets[j] to text_offsets[j + 1]
        text                    [sum K, D]

    and as metadata `keys`, a JSON list. All but latents and text is int64: safetensors sorts
    tensors by the width of their type, then by name, and so one read from the front gives
    everything about the rows.
    """
    values = [
        row.latent if row.log_variance is None else torch.cat([row.latent, row.log_variance], 1)
        for row in rows
    ]
    latents = torch.cat(values) if values else torch.empty(0, identity.values_per_token)
    latents = latents.to(DTYPES[identity.dtype])
    assert latents.shape[1] == identity.values_per_token, latents.shape
    lengths = np.array([len(row.latent) for row in rows], np.int64)
    tables = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "grid": np.array([row.grid for row in rows]).reshape(-1, 2),
        "image_size": np.array([row.image_size for row in rows]).reshape(-1, 2),
        "label": np.array([row.label for row in rows]),
        "variant": np.array([(row.transform, row.flipped) for row in rows]).reshape(-1, 2),
    }
    stored = {"latents": latents}
    if identity.text is not None:
        texts = _texts_of_images(rows, identity.text.channels)
        tables["text_offsets"] = np.cumsum([0, *map(len, texts)])
        stored["text"] = torch.cat(texts or [_no_text(identity.text.channels)]).to(latents.dtype)
    keys = json.dumps([row.key for row in rows])
    tensors = {key: torch.from_numpy(table.astype(np.int64)) for key, table in tables.items()}
    data = save(tensors | stored, metadata={"keys": keys})
    return data, describe_unit(name, data, skipped)


def _texts_of_images(rows: Sequence[LatentRow], channels: int) -> list[Tensor]:
    """Return the text of every image [K, D], once however many rows it has; K is 0 for none."""
    texts: dict[str, Tensor] = {}
    for row in rows:
        texts.setdefault(row.key, _no_text(channels) if row.text is None else row.text)
    return list(texts.values())


def _no_text(channels: int) -> Tensor:
    return torch.empty(0, channels)


def commit_unit(cache: Folder, data: bytes, record: UnitRecord) -> None:
    """Write a unit's file, then its record: from then on the unit exists, and is never changed.

    Raises:
        OSError: it cannot be written.
        ValueError: it is committed already, with another content.
    """
    units = cache.child(UNITS)
    if _is_committed(cache, record):
        return
    write_file(units, f"{record.name}.safetensors", data)
    if not create_file(units, f"{record.name}.json", as_json(record)):
        _is_committed(cache, record)


def _is_committed(cache: Folder, record: UnitRecord) -> bool:
    try:
        found = read_record(cache, record.name)
    except FileNotFoundError:
        return False
    if found != record:
        raise ValueError(
            f"{cache.uri}/{UNITS}/{record.name}.json: another job committed this unit with other "
            "content; delete it, and run `vitok encode` again, one at a time"
        )
    return True


def read_record(cache: Folder, name: str) -> UnitRecord:
    """Read the commit record of a unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        ValueError: the record is damaged.
    """
    text = read_file(cache.child(UNITS), f"{name}.json").decode(errors="replace")
    return parse_json(UnitRecord, text, f"{cache.uri}/{UNITS}/{name}.json")


def committed_units(cache: Folder) -> set[str]:
    """Return the names of the units that have a commit record."""
    names = file_names(cache.child(UNITS))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def claim_cache(cache: Folder, identity: CacheIdentity) -> None:
    """Note in a new cache's folder what it is of, or check that the cache there is of the same.

    Raises:
        ValueError: it is another cache; the differences are listed.
    """
    if create_file(cache, CACHE_FILE, as_json(identity)):
        return
    if differences := describe_difference(read_identity(cache), identity):
        raise ValueError(
            f"{cache.uri} holds another cache ({'; '.join(differences)}); choose another folder"
        )


def read_identity(cache: Folder) -> CacheIdentity:
    """Read what a cache is of.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is damaged.
    """
    text = read_file(cache, CACHE_FILE).decode(errors="replace")
    return parse_json(CacheIdentity, text, f"{cache.uri}/{CACHE_FILE}")


def as_json(value: Any) -> bytes:
    """Return a config as the one text that files of a cache have of it."""
    return (json.dumps(to_dict(value), indent=1) + "\n").encode()
