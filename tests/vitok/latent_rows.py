"""Rows of latents and small velocity models for the tests of flow matching."""

from collections.abc import Sequence
from typing import Any

import torch

from vitok.dit import Condition, DiT, DiTConfig
from vitok.packed import PackedTokens, layout_of

CHANNELS = 6


def tiny_dit(seed: int = 0, **shape: Any) -> DiT:
    """Build a small DiT in which no parameter has a value that would hide its absence."""
    tiny = {
        "latent_channels": CHANNELS,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "num_classes": 5,
        "position_grid": 4,
    }
    model = DiT(DiTConfig(**(tiny | shape)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def row_of_latents(
    grids: Sequence[tuple[int, int]],
    *,
    channels: int = CHANNELS,
    extra_tokens: int = 3,
    extra_slots: int = 2,
    seed: int = 0,
) -> PackedTokens:
    """Draw latents of some grids, with something other than zeros in the row's padding."""
    lengths = [rows * columns for rows, columns in grids]
    layout = layout_of(
        grids,
        patch_size=1,
        row_tokens=sum(lengths) + extra_tokens,
        max_images=len(grids) + extra_slots,
        max_seqlen=max(lengths, default=1),
    )
    generator = torch.Generator().manual_seed(seed)
    return layout.with_tokens(torch.randn(len(layout.segment_ids), channels, generator=generator))


def one_latent(packed: PackedTokens, index: int) -> PackedTokens:
    """Return one image of a row as a row of its own, without padding."""
    start, stop = packed.cu_seqlens[index : index + 2].tolist()
    rows, columns = packed.grid[index].tolist()
    alone = row_of_latents([(rows, columns)], extra_tokens=0, extra_slots=0)
    return alone.with_tokens(packed.tokens[start:stop])


def labelled(*labels: int, slots: int | None = None) -> Condition:
    """Return a condition on classes, with the null condition in the slots that are left."""
    missing = (slots or len(labels)) - len(labels)
    return Condition(labels=torch.tensor([*labels, *([-1] * missing)]))
