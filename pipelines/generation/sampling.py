"""Images from a trained flow model: requests, rows of them, latents, pixels."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.caching.latent_corpus import LatentCorpus, LatentStatistics
from pipelines.packing import pack_best_fit
from pipelines.reconstruction import sheet_of
from vitok.autoencoder import Autoencoder
from vitok.checkpoint import load_weights
from vitok.dit import Condition, DiT, DiTConfig
from vitok.flow import SamplerConfig, TimeConfig, sample_latents
from vitok.images import Latent
from vitok.packed import layout_of
from vitok.patches import grid_size, num_tokens
from vitok.storage import Folder
from vitok.texts import TextEncoder


@dataclass(frozen=True)
class Request:
    """One image that is to be sampled.

    Attributes:
        seed: of its noise.
        label: its class; -1 for none.
        size: pixels (height, width).
        text: [K, D], the embeddings of its text; None for no text.
        caption: the text itself, where it is known.
    """

    seed: int
    label: int
    size: tuple[int, int]
    text: torch.Tensor | None = None
    caption: str = ""


def load_dit(checkpoint: Folder, config: DiTConfig) -> DiT:
    """Load the weights of a training checkpoint, averaged where the run kept an average.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    with torch.device("meta"):
        model = DiT(config)
    with tempfile.TemporaryDirectory() as scratch:
        local = checkpoint.download(Path(scratch))
        load_weights(model.to_empty(device="cpu"), local, average=True)
    return model.eval()


def sample_requests(
    model: Any,
    requests: Sequence[Request],
    statistics: LatentStatistics,
    device: torch.device,
    *,
    sampler: SamplerConfig,
    times: TimeConfig,
    row_tokens: int,
) -> list[Latent]:
    """Sample latents as the decoder takes them, on the host, in the order of the requests.

    The requests are packed among themselves alone: the same ones give the same latents, bit for
    bit, on the same kind of device.

    Args:
        model: a DiT, whole or sharded.
        row_tokens: tokens of a row; as many as the largest image has, if that is more.
    """
    patch_size = statistics.patch_size
    lengths = [num_tokens(*request.size, patch_size) for request in requests]
    row_tokens = max(row_tokens, *lengths)
    latents: dict[int, Latent] = {}
    for members in pack_best_fit(lengths, row_tokens=row_tokens, max_images=len(requests)):
        chosen = [requests[i] for i in members]
        tokens = _sample_row(model, chosen, patch_size, device, sampler, times)
        pieces = statistics.denormalize(tokens).cpu().split([lengths[i] for i in members])
        for place, request, piece in zip(members, chosen, pieces, strict=True):
            latents[place] = Latent(piece, request.size, patch_size)
    return [latents[place] for place in range(len(requests))]


def _sample_row(
    model: Any,
    requests: Sequence[Request],
    patch_size: int,
    device: torch.device,
    sampler: SamplerConfig,
    times: TimeConfig,
) -> torch.Tensor:
    lengths = [num_tokens(*request.size, patch_size) for request in requests]
    layout = layout_of(
        [request.size for request in requests],
        patch_size=patch_size,
        row_tokens=sum(lengths),
        max_images=len(requests),
        max_seqlen=max(lengths),
    ).to(device)
    condition = condition_of(requests, model.config).to(device)
    seeds = [request.seed for request in requests]
    return sample_latents(model, layout, condition, seeds, sampler=sampler, times=times).tokens


def condition_of(requests: Sequence[Request], config: DiTConfig) -> Condition:
    """Return what a model is given of some requests, in their order."""
    labels = torch.tensor([request.label for request in requests])
    if not config.text_channels:
        return Condition(labels=labels)
    text = torch.zeros(len(requests), config.text_tokens, config.text_channels)
    text_tokens = torch.zeros(len(requests), dtype=torch.int64)
    for slot, request in enumerate(requests):
        if request.text is not None:
            text_tokens[slot] = len(request.text)
            text[slot, : len(request.text)] = request.text
    return Condition(labels=labels, text=text, text_tokens=text_tokens)


def conditions_of_latents(
    corpus: LatentCorpus, sample_ids: NDArray[np.int64], model: DiTConfig
) -> list[tuple[int, torch.Tensor | None]]:
    """Return the class of some latents, -1 for a model without classes, and their texts."""
    records = corpus.records(sample_ids)
    labels = records.label if model.num_classes else np.full(len(records), -1)
    return list(zip(labels.tolist(), corpus.read_texts(records), strict=True))


def require_texts_learned(model: DiTConfig, option: str) -> None:
    """Check that a model takes texts.

    Args:
        option: what the user set, for the message.

    Raises:
        ValueError: it knows nothing but classes.
    """
    if not model.text_channels:
        raise ValueError(f"the model learned no texts; leave {option} out")


def load_text_encoder(
    statistics: LatentStatistics, text_encoder: str, device: torch.device
) -> TextEncoder:
    """Load the encoder of the texts that a model learned, in float32.

    Args:
        text_encoder: folder or Hugging Face repository; where the cache's was if empty.

    Raises:
        FileNotFoundError: the text encoder is not there.
        ValueError: it is another than the cache's.
    """
    assert statistics.text is not None, "the cache had no texts"
    location = text_encoder or statistics.text_encoder
    encoder = TextEncoder.load(location, option="text_encoder")
    if encoder.digest != statistics.text.encoder_digest:
        raise ValueError(
            f"{location} is the text encoder {encoder.digest[:12]}, and the model learned texts of "
            f"{statistics.text.encoder_digest[:12]}; give that one as text_encoder"
        )
    return encoder.to(device, torch.float32)


def embed_texts(
    texts: Sequence[str], statistics: LatentStatistics, encoder: TextEncoder
) -> list[torch.Tensor]:
    """Embed texts [K, D] as those of the cache were that a model learned, in float32."""
    assert statistics.text is not None, "the cache had no texts"
    return encoder(texts, statistics.text.max_tokens)


def whole_patches(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return a size in pixels, enlarged to whole patches: a sample has no padding to cut off."""
    rows, columns = grid_size(*size, patch_size)
    return rows * patch_size, columns * patch_size


def spread_classes(num_images: int, num_classes: int) -> list[int]:
    """Return classes for some images, evenly from all of them; -1 where there are none."""
    if not num_classes:
        return [-1] * num_images
    return [index * num_classes // num_images for index in range(num_images)]


def draw_sheet(decoder: Autoencoder, latents: Sequence[Latent]) -> NDArray[np.uint8]:
    """Decode samples and arrange them on one sheet [H, W, 3]."""
    return sheet_of([to_uint8(image) for image in decoder.decode(latents)])


def to_uint8(image: torch.Tensor) -> NDArray[np.uint8]:
    """Return an image [3, H, W] in [-1, 1] as bytes [H, W, 3]."""
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()
