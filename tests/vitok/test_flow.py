from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from tests.vitok.latent_rows import labelled, one_latent, row_of_latents, tiny_dit
from vitok.dit import Condition, DiT
from vitok.flow import (
    Draws,
    SamplerConfig,
    TimeConfig,
    draw_for_images,
    flow_loss,
    guided,
    integrate,
    per_token,
    sample_latents,
    sampling_times,
    training_times,
)
from vitok.initialize import start_at_random
from vitok.optim import OptimConfig, build_optimizer
from vitok.packed import PackedTokens

MEAN, STD = 1.5, 0.4
UNIFORM = TimeConfig(distribution="uniform")


def single_tokens(num_images: int, channels: int, seed: int = 0) -> PackedTokens:
    """Return a row of images of one token each, filled with noise."""
    return row_of_latents(
        [(1, 1)] * num_images, channels=channels, extra_tokens=0, extra_slots=0, seed=seed
    )


def gaussian_velocity(packed: PackedTokens, time_S: Tensor) -> Tensor:
    """Return E[data - noise | x] for data of mean MEAN and deviation STD in every channel."""
    t = per_token(time_S, packed)
    variance = (1 - t) ** 2 + t**2 * STD**2
    covariance = t * STD**2 - (1 - t)
    return MEAN + covariance / variance * (packed.tokens - t * MEAN)


def test_loss_of_the_true_velocity_of_a_gaussian_is_its_conditional_variance() -> None:
    packed = single_tokens(4096, channels=8)
    latents = packed.with_tokens(MEAN + STD * packed.tokens)
    draws = draw_for_images(range(4096), [1] * 4096, row_tokens=4096, slots=4096, channels=8)
    condition = Condition(labels=torch.full((4096,), -1))

    def loss(shift: float) -> float:
        def model(packed: PackedTokens, time_S: Tensor, condition: Condition) -> PackedTokens:
            return packed.with_tokens(gaussian_velocity(packed, time_S) + shift)

        return flow_loss(model, latents, condition, draws, UNIFORM)["loss"].item() / 4096

    # Var[data - noise | x] at every time, of which the loss takes the mean.
    t = draws.time
    floor = (STD**2 / ((1 - t) ** 2 + t**2 * STD**2)).mean().item()
    assert loss(0.0) == pytest.approx(floor, rel=0.02)
    # The floor is a minimum: whatever is added comes on top with its square.
    assert loss(0.3) == pytest.approx(floor + 0.09, rel=0.02)
    assert loss(-0.3) == pytest.approx(floor + 0.09, rel=0.02)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
def test_samples_of_a_gaussian_have_its_moments(method: str) -> None:
    noise = single_tokens(4096, channels=8)
    times = sampling_times(UNIFORM, 200, noise)
    samples = integrate(gaussian_velocity, noise, times, method)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_errors_of_a_sampler_fall_with_its_order(method: str, order: int) -> None:
    start = single_tokens(64, channels=4)
    start = start.with_tokens(0.5 + start.tokens.double().abs())
    # For a Gaussian some errors cancel; this velocity bends in x and in t.
    exact = 1 / (1 / start.tokens + 1 + 1 / 2)

    def velocity(packed: PackedTokens, time_S: Tensor) -> Tensor:
        return -packed.tokens.square() * (1 + per_token(time_S, packed))

    def error(steps: int) -> float:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.double)[:, None].expand(-1, 64)
        return (integrate(velocity, start, times, method) - exact).norm().item()

    errors = [error(steps) for steps in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_samples_of_a_mixture_of_two_points_end_on_the_nearer_one() -> None:
    point = 0.8

    def velocity(packed: PackedTokens, time_S: Tensor) -> Tensor:
        t = per_token(time_S, packed)
        data = point * torch.tanh(t * point * packed.tokens / (1 - t) ** 2)
        return (data - packed.tokens) / (1 - t)

    noise = single_tokens(512, channels=1)
    samples = integrate(velocity, noise, sampling_times(UNIFORM, 100, noise), "euler")
    torch.testing.assert_close(samples, point * noise.tokens.sign())
    assert 0.4 < (samples > 0).float().mean() < 0.6


def test_a_model_that_learned_a_point_for_each_class_samples_these_points() -> None:
    points = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.0, 1.0]])
    model = tiny_dit(latent_channels=3, num_classes=2, depth=1)
    start_at_random(model, seed=0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.0))
    labels = [0, 1] * 8
    layout = row_of_latents([(1, 2)] * 16, channels=3, extra_tokens=0, extra_slots=0)
    latents = layout.with_tokens(points[labels].repeat_interleave(2, dim=0))
    losses = []
    for step in range(150):
        draws = draw_for_images(
            [f"{step}/{i}" for i in range(16)], [2] * 16, row_tokens=32, slots=16, channels=3
        )
        loss = flow_loss(model, latents, labelled(*labels), draws, TimeConfig(), dropout=0.2)
        (loss["loss"] / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss["loss"].item() / 16)
    assert losses[-1] < losses[0] / 3

    def distance(guidance: float) -> float:
        sampler = SamplerConfig(steps=20, guidance=guidance)
        samples = sample_latents(
            model, layout, labelled(*labels), range(100, 116), sampler=sampler, times=TimeConfig()
        )
        return (samples.tokens - latents.tokens).norm(dim=-1).mean().item()

    between = (points[0] - points[1]).norm().item()
    assert distance(1.0) < 0.15 * between
    # The null condition knows of both points.
    assert distance(0.0) > 0.2 * between


def test_guidance_of_1_is_the_condition_alone_and_never_asks_for_the_null_condition() -> None:
    model, packed = tiny_dit(), row_of_latents([(2, 3), (3, 3)])
    condition, time = labelled(1, 2, slots=4), torch.full((4,), 0.5)
    asked: list[Tensor] = []

    def counting(packed: PackedTokens, time_S: Tensor, condition: Condition) -> PackedTokens:
        asked.append(condition.labels)
        return model(packed, time_S, condition)

    velocity = guided(counting, condition, SamplerConfig(guidance=1.0))(packed, time)
    assert torch.equal(velocity, model(packed, time, condition).tokens)
    assert [labels.tolist() for labels in asked] == [[1, 2, -1, -1]]


def test_guidance_goes_from_the_null_condition_through_the_condition() -> None:
    model, packed = tiny_dit(), row_of_latents([(2, 3), (3, 3)])
    condition, time = labelled(1, 2, slots=4), torch.tensor([0.2, 0.8, 0.0, 0.0])
    conditional = model(packed, time, condition).tokens
    null = model(packed, time, labelled(slots=4)).tokens
    assert (conditional - null).norm() > 0.1
    real = packed.segment_ids >= 0
    velocity = guided(model, condition, SamplerConfig(guidance=4.0))(packed, time)
    torch.testing.assert_close(velocity[real], (null + 4 * (conditional - null))[real])
    # Inside the interval lies the second image alone.
    some = SamplerConfig(guidance=4.0, guidance_interval=(0.5, 0.9))
    mixed = guided(model, condition, some)(packed, time)
    second = packed.segment_ids == 1
    first = packed.segment_ids == 0
    assert torch.equal(mixed[first], conditional[first])
    assert torch.equal(mixed[second], velocity[second])


def sampled(model: DiT, packed: PackedTokens, labels: Condition, seeds: list[int]) -> Tensor:
    sampler = SamplerConfig(steps=4, method="heun", guidance=2.0)
    times = TimeConfig(shift_values=12)
    return sample_latents(model, packed, labels, seeds, sampler=sampler, times=times).tokens


def test_a_sample_depends_on_its_seed_and_not_on_its_batch() -> None:
    model = tiny_dit()
    packed = row_of_latents([(2, 3), (4, 4), (1, 5)])
    together = sampled(model, packed, labelled(3, 0, -1, slots=5), [7, 8, 9])
    assert torch.equal(together, sampled(model, packed, labelled(3, 0, -1, slots=5), [7, 8, 9]))
    for index, (label, seed) in enumerate(zip([3, 0, -1], [7, 8, 9], strict=True)):
        start, stop = packed.cu_seqlens[index : index + 2].tolist()
        layout = one_latent(packed, index)
        alone = sampled(model, layout, labelled(label), [seed])
        torch.testing.assert_close(together[start:stop], alone, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(alone, sampled(model, layout, labelled(label), [seed + 1]))


def test_draws_of_an_image_follow_from_its_key_wherever_it_lies() -> None:
    keys, lengths = ["a", "b", "c"], [3, 2, 4]
    draws = draw_for_images(keys, lengths, row_tokens=12, slots=5, channels=7)
    again = draw_for_images(keys[::-1], lengths[::-1], row_tokens=9, slots=3, channels=7)
    assert torch.equal(draws.time[:3], again.time.flip(0))
    assert torch.equal(draws.keep[:3], again.keep.flip(0))
    pieces = draws.noise[:9].split(lengths)
    for piece, other in zip(pieces, reversed(again.noise.split(lengths[::-1])), strict=True):
        assert torch.equal(piece, other)
    assert not draws.noise[9:].any()
    assert len({*draws.time[:3].tolist(), *draws.keep[:3].tolist()}) == 6


def test_dropped_images_train_the_null_condition() -> None:
    packed = single_tokens(1000, channels=2)
    draws = draw_for_images(range(1000), [1] * 1000, row_tokens=1000, slots=1000, channels=2)
    seen: list[Tensor] = []

    def model(packed: PackedTokens, time_S: Tensor, condition: Condition) -> PackedTokens:
        seen.append(condition.labels)
        return packed

    for dropout in (0.0, 0.1, 1.0):
        flow_loss(model, packed, labelled(*[3] * 1000), draws, UNIFORM, dropout=dropout)
    none, some, all_of_them = ((labels == -1).sum().item() for labels in seen)
    assert (none, all_of_them) == (0, 1000)
    assert some == (draws.keep < 0.1).sum().item() == pytest.approx(100, abs=30)


def test_loss_of_a_row_is_the_sum_of_its_images_alone() -> None:
    model, packed = tiny_dit(), row_of_latents([(2, 3), (4, 4), (1, 5)])
    lengths = [6, 16, 5]
    keys = ["x", "y", "z"]
    draws = draw_for_images(keys, lengths, row_tokens=30, slots=5, channels=6)
    assert len(packed.tokens) == 30
    together = flow_loss(model, packed, labelled(3, 0, 1, slots=5), draws, TimeConfig())["loss"]
    alone = []
    for index, label in enumerate([3, 0, 1]):
        one = draw_for_images(
            keys[index : index + 1],
            lengths[index : index + 1],
            row_tokens=lengths[index],
            slots=1,
            channels=6,
        )
        latent = one_latent(packed, index)
        alone.append(flow_loss(model, latent, labelled(label), one, TimeConfig())["loss"].item())
    assert together.item() == pytest.approx(sum(alone), rel=1e-4)
    assert min(alone) > 0.5


def test_training_times_have_the_distribution_that_was_asked_for() -> None:
    packed = single_tokens(999, channels=2)
    uniform = torch.arange(1, 1000) / 1000
    assert torch.equal(training_times(UNIFORM, uniform, packed), uniform)
    config = TimeConfig(mean=0.4, std=1.3)
    times = training_times(config, uniform, packed).double()
    normal = NormalDist(0.4, 1.3)
    reached = torch.tensor([normal.cdf(x) for x in times.logit().tolist()])
    torch.testing.assert_close(reached, uniform, rtol=1e-4, atol=1e-5)


def test_times_at_the_ends_of_the_unit_interval_are_finite() -> None:
    packed = single_tokens(2, channels=2)
    times = training_times(TimeConfig(), torch.tensor([0.0, 1.0]), packed)
    assert ((times > 0) & (times < 1)).all()


def test_larger_latents_are_given_times_with_more_noise() -> None:
    packed = row_of_latents([(2, 4), (4, 8), (1, 2)], channels=3, extra_slots=0)
    config = TimeConfig(distribution="uniform", shift_values=24)
    times = training_times(config, torch.full((3,), 0.5), packed)
    # 24, 96 and 6 values: at the middle the odds of data to noise are 1, 1/2 and 2.
    torch.testing.assert_close(times, torch.tensor([1 / 2, 1 / 3, 2 / 3]))
    stops = sampling_times(config, 10, packed)
    assert torch.equal(stops[0], torch.zeros(3)) and torch.equal(stops[-1], torch.ones(3))
    assert (stops.diff(dim=0) > 0).all()
    torch.testing.assert_close(stops[5], times)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SamplerConfig, {"steps": 0}, "steps=0 must be at least 1"),
        (SamplerConfig, {"method": "rk4"}, "method='rk4' must be one of euler, heun, midpoint"),
        (SamplerConfig, {"guidance_interval": (0.9, 0.1)}, "must rise, from 0"),
        (TimeConfig, {"std": 0.0}, "std=0.0 must be positive"),
        (TimeConfig, {"distribution": "beta"}, "must be one of uniform, logit_normal"),
    ],
)
def test_settings_without_a_meaning_are_refused(kind, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_draws_move_to_a_device_whole() -> None:
    draws = draw_for_images([0], [2], row_tokens=2, slots=1, channels=3)
    moved = draws.to(torch.device("meta"))
    assert isinstance(moved, Draws)
    assert {moved.noise.device.type, moved.time.device.type, moved.keep.device.type} == {"meta"}
