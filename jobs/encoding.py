"""Recipes of `vitok encode`: functions that return a complete config.

Every field can be changed on the command line; a variant in code derives with `replace`.
"""

from collections.abc import Callable

from pipelines.caching.config import LatentCaching
from pipelines.caching.units import DTYPES
from vitok.variants import AutoencoderConfig

EncodingRecipe = Callable[[], LatentCaching]

# ImageNet-22k as it was released in fall 2011: https://www.image-net.org
_IMAGENET_22K_IMAGES, _IMAGENET_22K_CLASSES = 14_197_122, 21_841
_H200_PEAK = 989.5e12  # operations per second, dense bfloat16; see vitok.flops
_ASSUMED_MFU = 0.4
_ASSUMED_CORE_IMAGES_PER_S = 400  # decoded and packed by a CPU core


def quickstart() -> LatentCaching:
    """Latents at 256 tokens and native aspect ratio on two CPU cores, as in `vitok quickstart`.

    Set manifest, model and out.
    """
    return LatentCaching(
        token_budgets=(256,),
        unit_samples=32,
        num_workers=2,
        cpus_per_worker=0.5,
        use_gpu=False,
        cpus_per_reader=0.5,
    )


def imagenet_22k() -> list[EncodingRecipe]:
    """ImageNet-22k by the released encoders, `imagenet-22k-MODEL`, and native aspect ratios.

    Without -native: squares of 256 pixels, as class-conditional generators are compared on.
    """
    recipes = []
    for size in ("350M", "5B"):
        for shape in ("f16x64", "f16x32", "f16x16"):
            model = f"{size}-{shape}"
            square = LatentCaching(
                model=model, squares=(256,), num_classes=_IMAGENET_22K_CLASSES, num_workers=8
            )
            recipes.append(
                _recipe(f"imagenet-22k-{model.lower()}", square, "256 x 256, ADM's crop")
            )
            native = LatentCaching(
                model=model, token_budgets=(256,), num_classes=_IMAGENET_22K_CLASSES, num_workers=8
            )
            name = f"imagenet-22k-{model.lower()}-native"
            recipes.append(_recipe(name, native, "at most 256 tokens, native aspect ratio"))
    return recipes


def _recipe(name: str, settings: LatentCaching, sizes: str) -> EncodingRecipe:
    """Return a recipe of a config for H200."""

    def recipe() -> LatentCaching:
        return settings

    config = AutoencoderConfig.from_name(settings.model)
    tokens = 256
    flops = tokens * config.flops_per_token(tokens, "encoder")
    gpu_s = _IMAGENET_22K_IMAGES * flops / (_H200_PEAK * _ASSUMED_MFU)
    cores_h = _IMAGENET_22K_IMAGES / _ASSUMED_CORE_IMAGES_PER_S / 3600
    num_bytes = _IMAGENET_22K_IMAGES * tokens * config.latent_channels
    num_bytes *= DTYPES[settings.dtype].itemsize
    recipe.__name__ = name
    recipe.__doc__ = f"""ImageNet-22k by {settings.model}: {sizes}.

    Hardware: {settings.num_workers} H200, {gpu_s / 3600 / settings.num_workers:.2f} hours of each
    at {_ASSUMED_MFU:.0%} of their bfloat16 peak, beside {cores_h:.0f} hours of a CPU core that
    decodes: estimated, not measured by us. With 64 cores decoding takes {cores_h / 64:.1f} hours,
    and is what the job waits for.

    Expected: {num_bytes / 1e12:.2f} TB at most, {config.latent_channels} values of {settings.dtype}
    for each of {tokens} tokens of {_IMAGENET_22K_IMAGES:,} images.

    Set manifest (of shards whose labels are 0 to {_IMAGENET_22K_CLASSES - 1}) and out.
    """
    return recipe


ENCODING: dict[str, EncodingRecipe] = {
    "quickstart": quickstart,
    **{recipe.__name__: recipe for recipe in imagenet_22k()},
}
