from dataclasses import asdict, replace

import pytest
import torch

from vitok.autoencoder import Autoencoder
from vitok.variants import RELEASED, AutoencoderConfig, mean_window_keys, released_name


def on_meta(name: str) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(AutoencoderConfig.from_name(name))


def test_names_are_read_in_both_forms():
    expected = AutoencoderConfig(
        patch_size=16,
        latent_channels=64,
        encoder_width=3072,
        encoder_depth=4,
        encoder_heads=24,
        decoder_width=3072,
        decoder_depth=40,
        decoder_heads=24,
    )
    assert AutoencoderConfig.from_name("Td4-T/16x64") == expected
    assert AutoencoderConfig.from_name("Td4-T/1x16x64") == expected
    assert AutoencoderConfig.from_name("Ld4-Ld24/16x64") == AutoencoderConfig()
    assert AutoencoderConfig.from_name("Ld4-L/1x16x64") == AutoencoderConfig()


def test_released_models_have_their_own_names():
    assert AutoencoderConfig.from_name("350M-f16x64") == AutoencoderConfig.from_name("Ld4-L/16x64")
    assert AutoencoderConfig.from_name("5B-f32x128") == AutoencoderConfig.from_name("Td4-T/32x128")
    assert len({AutoencoderConfig.from_name(name) for name in RELEASED}) == 9
    for name in RELEASED:
        assert released_name(name) == name
        assert released_name(f"philippehansen/ViTok-v2-{name}") == name
    assert released_name("350M-f32x64") is None
    assert released_name("Ld4-L/16x64") is None


def test_sizes_of_the_first_vitok_have_names_of_their_own():
    config = AutoencoderConfig.from_name("v1/S-L/16x16")
    assert (config.encoder_width, config.encoder_depth, config.encoder_heads) == (768, 6, 12)
    assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == (1152, 24, 16)
    assert AutoencoderConfig.from_name("L-L/16x16").decoder_width == 1024


def test_a_linear_encoder_has_a_name_and_its_published_number_of_parameters():
    model = on_meta("linear-B/16x64")
    assert model.num_parameters("encoder") == 768 * 64 + 64  # "49K"
    assert model.num_parameters("decoder") == on_meta("B-B/16x64").num_parameters("decoder")


def test_every_part_of_a_name_counts():
    config = AutoencoderConfig.from_name("Bd2-Gd7/32x128")
    assert asdict(config) == asdict(AutoencoderConfig()) | {
        "patch_size": 32,
        "latent_channels": 128,
        "encoder_width": 768,
        "encoder_depth": 2,
        "encoder_heads": 12,
        "decoder_width": 1728,
        "decoder_depth": 7,
        "decoder_heads": 24,
    }
    assert AutoencoderConfig.from_name("B-L/8x4").encoder_depth == 12
    assert AutoencoderConfig.from_name("Bd0-L/8x4").encoder_depth == 0
    assert config.patch_dim == 3072
    assert config.compression_ratio == 24
    assert AutoencoderConfig.from_name("B-B/16x64").compression_ratio == 12


@pytest.mark.parametrize(
    "name",
    ["", "Td4/16x64", "T-linear/16x64", "Td4-T", "Td4-T/2x16x64", "Td4-T/16x64 ", "td4-t/16x64"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no model name; write ENCODER-DECODER/PATCHxCHANNELS"):
        AutoencoderConfig.from_name(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("X-B/16x64", "there is no size X of ViTok-v2, only B, L, G, T"),
        ("S-B/16x64", r"no size S of ViTok-v2, only B, L, G, T; S is a size of ViTok v1: .* v1/S-"),
        ("v1/S-T/16x64", "there is no size T of ViTok v1, only S, B, L"),
    ],
)
def test_other_sizes_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AutoencoderConfig.from_name(name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder_heads": 10}, "decoder_width=1024 over decoder_heads=10 must leave a head"),
        ({"encoder_width": 1032}, "encoder_width=1032 over encoder_heads=16 must leave a head"),
        ({"encoder_heads": 0}, "encoder_width=1024 over encoder_heads=0"),
        ({"encoder_width": 0}, "encoder_width=0 is a linear encoder, which has no blocks"),
        ({"decoder_width": 0, "decoder_heads": 0}, "decoder_width=0 over decoder_heads=0"),
        ({"decoder_depth": -1}, "decoder_depth=-1 is negative"),
        ({"latent": "layer_norm"}, "latent='layer_norm' must be one of layernorm, tanh, kl"),
        ({"latent_noise": float("nan")}, "latent_noise=nan must be finite"),
        ({"latent_noise": -1.0}, "latent_noise=-1.0 must be finite and not negative"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"latent_channels": 1}, "latent_channels=1 at least 2"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(AutoencoderConfig(), **change)


@pytest.mark.parametrize(
    ("letter", "width", "depth", "published", "tolerance"),
    [
        # The tolerance is what the printed number of digits leaves open.
        ("B", 768, 12, 86e6, 0.01),
        ("L", 1024, 24, 302e6, 0.01),
        ("G", 1728, 32, 1.1e9, 0.05),
        ("T", 3072, 40, 4.5e9, 0.012),
    ],
)
def test_decoders_have_the_published_number_of_parameters(
    letter: str, width: int, depth: int, published: float, tolerance: float
) -> None:
    model = on_meta(f"Bd1-{letter}/16x64")
    decoder = model.num_parameters("decoder")
    # q, k, v and out are W^2 each; the three SwiGLU matrices are 2.67 W^2 each.
    implied = depth * (4 + 3 * 2.67) * width**2
    assert len(model.decoder_blocks) == depth
    assert decoder == pytest.approx(implied, rel=0.02)
    assert decoder == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "decoder_digit"),
    [
        # As printed in the paper, some rounded and some cut: within one unit of the last digit.
        ("Bd4-B/16x64", 29e6, 86e6, 1e6),
        ("Bd2-B/16x64", 15e6, 86e6, 1e6),
        ("Bd1-B/16x64", 8e6, 86e6, 1e6),
        ("Bd4-B/32x256", 31e6, 87e6, 1e6),
        ("Ld4-L/32x256", 54e6, 306e6, 1e6),
        ("Gd4-G/32x256", 149e6, 1.2e9, 0.1e9),
        ("Td4-T/32x256", 463e6, 4.5e9, 0.1e9),
    ],
)
def test_parts_have_the_printed_number_of_parameters(
    name: str, encoder: float, decoder: float, decoder_digit: float
) -> None:
    model = on_meta(name)
    assert abs(model.num_parameters("encoder") - encoder) < 1e6
    assert abs(model.num_parameters("decoder") - decoder) < decoder_digit


def test_the_350m_model_has_about_350m_parameters():
    model = on_meta("Ld4-Ld24/16x64")
    assert model.num_parameters() == pytest.approx(350e6, rel=0.02)
    assert model.num_parameters() == model.num_parameters("encoder") + model.num_parameters(
        "decoder"
    )


@pytest.mark.parametrize(
    ("name", "published"), [("v1/S-S/16x16", 43e6), ("v1/S-B/16x16", 86e6), ("v1/S-L/16x16", 384e6)]
)
def test_decoders_of_the_first_vitok_have_the_published_number_of_parameters(
    name: str, published: float
) -> None:
    model = on_meta(name)
    assert model.num_parameters("decoder") == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("radius", [None, 0, 1, 3, 20])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 9), (5, 7)])
def test_keys_of_a_window_are_those_that_a_loop_counts(
    rows: int, columns: int, radius: int | None
) -> None:
    places = [(row, column) for row in range(rows) for column in range(columns)]
    reach = rows + columns if radius is None else radius
    pairs = sum(abs(a - c) <= reach and abs(b - d) <= reach for a, b in places for c, d in places)
    assert mean_window_keys(rows, columns, radius) == pytest.approx(pairs / len(places))
