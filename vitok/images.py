"""Images of any kind and size to latents and back: the interface for a few lines of Python."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vitok.packed import PackedTokens, layout_of, unpack_images
from vitok.patches import grid_size, num_tokens, pad_to_patch, patchify
from vitok.pixels import (
    FLOAT_DTYPES,
    ImageLike,
    checked_pixels,
    normalized,
    to_pil,
    to_tensor,
)

if TYPE_CHECKING:
    from vitok.autoencoder import Autoencoder

__all__ = ["Latent", "decode_latents", "encode_images", "to_pil", "to_tensor"]

PASS_TOKENS = 16384


@dataclass(frozen=True, eq=False)
class Latent:
    """The latent of one image.

    Attributes:
        tokens: [N, c] float32, row-major over the grid.
        image_size: (height, width) of the image in pixels; need not be whole patches.
        patch_size: pixels along each side of a patch.
    """

    tokens: Tensor
    image_size: tuple[int, int]
    patch_size: int

    @classmethod
    def from_map(
        cls, latent_map: Tensor, patch_size: int, image_size: tuple[int, int] | None = None
    ) -> "Latent":
        """Turn a map [c, rows, columns] into a latent; a view.

        Args:
            image_size: (height, width) in pixels; whole patches if None.

        Raises:
            ValueError: no map, or not the one of an image of this size.
        """
        if latent_map.ndim != 3:
            raise ValueError(
                f"a latent map of shape {list(latent_map.shape)} is not [c, rows, columns]; "
                "give the maps of a batch one by one"
            )
        _, rows, columns = latent_map.shape
        size = image_size or (rows * patch_size, columns * patch_size)
        if grid_size(*size, patch_size) != (rows, columns):
            raise ValueError(
                f"image_size={size} at {patch_size=} has a grid of {grid_size(*size, patch_size)}, "
                f"the map one of {(rows, columns)}; leave image_size out for whole patches"
            )
        return cls(latent_map.flatten(1).T, size, patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return grid_size(*self.image_size, self.patch_size)

    def as_map(self) -> Tensor:
        """Return a view [c, rows, columns], as convolutions and diffusion models take it."""
        return self.tokens.T.unflatten(1, self.grid)


def encode_images(
    model: "Autoencoder",
    images: ImageLike | Iterable[ImageLike],
    *,
    window: int | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> list[Latent]:
    """Encode images of any sizes, each as if alone; nothing is resized.

    Args:
        images: one image or several, of the kinds that `to_tensor` takes, mixed at will; or a
            batch [B, H, W, 3] (array) or [B, 3, H, W] (tensor).
        window: radius in patches of sliding-window attention; full attention if None.
        pass_tokens: images share a forward pass up to this many patches; a larger one goes alone.

    Returns:
        a latent an image, in their order, on the model's device. Images are padded to whole
        patches with gray. No gradient flows back, but the tensors may be trained on.

    Raises:
        TypeError: something is no image; the message names its position in the batch.
        ValueError: there are no images, or one has no pixels or another shape, type or range.
    """
    batch = [
        checked_pixels(image, f"image {position} of the batch")
        for position, image in enumerate(_as_list(images))
    ]
    if not batch:
        raise ValueError("there are no images to encode; give at least one")
    patch_size, device = model.config.patch_size, model.device
    sizes = [(image.shape[1], image.shape[2]) for image in batch]
    latents: list[Latent] = []
    for members in _passes(sizes, patch_size, pass_tokens):
        with torch.inference_mode():
            pixels = (pad_to_patch(normalized(x, device), patch_size) for x in batch[members])
            patches = torch.cat([patchify(x, patch_size)[0] for x in pixels])
            packed = _layout(sizes[members], patch_size, device).with_tokens(patches)
            encoded = model.encode_packed(packed, window=window)
        lengths = encoded.cu_seqlens.diff().tolist()
        # clone() outside of inference mode: training steps may use the copies, and each image's
        # latent can be freed on its own.
        latents += [
            Latent(tokens.clone(), size, patch_size)
            for tokens, size in zip(encoded.tokens.split(lengths), sizes[members], strict=True)
        ]
    return latents


def decode_latents(
    model: "Autoencoder",
    latents: Latent | Iterable[Latent],
    *,
    window: int | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> list[Tensor]:
    """Decode latents to images of their original sizes.

    Args:
        latents: one or several, of any sizes, on any device.
        window, pass_tokens: see `encode_images`.

    Returns:
        pixels [3, H, W] of each, float32 clamped to [-1, 1], on the model's device; no gradient
        flows back, but the tensors may be trained on.

    Raises:
        TypeError: something is no Latent; the message names its position in the batch.
        ValueError: there are no latents, or one is not finite or not of the model's shape.
    """
    batch = [latents] if isinstance(latents, Latent) else list(latents)
    if not batch:
        raise ValueError("there are no latents to decode; give at least one")
    patch_size, device = model.config.patch_size, model.device
    for position, latent in enumerate(batch):
        _require_latent(latent, model, f"latent {position} of the batch")
    sizes = [latent.image_size for latent in batch]
    images: list[Tensor] = []
    for members in _passes(sizes, patch_size, pass_tokens):
        with torch.inference_mode():
            tokens = torch.cat([latent.tokens.to(device) for latent in batch[members]])
            packed = _layout(sizes[members], patch_size, device).with_tokens(tokens)
            decoded = unpack_images(model.decode_packed(packed, window=window), patch_size)
        # clamp() outside of inference mode, as clone() in encode_images.
        images += [image.clamp(-1, 1).float() for image in decoded]
    return images


def _passes(sizes: Sequence[tuple[int, int]], patch_size: int, pass_tokens: int) -> Iterator[slice]:
    """Cut a batch into runs of images that share a forward pass."""
    start, filled = 0, 0
    for position, size in enumerate(sizes):
        length = num_tokens(*size, patch_size)
        if position > start and filled + length > pass_tokens:
            yield slice(start, position)
            start, filled = position, 0
        filled += length
    yield slice(start, len(sizes))


def _layout(
    sizes: Sequence[tuple[int, int]], patch_size: int, device: torch.device
) -> PackedTokens:
    """Lay images out in a row that has no padding."""
    lengths = [num_tokens(*size, patch_size) for size in sizes]
    return layout_of(
        sizes,
        patch_size=patch_size,
        row_tokens=sum(lengths),
        max_images=len(sizes),
        max_seqlen=max(lengths),
    ).to(device)


def _as_list(images: ImageLike | Iterable[ImageLike]) -> list[Any]:
    """Return the images of a batch; what is no batch becomes a batch of one, to be judged there."""
    if isinstance(images, Tensor | np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def _require_latent(latent: object, model: "Autoencoder", where: str) -> None:
    """Refuse what the model's decoder cannot take."""
    if not isinstance(latent, Latent):
        remedy = "give what encode returned, or Latent.from_map(map, patch_size) of a map [c, h, w]"
        raise TypeError(f"{where} is of type {type(latent).__name__}; {remedy}")
    config, tokens = model.config, latent.tokens
    if latent.patch_size != config.patch_size:
        raise ValueError(
            f"{where} has patches of {latent.patch_size} pixels, the model of {config.patch_size}; "
            "decode it with the model that encoded it"
        )
    if min(latent.image_size) < 1:
        raise ValueError(f"{where} has image_size={latent.image_size}, without pixels; drop it")
    rows, columns = latent.grid
    if tokens.ndim != 2 or tokens.shape[0] != rows * columns:
        raise ValueError(
            f"{where} has tokens of shape {list(tokens.shape)}, but image_size={latent.image_size} "
            f"is a grid of {rows} x {columns}: give [{rows * columns}, {config.latent_channels}]"
        )
    if tokens.shape[1] != config.latent_channels:
        raise ValueError(
            f"{where} has {tokens.shape[1]} channels, the model {config.latent_channels}; "
            "decode it with the model that encoded it"
        )
    if tokens.dtype not in FLOAT_DTYPES or not tokens.isfinite().all():
        raise ValueError(f"{where} is not finite floats (dtype {tokens.dtype}); compute it again")
