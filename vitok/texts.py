"""Text encoders: from captions to the embeddings that generators are conditioned on."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vitok.networks import hush_torchao, is_repository, load_network
from vitok.pretrained import weights_digest

# Type of a model in its config.json -> class of transformers that holds its text encoder.
_KINDS = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
_EXAMPLE = "google/flan-t5-large"
_TOKENIZER_FILE = "tokenizer.json"
# Texts of about one length share a forward pass of so many tokens.
_BATCH_TOKENS = 8192


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Attributes:
        channels: of an embedding.
        max_tokens: that a text may have; None for any number.
        digest: sha256 (hex) of weights and tokenizer: all that makes the embeddings.

    Args:
        network: of transformers; gives `last_hidden_state` for `input_ids` and `attention_mask`.
        tokenizer: its own.
    """

    def __init__(self, network: nn.Module, tokenizer: Tokenizer) -> None:
        config: Any = network.config
        self.channels: int = config.hidden_size
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.digest = hashlib.sha256(
            f"{weights_digest(network)} {tokenizer.to_str()}".encode()
        ).hexdigest()

    @classmethod
    def load(cls, weights: str, option: str) -> Self:
        """Load a T5 or CLIP text encoder from a folder or a repository already on this machine.

        Args:
            option: what the user sets, for the messages.

        Raises:
            FileNotFoundError: the weights, or the tokenizer's files, are not there.
            ValueError: it is another kind of network, or not whole.
        """
        hush_torchao()
        import transformers
        from transformers.utils import cached_file

        remedy = (
            f"download a T5 or CLIP text encoder with its {_TOKENIZER_FILE}, as in "
            f"`hf download {_EXAMPLE} --local-dir FOLDER`, and set {option} to FOLDER"
        )
        offline = is_repository(weights)
        try:
            config = transformers.AutoConfig.from_pretrained(weights, local_files_only=offline)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no text encoder at {weights!r}; {remedy}") from error
        if config.model_type not in _KINDS:
            raise ValueError(
                f"{weights} is of the kind {config.model_type!r}, and no text encoder of the kinds "
                f"{', '.join(_KINDS)}; {remedy}"
            )
        kind = _KINDS[config.model_type]
        network = load_network(kind, weights, what="text encoder", remedy=remedy, is_part=True)
        # Not AutoTokenizer: where it finds no vocabulary, it makes an empty one without a word.
        try:
            file = cached_file(weights, _TOKENIZER_FILE, local_files_only=offline)
        except OSError as error:
            raise FileNotFoundError(f"no {_TOKENIZER_FILE} at {weights!r}; {remedy}") from error
        return cls(network, Tokenizer.from_file(str(file)))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move the network; the digest stays that of what was loaded."""
        self._network.to(device, dtype)
        return self

    def require_length(self, max_tokens: int) -> None:
        """Check that texts may have so many tokens.

        Raises:
            ValueError: they may not.
        """
        if self.max_tokens is not None and max_tokens > self.max_tokens:
            raise ValueError(
                f"text_tokens={max_tokens}, but the text encoder takes texts of at most "
                f"{self.max_tokens} tokens; set it to that"
            )

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[Tensor]:
        """Return the last hidden states [K, D] of the tokens of each text, on the host.

        The tokens are those of the tokenizer with its special ones. The same texts in the same
        order give the same bits on the same kind of device.

        Args:
            max_tokens: longer texts are cut to so many.
        """
        self._tokenizer.enable_truncation(max_tokens)
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        states: dict[int, Tensor] = {}
        for members in _batches([len(one) for one in tokens]):
            found = self._encode([tokens[i] for i in members])
            states |= {i: found[row, : len(tokens[i])].clone() for row, i in enumerate(members)}
        return [states[i] for i in range(len(texts))]

    def _encode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return the last hidden states [B, longest, D] of some texts, on the host."""
        longest = max(map(len, tokens))
        device = next(self._network.parameters()).device
        ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        states = self._network(input_ids=ids.to(device), attention_mask=mask.to(device))
        return states.last_hidden_state.cpu()


def text_libraries() -> str:
    """Return the versions of what makes tokens and computes their embeddings."""
    return ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers"))


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Cut texts into batches of about one length, as places among them."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(place)
    return batches
