"""An Autoencoder where diffusers expects an AutoencoderKL; diffusers itself is not needed.

The interface is what pipelines and training scripts of diffusers 0.42 use of their `vae`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitok.autoencoder import Autoencoder
from vitok.packed import layout_of, pack_images, unpack_images


@dataclass(frozen=True)
class VaeConfig(Mapping[str, Any]):
    """What pipelines read of a VAE's config, as attributes or as items.

    Attributes:
        latent_channels: c.
        block_out_channels: only its length means anything: pipelines take 2^(length - 1) pixels for
            the side of a latent.
        scaling_factor, shift_factor: pipelines diffuse (latent - shift_factor) * scaling_factor.
        sample_size: pixels of a side that some pipelines take for their default.
        latents_mean, latents_std: statistics of each channel, of which there are none.
        force_upcast: whether SDXL computes the VAE in float32 instead of float16.
    """

    latent_channels: int
    block_out_channels: tuple[int, ...]
    scaling_factor: float
    shift_factor: float
    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = False

    def __getitem__(self, key: str) -> Any:
        if key not in iter(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))


@dataclass(frozen=True)
class LatentDistribution:
    """Where the latents of a batch may lie.

    Attributes:
        mean, std: [B, c, rows, columns]; std is 0 for LayerNorm latents, which are exact.
    """

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """Return the most likely latents."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents; from a CPU generator the same on every device."""
        noise = torch.randn(
            self.mean.shape,
            generator=generator,
            device=self.mean.device if generator is None else generator.device,
            dtype=self.mean.dtype,
        )
        return self.mean + self.std * noise.to(self.mean.device)


class EncoderOutput(NamedTuple):
    """What `encode` returns."""

    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    """What `decode` returns: [B, 3, H, W]."""

    sample: Tensor


class DiffusersAutoencoder(nn.Module):
    """Give an Autoencoder the interface of diffusers' AutoencoderKL.

    All images of a batch have one size, whose sides are multiples of the patch. As with
    AutoencoderKL, results have the dtype of the weights, pixels are not clamped, and gradients
    flow; pipelines switch them off themselves.

    Pipelines take it in their constructor, `DiTPipeline(vae=..., ...)`, but not in from_pretrained,
    which refuses classes that are not of diffusers.

    Args:
        scaling_factor, shift_factor: see VaeConfig. LayerNorm latents have mean 0 and variance 1 as
            they are; for tanh and KL latents give 1 / std and the mean of latents of your images.
        sample_size: see VaeConfig.

    Raises:
        ValueError: the patch is no power of two, which pipelines could not know.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        *,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        sample_size: int = 256,
    ) -> None:
        super().__init__()
        patch_size = autoencoder.config.patch_size
        if patch_size.bit_count() != 1:
            raise ValueError(
                f"{patch_size=} is no power of two, and diffusers pipelines take every VAE's "
                "factor for one; use Autoencoder.encode and Autoencoder.decode instead"
            )
        self.autoencoder = autoencoder
        self.config = VaeConfig(
            latent_channels=autoencoder.config.latent_channels,
            block_out_channels=(autoencoder.config.decoder_width,) * patch_size.bit_length(),
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            sample_size=sample_size,
        )
        self.window: int | None = None
        self.use_slicing = False

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> EncoderOutput | tuple[LatentDistribution]:
        """Encode images [B, 3, H, W] in [-1, 1] to a distribution over [B, c, H/P, W/P].

        Raises:
            ValueError: another shape, or a side that is no multiple of the patch.
        """
        self._move_if_offloaded()
        patch_size = self.autoencoder.config.patch_size
        self._require_batch(x, "images", 3)
        for side, pixels in zip(("height", "width"), x.shape[2:], strict=True):
            if pixels % patch_size:
                raise ValueError(
                    f"images of {side} {pixels} are no multiples of {patch_size=}: resize or crop "
                    "them (VaeImageProcessor does), or use Autoencoder.encode, which takes any size"
                )
        parts = [self._encode(part) for part in self._slices(x)]
        mean = torch.cat([part.mean for part in parts])
        distribution = LatentDistribution(mean, torch.cat([part.std for part in parts]))
        return EncoderOutput(distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents [B, c, rows, columns] to images [B, 3, rows * P, columns * P].

        Args:
            generator: unused, as in AutoencoderKL: decoding draws no numbers.

        Raises:
            ValueError: another shape.
        """
        self._move_if_offloaded()
        self._require_batch(z, "latents", self.config.latent_channels)
        images = torch.cat([self._decode(part) for part in self._slices(z)])
        return DecoderOutput(images) if return_dict else (images,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct images [B, 3, H, W], from the mode or from a sample of their latents."""
        (distribution,) = self.encode(sample, return_dict=False)
        z = distribution.sample(generator) if sample_posterior else distribution.mode()
        return self.decode(z, return_dict=return_dict)

    def enable_tiling(self, window: int = 8) -> None:
        """Let patches attend to those at most `window` away: time grows linearly with the image.

        The stand-in for AutoencoderKL's tiles. There are no seams; images of more than
        window + 1 patches a side come out differently than without.
        """
        self.window = window

    def disable_tiling(self) -> None:
        """Go back to full attention."""
        self.window = None

    @property
    def use_tiling(self) -> bool:
        """Whether attention is limited to a window."""
        return self.window is not None

    def enable_slicing(self) -> None:
        """Compute a batch image by image, which takes less memory and changes nothing else."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Compute all images of a batch in one pass."""
        self.use_slicing = False

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights and of every result."""
        return self.autoencoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.autoencoder.device

    def _encode(self, x: Tensor) -> LatentDistribution:
        patch_size = self.autoencoder.config.patch_size
        packed = pack_images(list(x), patch_size=patch_size)
        posterior = self.autoencoder.posterior(packed, window=self.window)
        std = torch.zeros_like(posterior.mean) if posterior.std is None else posterior.std
        grid = (len(x), x.shape[2] // patch_size, x.shape[3] // patch_size)
        mean, std = (
            tokens.to(self.dtype).unflatten(0, grid).permute(0, 3, 1, 2).contiguous()
            for tokens in (posterior.mean, std)
        )  # [B, c, rows, columns]
        return LatentDistribution(mean, std)

    def _decode(self, z: Tensor) -> Tensor:
        patch_size = self.autoencoder.config.patch_size
        num_images, _, rows, columns = z.shape
        layout = layout_of(
            [(rows * patch_size, columns * patch_size)] * num_images,
            patch_size=patch_size,
            row_tokens=num_images * rows * columns,
            max_images=num_images,
            max_seqlen=rows * columns,
        ).to(z.device)
        latents = layout.with_tokens(z.permute(0, 2, 3, 1).flatten(0, 2))  # [B*rows*columns, c]
        decoded = self.autoencoder.decode_packed(latents, window=self.window)
        return torch.stack(unpack_images(decoded, patch_size))

    def _slices(self, batch: Tensor) -> tuple[Tensor, ...]:
        return batch.split(1 if self.use_slicing else len(batch))

    def _require_batch(self, batch: Tensor, what: str, channels: int) -> None:
        if batch.ndim != 4 or batch.shape[1] != channels or 0 in batch.shape:
            raise ValueError(
                f"{what} of shape {list(batch.shape)} are no batch [B, {channels}, height, width]; "
                "add the dimension of the batch, or take the model with these channels"
            )
        if not batch.is_floating_point():
            raise ValueError(f"{what} are {batch.dtype}; give floats, pixels in [-1, 1]")

    def _move_if_offloaded(self) -> None:
        # accelerate hooks `forward` alone; AutoencoderKL calls its hook here, too
        # (diffusers.utils.accelerate_utils.apply_forward_hook).
        hook = getattr(self, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
