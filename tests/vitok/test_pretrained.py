import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitok.autoencoder import Autoencoder
from vitok.packed import pack_images
from vitok.pretrained import encoder_digest, from_pretrained, save_pretrained


@pytest.fixture
def model(make_autoencoder) -> Autoencoder:
    return make_autoencoder()


@pytest.fixture
def folder(model: Autoencoder, tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "export", model.config, dict(model.named_parameters()))
    return tmp_path / "export"


def test_saved_weights_come_back_bit_for_bit(model: Autoencoder, folder: Path) -> None:
    loaded = from_pretrained(folder)
    assert loaded.config == model.config
    expected = dict(model.named_parameters())
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert not parameter.requires_grad
    assert not loaded.training
    packed = pack_images([torch.rand(3, 17, 9)], patch_size=8)
    assert torch.equal(loaded(packed).tokens, model(packed).tokens)


def test_encoder_and_decoder_lie_in_the_two_files_of_a_release(folder: Path) -> None:
    encoder, decoder = (
        load_file(folder / f"{part}.safetensors") for part in ("encoder", "decoder")
    )
    assert {name.split(".")[0] for name in encoder} == {"patch_embed", "encoder_blocks", "to_code"}
    assert {name.split(".")[0] for name in decoder} == {
        "decoder_embed",
        "decoder_blocks",
        "to_pixels",
    }
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "decoder.safetensors",
        "encoder.safetensors",
    ]


def test_weights_load_in_another_precision(model: Autoencoder, folder: Path) -> None:
    loaded = from_pretrained(str(folder), dtype=torch.bfloat16)
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16()), name


@pytest.mark.parametrize("file", ["config.json", "encoder.safetensors", "decoder.safetensors"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no {file}; give the folder of"):
        from_pretrained(folder)


def test_a_missing_folder_is_named(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no config.json"):
        from_pretrained(folder)


def test_missing_surplus_and_misshapen_weights_are_each_named(folder: Path) -> None:
    weights = load_file(folder / "encoder.safetensors")
    del weights["encoder_blocks.0.attn.norm_q.weight"]
    weights["encoder_blocks.0.attn.norm_x.weight"] = torch.zeros(3)
    weights["to_code.bias"] = torch.zeros(7)
    save_file(weights, folder / "encoder.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of its config") as error:
        from_pretrained(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "encoder_blocks.0.attn.norm_q.weight missing" in message
    assert "encoder_blocks.0.attn.norm_x.weight not expected" in message
    assert "to_code.bias has shape (7,) where the config says (6,)" in message


def test_a_long_list_of_complaints_is_cut(folder: Path) -> None:
    weights = load_file(folder / "decoder.safetensors")
    save_file({"to_pixels.bias": weights["to_pixels.bias"]}, folder / "decoder.safetensors")
    # Four tensors of the ends and eight of each block, less the one that is there.
    surplus = 4 + 2 * 8 - 1 - 10
    with pytest.raises(ValueError, match=rf"missing; .* and {surplus} more$"):
        from_pretrained(folder)


def test_encoder_digest_names_the_encoder_and_nothing_else(make_autoencoder, folder: Path) -> None:
    model = make_autoencoder()
    digest = encoder_digest(model)
    assert len(digest) == 64
    assert encoder_digest(from_pretrained(folder)) == digest
    assert encoder_digest(make_autoencoder(encoder_heads=1)) != digest

    num_encoder = 0
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.tensor(9.0))
        in_encoder = name.startswith(("patch_embed", "encoder_blocks", "to_code"))
        assert (encoder_digest(model) != digest) == in_encoder, name
        flat[-1] = kept
        num_encoder += in_encoder
    assert num_encoder == 12
    assert encoder_digest(model) == digest
