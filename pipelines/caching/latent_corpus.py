"""A latent cache as what a training plans and reads: rows of latents through the same transport."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.caching.units import DTYPES, TextIdentity
from pipelines.corpus import SampleRecords
from pipelines.latents import LatentCache, LatentRow
from pipelines.packed_rows import PackedRow
from pipelines.reading.decode import UnreadableImage
from pipelines.views import SampleView, Texts
from vitok.config import UNLESS_EMPTY, config
from vitok.packed import PackedTokens

# NumPy knows no bfloat16: rows carry the bits of a latent, and the device reads them as they are.
_BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
_FLOOR = 1e-6  # as LatentCache divides by


class LatentCorpus(LatentCache):
    """A latent cache whose latents are used as they were encoded, one after the other in rows.

    Args:
        location: folder or `s3://` prefix.
        texts: rows carry the texts of their images too, where the cache has some.
    """

    resizes: ClassVar[bool] = False

    def __init__(self, location: str, *, texts: bool = False) -> None:
        super().__init__(location, texts=False)  # read apart from the latents: see texts()
        self._texts_in_rows = texts

    @property
    def text_bytes(self) -> int:
        """Bytes that a row holds for the text of an image, padded to the longest there may be."""
        text = self.identity.text
        if text is None or not self._texts_in_rows:
            return 0
        return text.max_tokens * self.identity.bytes_per_text_token

    def texts(self, records: SampleRecords) -> Texts | None:
        """Return the bits of the texts of records, in their order, for the slots of rows."""
        text = self.identity.text
        if text is None or not self._texts_in_rows:
            return None
        bits = np.dtype(_BITS[self.identity.dtype])
        values = np.zeros((len(records), text.max_tokens, text.channels), bits)
        num_tokens = np.zeros(len(records), np.int64)
        for place, found in enumerate(self.read_texts(records)):
            if found is not None:
                num_tokens[place] = len(found)
                values[place, : len(found)] = found.view(_torch_bits(found.dtype)).numpy()
        return Texts(values, num_tokens)

    def show(
        self, sample: LatentRow, views: Sequence[SampleView]
    ) -> dict[SampleView, NDArray[Any] | UnreadableImage]:
        """Return the bits of a latent [N, C], which every view sees as a whole."""
        height, width = sample.image_size
        for view in views:
            assert view.size == (height, width), f"{sample.key}: {view.size} of {height, width}"
        bits = sample.latent.contiguous().view(_torch_bits(sample.latent.dtype)).numpy()
        return dict.fromkeys(views, bits)

    def token_format(self, patch_size: int) -> tuple[int, np.dtype[Any]]:
        """Return the channels of a latent, and the type that carries its bits."""
        identity = self.identity
        assert patch_size == identity.patch_size, f"{patch_size} of {identity.patch_size}"
        return identity.channels, np.dtype(_BITS[identity.dtype])

    def write(self, shown: NDArray[Any], tokens: NDArray[Any], patch_size: int) -> None:
        """Put the bits of a latent into their place in a row."""
        tokens[...] = shown

    @cached_property
    def statistics(self) -> "LatentStatistics":
        """What samples of a model that learned this cache need of it."""
        identity, manifest = self.identity, self.manifest
        return LatentStatistics(
            encoder_digest=identity.encoder_digest,
            patch_size=identity.patch_size,
            tokens_per_latent=manifest.num_tokens / max(1, manifest.num_latents),
            mean=manifest.mean[: identity.channels],
            std=tuple(max(std, _FLOOR) for std in manifest.std[: identity.channels]),
            text=identity.text,
            text_encoder=manifest.text_encoder,
        )

    @property
    def max_tokens(self) -> int:
        """Tokens that no latent has more of."""
        identity = self.identity
        return max(transform.max_tokens(identity.patch_size) for transform in identity.transforms)

    def to_packed(self, row: PackedRow, device: torch.device) -> PackedTokens:
        """Return a row as normalised latents [T, C] float32 on the device; 0 in padding."""
        layout = row.layout(device)
        bits = torch.as_tensor(row.tokens).to(device, non_blocking=True)
        latents = self.normalize(bits.view(DTYPES[self.identity.dtype]))
        return layout.with_tokens(latents * (layout.segment_ids >= 0)[:, None])

    def to_embeddings(self, texts: Texts, device: torch.device) -> Tensor:
        """Return the texts of a row as embeddings [S, K, D] on the device; 0 in padding."""
        bits = torch.as_tensor(texts.values).to(device, non_blocking=True)
        return bits.view(DTYPES[self.identity.dtype])


@config
class LatentStatistics:
    """What brings normalised latents back to those of a cache, where the cache is not at hand.

    Attributes:
        encoder_digest: of the encoder that made the latents.
        patch_size: pixels along each side of a patch.
        tokens_per_latent: in the mean.
        mean, std: of every channel over the whole cache.
        text: of the texts of the cache, where it has some.
        text_encoder: where the encoder of these was.
    """

    encoder_digest: str
    patch_size: int
    tokens_per_latent: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: Annotated[TextIdentity | None, UNLESS_EMPTY] = None
    text_encoder: Annotated[str, UNLESS_EMPTY] = ""

    def denormalize(self, latents: Tensor) -> Tensor:
        """Return latents [..., C] as the encoder gave them, of such with mean 0 and variance 1."""
        mean, std = (torch.tensor(v, device=latents.device) for v in (self.mean, self.std))
        return latents.float() * std + mean


def _torch_bits(dtype: torch.dtype) -> torch.dtype:
    return torch.uint32 if dtype == torch.float32 else torch.uint16
