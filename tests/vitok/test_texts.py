import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from tests.vitok import text_encoders
from tests.vitok.text_encoders import (
    CHANNELS,
    SPECIAL,
    WORDS,
    clip_config,
    save_text_encoder,
    save_tokenizer,
    scattered,
    t5_config,
)
from vitok import texts as texts_module
from vitok.texts import TextEncoder

CPU = torch.device("cpu")
TEXTS = [
    "a red house near the sea",
    "dog",
    "two dog and two cat of the blue house near the red sea",
    "an unknown animal",
    "the sea",
]


def load(folder: Path) -> TextEncoder:
    return TextEncoder.load(str(folder), option="text_encoder")


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_texts_together_equal_each_alone_in_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_text_encoder(tmp_path / kind, kind)
    # Several batches, one of them of texts of different lengths.
    monkeypatch.setattr(texts_module, "_BATCH_TOKENS", 14)
    found = load(folder)(TEXTS, 7)
    network = {"t5": T5EncoderModel, "clip": CLIPTextModel}[kind].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [len(states) for states in found] == [7, 2, 7, 4, 3]
    for text, states in zip(TEXTS, found, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=7, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = network(input_ids=tokens).last_hidden_state[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert load(folder)([], 7) == []


def test_same_texts_give_the_same_bits_in_either_precision(tmp_path: Path) -> None:
    encoder = load(save_text_encoder(tmp_path / "t5"))
    exact = encoder(TEXTS, 9)
    assert all(torch.equal(*pair) for pair in zip(exact, encoder(TEXTS, 9), strict=True))
    digest = encoder.digest
    rounded = encoder.to(CPU, torch.bfloat16)(TEXTS, 9)
    assert encoder.digest == digest
    assert {states.dtype for states in rounded} == {torch.bfloat16}
    error = torch.cat(rounded).float() - torch.cat(exact)
    assert 0 < error.abs().max() < 0.1 * torch.cat(exact).abs().max()


def test_digest_is_that_of_weights_and_tokenizer(tmp_path: Path) -> None:
    first = load(save_text_encoder(tmp_path / "first"))
    again = load(save_text_encoder(tmp_path / "again"))
    other = load(save_text_encoder(tmp_path / "other", seed=1))
    save_tokenizer(tmp_path / "again", [*WORDS[1:], WORDS[0]])
    assert first.digest == again.digest
    assert len({first.digest, other.digest, load(tmp_path / "again").digest}) == 3


def test_encoder_of_a_larger_network_is_loaded_alone(tmp_path: Path) -> None:
    size = len(SPECIAL + WORDS)
    whole = scattered(T5ForConditionalGeneration(t5_config(size)))
    whole.save_pretrained(tmp_path / "t5")
    text = clip_config(size).to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1} | {
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 16,
    }
    clip = scattered(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)))
    clip.save_pretrained(tmp_path / "clip")
    for name, reference in (("t5", whole.encoder), ("clip", clip.text_model)):
        save_tokenizer(tmp_path / name)
        encoder = load(tmp_path / name)
        assert encoder.channels == CHANNELS
        tokens = torch.tensor([[4, 5, 8, 1]])
        with torch.no_grad():
            expected = reference(input_ids=tokens).last_hidden_state[0]
        (found,) = encoder(["a dog of"], 8)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_missing_or_another_network_is_named(tmp_path: Path, tiny_dino) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text encoder at '.*nowhere'; download a T5"):
        load(tmp_path / "nowhere")
    folder = save_text_encoder(tmp_path / "t5")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json at .*set text_encoder"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no text encoder weights at .*download a T5"):
        load(folder)
    tiny_dino.save_pretrained(tmp_path / "dino")
    with pytest.raises(ValueError, match=r"is of the kind 'dinov3_vit', and no text encoder"):
        load(tmp_path / "dino")
    smaller = save_text_encoder(tmp_path / "smaller")
    config = json.loads((smaller / "config.json").read_text()) | {"num_layers": 3}
    (smaller / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not hold a whole text encoder: .* missing"):
        load(smaller)


def test_texts_longer_than_an_encoder_takes_are_refused(tmp_path: Path) -> None:
    clip = load(save_text_encoder(tmp_path / "clip", "clip"))
    clip.require_length(8)
    with pytest.raises(ValueError, match="text_tokens=9, but the text encoder takes .* 8 tokens"):
        clip.require_length(9)
    load(save_text_encoder(tmp_path / "t5")).require_length(10_000)
    assert clip.channels == text_encoders.CHANNELS
