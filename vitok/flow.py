"""Flow matching on packed latents: the path, its velocity, training times, guidance and samplers.

The path is the straight line from noise at time 0 to data at time 1 (rectified flow,
arXiv:2209.03003), so that its velocity is data minus noise at all times.

Shape suffixes: T tokens of the row, C latent channels, S image slots, N sampling steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from vitok.config import config, require_choice
from vitok.dit import Condition
from vitok.losses import sum_of_image_means
from vitok.packed import PackedTokens
from vitok.seeds import keyed_generator

TimeDistribution = Literal["uniform", "logit_normal"]
Method = Literal["euler", "heun", "midpoint"]

# A uniform draw is kept this far from 0 and 1, where a logit-normal time would be infinite inside.
_EDGE = 1e-6

Velocity = Callable[[PackedTokens, Tensor], Tensor]
"""Maps a row of latents and the time [S] of each slot to velocities [T, C]."""


@config
class TimeConfig:
    """Which times a training sees, and how sampling steps are spread.

    Attributes:
        distribution: of training times; `logit_normal` looks more at the middle (SD3,
            arXiv:2403.03206).
        mean: of the logit of a `logit_normal` time.
        std: standard deviation of that logit.
        shift_values: an image whose latent has this many values, tokens times channels, keeps its
            times; one with m values has its noise raised as if the deviation of the noise were
            larger by sqrt(m / shift_values), because that many values show through that much more
            noise (SD3, sec. 5.3.2; by latent dimension, arXiv:2510.11690, whose figure is 4096).
            0 shifts none.
    """

    distribution: TimeDistribution = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift_values: int = 0

    def __post_init__(self) -> None:
        require_choice("distribution", self.distribution, TimeDistribution)
        if self.std <= 0 or self.shift_values < 0:
            raise ValueError(
                f"std={self.std} must be positive and shift_values={self.shift_values} positive, "
                "or 0 for no shift"
            )


@config
class SamplerConfig:
    """How latents are sampled.

    Attributes:
        steps: from noise to data; `heun` and `midpoint` compute two velocities in each.
        method: of integration; errors fall with the steps for `euler`, with their square for the
            others.
        guidance: how far the velocity goes from the null condition's through the condition's; 1 is
            the condition's alone, and costs half.
        guidance_interval: times from and to which it is guided, in [0, 1] from noise to data
            (arXiv:2404.07724); the condition's velocity counts outside.
    """

    steps: int = 50
    method: Method = "euler"
    guidance: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require_choice("method", self.method, Method)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        begin, end = self.guidance_interval
        if not 0 <= begin <= end <= 1:
            raise ValueError(
                f"guidance_interval={self.guidance_interval} must rise, from 0 (noise) to 1 (data)"
            )


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is random about a row of a training step.

    Attributes:
        noise: [T, C] standard normal; 0 in padding.
        time: [S] uniform in [0, 1), see `training_times`.
        keep: [S] uniform in [0, 1): below the dropout, the null condition is trained.
    """

    noise: Tensor
    time: Tensor
    keep: Tensor

    def to(self, device: torch.device) -> "Draws":
        """Return a copy on another device."""
        return Draws(self.noise.to(device), self.time.to(device), self.keep.to(device))


def draw_for_images(
    keys: Sequence[object], lengths: Sequence[int], *, row_tokens: int, slots: int, channels: int
) -> Draws:
    """Draw noise and numbers for the images of a row, each from its own key.

    Neither the packing nor the number of workers nor a resume changes what an image is given.

    Args:
        keys: of the images, in the order in which they lie in the row: seed, step and sample, or
            the seed of a picture.
        lengths: tokens of each.
    """
    noise = torch.zeros(row_tokens, channels)
    numbers = torch.zeros(slots, 2)
    start = 0
    for slot, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        generator = keyed_generator("flow", key)
        numbers[slot] = torch.rand(2, generator=generator)
        noise[start : start + length] = torch.randn(length, channels, generator=generator)
        start += length
    return Draws(noise=noise, time=numbers[:, 0], keep=numbers[:, 1])


def training_times(config: TimeConfig, uniform_S: Tensor, packed: PackedTokens) -> Tensor:
    """Return training times [S] in (0, 1), from one uniform number for each slot.

    Args:
        packed: the latents that the times are for.
    """
    time_S = uniform_S.clamp(_EDGE, 1 - _EDGE)
    if config.distribution == "logit_normal":
        time_S = torch.sigmoid(config.mean + config.std * torch.special.ndtri(time_S))
    return shift_time(config, time_S, packed)


def sampling_times(config: TimeConfig, steps: int, packed: PackedTokens) -> Tensor:
    """Return the times [N+1, S] at which sampling stops: even steps, shifted as in training."""
    even = torch.linspace(0, 1, steps + 1, device=packed.tokens.device)
    return shift_time(config, even[:, None].expand(-1, len(packed.grid)), packed)


def shift_time(config: TimeConfig, time_S: Tensor, packed: PackedTokens) -> Tensor:
    """Move times [..., S] towards noise, for images with many latent values."""
    if not config.shift_values:
        return time_S
    values_S = packed.grid.prod(dim=1).clamp(min=1) * packed.tokens.shape[1]
    factor_S = values_S.sqrt() / sqrt(config.shift_values)
    return time_S / (time_S + factor_S * (1 - time_S))


def per_token(values_S: Tensor, packed: PackedTokens) -> Tensor:
    """Return [T, 1]: the value of each token's image; 0 in padding."""
    real_T = packed.segment_ids >= 0
    return (values_S[packed.segment_ids.clamp(min=0)] * real_T)[:, None]


def flow_loss(
    model: Callable[[PackedTokens, Tensor, Condition], PackedTokens],
    latents: PackedTokens,
    condition: Condition,
    draws: Draws,
    times: TimeConfig,
    *,
    dropout: float = 0.0,
) -> dict[str, Tensor]:
    """Compare a model's velocity with that of the path, at one time for each image.

    Args:
        latents: normalised, [T, C].
        dropout: share of the images that train the null condition instead of their own.

    Returns:
        "loss", the mean square over an image's values, summed over the images; float32 scalar.
    """
    time_S = training_times(times, draws.time, latents)
    time_T1 = per_token(time_S, latents)
    noisy = latents.with_tokens((1 - time_T1) * draws.noise + time_T1 * latents.tokens)
    velocity = model(noisy, time_S, condition.where(draws.keep >= dropout)).tokens
    target = latents.tokens - draws.noise
    return {"loss": sum_of_image_means((velocity - target).square().mean(dim=-1), latents)}


def guided(
    model: Callable[[PackedTokens, Tensor, Condition], PackedTokens],
    condition: Condition,
    sampler: SamplerConfig,
) -> Velocity:
    """Return the velocity that a sampler follows: classifier-free guidance (arXiv:2207.12598)."""
    begin, end = sampler.guidance_interval

    def velocity(packed: PackedTokens, time_S: Tensor) -> Tensor:
        conditional = model(packed, time_S, condition).tokens
        inside_S = (time_S >= begin) & (time_S <= end)
        if sampler.guidance == 1 or not inside_S.any():
            return conditional
        null = model(packed, time_S, condition.null()).tokens
        weight_S = torch.where(inside_S, sampler.guidance, 1.0)
        return torch.lerp(null, conditional, per_token(weight_S, packed))

    return velocity


def integrate(velocity: Velocity, start: PackedTokens, times_NS: Tensor, method: Method) -> Tensor:
    """Follow a velocity from the first of the times to the last.

    Args:
        start: latents at the first time, [T, C].
        times_NS: [N+1, S], rising; every image may have times of its own.

    Returns:
        latents [T, C] at the last time.
    """
    x_TC = start.tokens
    for time_S, after_S in pairwise(times_NS):
        step_T1 = per_token(after_S - time_S, start)
        first_TC = velocity(start.with_tokens(x_TC), time_S)
        if method == "euler":
            x_TC = x_TC + step_T1 * first_TC
        elif method == "heun":
            second_TC = velocity(start.with_tokens(x_TC + step_T1 * first_TC), after_S)
            x_TC = x_TC + step_T1 * (first_TC + second_TC) / 2
        else:
            assert method == "midpoint", method
            middle_S = (time_S + after_S) / 2
            middle_TC = x_TC + step_T1 / 2 * first_TC
            x_TC = x_TC + step_T1 * velocity(start.with_tokens(middle_TC), middle_S)
    return x_TC


@torch.no_grad()
def sample_latents(
    model: Any,
    layout: PackedTokens,
    condition: Condition,
    seeds: Sequence[int],
    *,
    sampler: SamplerConfig,
    times: TimeConfig,
) -> PackedTokens:
    """Sample normalised latents for the images of a row.

    An image depends on its seed, its grid and its condition, not on what else is in the row; other
    rows change no more than the rounding of the model.

    Args:
        model: a DiT.
        layout: of the row, on the model's device.
        condition: of each slot.
        seeds: of each image, in the order of the row.

    Returns:
        the same layout around latents [T, C] float32.
    """
    lengths = [rows * columns for rows, columns in layout.grid.tolist() if rows > 0]
    draws = draw_for_images(
        seeds,
        lengths,
        row_tokens=len(layout.segment_ids),
        slots=len(layout.grid),
        channels=model.config.latent_channels,
    )
    start = layout.with_tokens(draws.noise.to(layout.segment_ids.device))
    times_NS = sampling_times(times, sampler.steps, start)
    velocity = guided(model, condition, sampler)
    return layout.with_tokens(integrate(velocity, start, times_NS, sampler.method))
