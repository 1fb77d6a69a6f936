"""What the images of a set are conditioned on, by their numbers: classes or captions, in turn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from pipelines.caching.latent_corpus import LatentCorpus, LatentStatistics
from pipelines.caching.units import CACHE_FILE
from pipelines.generation.sampling import (
    conditions_of_latents,
    embed_texts,
    load_text_encoder,
    require_texts_learned,
)
from vitok.config import describe_difference
from vitok.dit import DiTConfig
from vitok.storage import Folder
from vitok.texts import TextEncoder


@dataclass(frozen=True)
class Prompt:
    """What one image is conditioned on.

    Attributes:
        label: its class; -1 for none.
        text: [K, D], the embeddings of its text; None for no text.
        caption: the text itself, where it is known.
    """

    label: int
    text: torch.Tensor | None = None
    caption: str = ""


class Prompts(Protocol):
    """The prompts of a set.

    Attributes:
        digest: of what they are, beside the model.
    """

    @property
    def digest(self) -> str: ...

    def of(self, numbers: range) -> list[Prompt]:
        """Return the prompts of some images; the same numbers give the same bits."""


def prompts_of(
    model: DiTConfig,
    statistics: LatentStatistics,
    captions: str,
    text_encoder: str,
    device: torch.device,
) -> Prompts:
    """Return what the images of a set are conditioned on.

    Args:
        captions: a file of one caption a line, or a latent cache with texts; empty for classes.
        text_encoder: of the captions of a file; where the training's was if empty.
        device: that embeds them.

    Raises:
        FileNotFoundError: there are no such captions.
        ValueError: the model learned no texts, or nothing but texts; the captions cannot be used.
    """
    if not captions:
        if model.text_channels and not model.num_classes:
            raise ValueError(
                "the model learned texts and no classes; give captions, a file of one a line or a "
                "latent cache with texts"
            )
        return _Classes(model.num_classes)
    require_texts_learned(model, "captions")
    if Folder.of(captions).exists(CACHE_FILE):
        return _TextsOfCache(captions, model, statistics)
    return _LinesOfFile(captions, statistics, text_encoder, device)


@dataclass(frozen=True)
class _Classes:
    num_classes: int
    digest: str = ""

    def of(self, numbers: range) -> list[Prompt]:
        return [Prompt(i % self.num_classes if self.num_classes else -1) for i in numbers]


class _TextsOfCache:
    """The texts that lie in a cache, embedded, each with the class of its image."""

    def __init__(self, location: str, model: DiTConfig, statistics: LatentStatistics) -> None:
        self._corpus = LatentCorpus(location, texts=True)
        self._model = model
        if len(self._corpus) == 0 or self._corpus.manifest.num_texts == 0:
            raise ValueError(f"{location} holds no texts; give captions that are there")
        if differences := describe_difference(statistics.text, self._corpus.identity.text):
            raise ValueError(
                f"the texts of {location} are others than the model learned "
                f"({'; '.join(differences)}); give captions as a file, or another cache"
            )

    @property
    def digest(self) -> str:
        return self._corpus.manifest.checksum

    def of(self, numbers: range) -> list[Prompt]:
        places = np.asarray(numbers) % len(self._corpus)
        found = conditions_of_latents(self._corpus, places, self._model)
        return [Prompt(label, text) for label, text in found]


class _LinesOfFile:
    """The lines of a text file; the encoder is loaded with the first that is needed."""

    def __init__(
        self, location: str, statistics: LatentStatistics, text_encoder: str, device: torch.device
    ) -> None:
        self._statistics, self._text_encoder = statistics, text_encoder
        self._device = device
        self._captions = read_lines(location)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self._captions).encode()).hexdigest()

    @cached_property
    def _encoder(self) -> TextEncoder:
        return load_text_encoder(self._statistics, self._text_encoder, self._device)

    def of(self, numbers: range) -> list[Prompt]:
        captions = [self._captions[i % len(self._captions)] for i in numbers]
        texts = embed_texts(captions, self._statistics, self._encoder)
        return [Prompt(-1, *found) for found in zip(texts, captions, strict=True)]


def read_lines(location: str) -> Sequence[str]:
    """Return the captions of a file, one a line, UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is empty, or it is no UTF-8.
    """
    parent, _, name = Folder.of(location).uri.rpartition("/")
    folder = Folder(parent)
    if not folder.exists(name):
        raise FileNotFoundError(
            f"there are no captions at {folder.uri}/{name}; give a file of one caption a line, or "
            "a latent cache with texts"
        )
    try:
        text = folder.read_bytes(name).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{location} is not UTF-8 at its byte {error.start}") from error
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(
            f"{location}: line {lines.index('') + 1} is empty; write a caption on every line"
        )
    return lines
