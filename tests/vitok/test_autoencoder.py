from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitok.attention import attention_layout
from vitok.autoencoder import Autoencoder, AutoencoderConfig, num_tokens, part_of
from vitok.packed import pack_images
from vitok.transformer import rope_rotation

BLOCK_PARAMETERS = [
    "norm1.weight",
    "attn.qkv_proj.weight",
    "attn.norm_q.weight",
    "attn.norm_k.weight",
    "attn.out_proj.weight",
    "ffn.fc1.weight",
    "ffn.fc2.weight",
    "layer_scale.gamma",
]
ENCODER_ENDS = ["patch_embed.weight", "patch_embed.bias", "to_code.weight", "to_code.bias"]
DECODER_ENDS = ["decoder_embed.weight", "decoder_embed.bias", "to_pixels.weight", "to_pixels.bias"]


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
    ["", "Xd4-T/16x64", "Td4/16x64", "Td4-T", "Td4-T/2x16x64", "Td4-T/16x64 ", "td4-t/16x64"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no model name; write ENCODER-DECODER/PATCHxCHANNELS"):
        AutoencoderConfig.from_name(name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder_heads": 10}, "decoder_width=1024 over decoder_heads=10 must leave a head"),
        ({"encoder_width": 1032}, "encoder_width=1032 over encoder_heads=16 must leave a head"),
        ({"encoder_heads": 0}, "encoder_width=1024 over encoder_heads=0"),
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


def test_parameter_names_are_those_of_the_released_weights(make_autoencoder):
    model = make_autoencoder(encoder_depth=2, decoder_depth=3)
    encoder = {f"encoder_blocks.{i}.{name}" for i in range(2) for name in BLOCK_PARAMETERS}
    decoder = {f"decoder_blocks.{i}.{name}" for i in range(3) for name in BLOCK_PARAMETERS}
    encoder |= set(ENCODER_ENDS)
    decoder |= set(DECODER_ENDS)

    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    assert set(names) == encoder | decoder
    assert set(model.state_dict()) == encoder | decoder
    assert {part_of(name) for name in encoder} == {"encoder"}
    assert {part_of(name) for name in decoder} == {"decoder"}
    assert model.decoder_blocks[0].attn.qkv_proj.weight.shape == (72, 24)


@pytest.mark.parametrize("encoder_depth", [0, 2])
def test_flops_are_those_that_torch_counts(make_autoencoder, encoder_depth: int) -> None:
    model = make_autoencoder(encoder_depth=encoder_depth)
    packed = pack_images([torch.randn(3, 24, 40)], patch_size=8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(packed)
    assert counter.get_total_flops() > 0
    assert counter.get_total_flops() == 15 * model.config.flops_per_token(15)


def test_autoencoder_is_its_layers_in_order(make_autoencoder):
    model = make_autoencoder(encoder_depth=2)
    packed = pack_images(
        [torch.randn(3, 20, 9), torch.randn(3, 8, 8)], patch_size=8, row_tokens=9, max_images=3
    )
    layout = attention_layout(packed)
    with torch.no_grad():
        x = packed.tokens @ model.patch_embed.weight.T + model.patch_embed.bias
        for block in model.encoder_blocks:
            x = block(x, rope_rotation(packed.patch_coord, 8), layout)
        code = x @ model.to_code.weight.T + model.to_code.bias
        centred = code - code.mean(-1, keepdim=True)
        latents = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x = latents @ model.decoder_embed.weight.T + model.decoder_embed.bias
        for block in model.decoder_blocks:
            x = block(x, rope_rotation(packed.patch_coord, 8), layout)
        pixels = x @ model.to_pixels.weight.T + model.to_pixels.bias

        encoded = model.encode_packed(packed)
        torch.testing.assert_close(encoded.tokens, latents, rtol=1e-4, atol=1e-5)
        decoded = model.decode_packed(encoded)
        torch.testing.assert_close(decoded.tokens, pixels, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(packed).tokens, decoded.tokens)
    assert torch.equal(decoded.image_size, packed.image_size)
    assert decoded.tokens.shape == (9, 192)


def test_latents_are_normalised_with_a_tiny_epsilon(make_autoencoder):
    model = make_autoencoder()
    packed = pack_images([torch.randn(3, 24, 24)], patch_size=8)
    with torch.no_grad():
        tokens = model.encode_packed(packed).tokens
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(9), rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens.square().mean(-1), torch.ones(9), rtol=1e-3, atol=0)

        # A code of variance 1e-6 is where an epsilon of 1e-6 halves the variance of the latent.
        model.to_code.weight.mul_(0)
        model.to_code.bias.copy_(1e-3 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
        small = model.encode_packed(packed).tokens
        torch.testing.assert_close(small.square().mean(-1), torch.full((9,), 0.5))


def test_an_encoder_without_blocks_is_linear(make_autoencoder):
    model = make_autoencoder(encoder_depth=0)
    packed = pack_images([torch.randn(3, 16, 24)], patch_size=8)
    with torch.no_grad():
        code = model.to_code(model.patch_embed(packed.tokens))
        assert torch.equal(model.encode_packed(packed).tokens, F.layer_norm(code, (6,), eps=1e-6))


def test_half_precision_weights_take_float32_pixels_and_give_float32_latents(make_autoencoder):
    model = make_autoencoder()
    packed = pack_images([torch.randn(3, 16, 24)], patch_size=8)
    with torch.no_grad():
        exact = model(packed).tokens
        half = model.bfloat16()
        assert half.encode_packed(packed).tokens.dtype == torch.float32
        output = half(packed).tokens
    assert output.dtype == torch.bfloat16
    assert 0 < (output - exact).norm() < 0.1 * exact.norm()


def test_fresh_weights_come_from_torchs_generator(make_autoencoder):
    model = make_autoencoder(encoder_width=64, decoder_width=48)
    torch.manual_seed(3)
    model.reset_parameters()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    model.reset_parameters()
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())
    model.reset_parameters()
    assert not torch.equal(first["patch_embed.weight"], model.patch_embed.weight)

    for name, parameter in first.items():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "gamma" in name:
            assert (parameter == model.config.layer_scale).all(), name
        elif "bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.2), name


def test_number_of_tokens_counts_patches_that_are_begun():
    assert num_tokens(33, 16, 16) == 3
    assert num_tokens(1, 1, 16) == 1
    assert num_tokens(256, 256, 16) == 256
