"""The config of a latent cache that is to be made, as `vitok encode` takes it."""

from dataclasses import replace

from pipelines.caching.units import DTYPES
from pipelines.whole_images import Transform
from vitok.config import config
from vitok.storage import Folder, absolute_if_local

COMPUTE_DTYPES = ("bfloat16", "float32")


@config
class LatentCaching:
    """One latent cache.

    Attributes:
        manifest: folder that `vitok corpus index` wrote: the images.
        model: training run, folder of weights, released model; only the encoder is loaded.
        out: the cache: a folder or `s3://` prefix.
        token_budgets: at each of these, images are shrunk to at most so many patches, aspect kept.
        squares: at each of these, the centre of the image, so many pixels a side: what ADM's crop
            shows, resized once.
        buckets: at each of these, the centre of the image in the shape nearest to its own among
            about a dozen, none of more patches than a square of so many pixels a side.
        flip: every image a second time, mirrored.
        dtype: of the stored latents: bfloat16, float16 or float32.
        compute_dtype: of the encoder: bfloat16 or float32.
        log_variance: store the log-variances too; of encoders with KL latents.
        num_classes: labels must be 0 to num_classes - 1; 0 takes any, and none.
        text_encoder: folder or Hugging Face repository of a T5 or CLIP text encoder, already on
            this machine: embeds the captions (`.txt`) of the images. Empty stores no texts.
        text_tokens: of a caption at most; the rest of a longer one is cut off.
        unit_samples: samples of an input shard that make one file.
        row_tokens: tokens of a packed row, the unit of one forward pass.
        num_workers: encoder processes.
        cpus_per_worker: CPU cores that Ray sets aside for each of them. Without a GPU they compute,
            and a cache is finished with as many as it was begun with.
        use_gpu: encode on GPUs.
        cpus_per_reader: CPU cores of each task that decodes; there are as many as fit beside the
            encoders.
        max_unreadable: the job fails if more than this fraction of the samples is unreadable.
        dry_run: say what it would take, encode a few images to measure that, and write nothing.
        json: print the result as JSON on the last line.
    """

    manifest: str = ""
    model: str = ""
    out: str = ""
    token_budgets: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()
    flip: bool = False
    dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    log_variance: bool = False
    num_classes: int = 0
    text_encoder: str = ""
    text_tokens: int = 77
    unit_samples: int = 512
    row_tokens: int = 8192
    num_workers: int = 8
    cpus_per_worker: float = 2.0
    use_gpu: bool = True
    cpus_per_reader: float = 1.0
    max_unreadable: float = 0.01
    dry_run: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("dtype", tuple(DTYPES)), ("compute_dtype", COMPUTE_DTYPES)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
        for name in ("text_tokens", "unit_samples", "row_tokens", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("cpus_per_worker", "cpus_per_reader"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be positive, or 0 for any")
        if len(set(self.transforms)) < len(self.transforms):
            raise ValueError(
                f"token_budgets={self.token_budgets}, squares={self.squares} and "
                f"buckets={self.buckets}: one is there twice"
            )

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """What is done to images: the budgets, then the squares, then the buckets."""
        return (
            *(Transform(token_budget=budget) for budget in self.token_budgets),
            *(Transform(square=side) for side in self.squares),
            *(Transform(bucket=side) for side in self.buckets),
        )


def complete(settings: LatentCaching) -> LatentCaching:
    """Check that nothing is missing, and make the locations absolute: tasks run elsewhere.

    Raises:
        ValueError: a field that has no default is empty.
    """
    for name in ("manifest", "model", "out"):
        if not getattr(settings, name):
            raise ValueError(f"{name} is empty; set --{name}")
    if not settings.transforms:
        raise ValueError(
            "token_budgets, squares and buckets are all empty; give the sizes of the images"
        )
    return replace(
        settings,
        manifest=Folder.of(settings.manifest).uri,
        model=absolute_if_local(settings.model),
        text_encoder=absolute_if_local(settings.text_encoder),
        out=Folder.of(settings.out).uri,
    )
