import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.vitok.weight_folders import forget_config
from vitok.autoencoder import Autoencoder, part_of
from vitok.packed import pack_images
from vitok.pretrained import encoder_digest, load_pretrained, save_pretrained
from vitok.variants import AutoencoderConfig

LINEAR = {"encoder_width": 0, "encoder_depth": 0, "encoder_heads": 0}
KINDS = {
    "transformer": {},
    "linear": LINEAR,
    "kl": {"latent": "kl"},
    "linear-kl": {**LINEAR, "latent": "kl"},
    "no-blocks": {"encoder_depth": 0, "encoder_heads": 1, "decoder_depth": 0, "decoder_heads": 1},
}


def parameters(model: Autoencoder) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def assert_same_weights(loaded: Autoencoder, expected: dict[str, Tensor]) -> None:
    found = parameters(loaded)
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name
        assert parameter.device.type == "cpu" and parameter.requires_grad
    assert not loaded.training


@pytest.fixture
def model(make_autoencoder: Callable[..., Autoencoder]) -> Autoencoder:
    return make_autoencoder()


@pytest.fixture
def folder(model: Autoencoder, tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "export", model.config, parameters(model))
    return tmp_path / "export"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_come_back_bit_for_bit(
    make_autoencoder: Callable[..., Autoencoder],
    tmp_path: Path,
    kind: str,
    with_config: bool,
    dtype: torch.dtype,
) -> None:
    model = make_autoencoder(**KINDS[kind]).to(dtype)
    save_pretrained(tmp_path, model.config, parameters(model))
    if not with_config:
        forget_config(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=dtype)
    assert loaded.config == model.config
    assert_same_weights(loaded, parameters(model))
    packed = pack_images([torch.rand(3, 17, 9)], patch_size=8)
    output, expected = loaded(packed), model(packed)
    assert torch.equal(output.pixels.tokens, expected.pixels.tokens)
    assert torch.equal(output.latents.tokens, expected.latents.tokens)


def test_config_file_tells_what_shapes_cannot(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    model = make_autoencoder(latent="tanh", latent_noise=0.1)
    save_pretrained(tmp_path, model.config, parameters(model))
    assert load_pretrained(tmp_path).config == model.config
    (tmp_path / "config.json").unlink()
    assert load_pretrained(tmp_path).config == model.config, "it is noted in the files too"
    (tmp_path / "decoder.safetensors").unlink()
    assert load_pretrained(tmp_path, part="encoder").config == model.config
    save_pretrained(tmp_path, model.config, parameters(model))
    forget_config(tmp_path)
    assert load_pretrained(tmp_path).config == replace(
        model.config, latent="layernorm", latent_noise=0.01
    )


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


def test_parameter_names_are_those_of_the_released_weights() -> None:
    with torch.device("meta"):
        names = Autoencoder(AutoencoderConfig.from_name("350M-f16x64")).state_dict().keys()
    ends = ("patch_embed", "to_code", "decoder_embed", "to_pixels")
    expected = {f"{end}.{kind}" for end in ends for kind in ("weight", "bias")}
    for blocks, depth in (("encoder_blocks", 4), ("decoder_blocks", 24)):
        for i in range(depth):
            expected |= {
                f"{blocks}.{i}.norm1.weight",
                f"{blocks}.{i}.attn.qkv_proj.weight",
                f"{blocks}.{i}.attn.norm_q.weight",
                f"{blocks}.{i}.attn.norm_k.weight",
                f"{blocks}.{i}.attn.out_proj.weight",
                f"{blocks}.{i}.ffn.fc1.weight",
                f"{blocks}.{i}.ffn.fc2.weight",
                f"{blocks}.{i}.layer_scale.gamma",
            }
    assert names == expected
    assert len(names) == 8 + 8 * 28


def test_both_forms_of_a_name_mean_the_same_weights() -> None:
    shapes = []
    for name in ("Ld4-L/16x64", "Ld4-L/1x16x64", "350M-f16x64", "ViTok-v2-350M-f16x64"):
        with torch.device("meta"):
            model = Autoencoder(AutoencoderConfig.from_name(name))
        shapes.append({key: x.shape for key, x in model.state_dict().items()})
    assert shapes[0]["encoder_blocks.3.ffn.fc1.weight"] == (2 * 2736, 1024)
    assert shapes[1:] == shapes[:1] * 3


def test_models_of_either_name_load_each_others_files(tmp_path: Path) -> None:
    for name in ("Bd1-Bd1/8x4", "Bd1-Bd1/1x8x4"):
        config = AutoencoderConfig.from_name(name)
        model = Autoencoder(config)
        save_pretrained(tmp_path / config.latent, config, model.state_dict())
        other = AutoencoderConfig.from_name("Bd1-Bd1/1x8x4" if "1x" not in name else "Bd1-Bd1/8x4")
        loaded = load_pretrained(tmp_path / config.latent)
        assert loaded.config == other
        Autoencoder(other).load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_load_into_the_one_asked_for(
    model: Autoencoder, tmp_path: Path, stored: torch.dtype
) -> None:
    weights = {name: x.detach().to(stored) for name, x in parameters(model).items()}
    save_pretrained(tmp_path, model.config, weights)
    assert load_file(tmp_path / "encoder.safetensors")["to_code.bias"].dtype == stored
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_pretrained(str(tmp_path), dtype=dtype)
        assert_same_weights(loaded, {name: x.to(dtype) for name, x in weights.items()})


def test_loaded_weights_do_not_change_with_the_files(model: Autoencoder, folder: Path) -> None:
    loaded = load_pretrained(folder)
    for part in ("encoder", "decoder"):
        path = folder / f"{part}.safetensors"
        with path.open("r+b") as file:
            file.write(b"\0" * path.stat().st_size)
            file.truncate(8)
    assert_same_weights(loaded, parameters(model))


def cut_after_header(path: Path) -> None:
    """Leave nothing of a safetensors file but names and shapes."""
    data = path.read_bytes()
    path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_part_needs_no_more_of_the_other_than_its_header(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path, kind: str, part: str
) -> None:
    model = make_autoencoder(**KINDS[kind])
    save_pretrained(tmp_path, model.config, parameters(model))
    forget_config(tmp_path)
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    cut_after_header(tmp_path / f"{other}.safetensors")
    loaded = load_pretrained(tmp_path, part=part)
    assert loaded.config == model.config
    expected = {name: x for name, x in parameters(model).items() if part_of(name) == part}
    assert_same_weights(loaded, expected)
    with pytest.raises(ValueError, match=rf"{other}.safetensors is damaged"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_part_alone_is_enough_with_its_config(
    model: Autoencoder, tmp_path: Path, part: str
) -> None:
    alone = {name: x for name, x in parameters(model).items() if part_of(name) == part}
    save_pretrained(tmp_path, model.config, alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        f"{part}.safetensors",
    ]
    loaded = load_pretrained(tmp_path, part=part)
    assert loaded.config == model.config
    assert_same_weights(loaded, alone)
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    with pytest.raises(FileNotFoundError, match=f"holds no {other}.safetensors"):
        load_pretrained(tmp_path)


def test_one_part_alone_without_config_stands_in_for_the_other(
    make_autoencoder: Callable[..., Autoencoder], folder: Path, tmp_path: Path
) -> None:
    forget_config(folder)
    (folder / "decoder.safetensors").rename(tmp_path / "decoder.safetensors")
    encoder = load_pretrained(folder, part="encoder").config
    assert (encoder.decoder_width, encoder.decoder_depth, encoder.decoder_heads) == (16, 0, 2)
    decoder = load_pretrained(tmp_path, part="decoder").config
    assert (decoder.encoder_width, decoder.encoder_depth, decoder.encoder_heads) == (24, 0, 3)
    for config in (encoder, decoder):
        assert (config.patch_size, config.latent_channels, config.latent) == (8, 6, "layernorm")
    linear = make_autoencoder(**LINEAR)
    save_pretrained(folder, linear.config, parameters(linear))
    forget_config(folder)
    (folder / "decoder.safetensors").unlink()
    config = load_pretrained(folder, part="encoder").config
    assert config.encoder_width == 0 and config.decoder_depth == 0


@pytest.mark.parametrize(
    ("part", "file"),
    [
        (None, "encoder.safetensors"),
        (None, "decoder.safetensors"),
        ("encoder", "encoder.safetensors"),
        ("decoder", "decoder.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder: Path, part: str | None, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no {file}; give the folder of"):
        load_pretrained(folder, part=part)


def test_a_file_instead_of_its_folder_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"is a file; give its folder, {folder}, which"):
        load_pretrained(folder / "encoder.safetensors")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for location in (nowhere, str(nowhere), f"file://{nowhere}"):
        with pytest.raises(FileNotFoundError, match=rf"{nowhere} holds no encoder.safetensors"):
            load_pretrained(location)


@pytest.mark.parametrize("with_config", [True, False])
def test_missing_surplus_and_misshapen_weights_are_each_named(
    folder: Path, with_config: bool
) -> None:
    if not with_config:
        forget_config(folder)
    weights = load_file(folder / "encoder.safetensors")
    del weights["encoder_blocks.0.attn.norm_k.weight"]
    weights["encoder_blocks.0.attn.norm_x.weight"] = torch.zeros(3)
    weights["to_code.bias"] = torch.zeros(7)
    weights["to_pixels.bias"] = torch.zeros(192)  # of the other file
    save_file(weights, folder / "encoder.safetensors")
    for part in (None, "encoder"):
        with pytest.raises(ValueError, match="does not hold the weights of its config") as error:
            load_pretrained(folder, part=part)
        message = str(error.value)
        assert str(folder) in message
        assert "encoder_blocks.0.attn.norm_k.weight missing" in message
        assert "encoder_blocks.0.attn.norm_x.weight not expected" in message
        assert "to_code.bias has shape (7,) where the config says (6,)" in message
        assert "to_pixels.bias not expected" in message
    load_pretrained(folder, part="decoder")


def test_a_long_list_of_complaints_is_cut(folder: Path) -> None:
    weights = load_file(folder / "decoder.safetensors")
    save_file({"to_pixels.bias": weights["to_pixels.bias"]}, folder / "decoder.safetensors")
    # Four tensors of the ends and eight of each block, less the one that is there.
    surplus = 4 + 2 * 8 - 1 - 10
    with pytest.raises(ValueError, match=rf"missing; .* and {surplus} more$"):
        load_pretrained(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_weights_of_a_wrapped_model_are_refused(folder: Path, prefix: str) -> None:
    for part in ("encoder", "decoder"):
        path = folder / f"{part}.safetensors"
        save_file({f"{prefix}{name}": x for name, x in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=rf"{prefix}encoder_blocks.* not expected; .* more$"):
        load_pretrained(folder)
    forget_config(folder)
    with pytest.raises(ValueError, match=rf"neither to_code.weight .* \({prefix}dec"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("patch_embed.weight", None, "patch_embed.weight missing"),
        ("patch_embed.weight", (16, 100), r"a patch has 100 values, which is no 3 P\^2"),
        ("to_code.weight", (6,), r"to_code.weight has shape \(6,\), which is no matrix"),
        ("encoder_blocks.0.attn.norm_q.weight", None, "norm_q.weight missing; its length"),
        ("encoder_blocks.0.attn.norm_q.weight", (5,), r"norm_q.weight has shape \(5,\); its"),
        ("encoder_blocks.0.attn.norm_q.weight", (2,), "must leave a head dimension that is"),
    ],
)
def test_shapes_that_no_autoencoder_has_are_refused(
    folder: Path, name: str, shape: tuple[int, ...] | None, sentence: str
) -> None:
    forget_config(folder)
    weights = load_file(folder / "encoder.safetensors")
    del weights[name]
    if shape is not None:
        weights[name] = torch.zeros(shape)
    save_file(weights, folder / "encoder.safetensors")
    with pytest.raises(
        ValueError, match=rf"{folder} does not hold the weights of an autoencoder: .*{sentence}"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, b"\x02\0\0\0\0\0\0\0[]"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_damaged_file_is_named(folder: Path, damage: bytes, with_config: bool) -> None:
    if not with_config:
        forget_config(folder)
    (folder / "decoder.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{folder}/decoder.safetensors is damaged: .*; copy it"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "foreign", [{"model_type": "vitok", "patch_size": 16, "hidden_size": 4}, ["list"], None]
)
def test_config_file_of_another_format_is_passed_over(
    model: Autoencoder, folder: Path, foreign: object
) -> None:
    (folder / "config.json").write_text(json.dumps(foreign))
    assert load_pretrained(folder).config == model.config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"surplus": 1}, "config.json is no AutoencoderConfig: surplus"),
        ({"encoder_heads": "two"}, "config.json is no AutoencoderConfig: encoder_heads"),
        ({"decoder_depth": 3}, "does not hold the weights of its config: decoder_blocks.2"),
        ({"latent": "kl"}, r"to_code.bias has shape \(6,\) where the config says \(12,\)"),
    ],
)
def test_config_file_of_ours_must_be_right(
    folder: Path, change: dict[str, object], sentence: str
) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(folder)


def test_config_file_that_is_cut_off_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{folder}/config.json is not JSON"):
        load_pretrained(folder)


def test_encoder_digest_names_the_encoder_and_nothing_else(
    make_autoencoder: Callable[..., Autoencoder],
) -> None:
    model = make_autoencoder()
    digest = encoder_digest(model)
    assert len(digest) == 64
    others = [{"encoder_heads": 1}, {"latent": "tanh"}, {"latent": "kl"}, LINEAR]
    digests = {digest, *(encoder_digest(make_autoencoder(**other)) for other in others)}
    assert len(digests) == 5

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


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_digest_is_the_same_however_the_encoder_was_loaded(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path, kind: str
) -> None:
    model = make_autoencoder(**KINDS[kind]).to(torch.bfloat16)
    save_pretrained(tmp_path, model.config, parameters(model))
    digests = {encoder_digest(model)}
    for dtype in (torch.float32, torch.bfloat16):
        for part in (None, "encoder"):
            digests.add(encoder_digest(load_pretrained(tmp_path, part=part, dtype=dtype)))
    forget_config(tmp_path)
    digests.add(encoder_digest(load_pretrained(tmp_path, part="encoder")))
    if "kl" not in kind:  # which the encoder's file alone does not tell
        (tmp_path / "decoder.safetensors").unlink()
        digests.add(encoder_digest(load_pretrained(tmp_path, part="encoder")))
    assert len(digests) == 1
