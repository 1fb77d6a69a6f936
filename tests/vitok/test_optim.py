from dataclasses import replace
from math import cos, pi

import pytest
import torch

from vitok.optim import OptimConfig, build_optimizer, learning_rate


def test_weight_decay_shrinks_matrices_and_nothing_else(make_autoencoder):
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    model = make_autoencoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    num_vectors = 0
    for name, parameter in model.named_parameters():
        is_vector = name.endswith(("bias", "gamma")) or "norm" in name
        num_vectors += is_vector
        kept = before[name] if is_vector else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), kept, msg=name)
    assert 0 < num_vectors < len(before)


def test_every_trained_parameter_is_in_exactly_one_group(make_autoencoder):
    model = make_autoencoder()
    model.patch_embed.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=3e-4, betas=(0.8, 0.9)))

    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len(trained) == len(list(model.parameters())) - 2
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    config = OptimConfig(lr=2.0, warmup=0.1, final_lr=0.25)
    for tenth_of_percent in range(1001):
        progress = tenth_of_percent / 1000
        if progress < 0.1:
            expected = 20 * progress
        else:
            # Half a turn of the cosine over the remaining 90%, from 2 down to a quarter of it.
            expected = 1.25 + 0.75 * cos(pi * (progress - 0.1) / 0.9)
        assert learning_rate(config, progress) == pytest.approx(expected, abs=1e-9)
    assert learning_rate(config, 0.0) == 0
    assert learning_rate(config, 0.1) == pytest.approx(2.0)
    assert learning_rate(config, 1.0) == pytest.approx(0.5)
    assert learning_rate(config, 1.2) == pytest.approx(0.5)


def test_learning_rate_without_warmup_starts_at_its_peak():
    assert learning_rate(OptimConfig(lr=0.3, warmup=0.0), 0.0) == pytest.approx(0.3)
    assert learning_rate(OptimConfig(lr=0.3, warmup=0.0), 1.0) == pytest.approx(0.0)


def test_defaults_are_the_published_ones():
    config = OptimConfig()
    assert (config.lr, config.betas, config.weight_decay) == (5e-4, (0.9, 0.95), 0.05)
    assert config.clip_norm == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.0}, "lr=0.0 and clip_norm=1.0 must be positive"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be positive"),
        ({"warmup": 1.0}, "warmup=1.0 is a fraction of the run"),
        ({"warmup": -0.1}, "warmup=-0.1 is a fraction of the run"),
    ],
)
def test_optim_config_refuses(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(OptimConfig(), **change)
