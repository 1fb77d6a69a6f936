import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitok.attention import attention_layout
from vitok.autoencoder import Autoencoder, part_of
from vitok.packed import PackedTokens, pack_images
from vitok.patches import num_tokens
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


@pytest.mark.parametrize(
    "shape",
    [
        {"encoder_depth": 0},
        {"encoder_depth": 2},
        {"encoder_width": 0, "encoder_depth": 0, "encoder_heads": 0},
        {"latent": "kl"},
    ],
)
def test_flops_are_those_that_torch_counts(make_autoencoder, shape: dict) -> None:
    model = make_autoencoder(**shape)
    packed = pack_images([torch.randn(3, 24, 40)], patch_size=8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = model.encode_packed(packed)
    encoder = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.decode_packed(latents)
    decoder = counter.get_total_flops()
    assert min(encoder, decoder) > 0
    config = model.config
    assert encoder == 15 * config.flops_per_token(15, "encoder")
    assert decoder == 15 * config.flops_per_token(15, "decoder")
    assert encoder + decoder == 15 * config.flops_per_token(15)


def test_autoencoder_is_its_layers_in_order(make_autoencoder):
    model = make_autoencoder(encoder_depth=2)
    packed = pack_images(
        [torch.randn(3, 20, 9), torch.randn(3, 8, 8)], patch_size=8, row_tokens=9, max_images=3
    )
    layout = attention_layout(packed, torch.float32, 8)
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
        assert torch.equal(model(packed).pixels.tokens, decoded.tokens)
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


def test_a_linear_encoder_is_one_layer(make_autoencoder):
    model = make_autoencoder(encoder_width=0, encoder_depth=0, encoder_heads=0)
    names = {name for name, _ in model.named_parameters() if part_of(name) == "encoder"}
    assert names == {"to_code.weight", "to_code.bias"}
    packed = pack_images([torch.randn(3, 16, 24)], patch_size=8)
    with torch.no_grad():
        code = packed.tokens @ model.to_code.weight.T + model.to_code.bias
        expected = F.layer_norm(code, (6,), eps=1e-6)
        torch.testing.assert_close(model.encode_packed(packed).tokens, expected)
        assert model(packed).pixels.tokens.shape == packed.tokens.shape


def test_noise_moves_tanh_and_kl_latents_by_their_spread_and_layernorm_latents_not_at_all(
    make_autoencoder,
):
    packed = pack_images([torch.randn(3, 24, 24)], patch_size=8)
    noise = torch.randn(9, 6)
    with torch.no_grad():
        plain = make_autoencoder()
        assert torch.equal(plain(packed, noise=noise).pixels.tokens, plain(packed).pixels.tokens)
        assert plain(packed).kl_T is None

        bounded = make_autoencoder(latent="tanh", latent_noise=0.5)
        hidden = _code_of(bounded, packed)
        moved = bounded(packed, noise=noise)
        torch.testing.assert_close(moved.latents.tokens, hidden.tanh() + 0.5 * noise)
        assert torch.equal(bounded.encode_packed(packed).tokens, hidden.tanh())
        assert moved.kl_T is None

        gaussian = make_autoencoder(latent="kl")
        mean, log_variance = _code_of(gaussian, packed).chunk(2, dim=1)
        moved = gaussian(packed, noise=noise)
        expected = mean + log_variance.exp().sqrt() * noise
        torch.testing.assert_close(moved.latents.tokens, expected)
        assert torch.equal(gaussian.encode_packed(packed).tokens, mean)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, log_variance.exp().sqrt()),
            torch.distributions.Normal(0.0, 1.0),
        )
        torch.testing.assert_close(moved.kl_T, divergence.mean(dim=1))
        assert torch.equal(moved.pixels.tokens, gaussian.decode_packed(moved.latents).tokens)


def _code_of(model: Autoencoder, packed: PackedTokens) -> Tensor:
    """Return what the encoder's last layer gives."""
    codes: list[Tensor] = []
    with model.to_code.register_forward_hook(lambda *call: codes.append(call[2])):
        model.encode_packed(packed)
    return codes[0]


def test_extreme_log_variances_give_finite_latents_and_gradients(make_autoencoder):
    model = make_autoencoder(latent="kl")
    packed = pack_images([torch.randn(3, 8, 8)], patch_size=8)
    with torch.no_grad():
        model.to_code.bias[6:] = torch.tensor([1e6, -1e6, 88.0, -120.0, 0.0, 1.0])
    output = model(packed, noise=torch.randn(1, 6))
    (output.pixels.tokens.square().mean() + output.kl_T.mean()).backward()
    assert output.latents.tokens.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_part_alone_computes_what_it_does_in_the_whole(make_autoencoder, part: str) -> None:
    whole = make_autoencoder()
    alone = Autoencoder(whole.config, part=part)
    names = {name for name, _ in alone.named_parameters()}
    assert {part_of(name) for name in names} == {part}
    alone.load_state_dict({name: p for name, p in whole.state_dict().items() if name in names})
    packed = pack_images([torch.randn(3, 17, 24)], patch_size=8)
    with torch.no_grad():
        latents = whole.encode_packed(packed)
        if part == "encoder":
            assert torch.equal(alone.encode_packed(packed).tokens, latents.tokens)
        else:
            pixels = whole.decode_packed(latents)
            assert torch.equal(alone.decode_packed(latents).tokens, pixels.tokens)
        with pytest.raises(ValueError, match=f"its {part} alone; load it without part='{part}'"):
            alone(packed)


def test_half_precision_weights_take_float32_pixels_and_give_float32_latents(make_autoencoder):
    model = make_autoencoder()
    packed = pack_images([torch.randn(3, 16, 24)], patch_size=8)
    with torch.no_grad():
        exact = model(packed).pixels.tokens
        half = model.bfloat16()
        assert half.encode_packed(packed).tokens.dtype == torch.float32
        output = half(packed).pixels.tokens
    assert output.dtype == torch.bfloat16
    assert 0 < (output - exact).norm() < 0.1 * exact.norm()


def test_number_of_tokens_counts_patches_that_are_begun():
    assert num_tokens(33, 16, 16) == 3
    assert num_tokens(1, 1, 16) == 1
    assert num_tokens(256, 256, 16) == 256


def test_a_window_changes_what_is_far_away_and_nothing_where_it_covers_the_image(make_autoencoder):
    model = make_autoencoder()
    packed = pack_images([torch.rand(3, 16, 40), torch.rand(3, 8, 24)], patch_size=8)
    with torch.no_grad():
        full = model(packed).pixels.tokens
        covering = model(packed, window=4).pixels.tokens
        narrow = model(packed, window=1).pixels.tokens
        itself = model(packed, window=0).pixels.tokens
    torch.testing.assert_close(covering, full, rtol=1e-4, atol=1e-5)
    for window in (narrow, itself):
        assert (window - full).abs().max() > 1e-2
    one_patch = pack_images([torch.rand(3, 8, 8)], patch_size=8)
    with torch.no_grad():
        expected = model(one_patch).pixels.tokens
        torch.testing.assert_close(model(one_patch, window=0).pixels.tokens, expected)


@pytest.mark.parametrize("backend", ["halo", "flex"])
def test_backends_of_a_window_agree_through_the_whole_model(make_autoencoder, backend) -> None:
    wide = {"encoder_width": 32, "decoder_width": 48, "decoder_depth": 1}
    model = make_autoencoder(**wide)
    packed = pack_images(
        [torch.rand(3, 136, 80), torch.rand(3, 24, 8)], patch_size=8, row_tokens=180
    )
    with torch.no_grad():
        expected = model(packed, window=2).pixels.tokens
        model.window_backend = backend
        actual = model(packed, window=2).pixels.tokens
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    model.window_backend = "halloo"
    with pytest.raises(ValueError, match="window_backend='halloo' must be one of halo, flex"):
        model(packed, window=2)


def test_a_part_that_is_none_is_refused(make_autoencoder):
    with pytest.raises(ValueError, match="part='enc' must be one of encoder, decoder"):
        Autoencoder(make_autoencoder().config, part="enc")
