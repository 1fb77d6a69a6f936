"""The config of an evaluation."""

from pipelines.evaluation.published import PUBLISHED
from pipelines.evaluation.subjects import SubjectSpec
from pipelines.evaluation.worker import ExtractorConfig
from pipelines.whole_images import Transform
from vitok.config import config


@config
class EvaluationConfig:
    """One evaluation: subjects on images at resolutions.

    Attributes:
        subjects: what is evaluated, each as LOCATION or LOCATION,option=value,...: a training run,
            weights, a released model, an autoencoder of diffusers (sd-vae, flux2-vae, ...,
            diffusers:FOLDER), jpeg, webp. Options: name, window, dtype, compile, bits_per_pixel.
        data: the images: a folder of image files, Parquet, shards, or the folder of a manifest.
        out: folder for the results.
        square: sides in pixels of ADM's centre crops; each is a resolution.
        longest_side: sides in pixels to which larger images are shrunk, aspect kept.
        token_budget: patches to which larger images are shrunk, aspect kept.
        patch_size: pixels along each side of the patches that a token budget counts, for all
            subjects: they see the same pixels.
        max_images: choose so many at random; 0 takes all.
        seed: of that choice.
        samples: file with the keys to take, one a line, such as an evaluation writes.
        slice_images: images that share passes; part of what is measured, to the last bits.
        row_tokens: patches of patch_size of one pass; a larger image is a pass of its own.
        repeats: time every image alone, so often after a first pass that is not timed; 0 times the
            passes as they are.
        timeout_s: for each image, all its repeats included. Without num_workers there is no limit.
        networks: what judges beside PSNR and SSIM.
        inception_reference: .npz statistics that rFID compares with, instead of those of the
            sources at the same resolution; or the folder `statistics` of an earlier evaluation.
        dino_reference: the same for rFDD.
        benchmark: published figures that are shown beside the results: imagenet-256p or div8k.
        num_workers: processes; 0 evaluates in the calling one, without Ray.
        cpus_per_worker: CPU cores of each, which are its threads too.
        use_gpu: evaluate on GPUs, one each.
        num_pictures: images that are shown.
        json: print the scores as JSON on the last line.
    """

    subjects: tuple[str, ...] = ()
    data: str = ""
    out: str = "evaluation"
    square: tuple[int, ...] = ()
    longest_side: tuple[int, ...] = ()
    token_budget: tuple[int, ...] = ()
    patch_size: int = 16
    max_images: int = 0
    seed: int = 0
    samples: str = ""
    slice_images: int = 32
    row_tokens: int = 8192
    repeats: int = 0
    timeout_s: float = 600.0
    networks: ExtractorConfig = ExtractorConfig()
    inception_reference: str = ""
    dino_reference: str = ""
    benchmark: str = ""
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    use_gpu: bool = True
    num_pictures: int = 8
    json: bool = False

    def __post_init__(self) -> None:
        if not self.transforms():
            raise ValueError("there is no resolution; give square, longest_side or token_budget")
        for name in ("patch_size", "slice_images", "row_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_images", "repeats", "num_workers", "num_pictures"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if min(self.timeout_s, self.cpus_per_worker) <= 0:
            raise ValueError("timeout_s and cpus_per_worker must be above 0")
        if self.benchmark and self.benchmark not in PUBLISHED:
            raise ValueError(
                f"benchmark={self.benchmark!r} is none of {', '.join(PUBLISHED)}; leave it empty"
            )
        titles = [spec.title for spec in self.specs()]
        if len(set(titles)) < len(titles):
            raise ValueError(f"the subjects {', '.join(titles)} need different names; add name=...")

    def specs(self) -> list[SubjectSpec]:
        """Return the subjects, codecs last: they may take the bits of a model's latents."""
        specs = [SubjectSpec.parse(text) for text in self.subjects]
        return sorted(specs, key=lambda spec: spec.is_codec)

    def transforms(self) -> list[Transform]:
        """Return the resolutions."""
        return [
            *(Transform(square=side, adm=True) for side in self.square),
            *(Transform(longest_side=side) for side in self.longest_side),
            *(Transform(token_budget=budget) for budget in self.token_budget),
        ]
