import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from jobs.cli import _recipe
from jobs.recipes import TRAINING
from pipelines.plan import Stage
from pipelines.runs import next_step
from pipelines.tracking import TrackingConfig, tracking_uri
from pipelines.train_autoencoder import (
    AutoencoderTraining,
    load_autoencoder,
    prepare,
    run_training,
)
from tests.conftest import tiny_model
from vitok.config import parse_json, read_config, to_dict, write_config
from vitok.losses import LossConfig

# Only one of them shows that several workers agree; starting a second one takes seconds.
WORKERS = {name: 1 for name in TRAINING} | {"vitok-350m-f16x64": 2}


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


def shrink(
    settings: AutoencoderTraining, manifests: tuple[Path, Path], dino: Path, storage: Path
) -> AutoencoderTraining:
    """Make a recipe one that a CPU core trains in a second; what it does stays the same."""
    budgets = [[16], [36, 64]]
    model = settings.model
    if settings.start == "pca":
        # The principal components must fit through the widths.
        model = replace(model, latent_channels=min(model.latent_channels, 16))
    return replace(
        settings,
        model=tiny_model(model),
        data=replace(
            settings.data,
            manifest=str(manifests[0]),
            eval_manifest=str(manifests[1]),
            row_tokens=96,
        ),
        stages=tuple(
            replace(stage, steps=1, images_per_step=5, token_budgets=tuple(some), rows_per_step=0)
            for stage, some in zip(settings.stages, budgets, strict=True)
        ),
        loss=replace(settings.loss, dino_weights=str(dino) if settings.loss.dino else ""),
        run=replace(
            settings.run,
            storage=str(storage),
            num_workers=WORKERS[settings.run.name],
            cpus_per_worker=0.5,
            use_gpu=False,
            log_every=1,
            max_failures=0,
            tracking=replace(settings.run.tracking, upload_weights=False),
        ),
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs: MLflow takes seconds to make its database."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", TRAINING)
def test_recipe_trains_two_steps_at_tiny_size(
    ray_cluster: None, name: str, sample_manifests: tuple[Path, Path], dino: Path, storage: Path
) -> None:
    recipe = TRAINING[name]()
    assert len(recipe.stages) == 2
    settings = prepare(shrink(recipe, sample_manifests, dino, storage))
    export = run_training(settings)
    assert next_step(settings.run.folder) == 2

    run_id = json.loads(settings.run.folder.read_text("mlflow.json") or "")["run_id"]
    client = MlflowClient(tracking_uri(TrackingConfig(), str(storage)))
    assert client.get_run(run_id).info.status == "FINISHED"
    weights = {"charbonnier": recipe.loss.charbonnier}
    weights |= {"ssim_loss": recipe.loss.ssim} if recipe.loss.ssim else {}
    weights |= {"dino": recipe.loss.dino} if recipe.loss.dino else {}
    history = {}
    for metric in ("loss", *weights):
        points = sorted(client.get_metric_history(run_id, metric), key=lambda point: point.step)
        assert [point.step for point in points] == [1, 2], metric
        history[metric] = [point.value for point in points]
        assert all(math.isfinite(value) and value > 0 for value in history[metric]), metric
    for step in range(2):
        total = sum(weight * history[term][step] for term, weight in weights.items())
        assert history["loss"][step] == pytest.approx(total, rel=1e-4)
    assert ("dino" in client.get_run(run_id).data.metrics) == bool(recipe.loss.dino)
    assert [point.step for point in client.get_metric_history(run_id, "eval_psnr")] == [2]
    model = load_autoencoder(export.uri)
    assert model.config == settings.model
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


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
def test_recipe_says_what_it_is_and_where_it_runs(name: str) -> None:
    text = inspect.getdoc(TRAINING[name]) or ""
    summary = text.splitlines()[0]
    assert summary.endswith(".")
    assert len(summary) > 30
    another = re.search(r"the rest as ([\w-]+)", text)
    if another:
        text = inspect.getdoc(TRAINING[another[1]]) or ""
    assert re.search(r"CPU|H100|H200|GPU", text), "hardware"
    assert re.search(r"minutes|[Hh]ours", text), "how long it takes"


def test_recipes_have_the_compression_of_their_names() -> None:
    for name, recipe in TRAINING.items():
        match = re.fullmatch(r"vitok-350m-f(\d+)x(\d+)", name)
        if match:
            model = recipe().model
            assert (model.patch_size, model.latent_channels) == (int(match[1]), int(match[2]))
    assert sum("350m" in name for name in TRAINING) == 3


def test_command_line_overrides_nested_fields_and_nothing_else() -> None:
    arguments = ["quickstart", "--optim.lr", "3e-4", "--stages.1.steps", "7"]
    arguments += ["--stages.0.token-budgets", "16", "24", "--model.decoder-depth", "3"]
    arguments += ["--loss.ssim", "0", "--run.no-use-gpu", "--run.tracking.experiment", "mine"]
    arguments += ["--start", "random", "--seed", "5"]
    base = TRAINING["quickstart"]()
    assert _recipe(TRAINING, arguments, "train") == replace(
        base,
        optim=replace(base.optim, lr=3e-4),
        stages=(
            replace(base.stages[0], token_budgets=(16, 24)),
            replace(base.stages[1], steps=7),
        ),
        model=replace(base.model, decoder_depth=3),
        loss=replace(base.loss, ssim=0.0),
        run=replace(base.run, tracking=replace(base.run.tracking, experiment="mine")),
        start="random",
        seed=5,
    )
    assert _recipe(TRAINING, ["quickstart"], "train") == base


def test_stages_and_losses_are_checked_where_they_are_written() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Stage(steps=0, images_per_step=1)
    with pytest.raises(ValueError, match="needs DINOv3 weights: request access"):
        replace(TRAINING["vitok-350m-f16x64"](), loss=LossConfig(dino=1.0))
