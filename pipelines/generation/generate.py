"""Many samples of a flow model as WebDataset shards: a Ray batch job that goes on where it stopped.

    OUT/generation.json     what is sampled: model, checkpoint, sampler, seeds, captions, size
    OUT/samples-NUMBER.tar  unit_images samples: KEY.png, KEY.cls, KEY.json, KEY.txt

Sample i has the seed seed + i and the class i mod num_classes, so that every class is there as
often as any other; or caption i mod num_captions. A shard is sampled by itself, in rows of one
packing: what lies in it depends on its number alone, whoever samples it and when.
"""

import io
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.generation.prompts import Prompts, prompts_of
from pipelines.generation.sampling import (
    Request,
    load_dit,
    sample_requests,
    to_uint8,
    whole_patches,
)
from pipelines.launch import check_resources
from pipelines.progress import progress_bar
from pipelines.reading.shards import write_shards
from pipelines.runs import newest_checkpoint
from pipelines.train_flow import FlowTraining, read_settings, read_statistics
from vitok.autoencoder import Autoencoder
from vitok.config import UNLESS_EMPTY, config, describe_difference, parse_json, to_dict
from vitok.dit import DiT
from vitok.flow import SamplerConfig
from vitok.storage import Folder, absolute_if_local

GENERATION_FILE = "generation.json"
_PREFIX = "samples"


@config
class Generation:
    """One set of samples.

    Attributes:
        model: folder of a flow training; its newest checkpoint is taken.
        out: where the shards go: a folder or `s3://` prefix.
        autoencoder: whose decoder makes pixels; the training's own if empty.
        captions: what a model of texts samples: a file of one caption a line, or a latent cache
            with texts, whose images are gone through in order, each with its text and class. Empty
            samples all classes in turn.
        text_encoder: of the captions of a file; where it was when the training's cache was made, if
            empty.
        num_images: how many samples; more than there are captions begin with the first again.
        size: of every sample in pixels (height, width), enlarged to whole patches.
        sampler: how latents are sampled.
        seed: of the first sample; the others count on from it.
        unit_images: samples of a shard.
        row_tokens: tokens of a packed row, the unit of one forward pass.
        num_workers: sampling processes.
        cpus_per_worker: CPU cores that Ray sets aside for each of them.
        use_gpu: sample on GPUs.
        compute_dtype: of matrix products: bfloat16 or float32.
    """

    model: str
    out: str
    autoencoder: str = ""
    captions: str = ""
    text_encoder: str = ""
    num_images: int = 100_000
    size: tuple[int, int] = (256, 256)
    sampler: SamplerConfig = SamplerConfig()
    seed: int = 0
    unit_images: int = 256
    row_tokens: int = 8192
    num_workers: int = 8
    cpus_per_worker: float = 4.0
    use_gpu: bool = True
    compute_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.num_images, self.unit_images, self.num_workers, *self.size) < 1:
            raise ValueError("num_images, unit_images, num_workers and size must be at least 1")
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} must be bfloat16 or float32")


@config
class GenerationIdentity:
    """What all shards of a set have in common: with their numbers, all that shapes a byte.

    Attributes:
        checkpoint: URI of the flow model's weights.
        autoencoder: of the decoder's.
        captions: digest of these; empty for classes.
        device: kind of device that computed: cpu or cuda. Kernels of others round differently.
    """

    checkpoint: str
    autoencoder: str
    captions: Annotated[str, UNLESS_EMPTY] = ""
    num_classes: int
    num_images: int
    size: tuple[int, int]
    sampler: SamplerConfig
    seed: int
    unit_images: int
    row_tokens: int
    compute_dtype: str
    device: str


@dataclass(frozen=True)
class Generator:
    """A flow model with its decoder, on a device."""

    model: DiT
    decoder: Autoencoder
    training: FlowTraining
    run: Folder
    device: torch.device

    @classmethod
    def load(
        cls, run: Folder, autoencoder: str, device: torch.device, compute_dtype: torch.dtype
    ) -> "Generator":
        """Load the newest weights of a run, and the decoder of its latents.

        Args:
            autoencoder: as load_autoencoder takes it; the run's own if empty.

        Raises:
            FileNotFoundError: there is no run, it has no checkpoint yet, or no autoencoder is
                there.
        """
        training = read_settings(run)
        decoder = load_autoencoder(
            decoder_location(training, autoencoder), part="decoder", dtype=compute_dtype
        )
        model = load_dit(newest_checkpoint(run)[0], training.model)
        return cls(model.to(device, compute_dtype), decoder.to(device), training, run, device)

    def images(
        self, requests: list[Request], sampler: SamplerConfig, row_tokens: int
    ) -> list[NDArray[np.uint8]]:
        """Sample images [H, W, 3], in the order of the requests."""
        latents = sample_requests(
            self.model,
            requests,
            read_statistics(self.run),
            self.device,
            sampler=sampler,
            times=self.training.times,
            row_tokens=row_tokens,
        )
        return [to_uint8(image) for image in self.decoder.decode(latents)]


def decoder_location(training: FlowTraining, given: str) -> str:
    """Return where the autoencoder of a run's latents is.

    Raises:
        ValueError: it is known neither to the run nor given.
    """
    if not (given or training.autoencoder):
        raise ValueError(
            "the run names no autoencoder; give the one that made its latents as --autoencoder"
        )
    return given or training.autoencoder


def prepare_generation(settings: Generation) -> Generation:
    """Check what can be checked before anything starts, and claim the folder.

    Returns:
        the config to sample by, with absolute locations: workers run in other directories.

    Raises:
        FileNotFoundError: the run, its checkpoint, the autoencoder, the captions or their encoder
            is not there.
        ValueError: the folder holds samples of another kind; the captions do not suit the model.
    """
    settings = replace(
        settings,
        model=Folder.of(settings.model).uri,
        out=Folder.of(settings.out).uri,
        autoencoder=absolute_if_local(settings.autoencoder),
        captions=Folder.of(settings.captions).uri if settings.captions else "",
        text_encoder=absolute_if_local(settings.text_encoder),
    )
    identity = _identity(settings)
    if _missing_units(settings):
        # Names a text encoder that is not there, or is another.
        _prompts(settings, torch.device("cpu")).of(range(1))
    _claim(Folder.of(settings.out), identity)
    return settings


def generate(settings: Generation) -> list[str]:
    """Sample what is not sampled yet on the connected Ray cluster.

    Args:
        settings: as `prepare_generation` returned it.

    Returns:
        the URIs of all shards, in order.

    Raises:
        RuntimeError: the cluster is too small.
    """
    import ray.data

    out = Folder.of(settings.out)
    if missing := _missing_units(settings):
        num_workers = min(settings.num_workers, len(missing))
        check_resources(
            num_cpus=num_workers * settings.cpus_per_worker,
            num_gpus=num_workers * settings.use_gpu,
            remedy="lower num_workers or cpus_per_worker, or set use_gpu to False",
        )
        done = settings.num_images - sum(len(_numbers(settings, unit)) for unit in missing)
        with progress_bar("sample", settings.num_images, "image", done) as board:
            results = ray.data.from_items(
                [{"unit": unit} for unit in missing], override_num_blocks=len(missing)
            ).map_batches(
                _SampleUnits,
                batch_size=1,
                fn_constructor_args=(settings, board),
                compute=ray.data.ActorPoolStrategy(size=num_workers),
                num_cpus=settings.cpus_per_worker,
                num_gpus=1 if settings.use_gpu else 0,
            )
            for _ in results.iter_batches(batch_size=None):
                pass
    out.remove_unfinished()
    return [f"{out.uri}/{shard_name(unit)}" for unit in range(_num_units(settings))]


def _num_units(settings: Generation) -> int:
    return -(-settings.num_images // settings.unit_images)


def _missing_units(settings: Generation) -> list[int]:
    there = set(Folder.of(settings.out).names())
    return [unit for unit in range(_num_units(settings)) if shard_name(unit) not in there]


def shard_name(unit: int) -> str:
    """Return the name of a shard."""
    return f"{_PREFIX}-{unit:06d}.tar"


def unit_requests(settings: Generation, unit: int, prompts: Prompts) -> list[Request]:
    """Return the samples of a shard."""
    size = whole_patches(settings.size, read_statistics(Folder.of(settings.model)).patch_size)
    numbers = _numbers(settings, unit)
    return [
        Request(settings.seed + number, prompt.label, size, prompt.text, prompt.caption)
        for number, prompt in zip(numbers, prompts.of(numbers), strict=True)
    ]


def _prompts(settings: Generation, device: torch.device) -> Prompts:
    run = Folder.of(settings.model)
    model, statistics = read_settings(run).model, read_statistics(run)
    return prompts_of(model, statistics, settings.captions, settings.text_encoder, device)


def _numbers(settings: Generation, unit: int) -> range:
    first = unit * settings.unit_images
    return range(first, min(first + settings.unit_images, settings.num_images))


def _identity(settings: Generation) -> GenerationIdentity:
    run = Folder.of(settings.model)
    training = read_settings(run)
    return GenerationIdentity(
        checkpoint=newest_checkpoint(run)[0].uri,
        autoencoder=decoder_location(training, settings.autoencoder),
        captions=_prompts(settings, torch.device("cpu")).digest,
        num_classes=training.model.num_classes,
        num_images=settings.num_images,
        size=settings.size,
        sampler=settings.sampler,
        seed=settings.seed,
        unit_images=settings.unit_images,
        row_tokens=settings.row_tokens,
        compute_dtype=settings.compute_dtype,
        device="cuda" if settings.use_gpu else "cpu",
    )


def _claim(out: Folder, identity: GenerationIdentity) -> None:
    """Note what a new set is of, or check that the set there is of the same."""
    text = out.read_text(GENERATION_FILE)
    if text is None:
        out.write_text(GENERATION_FILE, json.dumps(to_dict(identity), indent=2) + "\n")
        return
    found = parse_json(GenerationIdentity, text, f"{out.uri}/{GENERATION_FILE}")
    if differences := describe_difference(found, identity):
        raise ValueError(
            f"{out.uri} holds other samples ({'; '.join(differences)}); choose another folder"
        )


class _SampleUnits:
    """A Ray Data actor that holds the models and turns shard numbers into shards."""

    def __init__(self, settings: Generation, board: Any) -> None:
        self._settings, self._board = settings, board
        device = torch.device("cuda" if settings.use_gpu else "cpu")
        self._generator = Generator.load(
            Folder.of(settings.model),
            settings.autoencoder,
            device,
            getattr(torch, settings.compute_dtype),
        )
        self._prompts = _prompts(settings, device)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        for unit in batch["unit"].tolist():
            requests = unit_requests(self._settings, unit, self._prompts)
            images = self._generator.images(
                requests, self._settings.sampler, self._settings.row_tokens
            )
            data = _shard_bytes(requests, images)
            Folder.of(self._settings.out).write_bytes(shard_name(unit), data)
            self._board.advance.remote(len(requests))
        return batch


def _shard_bytes(requests: list[Request], images: list[NDArray[np.uint8]]) -> bytes:
    samples = [
        {
            "__key__": f"{request.seed:012d}",
            "png": _png(pixels),
            "cls": request.label,
            "json": {"seed": request.seed, "height": pixels.shape[0], "width": pixels.shape[1]},
            **({"txt": request.caption.encode()} if request.caption else {}),
        }
        for request, pixels in zip(requests, images, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        (path,) = write_shards(samples, scratch, _PREFIX, len(samples))
        return Path(path).read_bytes()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
