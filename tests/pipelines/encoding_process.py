"""Encoding all of a cache in one process that may be killed at any moment."""

from pathlib import Path
from typing import Any

import torch

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.cache_latents import finish_cache, identity_of, load_text_encoder, name_of
from pipelines.caching.config import LatentCaching, complete
from pipelines.caching.encode_units import (
    Encoder,
    embed_captions,
    finish_unit,
    prepare_unit,
    units_of,
)
from pipelines.caching.units import DTYPES, claim_cache, commit_unit, committed_units
from pipelines.corpus import Manifest
from vitok.storage import Folder


def small_caching(manifest: Path, model: Path, out: Path, **changes: Any) -> LatentCaching:
    """Return settings for a few small images on shared cores.

    Args:
        changes: fields beside these.
    """
    small: dict[str, Any] = {
        "row_tokens": 128,
        "num_workers": 1,
        "cpus_per_worker": 0.5,
        "use_gpu": False,
        "cpus_per_reader": 0.5,
    }
    given = {"manifest": str(manifest), "model": str(model), "out": str(out)}
    return LatentCaching(**given | small | changes)


def encode_all(settings: LatentCaching) -> None:
    """Do what the job does, unit after unit; goes on where it was stopped."""
    settings = complete(settings)
    source, cache = Manifest.load(settings.manifest), Folder(settings.out)
    identity = identity_of(settings)
    torch.set_num_threads(identity.threads)
    claim_cache(cache, identity)
    units = units_of(source, settings.unit_samples)
    encode = Encoder(load_autoencoder(settings.model, part="encoder"), identity)
    dtype = DTYPES[identity.compute_dtype]
    encoder = load_text_encoder(settings).to(encode.device, dtype) if identity.text else None
    committed = committed_units(cache)
    for unit in units:
        if name_of(identity, source, unit) in committed:
            continue
        prepared = prepare_unit(source, unit, identity)
        values = encode(prepared.rows)
        texts = embed_captions(encoder, identity, prepared.captions) if encoder else {}
        data, record = finish_unit(
            source, unit, identity, prepared.members, values, prepared.skipped, texts
        )
        commit_unit(cache, data, record)
    finish_cache(settings, identity, source, units)
    Path(settings.out).with_suffix(".done").touch()


def files_of(cache: str) -> dict[str, bytes]:
    """Every file of a folder with its bytes, by its path in the folder."""
    root = Path(cache)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def differing(one: str, other: str) -> list[str]:
    """Names of the files that are not the same in two folders."""
    first, second = files_of(one), files_of(other)
    return sorted(
        name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    )
