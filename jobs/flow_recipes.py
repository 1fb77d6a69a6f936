"""Recipes of flow models on cached latents, as jobs/recipes.py has them of autoencoders.

Models, schedule and sampler are those of arXiv 2605.05331. What we have not run says so.
"""

from collections.abc import Callable
from dataclasses import replace

from jobs.encoding import ENCODING
from pipelines.generation.joint import JointScaling
from pipelines.runs import RunConfig
from pipelines.train_flow import FlowTraining
from vitok.dit import SIZES, DiT, DiTConfig
from vitok.flops import training_flops
from vitok.flow import SamplerConfig, TimeConfig
from vitok.optim import OptimConfig
from vitok.parallel import ParallelConfig

FlowRecipe = Callable[[], FlowTraining]

_IMAGENET_22K_IMAGES, _IMAGENET_22K_CLASSES = 14_197_122, 21_841
_IMAGES_PER_STEP = 4096
_TOKENS = 256  # of an image of 256 x 256 pixels at f16
_H200_PEAK = 989.5e12  # operations per second, dense bfloat16; see vitok.flops
_ASSUMED_MFU = 0.4


def flow_quickstart() -> FlowTraining:
    """A small generator on squares of the quickstart's images, in minutes on two CPU cores.

    Two workers, 12 classes: the photographs that the corpus is cropped from. Expected: colours and
    textures of each class, no objects (measured). Set cache and autoencoder; `vitok quickstart
    --flow` does.
    """
    return FlowTraining(
        model=DiTConfig(
            latent_channels=64, width=192, depth=4, heads=3, num_classes=12, layer_scale=0.5
        ),
        steps=400,
        images_per_step=32,
        row_tokens=576,  # two rows hold the 36 tokens of every image: one for each worker
        times=TimeConfig(shift_values=4096),
        optim=OptimConfig(algorithm="muon", lr=1e-2, warmup=0.05, ema_decay=0.99),
        sampler=SamplerConfig(steps=25, guidance=2.0),
        eval_images=12,
        eval_size=(96, 96),
        run=RunConfig(
            name="flow-quickstart",
            num_workers=2,
            cpus_per_worker=0.5,
            use_gpu=False,
            log_every=10,
            evaluate_every=200,
            checkpoint_every=100,
            max_failures=1,
        ),
    )


def imagenet_22k(
    name: str, size: str, autoencoder: str, *, epochs: int = 300, num_workers: int = 8
) -> FlowTraining:
    """Return a training on latents of ImageNet-22k, squares of 256 x 256 pixels.

    Args:
        size: of the generator: 450M or 1.2B.
        autoencoder: a released model of patch 16.
    """
    channels = int(autoencoder.rpartition("x")[2])
    return FlowTraining(
        model=DiTConfig.from_name(
            size, latent_channels=channels, num_classes=_IMAGENET_22K_CLASSES
        ),
        autoencoder=autoencoder,
        steps=epochs * _IMAGENET_22K_IMAGES // _IMAGES_PER_STEP,
        images_per_step=_IMAGES_PER_STEP,
        run=RunConfig(
            name=name,
            num_workers=num_workers,
            evaluate_every=10_000,
            parallel=ParallelConfig(compile=True),
        ),
    )


def _recipe(settings: FlowTraining, summary: str, expected: str) -> FlowRecipe:
    def recipe() -> FlowTraining:
        return settings

    hours = flops_of(settings) / (settings.run.num_workers * _H200_PEAK * _ASSUMED_MFU * 3600)
    recipe.__doc__ = f"""{summary}

    {parameters_of(settings.model):,.2f}B parameters, with the embedding of the classes.

    Schedule: {settings.steps:,} steps of {settings.images_per_step:,} images.

    Hardware: {settings.run.num_workers} H200, some {hours:,.0f} hours at {_ASSUMED_MFU:.0%} of
    their bfloat16 peak: computed, not measured by us.

    Expected: {expected} With this code: not measured by us.

    Set cache.
    """
    return recipe


def flops_of(settings: FlowTraining, tokens: int = _TOKENS) -> float:
    """Return the operations of a whole training on images of so many tokens."""
    image = training_flops(settings.model, [tokens])
    return settings.steps * settings.images_per_step * image


def parameters_of(model: DiTConfig) -> float:
    """Return the parameters of a model, in billions."""
    import torch

    with torch.device("meta"):
        return DiT(model).num_parameters() / 1e9


def generators() -> list[FlowRecipe]:
    """Both generators at three compression ratios, `flow-SIZE-fPxC`."""
    recipes = []
    for size in SIZES:
        for channels in (64, 32, 16):
            name = f"flow-{size.lower()}-f16x{channels}"
            gpus = 8 if size == "450M" else 64
            settings = imagenet_22k(name, size, f"350M-f16x{channels}", num_workers=gpus)
            ratio = 768 // channels
            summary = f"DiT-{size} on latents of 350M-f16x{channels} (r = {ratio}), ImageNet-22k."
            expected = "arXiv 2605.05331 finds that larger generators use lower r."
            recipes.append(_recipe(settings, summary, expected))
    return recipes


def autoencoder_comparison() -> list[FlowRecipe]:
    """The same generators on latents of the 5B autoencoder, `flow-SIZE-5b-fPxC`.

    Beside flow-SIZE-fPxC they tell whether a larger autoencoder helps generation.
    """
    recipes = []
    for size in SIZES:
        name = f"flow-{size.lower()}-5b-f16x64"
        gpus = 8 if size == "450M" else 64
        settings = imagenet_22k(name, size, "5B-f16x64", num_workers=gpus)
        summary = f"DiT-{size} on latents of 5B-f16x64; beside flow-{size.lower()}-f16x64."
        recipes.append(_recipe(settings, summary, "there are no printed figures known to us."))
    return recipes


def joint_imagenet_22k() -> JointScaling:
    """Nine pairs on ImageNet-22k: three generators at r = 12, 24 and 48.

    DiTs of half and of all the depth of 450M, and 1.2B, on latents of 350M-f16x64, -f16x32 and
    -f16x16, with an eighth of the epochs of `vitok flow`: shorter than the paper's, our choice.

    Hardware: 8 H200, some 390 hours at 40% of their bfloat16 peak: computed, not measured by us.

    Expected: arXiv 2605.05331 finds that larger generators use lower r. With this code: not
    measured by us.

    Set encoding.manifest.
    """
    training = imagenet_22k("joint", "450M", "350M-f16x64", epochs=38)
    large = DiTConfig.from_name("1.2B", latent_channels=64)
    sizes = f"model.width={large.width} model.depth={large.depth} model.heads={large.heads}"
    return JointScaling(
        name="joint-imagenet-22k",
        autoencoders=("350M-f16x64", "350M-f16x32", "350M-f16x16"),
        generators=("model.depth=12", f"model.depth={training.model.depth}", sizes),
        encoding=ENCODING["imagenet-22k-350m-f16x64"](),
        training=training,
    )


def joint_quickstart() -> JointScaling:
    """Two small generators on squares of the quickstart's images, some minutes on two CPU cores.

    Each autoencoder takes some seconds to encode, each pair about a minute. Expected: curves to
    look at; 200 steps tell no laws. Set autoencoders (runs of `vitok quickstart` or `vitok train
    quickstart`) and encoding.manifest.
    """
    base = flow_quickstart()
    run = replace(base.run, checkpoint_every=100, evaluate_every=1000)
    return JointScaling(
        name="joint-quickstart",
        autoencoders=("runs/quickstart",),
        generators=("model.width=96 model.depth=2", "model.width=192 model.depth=4"),
        encoding=replace(
            ENCODING["quickstart"](),
            manifest="runs/quickstart/corpus/train",
            token_budgets=(),
            squares=base.eval_size[:1],
        ),
        training=replace(base, steps=200, run=run),
        smooth=10,
    )


FLOWS: dict[str, FlowRecipe] = {
    recipe().run.name: recipe
    for recipe in (
        flow_quickstart,
        *generators(),
        *autoencoder_comparison(),
    )
}

JOINTS: dict[str, Callable[[], JointScaling]] = {
    "quickstart": joint_quickstart,
    "imagenet-22k": joint_imagenet_22k,
}
