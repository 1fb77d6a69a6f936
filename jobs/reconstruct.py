"""`vitok reconstruct`: what a model makes of images of one's own."""

import glob
import itertools
import json as json_format
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from jobs import positional
from jobs.command_lines import UsageError
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.reading.decode import UnreadableImage
from pipelines.reading.tar_index import IMAGE_EXTENSIONS
from pipelines.reconstruction import comparison, flat, reconstruct_image


def reconstruct(
    images: positional.Images,
    /,
    *,
    model: str,
    resolution: int | Literal["native"] = 512,
    window: int | Literal["full"] = "full",
    dtype: Literal["bfloat16", "float32"] = "float32",
    out: str = "reconstructions",
    json: bool = False,
) -> None:
    """Reconstruct images and save original, reconstruction and error map side by side.

    Args:
        images: files, folders or globs.
        model: a released model (350M-f16x64), a Hugging Face repository, a training run, or a
            folder of weights.
        resolution: a larger image is shrunk, aspect kept, to the tokens of a square of so many
            pixels a side; native keeps every size.
        window: radius in patches of 2D sliding-window attention, such as 8; it makes the time
            of large images linear.
        dtype: precision of the weights.
        out: folder for the PNG files.
        json: print the results as JSON on the last line.
    """
    for name, limit, remedy in (
        ("resolution", resolution, "or native"),
        ("window", window, "or full"),
    ):
        if isinstance(limit, int) and limit < 1:
            raise UsageError(f"{name}={limit} must be at least 1, {remedy}")
    files = _image_files(images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = load_autoencoder(model).to(device, getattr(torch, dtype))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[Path, dict[str, Any]] = {}
    unreadable: list[str] = []
    for file in files:
        try:
            result, picture, seconds = reconstruct_image(
                autoencoder,
                file,
                resolution=None if resolution == "native" else resolution,
                window=None if window == "full" else window,
            )
        except (UnreadableImage, OSError) as error:
            unreadable.append(str(error))
            continue
        target = _target(folder, file, results)
        Image.fromarray(comparison(picture.source, picture.reconstruction)).save(target)
        results[target] = {
            "image": str(file),
            "picture": str(target),
            **flat(result),
            "seconds": seconds,
        }
        print(
            f"{target}: {result.width} x {result.height}, {result.num_tokens} tokens, "
            f"PSNR {result.metrics.psnr:.2f} dB, SSIM {result.metrics.ssim:.4f}, {seconds:.2f} s"
        )
    if json:
        print(json_format.dumps(list(results.values())))
    if unreadable:
        listed = "; ".join(unreadable[:10]) + (" ..." if len(unreadable) > 10 else "")
        raise ValueError(
            listed
            if len(files) == 1
            else f"{len(unreadable)} of {len(files)} images are unreadable: {listed}"
        )


def _target(folder: Path, image: Path, taken: Collection[Path]) -> Path:
    """Return where the picture of an image goes.

    Files of one name in several folders, or of two formats, have a picture each.
    """
    numbered = (f"{image.stem}-{number}" for number in itertools.count(2))
    names = itertools.chain([image.stem], numbered)
    return next(path for name in names if (path := folder / f"{name}.png") not in taken)


def _image_files(patterns: Sequence[str]) -> list[Path]:
    if not patterns:
        raise UsageError("there is nothing to reconstruct; give image files, folders or globs")
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(
                child
                for child in path.iterdir()
                if child.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
            )
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern)) if Path(name).is_file()]
        if not found:
            raise FileNotFoundError(f"{pattern} names no image; give image files, folders or globs")
        files += found
    return files
