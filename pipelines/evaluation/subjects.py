"""What is evaluated: our models, autoencoders of diffusers, codecs, behind one function each."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.evaluation.baselines import (
    REPOSITORIES,
    latent_shape,
    load_baseline,
    reconstruct_with,
)
from pipelines.evaluation.codecs import Codec, reconstruct_with_codec
from vitok.config import config, parse_config, require_choice
from vitok.parallel import compile_blocks, float8_inference
from vitok.pretrained import weights_digest
from vitok.storage import absolute_if_local

Dtype = Literal["", "bfloat16", "float32", "float8"]

SOURCE = "source"
_DIFFUSERS = "diffusers:"
_LATENT_BITS = 16  # of a latent value: bfloat16, in which latents are cached


@config
class SubjectSpec:
    """One thing to evaluate, as `LOCATION,option=value,...` names it.

    Attributes:
        location: a training run, a folder of weights, a released model (350M-f16x64) or a Hugging
            Face repository of ours; sd-vae, sdxl-vae, flux1-vae, flux2-vae, qwen-image-vae,
            hunyuan-video-vae, hunyuan-image-vae, dc-ae-f32c32, rae-dinov2, or diffusers:FOLDER and
            diffusers:OWNER/NAME for others; jpeg or webp; `source` reconstructs without a fault.
        name: in results; the location if empty.
        window: radius in patches of sliding-window attention of our models; 0 for full attention.
        dtype: bfloat16, float32 or float8 (our models, with a GPU for it); empty for bfloat16 of
            our models and float32 of all others.
        compile: compile the blocks of our models.
        bits_per_pixel: of jpeg and webp; 0 for those of the first model's latents at 16 bits a
            number.
    """

    location: str
    name: str = ""
    window: int = 0
    dtype: Dtype = ""
    compile: bool = False
    bits_per_pixel: float = 0.0

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, Dtype)
        if self.window < 0:
            raise ValueError(f"window={self.window} must be at least 1, or 0 for full attention")
        if self.bits_per_pixel and not self.is_codec:
            raise ValueError(f"{self.location} is neither jpeg nor webp and has no bits_per_pixel")
        if self.bits_per_pixel < 0:
            raise ValueError(f"bits_per_pixel={self.bits_per_pixel} must be above 0")
        if (self.window or self.compile or self.dtype == "float8") and not self.is_ours:
            raise ValueError(
                f"window, compile and float8 are for our models, and {self.location} is none"
            )

    @classmethod
    def parse(cls, text: str) -> "SubjectSpec":
        """Read `LOCATION,option=value,...`.

        Raises:
            ValueError: an option that there is not, or a value that it cannot have.
        """
        location, *options = text.split(",")
        given: dict[str, Any] = {"location": location}
        for option in options:
            name, separator, value = option.partition("=")
            name = name.replace("-", "_")  # as on the command line
            if not separator or name not in _OPTIONS:
                raise ValueError(
                    f"{text}: {option!r} is no option; write option=value, of {', '.join(_OPTIONS)}"
                )
            given[name] = value
        return parse_config(cls, given, text)

    def absolute(self) -> "SubjectSpec":
        """Return the same with an absolute path, if it is one: workers run in other directories."""
        if self.is_codec or self.location == SOURCE or self.location in REPOSITORIES:
            return self
        prefix = _DIFFUSERS if self.is_baseline else ""
        location = prefix + absolute_if_local(self.location.removeprefix(prefix))
        return replace(self, location=location, name=self.title)

    @property
    def title(self) -> str:
        """What results call it."""
        if self.name:
            return self.name
        options = [f"window {self.window}"] if self.window else []
        options += [self.dtype] if self.dtype else []
        return ", ".join([self.location.rstrip("/"), *options])

    @property
    def is_codec(self) -> bool:
        """Whether it is JPEG or WebP."""
        return self.location in get_args(Codec)

    @property
    def is_baseline(self) -> bool:
        """Whether it is an autoencoder of diffusers."""
        return self.location in REPOSITORIES or self.location.startswith(_DIFFUSERS)

    @property
    def is_ours(self) -> bool:
        """Whether it is a model of this project."""
        return not (self.is_codec or self.is_baseline or self.location == SOURCE)


_OPTIONS = tuple(field.name for field in fields(SubjectSpec) if field.name != "location")


@dataclass(frozen=True)
class SubjectFacts:
    """What is known of a subject.

    Attributes:
        compression_ratio: numbers of the image for each number of its latent; None for codecs.
        bits_per_pixel: of latents at 16 bits a number; of a codec, at most.
        digest: sha256 (hex) of the weights at the precision in use; empty for codecs.
        device: GPU or processor that it runs on.
    """

    compression_ratio: float | None = None
    bits_per_pixel: float | None = None
    digest: str = ""
    device: str = ""


@dataclass(frozen=True, eq=False)
class Subject:
    """A subject, ready to be used.

    Attributes:
        reconstruct: images [3, H, W] in [-1, 1], of any sizes, to as many of the same sizes.
    """

    facts: SubjectFacts
    reconstruct: Callable[[Sequence[Tensor]], list[Tensor]]


def load_subject(spec: SubjectSpec, device: torch.device) -> Subject:
    """Load a subject's weights to a device.

    Raises:
        FileNotFoundError: the weights are not there.
        ImportError: a package is missing.
        RuntimeError: the device has no float8.
        ValueError: the weights are of something else; a codec without bits_per_pixel.
    """
    if spec.location == SOURCE:
        return Subject(SubjectFacts(), list)
    if spec.is_codec:
        if not spec.bits_per_pixel:
            raise ValueError(
                f"there is no model whose bits per pixel {spec.location} could take; give them, as "
                f"in {spec.location},bits_per_pixel=1.5"
            )
        reconstruct = reconstruct_with_codec(spec.location, spec.bits_per_pixel)  # type: ignore[arg-type]
        facts = SubjectFacts(bits_per_pixel=spec.bits_per_pixel)
        return Subject(facts, lambda images: [reconstruct(image) for image in images])
    return _baseline(spec, device) if spec.is_baseline else _ours(spec, device)


def _ours(spec: SubjectSpec, device: torch.device) -> Subject:
    others = (*REPOSITORIES, *get_args(Codec))
    near = difflib.get_close_matches(spec.location, others, n=1, cutoff=0.75)
    if near and not Path(spec.location).exists():
        raise ValueError(
            f"there is no subject {spec.location!r}; did you mean {near[0]}? There are "
            f"{', '.join(others)}, models of ours and diffusers:FOLDER"
        )
    dtype = torch.float32 if spec.dtype == "float32" else torch.bfloat16
    model = load_autoencoder(spec.location, dtype=dtype)
    facts = _facts(model, model.config.patch_size, model.config.latent_channels)
    model.to(device)
    if spec.dtype == "float8":
        float8_inference(model)
    if spec.compile:
        compile_blocks(model)
    window = spec.window or None

    def reconstruct(images: Sequence[Tensor]) -> list[Tensor]:
        return model.decode(model.encode(images, window=window), window=window)

    return Subject(facts, reconstruct)


def _baseline(spec: SubjectSpec, device: torch.device) -> Subject:
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
    model = load_baseline(spec.location.removeprefix(_DIFFUSERS), dtype)
    facts = _facts(model, *latent_shape(model))
    reconstruct_batch = reconstruct_with(model.to(device))

    @torch.inference_mode()
    def reconstruct(images: Sequence[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        sizes = {image.shape for image in images}
        for size in sorted(sizes):
            places = [place for place, image in enumerate(images) if image.shape == size]
            batch = torch.stack([images[place] for place in places]).to(device, dtype)
            found |= dict(zip(places, reconstruct_batch(batch).float(), strict=True))
        return [found[place] for place in range(len(images))]

    return Subject(facts, reconstruct)


def _facts(model: nn.Module, stride: int, channels: int) -> SubjectFacts:
    numbers_per_pixel = channels / stride**2
    return SubjectFacts(
        compression_ratio=3 / numbers_per_pixel,
        bits_per_pixel=_LATENT_BITS * numbers_per_pixel,
        digest=weights_digest(model),
    )
