"""Recipes: functions that return a complete config. The first docstring line is their summary.

Every field can be changed on the command line; a variant in code derives with `replace`, as the
families below do. Models, schedule, losses and published figures are those of arXiv 2605.05331.
What we have not run says so.
"""

from collections.abc import Callable
from dataclasses import replace

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.plan import DataConfig, Stage
from pipelines.runs import RunConfig
from pipelines.sweeps.costs import work_of
from pipelines.tracking import TrackingConfig
from vitok.losses import LossConfig
from vitok.optim import OptimConfig
from vitok.parallel import ParallelConfig
from vitok.perceptual import DINO_REPOSITORY
from vitok.variants import RELEASED, AutoencoderConfig

TrainingRecipe = Callable[[], AutoencoderTraining]

# Where `hf download timm/vgg16.tv_in1k model.safetensors --local-dir vgg16.tv_in1k` puts it.
_VGG_FILE = "vgg16.tv_in1k/model.safetensors"
_H200_PEAK = 989.5e12  # operations per second, dense bfloat16; see vitok.flops
_ASSUMED_MFU = 0.4
H200_FLOPS = _H200_PEAK * _ASSUMED_MFU


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


def base() -> AutoencoderTraining:
    """Return what all recipes for GPUs derive from: the 350M model of f16x64 on 8 H200.

    No block is checkpointed, not even of 5B: what autograd keeps of a row of 8,192 tokens is 73 GB
    there without compilation (counted on a CPU), beside 10 GB of weights and optimizer on each of 8
    GPUs. On GPUs of 80 GB set run.parallel.checkpoint_every to 2. float8 is left to
    run.parallel.float8, as it needs torchao.
    """
    return AutoencoderTraining(
        model=AutoencoderConfig.from_name("350M-f16x64"),
        data=DataConfig(row_tokens=8192),
        stages=_two_stages(steps=300_000, images_per_step=8192),
        loss=LossConfig.paper(DINO_REPOSITORY),
        run=RunConfig(name="base", num_workers=8, parallel=ParallelConfig(compile=True)),
    )


def _two_stages(*, steps: int, images_per_step: int) -> tuple[Stage, Stage]:
    """Return the paper's schedule: 90% of the images at 256 tokens, the last 10% at 1,024."""
    last = steps // 10
    return (
        Stage(steps=steps - last, images_per_step=images_per_step, token_budgets=(256,)),
        Stage(steps=last, images_per_step=images_per_step, token_budgets=(1024,)),
    )


def _derived(name: str, model: str, num_workers: int) -> AutoencoderTraining:
    """Return the base under another name, with another model, on so many H200."""
    settings = base()
    return replace(
        settings,
        model=AutoencoderConfig.from_name(model),
        run=replace(settings.run, name=name, num_workers=num_workers),
    )


def _recipe(settings: AutoencoderTraining, summary: str, expected: str) -> TrainingRecipe:
    """Return a recipe of a config for H200.

    Args:
        summary: first line of its docstring.
        expected: results, and whose they are.
    """

    def recipe() -> AutoencoderTraining:
        return settings

    schedule = ", then ".join(
        f"{stage.steps:,} steps of {stage.images_per_step:,} images at {stage.token_budgets[0]:,} "
        "tokens"
        for stage in settings.stages
    )
    to_set = ["data.manifest", "data.eval_manifest"]
    to_set += ["loss.dino_weights"] if settings.loss.dino else []
    to_set += ["loss.lpips_weights"] if settings.loss.lpips else []
    recipe.__doc__ = f"""{summary}

    Schedule: {schedule}.

    Hardware: {settings.run.num_workers} H200, some {_hours(settings):,.0f} hours at
    {_ASSUMED_MFU:.0%} of their bfloat16 peak: computed, not measured by us.

    Expected: {expected} With this code: not measured by us.

    Set {", ".join(to_set)}.
    """
    return recipe


def _hours(settings: AutoencoderTraining) -> float:
    """Return the hours of a training on H200 at the assumed share of their peak."""
    return work_of(settings).flops / (settings.run.num_workers * H200_FLOPS * 3600)


def released_models() -> list[TrainingRecipe]:
    """Every released model, `vitok-SIZE-fPxC`.

    The paper trains on 128 H200. 5B at f16x64 and f32x256 also comes for 64 and 8: the global batch
    is the same, only accumulated over more rows.
    """
    none = "arXiv 2605.05331 prints no figures of this model on ImageNet 256p."
    printed = {
        "5B-f16x64": "rFID .74, rFDD 2.49, PSNR 34.2, SSIM .924",
        "5B-f16x32": "rFID 1.26, rFDD 2.94, PSNR 31.2, SSIM .867",
        "5B-f16x16": "rFID 1.52, rFDD 3.66, PSNR 28.5, SSIM .793",
    }
    small = [f"350M-{shape}" for shape in ("f16x64", "f16x32", "f16x16")]
    large = [f"5B-{shape}" for shape in ("f16x64", "f16x32", "f16x16")]
    large += [f"5B-{shape}" for shape in ("f32x256", "f32x128", "f32x64")]
    recipes = []
    for model in (*small, *large):
        size, _, shape = model.partition("-")
        name = f"vitok-{model.lower()}"
        expected = none
        if model in printed:
            expected = f"arXiv 2605.05331 prints {printed[model]} on ImageNet 256p."
        ratio = AutoencoderConfig.from_name(model).compression_ratio
        num_workers = 8 if size == "350M" else 128
        summary = f"ViTok-v2 {size} at {shape} (r = {ratio:.0f}) on {num_workers} H200."
        recipes.append(_recipe(_derived(name, model, num_workers), summary, expected))
        if size == "5B" and shape in ("f16x64", "f32x256"):
            recipes += [
                _recipe(
                    _derived(f"{name}-{few}gpu", model, few),
                    f"The same training as {name}, on {few} H200.",
                    expected,
                )
                for few in (64, 8)
            ]
    return recipes


def decoder_ladder() -> list[TrainingRecipe]:
    """Decoders B, L, G and T at three compression ratios, `ladder-SIZE-fPxC`.

    The paper finds that decoder scale helps at every ratio, and more at higher ones. A twelfth of
    its images, the same for all, is our choice, to compare with; for f32 set model.patch_size and
    four times the channels.
    """
    encoders = {"b": "Bd4-B", "l": "Ld4-L", "g": "Gd4-G", "t": "Td4-T"}
    gpus = {"b": 8, "l": 8, "g": 64, "t": 64}
    recipes = []
    for channels in (64, 32, 16):
        for size, towers in encoders.items():
            name = f"ladder-{size}-f16x{channels}"
            settings = replace(
                _derived(name, f"{towers}/16x{channels}", gpus[size]),
                stages=_two_stages(steps=100_000, images_per_step=2048),
            )
            summary = f"Decoder ladder: {towers}/16x{channels} (r = {768 // channels})."
            expected = "arXiv 2605.05331 prints no figures of so short a training."
            recipes.append(_recipe(settings, summary, expected))
    return recipes


def loss_ablation() -> list[TrainingRecipe]:
    """Rows of the paper's loss ablation, `ablation-loss-TERM`: the terms of Td4-T/16x64.

    The weight of LPIPS is that of ViTok v1 (arXiv 2501.09755); ViTok-v2's is not known to us.
    """
    dino = LossConfig.paper(DINO_REPOSITORY)
    rows = {
        "pixel": (LossConfig(ssim=0.0), "Charbonnier alone", "5.13, 10.96 and .929"),
        "ssim": (LossConfig(), "Charbonnier + SSIM", "4.87, 10.42 and .931"),
        "lpips": (
            LossConfig(lpips=1.0, lpips_weights=_VGG_FILE),
            "Charbonnier + SSIM + LPIPS",
            "0.72, 2.93 and .923",
        ),
        "dino250": (
            replace(dino, dino=250.0),
            "Charbonnier + SSIM + DINO 250",
            "0.51, 1.45 and .919",
        ),
        "dino500": (dino, "Charbonnier + SSIM + DINO 500", ""),
        "dino1000": (
            LossConfig.perceptual(DINO_REPOSITORY),
            "Charbonnier + SSIM + DINO 1000",
            "0.30, 1.12 and .914",
        ),
    }
    recipes = []
    for row, (loss, terms, printed) in rows.items():
        settings = replace(_derived(f"ablation-loss-{row}", "5B-f16x64", 128), loss=loss)
        expected = (
            f"arXiv 2605.05331 prints rFID, rFDD and SSIM of {printed} on ImageNet 256p."
            if printed
            else "the ablation of arXiv 2605.05331 has no such row; see vitok-5b-f16x64."
        )
        recipes.append(_recipe(settings, f"Loss ablation of 5B f16x64: {terms}.", expected))
    return recipes


def size_ablation() -> list[TrainingRecipe]:
    """Fixed squares against native sizes, `ablation-size-KIND`: the same images, one stage."""
    kinds = {
        "square256": (256, True, "every image a square of 256 x 256"),
        "native256": (256, False, "native aspect ratios at 256 tokens"),
        "native1024": (1024, False, "native aspect ratios at 1,024 tokens"),
    }
    recipes = []
    for kind, (budget, square, what) in kinds.items():
        settings = _derived(f"ablation-size-{kind}", "350M-f16x64", 8)
        settings = replace(
            settings,
            data=replace(settings.data, square=square),
            stages=(Stage(steps=100_000, images_per_step=2048, token_budgets=(budget,)),),
        )
        expected = "there are no printed figures to compare with."
        recipes.append(_recipe(settings, f"Size ablation of 350M f16x64: {what}.", expected))
    return recipes


def fine_tuning() -> list[TrainingRecipe]:
    """Released weights trained on, `finetune-MODEL-decoder` with a frozen encoder, and one without.

    With another `start` of the same architecture they go on from there: a run, a checkpoint.
    """
    stage = Stage(steps=20_000, images_per_step=1024, token_budgets=(1024,))
    expected = "at first what the released model reaches."
    recipes = []
    for model in RELEASED:
        settings = replace(
            _derived(f"finetune-{model.lower()}-decoder", model, 8),
            stages=(stage,),
            optim=OptimConfig(lr=1e-4, warmup=0.05, ema_decay=0.999),
            start=model,
            freeze="encoder",
        )
        summary = f"The decoder of the released {model}; its latents stay what they are."
        recipes.append(_recipe(settings, summary, expected))
    settings = _derived("finetune-350m-f16x64", "350M-f16x64", 8)
    settings = replace(settings, stages=settings.stages[1:], start="350M-f16x64")
    summary = "The second stage of 350M-f16x64 alone, all of it, from released weights."
    return [*recipes, _recipe(settings, summary, expected)]


TRAINING: dict[str, TrainingRecipe] = {
    recipe().run.name: recipe
    for recipe in (
        quickstart,
        *released_models(),
        *decoder_ladder(),
        *loss_ablation(),
        *size_ablation(),
        *fine_tuning(),
    )
}
