"""Evaluation of a trained model on held-out images: per-image rows, means, a picture."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from pipelines.corpus import Manifest
from pipelines.decode import UnreadableImage, decode_rgb, image_size
from pipelines.reconstruction import (
    ImageResult,
    Pictured,
    contact_sheet,
    evaluate_rows,
    evaluation_rows,
    judge,
    summarize,
)
from pipelines.train_autoencoder import load_autoencoder
from vitok.autoencoder import Autoencoder
from vitok.config import config
from vitok.images import to_tensor
from vitok.patches import fit_to_budget, num_tokens


@config
class EvaluationConfig:
    """One evaluation.

    Attributes:
        model: training run or folder of weights.
        manifest: folder that `vitok corpus index` wrote: the images.
        out: folder for results.json (means and one row for each image) and reconstructions.png.
        token_budget: larger images are shrunk to at most this many patches, aspect kept.
        row_tokens: tokens of one forward pass.
        max_images: take the first images only; 0 takes all.
        num_pictures: images shown in the picture.
        json: print the means as JSON on the last line.
    """

    model: str
    manifest: str
    out: str = "evaluation"
    token_budget: int = 256
    row_tokens: int = 4096
    max_images: int = 0
    num_pictures: int = 8
    json: bool = False

    def __post_init__(self) -> None:
        if min(self.token_budget, self.row_tokens) < 1:
            raise ValueError("token_budget and row_tokens must be at least 1")


def evaluate_model(settings: EvaluationConfig) -> dict[str, float]:
    """Evaluate a model in this process, write the results, and return the means.

    Raises:
        FileNotFoundError: the model or the manifest is not there.
        ValueError: no image of the manifest is readable.
    """
    model = load_autoencoder(settings.model)
    rows = evaluation_rows(
        Manifest.load(settings.manifest),
        patch_size=model.config.patch_size,
        token_budget=settings.token_budget,
        row_tokens=settings.row_tokens,
        max_images=settings.max_images or None,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, pictures = evaluate_rows(
        model.to(device), tqdm(rows, desc="evaluate", unit="row"), device, settings.num_pictures
    )
    summary = summarize(results)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    skipped = [entry for row in rows for entry in row.skipped]
    document = {
        "settings": asdict(settings),
        "means": summary,
        "images": [asdict(result) for result in results],
        "skipped": skipped,
    }
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    if pictures:
        Image.fromarray(contact_sheet(pictures)).save(out / "reconstructions.png")
    return summary


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
