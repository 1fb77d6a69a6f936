import inspect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from jobs.command_lines import read_recipe
from jobs.recipes import TRAINING
from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.autoencoder_weights import initialize
from pipelines.ingest import load_step
from pipelines.loop import Recipe, train_step
from pipelines.packed_rows import StepRows
from pipelines.plan import Stage
from pipelines.train_autoencoder import build_model, prepare, reconstruction_step, row_flops
from tests.conftest import tiny_model
from vitok.autoencoder import Autoencoder, part_of
from vitok.checkpoint import TrainState
from vitok.config import flatten, parse_json, read_config, to_dict, write_config
from vitok.ema import Ema
from vitok.initialize import start_at_random
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.optim import build_optimizer
from vitok.parallel import prepare_blocks, shard_model
from vitok.perceptual import LpipsTileLoss
from vitok.variants import RELEASED, AutoencoderConfig

# Terms that are not logged by the name of their weight.
TERM_NAMES = {"ssim": "ssim_loss"}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a DINOv3 of the real architecture with two thin random blocks."""
    torch.manual_seed(0)
    network = DINOv3ViTModel(
        DINOv3ViTConfig(
            patch_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_register_tokens=1,
        )
    )
    folder = tmp_path_factory.mktemp("dino")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the weights that tiny recipes start from."""
    return tmp_path_factory.mktemp("weights")


def weights_of(config: AutoencoderConfig, weights: Path) -> Path:
    """Return a folder of weights of a model that nobody trained."""
    folder = weights / f"{config.patch_size}x{config.latent_channels}"
    if not folder.exists():
        model = Autoencoder(config)
        start_at_random(model, seed=1)
        model.save_pretrained(folder)
    return folder


def shrink(
    settings: AutoencoderTraining,
    manifests: tuple[Path, Path],
    *,
    dino: Path,
    weights: Path,
    storage: Path,
) -> AutoencoderTraining:
    """Make a recipe one that a CPU core trains in a second; what it does stays the same."""
    budgets = [[16], [36, 64]]
    model = settings.model
    if settings.start == "pca":
        # The principal components must fit through the widths.
        model = replace(model, latent_channels=min(model.latent_channels, 16))
    model = tiny_model(model)
    start = settings.start
    if start in RELEASED:
        start = str(weights_of(model, weights))
    return replace(
        settings,
        model=model,
        data=replace(
            settings.data,
            manifest=str(manifests[0]),
            eval_manifest=str(manifests[1]),
            row_tokens=96,
        ),
        stages=tuple(
            replace(stage, steps=1, images_per_step=5, token_budgets=tuple(some), rows_per_step=0)
            for stage, some in zip(settings.stages, budgets, strict=False)
        ),
        loss=replace(settings.loss, dino_weights=str(dino) if settings.loss.dino else ""),
        run=replace(
            settings.run,
            storage=str(storage),
            num_workers=1,
            cpus_per_worker=0.5,
            use_gpu=False,
            # Compiling takes minutes here; tests/vitok/test_parallel.py has what it changes.
            parallel=replace(settings.run.parallel, compile=False),
            log_every=1,
            max_failures=0,
            tracking=replace(settings.run.tracking, upload_weights=False),
        ),
        start=start,
    )


class StandInLpips(nn.Module):
    """Called as lpips.LPIPS is, whose package tests do without."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, for FSDP2."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def done() -> dict[str, str]:
    """Which recipe trained a config already: many are the same but for their numbers."""
    return {}


@pytest.mark.parametrize("name", TRAINING)
def test_recipe_trains_two_steps_at_tiny_size(
    one_rank: None,
    name: str,
    sample_manifests: tuple[Path, Path],
    dino: Path,
    weights: Path,
    tmp_path: Path,
    done: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        LpipsTileLoss, "from_pretrained", lambda _weights: LpipsTileLoss(StandInLpips())
    )
    settings = shrink(
        TRAINING[name](), sample_manifests, dino=dino, weights=weights, storage=tmp_path / "runs"
    )
    if len(settings.stages) == 1:
        settings = replace(settings, stages=(replace(settings.stages[0], steps=2),))
    same = replace(
        settings,
        model=replace(settings.model, latent_channels=16),
        loss=replace(settings.loss, dino=float(settings.loss.dino > 0)),
        run=replace(settings.run, name="any", storage="any", num_workers=1),
        start=settings.start if settings.start in ("random", "pca") else "weights",
    )
    if done.setdefault(json.dumps(to_dict(same)), name) == name:
        losses = train_two_steps(prepare(settings), tmp_path / "checkpoint")
        weights_of_terms = {
            TERM_NAMES.get(field.name, field.name): getattr(settings.loss, field.name)
            for field in fields(LossConfig)
            if field.type is float and (field.name != "kl" or settings.model.latent == "kl")
        }
        weighted = {term: weight for term, weight in weights_of_terms.items() if weight}
        for loss in losses:
            assert loss.keys() == {"loss", *weighted}
            assert all(math.isfinite(value) and value > 0 for value in loss.values())
            total = sum(weight * loss[term] for term, weight in weighted.items())
            assert loss["loss"] == pytest.approx(total, rel=1e-4)


def train_two_steps(settings: AutoencoderTraining, checkpoint: Path) -> list[dict[str, float]]:
    """Train as a worker does, with the loop's own step; check what moved, save and load.

    Returns:
        the summed loss terms of every step.
    """
    plan, device = plan_of(settings), torch.device("cpu")
    assert plan.num_steps == 2
    loss = ReconstructionLoss(settings.loss)
    model: Any = build_model(settings)
    prepare_blocks(model, settings.run.parallel)
    shard_model(model, init_device_mesh("cpu", (1,)), getattr(torch, settings.run.compute_dtype))
    model.to_empty(device=device)
    initialize(model, settings, plan)
    optimizer = build_optimizer(model, settings.optim)
    decay = settings.optim.ema_decay
    ema = Ema(model, decay) if decay else None
    recipe = Recipe(
        step=lambda model, row, device: reconstruction_step(settings, loss, model, row, device),
        flops=lambda row: row_flops(settings, row),
        initialize=lambda _model: None,
        evaluate=None,
        story={},
    )
    before = whole_weights(model)
    losses = []
    for step in range(plan.num_steps):
        batch = StepRows(step, load_step(plan, step), {})
        outcome = train_step(
            model, optimizer, recipe, batch, settings.optim.clip_norm, device, leaves=False
        )
        sums = outcome.values[-len(outcome.names) :].tolist()
        losses.append(dict(zip(outcome.names, sums, strict=True)))
        if ema is not None:
            ema.update(model)
    after = whole_weights(model)
    frozen = {name for name in before if settings.freeze == part_of(name)}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert bool(frozen) == (settings.freeze != "none")

    state = TrainState(model, optimizer, ema)
    checkpoint.mkdir()
    state.save(checkpoint, {"step": 2}).result()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert state.load(checkpoint) == {"step": 2}
    loaded = whole_weights(model)
    assert all(torch.equal(after[name], loaded[name]) for name in after)
    return losses


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}


def test_square_recipe_has_square_images_of_its_size_and_no_other_has(
    sample_manifests: tuple[Path, Path],
) -> None:
    def sizes(name: str) -> set[tuple[int, int]]:
        settings = TRAINING[name]()
        data = replace(settings.data, manifest=str(sample_manifests[0]))
        stages = tuple(replace(stage, images_per_step=60) for stage in settings.stages)
        plan = plan_of(replace(settings, data=data, stages=stages))
        views = [view for row in plan.step(7).rows for view in row]
        assert len(views) == 60
        if settings.data.square:
            assert all(view.crop[2] == view.crop[3] for view in views)
            assert any(view.crop[2] < 256 for view in views), "some are enlarged"
            assert len({view.crop[:2] for view in views}) > 30, "random places"
            assert len({view.crop[2] for view in views}) > 10, "random areas"
        return {view.size for view in views}

    assert sizes("ablation-size-square256") == {(256, 256)}
    for name in ("ablation-size-native256", "ablation-size-native1024"):
        assert len(sizes(name)) > 20


def test_pixels_of_square_crops_are_those_of_the_plan(
    sample_manifests: tuple[Path, Path], tiny_training: AutoencoderTraining
) -> None:
    settings = replace(
        tiny_training,
        data=replace(tiny_training.data, square=True, crop_area=1.0, row_tokens=256),
        stages=(Stage(steps=1, images_per_step=3, token_budgets=(64,)),),
    )
    rows = load_step(plan_of(settings), 0)
    images = [tuple(size) for row in rows for size in row.image_size.tolist() if size[0]]
    assert images == [(128, 128)] * 3
    for row in rows:
        packed, _ = row.to_packed(torch.device("cpu"))
        lengths = packed.cu_seqlens.diff().tolist()
        assert [length for length in lengths if length] == [64] * len(row.keys)


def test_recipes_differ_in_what_they_are_named_after() -> None:
    recipes = {name: recipe() for name, recipe in TRAINING.items()}

    def difference(name: str, other: str) -> set[str]:
        first, second = flatten(recipes[name]), flatten(recipes[other])
        fields = {
            field for field in first.keys() | second.keys() if first.get(field) != second.get(field)
        }
        return fields - {"run.name"}

    for few in ("8gpu", "64gpu"):
        for model in ("vitok-5b-f16x64", "vitok-5b-f32x256"):
            assert difference(model, f"{model}-{few}") == {"run.num_workers"}
            assert recipes[f"{model}-{few}"].run.num_workers == int(few.removesuffix("gpu"))
            assert recipes[model].run.num_workers == 128
    terms = {"pixel": "ssim", "lpips": "lpips", "dino250": "dino", "dino1000": "dino"}
    for row, term in terms.items():
        changed = difference(f"ablation-loss-{row}", "ablation-loss-ssim")
        assert changed - {f"loss.{term}_weights"} == {f"loss.{term}"}
    assert difference("ablation-loss-dino500", "vitok-5b-f16x64") == set()
    assert difference("ablation-size-square256", "ablation-size-native256") == {"data.square"}
    assert difference("ablation-size-native1024", "ablation-size-native256") == {
        "stages.0.token_budgets"
    }
    for size, width in (("b", 768), ("l", 1024), ("g", 1728), ("t", 3072)):
        ladder = recipes[f"ladder-{size}-f16x32"]
        assert (ladder.model.decoder_width, ladder.model.latent_channels) == (width, 32)
        assert ladder.stages == recipes["ladder-b-f16x32"].stages


def test_two_stages_are_nine_tenths_of_the_images_and_one() -> None:
    for name, recipe in TRAINING.items():
        stages = recipe().stages
        if name.startswith(("vitok-", "ladder-", "ablation-loss-")):
            images = [stage.steps * stage.images_per_step for stage in stages]
            assert images[0] == 9 * images[1]
            assert [stage.token_budgets for stage in stages] == [(256,), (1024,)]


@pytest.mark.parametrize("name", TRAINING)
def test_recipe_is_a_complete_config_that_json_carries(name: str, tmp_path: Path) -> None:
    settings = TRAINING[name]()
    assert settings.run.name == name
    write_config(tmp_path / "config.json", settings)
    assert read_config(tmp_path / "config.json", AutoencoderTraining) == settings
    text = json.dumps(to_dict(settings))
    assert parse_json(AutoencoderTraining, text, "text") == settings
    with pytest.raises(ValueError, match=r"text is no AutoencoderTraining: .*surplus"):
        parse_json(AutoencoderTraining, text.replace('"seed"', '"surplus"'), "text")


@pytest.mark.parametrize("name", TRAINING)
def test_recipe_says_what_it_is_where_it_runs_and_what_comes_out(name: str) -> None:
    text = inspect.getdoc(TRAINING[name]) or ""
    summary = text.splitlines()[0]
    assert summary.endswith(".")
    assert 30 < len(summary) < 80
    assert re.search(r"CPU|H100|H200|GPU", text), "hardware"
    assert re.search(r"minutes|[Hh]ours", text), "how long it takes"
    settings = TRAINING[name]()
    if settings.run.use_gpu:
        assert f"Hardware: {settings.run.num_workers} H200" in text
        assert "Expected:" in text
        assert "not measured by us" in text
        assert f"{settings.stages[-1].token_budgets[-1]:,} tokens" in text
        for field in ("dino", "lpips"):
            assert (f"loss.{field}_weights" in text) == bool(getattr(settings.loss, field))


def test_recipes_have_the_compression_of_their_names() -> None:
    for name, recipe in TRAINING.items():
        match = re.search(r"-f(\d+)x(\d+)", name)
        if match:
            model = recipe().model
            assert (model.patch_size, model.latent_channels) == (int(match[1]), int(match[2]))
    for model in RELEASED:
        assert TRAINING[f"vitok-{model.lower()}"]().model == AutoencoderConfig.from_name(model)
        tuned = TRAINING[f"finetune-{model.lower()}-decoder"]()
        assert tuned.model == AutoencoderConfig.from_name(tuned.start)


def test_command_line_overrides_nested_fields_and_nothing_else() -> None:
    arguments = ["quickstart", "--optim.lr", "3e-4", "--stages.1.steps", "7"]
    arguments += ["--stages.0.token-budgets", "16", "24", "--model.decoder-depth", "3"]
    arguments += ["--loss.ssim", "0", "--run.no-use-gpu", "--run.tracking.experiment", "mine"]
    arguments += ["--start", "350M-f16x64", "--freeze", "encoder", "--seed", "5"]
    base = TRAINING["quickstart"]()
    assert read_recipe(TRAINING, arguments, "train") == replace(
        base,
        optim=replace(base.optim, lr=3e-4),
        stages=(
            replace(base.stages[0], token_budgets=(16, 24)),
            replace(base.stages[1], steps=7),
        ),
        model=replace(base.model, decoder_depth=3),
        loss=replace(base.loss, ssim=0.0),
        run=replace(base.run, tracking=replace(base.run.tracking, experiment="mine")),
        start="350M-f16x64",
        freeze="encoder",
        seed=5,
    )
    assert read_recipe(TRAINING, ["quickstart"], "train") == base


def test_stages_and_losses_are_checked_where_they_are_written() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Stage(steps=0, images_per_step=1)
    with pytest.raises(ValueError, match="needs DINOv3 weights: request access"):
        replace(TRAINING["vitok-350m-f16x64"](), loss=LossConfig(dino=1.0))
