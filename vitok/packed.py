"""PackedTokens: many images of any size as one row of tokens of fixed length."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitok.patches import grid_size, pad_to_patch, patchify, unpatchify


@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """A row of T tokens that holds up to S images, one after the other, then padding.

    Encoder, decoder and DiT all map PackedTokens to PackedTokens. An image's tokens are the
    row-major patches of its grid.

    Attributes:
        tokens: [T, D]; what D means is up to the stage (pixels of a patch, latent channels).
        patch_coord: [T, 2] int32, (row, column) in the image's own grid; 0 in padding.
        segment_ids: [T] int32, which image a token belongs to; -1 in padding.
        cu_seqlens: [S+1] int32, image s holds tokens cu_seqlens[s] to cu_seqlens[s+1]; unused
            slots are empty, so the last entry is the number of real tokens.
        image_size: [S, 2] int32, pixels (height, width); 0 in unused slots.
        grid: [S, 2] int32, patches (rows, columns); 0 in unused slots.
        max_seqlen: no image has more tokens; a constant of the run, so that nothing recompiles.
    """

    tokens: Tensor
    patch_coord: Tensor
    segment_ids: Tensor
    cu_seqlens: Tensor
    image_size: Tensor
    grid: Tensor
    max_seqlen: int

    def with_tokens(self, tokens: Tensor) -> "PackedTokens":
        """Return the same layout around other tokens [T, D']."""
        return dataclasses.replace(self, tokens=tokens)

    def to(self, device: torch.device | str) -> "PackedTokens":
        """Return a copy on another device; asynchronous from pinned memory to CUDA."""
        # Towards the host the caller would read bytes that have not arrived.
        asynchronous = torch.device(device).type == "cuda"
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=asynchronous)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def token_image_size(self) -> Tensor:
        """Return [T, 2]: the pixel size of each token's image, 0 for padding tokens."""
        real_T = self.segment_ids >= 0
        return self.image_size[self.segment_ids.clamp(min=0)] * real_T[:, None]

    def num_images(self) -> Tensor:
        """Return the number of images in the row, as a scalar tensor on its device."""
        return (self.grid[:, 0] > 0).sum()

    def num_tokens(self) -> Tensor:
        """Return the number of real tokens in the row, as a scalar tensor on its device."""
        return self.cu_seqlens[-1]


def layout_of(
    image_sizes: Sequence[tuple[int, int]],
    *,
    patch_size: int,
    row_tokens: int,
    max_images: int,
    max_seqlen: int,
) -> PackedTokens:
    """Lay images out one after the other, without their pixels.

    Args:
        image_sizes: (height, width) of each image in pixels.

    Returns:
        PackedTokens whose tokens are an empty [T, 0] tensor.

    Raises:
        ValueError: more images than slots, more tokens than the row holds, or an image with more
            than max_seqlen tokens.
    """
    grids = [grid_size(height, width, patch_size) for height, width in image_sizes]
    lengths = [rows * columns for rows, columns in grids]
    if len(grids) > max_images:
        raise ValueError(f"{len(grids)} images exceed the {max_images} slots of a row")
    if sum(lengths) > row_tokens:
        raise ValueError(f"{sum(lengths)} tokens exceed the row of {row_tokens}; pack fewer images")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"an image of {max(lengths)} tokens exceeds {max_seqlen=}; resize it or raise the limit"
        )
    slots = max_images - len(grids)
    lengths_S = torch.tensor(lengths + [0] * slots, dtype=torch.int32)
    grid_S2 = torch.tensor(grids + [(0, 0)] * slots, dtype=torch.int32).reshape(-1, 2)
    size_S2 = torch.tensor(list(image_sizes) + [(0, 0)] * slots, dtype=torch.int32).reshape(-1, 2)
    cu_seqlens = torch.zeros(max_images + 1, dtype=torch.int32)
    torch.cumsum(lengths_S, 0, out=cu_seqlens[1:])

    real = int(cu_seqlens[-1])
    segment_ids = torch.full((row_tokens,), -1, dtype=torch.int32)
    segment_ids[:real] = torch.repeat_interleave(
        torch.arange(max_images, dtype=torch.int32), lengths_S
    )
    patch_coord = torch.zeros(row_tokens, 2, dtype=torch.int32)
    segment = segment_ids[:real].long()
    place = torch.arange(real, dtype=torch.int32) - cu_seqlens[segment]
    columns = grid_S2[segment, 1]
    patch_coord[:real, 0] = place // columns
    patch_coord[:real, 1] = place % columns
    return PackedTokens(
        tokens=torch.empty(row_tokens, 0),
        patch_coord=patch_coord,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
        image_size=size_S2,
        grid=grid_S2,
        max_seqlen=max_seqlen,
    )


def pack_images(
    images: Sequence[Tensor],
    *,
    patch_size: int,
    row_tokens: int | None = None,
    max_images: int | None = None,
    max_seqlen: int | None = None,
) -> PackedTokens:
    """Pack images of any sizes, in the given order, at the sizes they have.

    Args:
        images: each [3, H, W] in [-1, 1].
        row_tokens, max_images, max_seqlen: fixed sizes of the row; just enough where not given.

    Returns:
        PackedTokens with tokens [T, 3*P*P], padded with gray (0).

    Raises:
        ValueError: there are no images, one is not [3, H, W] of floats, or they do not fit the
            fixed sizes.
    """
    if not images:
        raise ValueError("there are no images to pack; give at least one")
    for position, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(
                f"image {position} has shape {list(image.shape)}; give [3, H, W] with at least a "
                "pixel"
            )
        if not image.is_floating_point():
            raise ValueError(
                f"image {position} is {image.dtype}; give floats in [-1, 1], as "
                "vitok.images.to_tensor makes them"
            )
    patches = [patchify(pad_to_patch(image, patch_size), patch_size)[0] for image in images]
    lengths = [len(patch) for patch in patches]
    packed = layout_of(
        [(image.shape[1], image.shape[2]) for image in images],
        patch_size=patch_size,
        row_tokens=sum(lengths) if row_tokens is None else row_tokens,
        max_images=len(images) if max_images is None else max_images,
        max_seqlen=max(lengths, default=1) if max_seqlen is None else max_seqlen,
    )
    tokens = patches[0].new_zeros(len(packed.segment_ids), patches[0].shape[1])
    tokens[: sum(lengths)] = torch.cat(patches)
    return packed.to(tokens.device).with_tokens(tokens)


def unpack_images(packed: PackedTokens, patch_size: int) -> list[Tensor]:
    """Cut a row of patches into its images: the inverse of pack_images.

    Returns:
        each image as [3, height, width], in the order of the row; unused slots are left out.
    """
    bounds = packed.cu_seqlens.tolist()
    sizes = [(height, width) for height, width in packed.image_size.tolist() if height > 0]
    return [
        unpatchify(packed.tokens[start:end], size, patch_size)
        for start, end, size in zip(bounds, bounds[1:], sizes, strict=False)
    ]


# FSDP finds the tensors in the arguments and results of a forward pass through pytrees.
torch.export.register_dataclass(PackedTokens)
