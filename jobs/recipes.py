"""Recipes: functions that return a complete config. The first docstring line is their summary.

Every field can be changed on the command line; a variant in code derives with `replace`.
"""

from collections.abc import Callable
from dataclasses import replace

from pipelines.plan import DataConfig, Stage
from pipelines.runs import RunConfig
from pipelines.tracking import TrackingConfig
from pipelines.train_autoencoder import AutoencoderTraining
from vitok.losses import LossConfig
from vitok.optim import OptimConfig
from vitok.perceptual import DINO_REPOSITORY
from vitok.variants import AutoencoderConfig


def quickstart() -> AutoencoderTraining:
    """A small f16x64 autoencoder, trained in two to three minutes on two CPU cores.

    Two workers, two stages of 64 and 256 tokens, linear layers from a PCA of the patches. Set
    data.manifest and data.eval_manifest; `vitok quickstart` makes a corpus for them.
    """
    return AutoencoderTraining(
        model=AutoencoderConfig(
            patch_size=16,
            latent_channels=64,
            encoder_width=256,
            encoder_depth=2,
            encoder_heads=4,
            decoder_width=256,
            decoder_depth=4,
            decoder_heads=4,
        ),
        data=DataConfig(row_tokens=1024, crop_area=0.5),
        stages=(
            # These crops average 59 and 147 tokens: the rows are nearly full.
            Stage(steps=120, images_per_step=32, token_budgets=(64,), rows_per_step=2),
            Stage(steps=40, images_per_step=24, token_budgets=(256,), rows_per_step=4),
        ),
        loss=LossConfig(ssim_tile=64),
        optim=OptimConfig(lr=1e-3, warmup=0.05),
        run=RunConfig(
            name="quickstart",
            num_workers=2,
            cpus_per_worker=0.5,
            use_gpu=False,
            log_every=5,
            evaluate_every=80,
            checkpoint_every=40,
            max_failures=1,
            tracking=TrackingConfig(upload_weights=True),
        ),
        start="pca",
    )


def vitok_350m_f16x64() -> AutoencoderTraining:
    """ViTok-v2 350M (Ld4-Ld24/16x64, r = 12) of arXiv 2605.05331.

    Paper: about 300,000 steps of 8,192 images, 90% at 256 and 10% at 1,024 tokens, on 128 H200.
    Its figures for the 5B model: ImageNet 256p PSNR 34.2, SSIM .924; for this one it prints none.
    Hours, and results with this code: not measured by us. Set data.manifest, data.eval_manifest and
    loss.dino_weights.
    """
    return AutoencoderTraining(
        model=AutoencoderConfig.from_name("Ld4-Ld24/16x64"),
        data=DataConfig(row_tokens=8192),
        stages=(
            Stage(steps=270_000, images_per_step=8192, token_budgets=(256,)),
            Stage(steps=30_000, images_per_step=8192, token_budgets=(1024,)),
        ),
        loss=LossConfig.paper(DINO_REPOSITORY),
        run=RunConfig(name="vitok-350m-f16x64", num_workers=8),
    )


def vitok_350m_f16x32() -> AutoencoderTraining:
    """ViTok-v2 350M with 32 channels (r = 24); the rest as vitok-350m-f16x64."""
    return _with_channels(32)


def vitok_350m_f16x16() -> AutoencoderTraining:
    """ViTok-v2 350M with 16 channels (r = 48); the rest as vitok-350m-f16x64."""
    return _with_channels(16)


def _with_channels(channels: int) -> AutoencoderTraining:
    base = vitok_350m_f16x64()
    return replace(
        base,
        model=replace(base.model, latent_channels=channels),
        run=replace(base.run, name=f"vitok-350m-f16x{channels}"),
    )


TRAINING: dict[str, Callable[[], AutoencoderTraining]] = {
    "quickstart": quickstart,
    "vitok-350m-f16x64": vitok_350m_f16x64,
    "vitok-350m-f16x32": vitok_350m_f16x32,
    "vitok-350m-f16x16": vitok_350m_f16x16,
}
