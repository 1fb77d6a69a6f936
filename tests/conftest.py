from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.sample_corpus import make_sample_corpus
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.plan import DataConfig, Stage
from pipelines.runs import RunConfig
from vitok.autoencoder import Autoencoder
from vitok.initialize import start_at_random
from vitok.losses import LossConfig
from vitok.optim import OptimConfig
from vitok.pretrained import save_pretrained
from vitok.variants import AutoencoderConfig


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray, started once for all tests, with more logical cores than the machine may have."""
    from cluster.local import ray_session

    with ray_session(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def sample_manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Manifests (train, eval) of 60 and 5 crops of real photographs."""
    return make_sample_corpus(
        tmp_path_factory.mktemp("corpus") / "sample", num_train=60, num_eval=5
    )


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an exported model that nobody trained; its reconstructions are gray noise."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    config = tiny_model(AutoencoderConfig(patch_size=16, latent_channels=16))
    model = Autoencoder(config)
    start_at_random(model, seed=0)
    save_pretrained(folder, config, model.state_dict())
    return folder


@pytest.fixture(scope="session")
def tiny_dino() -> nn.Module:
    """Build a random network of DINOv3's architecture, with patches of 16 as in S/16."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_register_tokens=2,
        patch_size=16,
    )
    torch.manual_seed(0)
    network = DINOv3ViTModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def tiny_training(sample_manifests: tuple[Path, Path], tmp_path: Path) -> AutoencoderTraining:
    """A training of 4 + 2 steps in float32 that a core does in seconds."""
    return make_tiny_training(sample_manifests, tmp_path)


def make_tiny_training(manifests: tuple[Path, Path], folder: Path) -> AutoencoderTraining:
    """Return the training of `tiny_training`, with its runs in a folder."""
    train, held_out = manifests
    return AutoencoderTraining(
        model=tiny_model(AutoencoderConfig(patch_size=16, latent_channels=16)),
        data=DataConfig(manifest=str(train), eval_manifest=str(held_out), row_tokens=128),
        stages=(
            Stage(steps=4, images_per_step=10, token_budgets=(16,)),
            Stage(steps=2, images_per_step=6, token_budgets=(36, 64)),
        ),
        loss=LossConfig(ssim_tile=32),
        optim=OptimConfig(lr=3e-3, warmup=0.3),
        run=RunConfig(
            name="tiny",
            storage=str(folder / "runs"),
            num_workers=2,
            cpus_per_worker=0.5,
            use_gpu=False,
            compute_dtype="float32",
            mfu=False,  # measuring the peak takes seconds
            log_every=1,
            evaluate_every=4,
            checkpoint_every=2,
            max_failures=2,
        ),
    )


def tiny_model(config: AutoencoderConfig) -> AutoencoderConfig:
    """Shrink a model to a few thousand weights; patch and channels stay."""
    return replace(
        config,
        encoder_width=32,
        encoder_depth=1,
        encoder_heads=2,
        decoder_width=48,
        decoder_depth=2,
        decoder_heads=2,
    )
