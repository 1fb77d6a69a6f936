import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.flow_recipes import (
    FLOWS,
    flops_of,
    flow_quickstart,
    joint_imagenet_22k,
    parameters_of,
)
from pipelines.generation.joint import pairs_of
from pipelines.train_flow import FlowTraining
from vitok.config import read_config, write_config

NAMES = list(FLOWS)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_a_complete_config_that_json_carries(name: str, tmp_path: Path) -> None:
    settings = FLOWS[name]()
    assert settings.run.name == name
    write_config(tmp_path / "config.json", settings)
    assert read_config(tmp_path / "config.json", FlowTraining) == settings


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flow-quickstart"])
def test_recipe_says_what_it_is_where_it_runs_and_what_comes_out(name: str) -> None:
    settings, recipe = FLOWS[name](), FLOWS[name]
    text = recipe.__doc__ or ""
    for word in ("Hardware: ", "hours", "computed, not measured by us", "Set cache."):
        assert word in text
    assert f"{parameters_of(settings.model):.2f}B parameters" in text
    channels = int(name.rpartition("x")[2])
    assert settings.model.latent_channels == channels
    assert settings.autoencoder.endswith(f"-f16x{channels}")
    assert settings.optim.lr == 1e-3 and settings.optim.ema_decay == 0.999
    assert (settings.sampler.steps, settings.sampler.method) == (50, "euler")
    assert settings.sampler.guidance == 4.0 and settings.images_per_step == 4096
    assert settings.model.num_classes == 21_841


def test_recipes_cover_both_sizes_at_three_ratios_and_both_autoencoders() -> None:
    for size in ("450m", "1.2b"):
        for channels in (64, 32, 16):
            assert f"flow-{size}-f16x{channels}" in NAMES
        small, large = FLOWS[f"flow-{size}-f16x64"](), FLOWS[f"flow-{size}-5b-f16x64"]()
        assert (small.autoencoder, large.autoencoder) == ("350M-f16x64", "5B-f16x64")
        run = replace(large.run, name=small.run.name)
        assert replace(large, autoencoder=small.autoencoder, run=run) == small
        # 300 epochs of ImageNet-22k, within a step.
        assert small.steps * 4096 == pytest.approx(300 * 14_197_122, abs=4096)


def test_joint_scaling_is_a_grid_of_operations_and_ratios() -> None:
    study = joint_imagenet_22k()
    pairs = pairs_of(study)
    assert [pair.autoencoder for pair in pairs] == [
        f"350M-f16x{channels}" for channels in (64, 32, 16) for _ in range(3)
    ]
    assert len({pair.steps for pair in pairs}) == 1
    assert len({pair.run.name for pair in pairs}) == 9
    assert len({pair.cache for pair in pairs}) == 3
    flops = [flops_of(pair) for pair in pairs]
    assert flops[1] / flops[0] == pytest.approx(2, rel=0.05)
    assert flops[2] / flops[1] == pytest.approx(2.4, rel=0.05)
    hours = sum(flops) / (8 * 989.5e12 * 0.4 * 3600)
    (said,) = re.findall(r"some (\d+) hours", joint_imagenet_22k.__doc__ or "")
    assert hours == pytest.approx(int(said), rel=0.02)


def test_quickstart_recipe_asks_for_nothing_but_what_the_quickstart_makes() -> None:
    recipe: Callable[[], FlowTraining] = flow_quickstart
    settings = recipe()
    assert not settings.run.use_gpu and settings.run.num_workers == 2
    assert (settings.cache, settings.autoencoder) == ("", "")
    assert settings.model.latent_channels == 64 and settings.model.num_classes == 12
