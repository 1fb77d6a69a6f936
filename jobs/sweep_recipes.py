"""Recipes of sweeps: functions that return a complete study.

A study's trials derive from a training recipe; every field of it can be set as `--base.FIELD`.
With `--evaluation.networks.inception` and `.dino` finished trials get an rFID and an rFDD.
Models and published figures are those of arXiv 2605.05331 (ViTok-v2) and 2501.09755 (ViTok v1).
None of the studies for GPUs has been run by us.
"""

from collections.abc import Callable
from dataclasses import replace

from jobs.recipes import H200_FLOPS, TRAINING
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.evaluation.config import EvaluationConfig
from pipelines.plan import Stage
from pipelines.sweeps.config import Axis, SweepConfig

SweepRecipe = Callable[[], SweepConfig]

_H200_GB = 141.0
_QUICKSTART_FLOPS = 0.1e12  # of half of two shared cores, roughly
_EVALUATION_256P = EvaluationConfig(square=(256,), num_workers=8, cpus_per_worker=4.0)


def quickstart() -> SweepConfig:
    """Four tiny trials, a few minutes on two CPU cores: decoders at two compression ratios.

    Three decoders at r = 48, the largest also at r = 12; draws every plot. In 60 steps from a PCA
    the ratio shows, the decoder's size does not. Set base.data.manifest
    and base.data.eval_manifest; `vitok quickstart` makes a corpus at runs/quickstart/corpus.
    """
    base = TRAINING["quickstart"]()
    run = replace(
        base.run, num_workers=1, checkpoint_every=20, evaluate_every=20, log_every=10, mfu=False
    )
    model = replace(base.model, latent_channels=16, encoder_width=128, decoder_width=128)
    points = [f"model.latent_channels=16 model.decoder_depth={depth}" for depth in (1, 2, 6)]
    points.append("model.latent_channels=64 model.decoder_depth=6")
    stages = (Stage(steps=60, images_per_step=16, token_budgets=(64,)),)
    return SweepConfig(
        name="sweep-quickstart",
        base=replace(base, model=model, stages=stages, run=run),
        points=tuple(points),
        worker_flops=_QUICKSTART_FLOPS,
        evaluation=EvaluationConfig(token_budget=(64,), num_workers=0, use_gpu=False),
    )


def decoder_scale() -> SweepConfig:
    """Decoders B to T at r = 12, 24 and 48, encoders of 4 and of 8 blocks: Figure 2.

    Hardware: 8 H200 for B and L, 16 for G, 64 for T: none takes much more than a day. The computed
    hours of each are what `--dry-run` prints. Expected, as the paper finds: decoder scale helps at
    every r and more at higher r, encoder depth barely matters.
    """
    towers = [f"{size}d{depth}-{size}" for depth in (4, 8) for size in "BLGT"]
    models = [f"{tower}/16x{channels}" for channels in (64, 32, 16) for tower in towers]
    return SweepConfig(
        name="decoder-scale",
        base=TRAINING["ladder-b-f16x64"](),
        axes=(Axis(field="model", values=tuple(models)),),
        worker_memory_gb=_H200_GB,
        max_hours=30.0,
        worker_flops=H200_FLOPS,
        evaluation=_EVALUATION_256P,
    )


def patch_channels() -> SweepConfig:
    """Patch against channels at a fixed number of latent values an image: Figure 3 of ViTok v1.

    E = tokens times channels is 4,096, 8,192 or 16,384 for images of 256 x 256. Expected, as the
    paper finds: E predicts the reconstruction, and the patch at equal E matters little.
    Hardware: 8 H200. ViTok v1's own losses and schedule are not used.
    """
    points = []
    for total in (4096, 8192, 16384):
        for patch in (8, 16, 32):
            tokens = (256 // patch) ** 2
            channels = total // tokens
            points.append(f"model=v1/S-B/{patch}x{channels} stages.0.token_budgets=[{tokens}]")
    base = _small(TRAINING["ladder-b-f16x64"](), steps=100_000)
    return SweepConfig(
        name="patch-channels",
        base=replace(base, data=replace(base.data, square=True)),
        points=tuple(points),
        worker_memory_gb=_H200_GB,
        worker_flops=H200_FLOPS,
        evaluation=_EVALUATION_256P,
    )


def loss_ablation() -> SweepConfig:
    """Terms of the loss, one after another: Table 2.

    Of Td4-T/16x64 in the paper, here of Ld4-L/16x64: set base.model for others. The paper prints
    rFID, rFDD and SSIM on ImageNet 256p: pixel 5.13, 10.96, .929; SSIM 4.87, 10.42, .931; LPIPS
    0.72, 2.93, .923; DINO 250 0.51, 1.45, .919; DINO 1000 0.30, 1.12, .914; LPIPS and DINO 0.38,
    1.35, .918. Hardware: 8 H200.

    Set base.loss.dino_weights, base.loss.lpips_weights, and the networks of the evaluation.
    """
    terms = (
        "loss.ssim=0 loss.dino=0",
        "loss.dino=0",
        "loss.dino=0 loss.lpips=1",
        "loss.dino=250",
        "loss.dino=500",
        "loss.dino=1000",
        "loss.dino=500 loss.lpips=1",
    )
    base = TRAINING["ablation-loss-lpips"]()
    small = _small(TRAINING["ladder-l-f16x64"](), steps=100_000)
    loss = replace(small.loss, lpips_weights=base.loss.lpips_weights)
    return SweepConfig(
        name="loss-ablation",
        base=replace(small, loss=loss),
        points=terms,
        worker_memory_gb=_H200_GB,
        worker_flops=H200_FLOPS,
        evaluation=_EVALUATION_256P,
    )


def regularisers() -> SweepConfig:
    """LayerNorm, tanh with noise, and KL latents at r = 12 and 48: Table 3.

    The paper finds that the regulariser barely matters for generation. Hardware: 8 H200.
    """
    return SweepConfig(
        name="regularisers",
        base=_small(TRAINING["ladder-l-f16x64"](), steps=100_000),
        axes=(
            Axis(field="model.latent", values=("layernorm", "tanh", "kl")),
            Axis(field="model.latent_channels", values=("64", "16")),
        ),
        worker_memory_gb=_H200_GB,
        worker_flops=H200_FLOPS,
        evaluation=_EVALUATION_256P,
    )


def learning_rate() -> SweepConfig:
    """Learning rate, weight decay and optimizer of a small model, worse trials stopped early.

    32 trials of Bd4-B/16x64 with 20,000 steps, drawn at random; asha stops the worse half at every
    rung. `--search optuna` draws them by what it has learnt. Hardware: 8 H200.
    """
    base = _small(TRAINING["ladder-b-f16x64"](), steps=20_000)
    run = replace(base.run, checkpoint_every=1000, evaluate_every=1000)
    return SweepConfig(
        name="learning-rate",
        base=replace(base, run=run),
        axes=(
            Axis(field="optim.lr", low=5e-5, high=5e-3, log=True),
            Axis(field="optim.weight_decay", values=("0.01", "0.05", "0.2")),
            Axis(field="optim.algorithm", values=("adamw", "muon")),
        ),
        search="random",
        num_trials=32,
        scheduler="asha",
        worker_memory_gb=_H200_GB,
        worker_flops=H200_FLOPS,
        evaluation=_EVALUATION_256P,
    )


def _small(settings: AutoencoderTraining, *, steps: int) -> AutoencoderTraining:
    """Return a training of one stage at 256 tokens, with 1,024 images a step."""
    stage = Stage(steps=steps, images_per_step=1024, token_budgets=(256,))
    return replace(settings, stages=(stage,))


SWEEPS: dict[str, SweepRecipe] = {
    "quickstart": quickstart,
    "decoder-scale": decoder_scale,
    "patch-channels": patch_channels,
    "loss-ablation": loss_ablation,
    "regularisers": regularisers,
    "learning-rate": learning_rate,
}
