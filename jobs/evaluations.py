"""Recipes of evaluations: functions that return a complete config, as those of jobs.recipes."""

from collections.abc import Callable
from dataclasses import replace

from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.worker import ExtractorConfig
from vitok.perceptual import DINO_REPOSITORY

EvaluationRecipe = Callable[[], EvaluationConfig]

_OURS = ("5B-f16x64", "5B-f16x32", "5B-f16x16")
_OTHERS = (
    "sd-vae",
    "sdxl-vae",
    "flux1-vae",
    "flux2-vae",
    "qwen-image-vae",
    "hunyuan-image-vae",
    "dc-ae-f32c32",
)
_CODECS = ("jpeg", "webp")
# Where `wget` of vitok.features.INCEPTION_URL puts it.
_NETWORKS = ExtractorConfig(inception="inception-2015-12-05.pt", dino=DINO_REPOSITORY)


def quickstart() -> EvaluationConfig:
    """PSNR and SSIM of any model on any folder of images, here, without other weights.

    256 tokens of 16 x 16 pixels an image, aspect kept. Set subjects and data, as in
    `vitok evaluate quickstart --subjects runs/quickstart --data photos`.
    """
    return EvaluationConfig(token_budget=(256,), num_workers=0, use_gpu=False)


def imagenet_256p() -> EvaluationConfig:
    """The 50,000 validation images of ImageNet-1k at 256 x 256: Table 2 of the paper.

    ADM's centre crops. Our released 5B models, the autoencoders that people compare with, JPEG and
    WebP at the bits of the first. Set data; see docs/evaluation.md for the weights.

    Hardware: 8 GPUs of 80 GB. Expected: arXiv 2605.05331 prints rFID .74, rFDD 2.49, PSNR 34.2 and
    SSIM .924 for 5B-f16x64. With this code: not measured by us.
    """
    return EvaluationConfig(
        subjects=(*_OURS, *_OTHERS, "rae-dinov2", *_CODECS),
        square=(256,),
        networks=_NETWORKS,
        benchmark="imagenet-256p",
        out="evaluation/imagenet-256p",
        num_workers=8,
        cpus_per_worker=4.0,
    )


def coco_256p() -> EvaluationConfig:
    """The 5,000 images of COCO val2017 at 256 x 256.

    As imagenet-256p. Fewer images than 10,000: distances compare with one another alone.

    Hardware: 8 GPUs of 80 GB. With this code: not measured by us.
    """
    return replace(imagenet_256p(), benchmark="", max_images=5000, out="evaluation/coco-256p")


def coco_512p() -> EvaluationConfig:
    """The 5,000 images of COCO val2017 at 512 x 512.

    As coco-256p, without RAE, which draws 256 x 256 alone.
    """
    return replace(
        coco_256p(),
        subjects=(*_OURS, *_OTHERS, *_CODECS),
        square=(512,),
        row_tokens=16_384,
        out="evaluation/coco-512p",
    )


def div8k() -> EvaluationConfig:
    """DIV8K at its own aspect ratio, longest side from 1,024 to 8,192 pixels, with latency.

    Every image alone, five timed passes after one that is not; windows of radius 8 in float8, as
    the paper times. What runs out of memory or time is a row that says so. Set data.

    Hardware: one H100 for each worker. Expected: arXiv 2605.05331 prints PSNR 34.9, SSIM .938 and
    294 ms at 2048p, 1.2 s at 4096p and 5.4 s at 8192p for 5B-f16x64. With this code: not measured
    by us.
    """
    return EvaluationConfig(
        subjects=(
            "5B-f16x64,window=8,dtype=float8,compile=yes",
            "5B-f32x128,window=8,dtype=float8,compile=yes",
            *_OTHERS,
        ),
        longest_side=(1024, 2048, 4096, 8192),
        repeats=5,
        timeout_s=300.0,
        networks=_NETWORKS,
        benchmark="div8k",
        out="evaluation/div8k",
        num_workers=1,
        cpus_per_worker=8.0,
    )


EVALUATIONS: dict[str, EvaluationRecipe] = {
    "quickstart": quickstart,
    "imagenet-256p": imagenet_256p,
    "coco-256p": coco_256p,
    "coco-512p": coco_512p,
    "div8k": div8k,
}
