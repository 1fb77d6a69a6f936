"""What a process does to the images of an evaluation: read, reconstruct, judge, describe."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.corpus import Manifest
from pipelines.evaluation.baselines import hush_torchao
from pipelines.evaluation.peak_memory import memory_in_use, start_peak
from pipelines.evaluation.read_ahead import RowReader
from pipelines.evaluation.subjects import Subject, SubjectFacts, SubjectSpec, load_subject
from pipelines.failures import is_out_of_memory, root_cause
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.reconstruction import Metrics, comparison, judge
from pipelines.whole_images import Transform
from vitok.config import config
from vitok.features import DinoFeatures, FeatureExtractor, InceptionFeatures
from vitok.packed import unpack_images
from vitok.perceptual import load_lpips
from vitok.storage import absolute_if_local

OK = "ok"
_MB = 2**20
_PICTURE_SIDE = 512  # pixels; larger images are shown shrunk


@config
class ExtractorConfig:
    """The networks that judge; an empty location leaves out what they are for.

    Attributes:
        inception: TorchScript file of Inception-v3, or an https URL of it, for FID.
        inception_digest: sha256 (hex) of that file, if it is another than the field's.
        dino: folder or cached repository of DINOv3, for FDD.
        lpips: safetensors file of VGG16, for LPIPS.
    """

    inception: str = ""
    inception_digest: str = ""
    dino: str = ""
    lpips: str = ""

    def absolute(self) -> "ExtractorConfig":
        """Return the same with absolute paths: workers run in other directories."""
        return replace(
            self,
            inception=absolute_if_local(self.inception),
            dino=absolute_if_local(self.dino),
            lpips=absolute_if_local(self.lpips),
        )


@dataclass(frozen=True)
class EvaluatedImage:
    """One image as a subject reconstructed it; what is not known is None.

    Attributes:
        key: its key in the corpus.
        height, width: pixels at which it was evaluated.
        num_tokens: patches of the evaluation's patch_size.
        metrics: how well it came back.
        seconds: of reconstructing it; of an equal share of its pass, where others were beside it.
        peak_mb: memory of the pass at its peak, beyond what was in use before it.
        status: "ok", or why there is no reconstruction.
    """

    key: str
    height: int | None = None
    width: int | None = None
    num_tokens: int | None = None
    metrics: Metrics | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    status: str = OK


@dataclass(frozen=True)
class SliceResult:
    """What came of some images.

    Attributes:
        images: one for each.
        features: of the reconstructions, [N, D] float32, by the name of the network.
    """

    images: list[EvaluatedImage]
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Attempt:
    """An image that a subject was given, and what it made of it; or why it made nothing."""

    key: str
    source: Tensor
    output: Tensor | None = None
    seconds: float = 0.0
    peak_mb: float = 0.0
    failure: str = ""


class Evaluator:
    """Holds a subject and the networks that judge it; the same in this process or as a Ray actor.

    `load` comes first.

    Args:
        manifest: folder of the images' manifest.
        patch_size: pixels along each side of the patches that a token budget counts.
        row_tokens: images share a pass of the subject up to so many of these patches.
        repeats: timed passes of each image, after one that is not; 0 times the only pass.
    """

    def __init__(
        self,
        spec: SubjectSpec,
        extractors: ExtractorConfig,
        *,
        manifest: str,
        patch_size: int,
        row_tokens: int,
        repeats: int,
        device: str,
    ) -> None:
        self._spec, self._extractors, self._manifest = spec, extractors, manifest
        self._patch_size, self._row_tokens, self._repeats = patch_size, row_tokens, repeats
        self._device = torch.device(device)

    def load(self) -> tuple[SubjectFacts, dict[str, str]]:
        """Load all weights.

        Not left to the constructor: what a constructor of an actor raises cannot be told apart.

        Returns:
            what is known of the subject, and the digest of each network by its name.
        """
        corpus = Corpus.of(Manifest.load(self._manifest))
        self._reader = RowReader(corpus, patch_size=self._patch_size, row_tokens=self._row_tokens)
        self._subject: Subject = load_subject(self._spec, self._device)
        self._networks = load_extractors(self._extractors, self._device)
        self._lpips = None
        if self._extractors.lpips:
            loaded = load_lpips(self._extractors.lpips, option="lpips", without="leave lpips empty")
            self._lpips = loaded.to(self._device)
        digests = {name: network.digest for name, network in self._networks.items()}
        is_gpu = self._device.type == "cuda"
        device = torch.cuda.get_device_name(self._device) if is_gpu else "CPU"
        return replace(self._subject.facts, device=device), digests

    def evaluate(
        self,
        sample_ids: NDArray[np.int64],
        transform: Transform,
        following: NDArray[np.int64] | None = None,
    ) -> SliceResult:
        """Reconstruct some samples and judge them; what fails is a result that says why.

        Args:
            following: samples that will be asked for next: the first of them are read while the
                last of these are judged.
        """
        images: list[EvaluatedImage] = []
        features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self._networks}
        for row in self._reader.rows(sample_ids, transform, following):
            skipped = [(key, reason) for _, key, reason in row.skipped]
            images += [EvaluatedImage(key, status=f"unreadable: {why}") for key, why in skipped]
            attempts = self._reconstruct(row.keys, self._sources(row))
            # Only now: the time and memory of a pass are those of the subject alone.
            self._reader.read_ahead()
            judged = [self._judge(attempt) for attempt in attempts]
            images += judged
            outputs = [
                attempt.output
                for attempt, image in zip(attempts, judged, strict=True)
                if attempt.output is not None and image.status == OK
            ]
            for name, network in self._networks.items():
                if outputs:
                    features[name].append(network(outputs).numpy())
        found = {name: np.concatenate(parts) for name, parts in features.items() if parts}
        return SliceResult(images, found)

    def pictures(
        self, sample_ids: NDArray[np.int64], transform: Transform
    ) -> dict[str, NDArray[np.uint8]]:
        """Draw original, reconstruction and error map of samples, by key."""
        strips: dict[str, NDArray[np.uint8]] = {}
        for row in self._reader.rows(sample_ids, transform):
            sources = self._sources(row)
            outputs = self._subject.reconstruct(sources)
            for key, source, output in zip(row.keys, sources, outputs, strict=True):
                strip = Image.fromarray(comparison(source.cpu(), output.cpu()))
                scale = min(1.0, _PICTURE_SIDE / max(source.shape))
                size = (max(1, round(side * scale)) for side in strip.size)
                strips[key] = np.asarray(strip.resize(tuple(size)) if scale < 1 else strip)
        return strips

    def _sources(self, row: PackedRow) -> list[Tensor]:
        """Return the images of a row on the device, [3, H, W] in [-1, 1]."""
        packed, _ = row.to_packed(self._device)
        return unpack_images(packed, self._patch_size)

    def _reconstruct(self, keys: Sequence[str], sources: Sequence[Tensor]) -> list[_Attempt]:
        """Reconstruct images together or, where that fails, one by one."""
        if not sources:
            return []
        try:
            outputs, seconds, peak_mb = self._pass(sources)
            share = seconds / len(sources)
            return [
                _Attempt(key, source, output, share, peak_mb)
                for key, source, output in zip(keys, sources, outputs, strict=True)
            ]
        except Exception as error:  # whatever a subject does must not end the evaluation
            torch.cuda.empty_cache()
            if len(sources) > 1:
                alone = zip(keys, sources, strict=True)
                return [
                    found for pair in alone for found in self._reconstruct(*([x] for x in pair))
                ]
            return [_Attempt(keys[0], sources[0], failure=reason_of(error))]

    def _pass(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], float, float]:
        """Return reconstructions, the median of the seconds, and the peak of memory in MB."""
        if self._repeats:
            self._subject.reconstruct(sources)
        seconds: list[float] = []
        start_peak(self._device)
        rest, _ = memory_in_use(self._device)
        for _ in range(max(1, self._repeats)):
            start = time.perf_counter()
            outputs = self._subject.reconstruct(sources)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - start)
        _, peak = memory_in_use(self._device)
        return outputs, statistics.median(seconds), max(0, peak - rest) / _MB

    def _judge(self, attempt: _Attempt) -> EvaluatedImage:
        key, source, output = attempt.key, attempt.source, attempt.output
        height, width = source.shape[1:]
        if output is None:
            return EvaluatedImage(key, height, width, status=attempt.failure)
        try:
            if not output.isfinite().all():
                raise ArithmeticError("the reconstruction holds values that are not finite")
            result = judge(key, source, output, self._patch_size)
            if self._lpips is not None:
                with torch.inference_mode():
                    distance = self._lpips(output[None].clamp(-1, 1), source[None]).item()
                result = replace(result, metrics=replace(result.metrics, lpips=distance))
        except Exception as error:  # such as a reconstruction of another size
            return EvaluatedImage(key, height, width, status=reason_of(error))
        return EvaluatedImage(**vars(result), seconds=attempt.seconds, peak_mb=attempt.peak_mb)


def load_extractors(
    settings: ExtractorConfig, device: torch.device | str = "cpu"
) -> dict[str, FeatureExtractor]:
    """Load the networks for Fréchet distances, by the field that names them.

    Raises:
        FileNotFoundError: weights are not there.
        ValueError: they are of another network.
    """
    networks: dict[str, FeatureExtractor] = {}
    if settings.inception:
        networks["inception"] = InceptionFeatures.load(
            settings.inception, settings.inception_digest, device
        )
    if settings.dino:
        hush_torchao()
        networks["dino"] = DinoFeatures.load(settings.dino, device)
    return networks


def reason_of(error: BaseException) -> str:
    """Return one line that says why an image has no reconstruction."""
    if is_out_of_memory(error):
        return "out of memory"
    line = root_cause(error).splitlines()[0]
    return (
        f"failed: {line}"
        if isinstance(error, ValueError)
        else (f"failed: {type(error).__name__}: {line}")
    )
