"""How well images are reconstructed: results, means and pictures, in training and after it."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipelines.corpus import Manifest
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow, empty_row
from pipelines.reading.decode import UnreadableImage, decode_rgb, image_size
from pipelines.whole_images import Transform, iterate_rows
from vitok.autoencoder import Autoencoder, Reconstruction
from vitok.images import to_tensor
from vitok.metrics import constant_patches, psnr, ssim
from vitok.packed import PackedTokens, unpack_images
from vitok.patches import fit_to_budget, num_tokens

_SHEET_WIDTH, _GAP = 1400, 12  # pixels
_ERROR_GAIN = 4.0  # error maps show |x - y| this many times brighter

Reconstruct = Callable[[PackedTokens], Reconstruction]


def _shown(heading: str, digits: int, **default: Any) -> Any:
    """Declare a metric with its heading in tables, "" for no column, and its digits there."""
    return dataclasses.field(metadata={"heading": heading, "digits": digits}, **default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """How well an image came back; of many images, the means of that.

    A field more, filled in `measure`, is averaged, logged, written and shown by its name.

    Attributes:
        psnr, ssim: data range 2 for values in [-1, 1].
        baseline_psnr: PSNR of the best image with one colour in every patch.
        lpips: distance by VGG16, where that is loaded.
    """

    psnr: float = _shown("PSNR", 2)
    ssim: float = _shown("SSIM", 4)
    baseline_psnr: float = _shown("", 2)
    lpips: float | None = _shown("LPIPS", 4, default=None)

    def known(self) -> dict[str, float]:
        """Return what was measured, by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def mean(cls, images: Sequence["Metrics"]) -> "Metrics":
        """Return the means over images, one or more, which have the same metrics."""
        # fsum rounds once: the order of the images does not matter.
        return cls(
            **{
                name: math.fsum(getattr(image, name) for image in images) / len(images)
                for name in images[0].known()
            }
        )


METRICS = {field.name: field.metadata for field in dataclasses.fields(Metrics)}


def flat(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, those of its `metrics` among them; None if not known."""
    row = vars(record).copy()
    metrics = row.pop("metrics")
    return row | (vars(metrics) if metrics else dict.fromkeys(METRICS))


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """One evaluated image.

    Attributes:
        key: its key in the corpus.
        height, width: pixels at which it was evaluated.
        num_tokens: patches of it.
        metrics: how well it came back.
    """

    key: str
    height: int
    width: int
    num_tokens: int
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class Pictured:
    """Source and reconstruction of an image, [3, H, W] in [-1, 1]."""

    key: str
    source: Tensor
    reconstruction: Tensor


def evaluation_rows(
    manifest: Manifest,
    *,
    patch_size: int,
    token_budget: int,
    row_tokens: int,
    max_images: int | None = None,
) -> list[PackedRow]:
    """Pack whole images at their own aspect ratio, resized to the budget; in corpus order.

    Args:
        max_images: take the first images only.
    """
    count = min(manifest.num_samples, max_images or manifest.num_samples)
    records = manifest.records(np.arange(count))
    views = Transform(token_budget=token_budget).views(records, patch_size)
    rows = iterate_rows(
        Corpus.of(manifest), records, views, patch_size=patch_size, row_tokens=row_tokens
    )
    return list(rows)


@torch.no_grad()
def evaluate_rows(
    reconstruct: Reconstruct, rows: Iterable[PackedRow], device: torch.device, num_pictures: int
) -> tuple[list[ImageResult], list[Pictured]]:
    """Reconstruct packed rows and judge every image.

    Returns:
        one result for each image in the order of the rows, and the first pictures.
    """
    results: list[ImageResult] = []
    pictures: list[Pictured] = []
    for row in rows:
        packed, _ = row.to_packed(device)
        output = reconstruct(packed).pixels
        patch_size = row.patch_size
        sources = unpack_images(packed, patch_size)
        images = unpack_images(output.with_tokens(output.tokens.float()), patch_size)
        for key, source, image in zip(row.keys, sources, images, strict=True):
            results.append(judge(key, source, image, patch_size))
            if len(pictures) < num_pictures:
                pictures.append(Pictured(key, source.cpu(), image.cpu()))
    return results, pictures


def judge(key: str, source: Tensor, image: Tensor, patch_size: int) -> ImageResult:
    """Compare one image [3, H, W] with its source, both in [-1, 1]."""
    height, width = source.shape[1:]
    return ImageResult(
        key=key,
        height=height,
        width=width,
        num_tokens=num_tokens(height, width, patch_size),
        metrics=measure(source, image, patch_size),
    )


def measure(source: Tensor, image: Tensor, patch_size: int) -> Metrics:
    """Measure a reconstruction [3, H, W] of a source, both in [-1, 1], without a network."""
    return Metrics(
        psnr=psnr(image, source),
        ssim=ssim(image, source),
        baseline_psnr=psnr(constant_patches(source, patch_size), source),
    )


def reconstruct_image(
    model: Autoencoder, file: Path, *, resolution: int | None = None, window: int | None = None
) -> tuple[ImageResult, Pictured, float]:
    """Reconstruct one image file at its own aspect ratio.

    Args:
        resolution: a larger image is shrunk to the tokens of a square of so many pixels a side;
            None keeps every size.
        window: radius in patches of sliding-window attention; full attention if None.

    Returns:
        how well it came back, both pictures, and the seconds of encoding and decoding.

    Raises:
        UnreadableImage: the file is no image.
    """
    patch_size = model.config.patch_size
    data = file.read_bytes()
    try:
        size = image_size(data)
        if resolution is not None:
            budget = num_tokens(resolution, resolution, patch_size)
            size = fit_to_budget(*size, patch_size=patch_size, token_budget=budget)
        pixels = decode_rgb(data, size=size)
    except UnreadableImage as error:
        raise UnreadableImage(f"{file}: {error}") from error
    source = to_tensor(pixels)
    start = time.perf_counter()
    (image,) = model.decode(model.encode(source, window=window), window=window)
    image = image.cpu()  # waits for the device
    seconds = time.perf_counter() - start
    result = judge(file.name, source, image, patch_size)
    return result, Pictured(file.name, source, image), seconds


def evaluate_on_all_ranks(
    reconstruct: Reconstruct, rows: Sequence[PackedRow], device: torch.device, num_pictures: int
) -> tuple[list[ImageResult], list[Pictured]]:
    """Share the rows among the ranks, which a sharded model needs; called by every rank.

    Returns:
        the results of all images, and pictures of this rank's alone.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = list(rows[rank::world_size])
    # Each forward pass is a collective: every rank makes the same number of them.
    mine += [empty_row(rows[0])] * (-(-len(rows) // world_size) - len(mine))
    results, pictures = evaluate_rows(reconstruct, mine, device, num_pictures)
    gathered: list[list[ImageResult]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, results)
    return [result for part in gathered for result in part], pictures


def summarize(results: Sequence[ImageResult]) -> dict[str, float]:
    """Return the means over images that trackers and tables show.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("no held-out image is readable; check the manifest's shards")
    means = Metrics.mean([result.metrics for result in results]).known()
    named = {f"eval_{name}": value for name, value in means.items()}
    return named | {"eval_images": float(len(results))}


def comparison(source: Tensor, reconstruction: Tensor) -> NDArray[np.uint8]:
    """Draw original, reconstruction and error map side by side.

    Args:
        source, reconstruction: [3, H, W] in [-1, 1].

    Returns:
        [H, 3 W + 2 gaps, 3]
    """
    error = (source - reconstruction.clamp(-1, 1)).abs() / 2 * _ERROR_GAIN
    gap = torch.ones(3, source.shape[1], _GAP // 3)
    panels = [(source + 1) / 2, gap, (reconstruction + 1) / 2, gap, error]
    strip = torch.cat(panels, dim=2).clamp(0, 1)
    return (strip * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def contact_sheet(pictures: Sequence[Pictured]) -> NDArray[np.uint8]:
    """Arrange the comparisons of several images on one white sheet [H, W, 3], tallest first."""
    strips = [comparison(picture.source, picture.reconstruction) for picture in pictures]
    return sheet_of(sorted(strips, key=lambda strip: -strip.shape[0]))


def sheet_of(strips: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Arrange pictures [H, W, 3] in the order given, shelf by shelf, on one white sheet."""
    width = max(_SHEET_WIDTH, *(strip.shape[1] + 2 * _GAP for strip in strips))
    places: list[tuple[int, int]] = []
    top, left, shelf_height = _GAP, _GAP, 0
    for strip in strips:
        if left + strip.shape[1] + _GAP > width:
            top, left, shelf_height = top + shelf_height + _GAP, _GAP, 0
        places.append((top, left))
        left += strip.shape[1] + _GAP
        shelf_height = max(shelf_height, strip.shape[0])
    sheet = np.full((top + shelf_height + _GAP, width, 3), 255, dtype=np.uint8)
    for strip, (top, left) in zip(strips, places, strict=True):
        sheet[top : top + strip.shape[0], left : left + strip.shape[1]] = strip
    return sheet
