"""Small text encoders that nobody trained, in folders as transformers writes them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "dog", "cat", "house", "of", "the", "red", "blue", "near", "two", "and", "sea"]
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
CHANNELS = 12


def save_text_encoder(folder: Path, kind: str = "t5", seed: int = 0) -> Path:
    """Write a text encoder, t5 or clip, with a tokenizer that knows WORDS."""
    save_tokenizer(folder)
    network(kind, seed).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """Write a tokenizer of whole words that ends every text with </s>."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def network(kind: str, seed: int) -> PreTrainedModel:
    """Build a network of random weights."""
    torch.manual_seed(seed)
    size = len(SPECIAL + WORDS)
    if kind == "t5":
        return scattered(T5EncoderModel(t5_config(size)))
    return scattered(CLIPTextModel(clip_config(size)))


def t5_config(vocabulary: int) -> T5Config:
    """Return the shape of a small T5."""
    return T5Config(
        vocab_size=vocabulary, d_model=CHANNELS, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )


def clip_config(vocabulary: int) -> CLIPTextConfig:
    """Return the shape of a small text model of CLIP, which takes 8 tokens."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CHANNELS,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )


def scattered(model: PreTrainedModel) -> PreTrainedModel:
    """Move the weights away from values that would hide their absence."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
