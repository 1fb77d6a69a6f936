import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor, nn

from vitok.autoencoder import Autoencoder
from vitok.images import (
    Latent,
    decode_latents,
    encode_images,
    to_pil,
    to_tensor,
)
from vitok.packed import pack_images, unpack_images
from vitok.pillow import upright_rgb

SIZES = [(16, 24), (5, 9), (40, 8), (1, 70), (33, 33), (8, 8)]


def random_array(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def random_images(sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    return [to_tensor(random_array(*size, seed)) for seed, size in enumerate(sizes)]


def latent_alone(model: Autoencoder, image: Tensor, window: int | None = None) -> Tensor:
    """Encode one image [3, H, W] in [-1, 1] in a row of its own."""
    with torch.no_grad():
        packed = pack_images([image], patch_size=model.config.patch_size)
        return model.encode_packed(packed, window=window).tokens


def image_alone(model: Autoencoder, image: Tensor, window: int | None = None) -> Tensor:
    """Reconstruct one image [3, H, W] in [-1, 1] in a row of its own."""
    patch_size = model.config.patch_size
    with torch.no_grad():
        packed = pack_images([image], patch_size=patch_size)
        encoded = model.encode_packed(packed, window=window)
        decoded = model.decode_packed(encoded, window=window)
    return unpack_images(decoded, patch_size)[0].float().clamp(-1, 1)


@pytest.fixture(scope="module")
def model(make_autoencoder: Callable[..., Autoencoder]) -> Autoencoder:
    return make_autoencoder()


@pytest.mark.parametrize("window", [None, 1])
def test_each_image_of_a_mixed_batch_comes_out_as_if_alone(
    model: Autoencoder, window: int | None
) -> None:
    images = random_images()
    latents = model.encode(images, window=window)
    reconstructions = model.decode(latents, window=window)
    for image, latent, reconstruction in zip(images, latents, reconstructions, strict=True):
        torch.testing.assert_close(latent.tokens, latent_alone(model, image, window))
        torch.testing.assert_close(reconstruction, image_alone(model, image, window))
        assert reconstruction.abs().max() > 0.1


def test_a_window_changes_the_latents(model: Autoencoder) -> None:
    [image] = random_images([(40, 40)])
    [narrow], [full] = model.encode(image, window=1), model.encode(image)
    assert (narrow.tokens - full.tokens).abs().max() > 1e-3
    [narrow_image], [full_image] = model.decode(full, window=1), model.decode(full)
    assert (narrow_image - full_image).abs().max() > 1e-3


@pytest.mark.parametrize("pass_tokens", [1, 6, 10, 1000])
def test_passes_stay_under_their_limit_and_change_no_result(
    make_autoencoder: Callable[..., Autoencoder],
    monkeypatch: pytest.MonkeyPatch,
    pass_tokens: int,
) -> None:
    model = make_autoencoder()
    images = random_images()
    expected = [latent_alone(model, image) for image in images]
    passes: list[list[int]] = []

    for name in ("encode_packed", "decode_packed"):
        compute = getattr(model, name)

        def recorded(packed, *, compute=compute, **options):
            passes.append(packed.cu_seqlens.diff().tolist())
            return compute(packed, **options)

        monkeypatch.setattr(model, name, recorded)
    latents = encode_images(model, images, pass_tokens=pass_tokens)
    num_encoder_passes = len(passes)
    reconstructions = decode_latents(model, latents, pass_tokens=pass_tokens)

    assert passes[:num_encoder_passes] == passes[num_encoder_passes:]
    lengths = [6, 2, 5, 9, 25, 1]
    assert [length for row in passes[:num_encoder_passes] for length in row] == lengths
    assert all(sum(row) <= pass_tokens or len(row) == 1 for row in passes)
    assert num_encoder_passes == {1: 6, 6: 6, 10: 5, 1000: 1}[pass_tokens]
    for latent, tokens in zip(latents, expected, strict=True):
        torch.testing.assert_close(latent.tokens, tokens)
    for image, reconstruction in zip(images, reconstructions, strict=True):
        torch.testing.assert_close(reconstruction, image_alone(model, image))


def test_a_permuted_batch_gives_permuted_results(model: Autoencoder) -> None:
    images = random_images()
    order = [4, 0, 5, 2, 1, 3]
    latents = encode_images(model, images, pass_tokens=12)
    permuted = encode_images(model, [images[i] for i in order], pass_tokens=12)
    for i, latent in zip(order, permuted, strict=True):
        assert latent.image_size == SIZES[i]
        torch.testing.assert_close(latent.tokens, latents[i].tokens)
    reconstructions = decode_latents(model, latents)
    for i, image in zip(order, decode_latents(model, permuted), strict=True):
        torch.testing.assert_close(image, reconstructions[i])


def test_all_kinds_of_one_image_give_the_same_latents(model: Autoencoder) -> None:
    array = random_array(19, 30)
    as_uint8 = torch.from_numpy(array).permute(2, 0, 1)
    as_float = as_uint8.float() / 127.5 - 1
    kinds = [
        Image.fromarray(array),
        array,
        as_uint8,
        as_float,
        as_float.double(),
        as_float.permute(1, 2, 0).numpy(),
        as_float.permute(1, 2, 0).double().numpy(),
    ]
    # One by one: rows of other lengths may round otherwise.
    expected, *others = [model.encode(kind)[0].tokens for kind in kinds]
    torch.testing.assert_close(expected, latent_alone(model, as_float))
    for tokens in others:
        assert torch.equal(tokens, expected)
    mixed = model.encode(kinds)
    assert len(mixed) == len(kinds)
    for latent in mixed:
        torch.testing.assert_close(latent.tokens, expected)
        assert latent.image_size == (19, 30) and latent.grid == (3, 4)


def test_a_batch_may_be_a_generator_or_a_tensor_or_an_array(model: Autoencoder) -> None:
    arrays = np.stack([random_array(9, 17, seed) for seed in range(3)])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = torch.stack([latent.tokens for latent in model.encode(list(arrays))])
    for batch in (arrays, tensors, tuple(arrays), (image for image in tensors)):
        latents = model.encode(batch)
        assert torch.equal(torch.stack([latent.tokens for latent in latents]), expected)
    assert not torch.allclose(expected[0], expected[1])


def test_arrays_of_any_memory_layout_are_read_without_a_warning(
    model: Autoencoder, recwarn: pytest.WarningsRecorder
) -> None:
    array = random_array(12, 20)
    expected = to_tensor(array)
    read_only = array.copy()
    read_only.flags.writeable = False
    flipped = array[::-1].copy()[::-1]
    big_endian = expected.permute(1, 2, 0).numpy().astype(">f4")
    fortran = np.asfortranarray(array)
    for other in (read_only, flipped, big_endian, fortran):
        assert torch.equal(to_tensor(other), expected)
        assert torch.equal(model.encode(other)[0].tokens, model.encode(array)[0].tokens)
    assert not recwarn.list


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 41), st.integers(1, 41)), min_size=1, max_size=4),
    pass_tokens=st.integers(1, 60),
)
def test_images_of_any_size_keep_it(
    model: Autoencoder, sizes: list[tuple[int, int]], pass_tokens: int
) -> None:
    latents = encode_images(model, [random_array(*size) for size in sizes], pass_tokens=pass_tokens)
    for (height, width), latent in zip(sizes, latents, strict=True):
        assert latent.image_size == (height, width)
        assert latent.grid == (-(-height // 8), -(-width // 8))
        assert latent.tokens.shape == (latent.grid[0] * latent.grid[1], 6)
    images = decode_latents(model, latents, pass_tokens=pass_tokens)
    assert [tuple(image.shape) for image in images] == [(3, *size) for size in sizes]
    assert all(image.isfinite().all() and image.abs().max() <= 1 for image in images)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 500)])
def test_extreme_aspect_ratios_keep_their_size(model: Autoencoder, size: tuple[int, int]) -> None:
    [image] = random_images([size])
    [latent] = model.encode(image)
    [reconstruction] = model.decode(latent)
    assert reconstruction.shape == image.shape
    torch.testing.assert_close(reconstruction, image_alone(model, image))


@pytest.mark.parametrize("as_kind", [lambda array: array, to_tensor])
def test_odd_sizes_are_padded_with_exact_gray(model: Autoencoder, as_kind: Callable) -> None:
    array = random_array(11, 21)
    canvas = torch.zeros(3, 16, 24)
    canvas[:, :11, :21] = to_tensor(array)
    [odd], [padded] = model.encode(as_kind(array)), model.encode(canvas)
    torch.testing.assert_close(odd.tokens, padded.tokens)
    canvas[:, 11:] = 1.0
    assert not torch.allclose(model.encode(canvas)[0].tokens, odd.tokens, atol=1e-3)


def test_bf16_weights_compute_in_bf16(make_autoencoder: Callable[..., Autoencoder]) -> None:
    exact, model = make_autoencoder(), make_autoencoder().bfloat16()
    images = random_images([(24, 24), (10, 30)])
    latents = model.encode(images)
    reconstructions = model.decode(latents)
    for image, latent, reconstruction in zip(images, latents, reconstructions, strict=True):
        assert latent.tokens.dtype == reconstruction.dtype == torch.float32
        torch.testing.assert_close(latent.tokens, latent_alone(model, image), atol=0.1, rtol=0.1)
        # Pixels of bf16 are those of bf16.
        assert torch.equal(reconstruction, reconstruction.bfloat16().float())
        assert not torch.allclose(latent.tokens, latent_alone(exact, image), atol=1e-5)


def test_results_can_be_trained_on(model: Autoencoder) -> None:
    [latent] = model.encode(random_array(16, 16))
    [image] = model.decode(latent)
    for tensor in (latent.tokens, latent.as_map(), image):
        assert not tensor.is_inference() and not tensor.requires_grad
        layer = nn.Linear(tensor.shape[-1], 2)
        layer(tensor).square().sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    image.mul_(0.5)


@pytest.mark.parametrize("window", [None, 2])
def test_the_model_can_be_trained_after_it_was_used(
    make_autoencoder: Callable[..., Autoencoder], window: int | None
) -> None:
    model = make_autoencoder()
    [image] = random_images([(24, 24)])
    model.decode(model.encode(image, window=window), window=window)
    packed = pack_images([image], patch_size=8)
    model(packed, window=window).pixels.tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_each_latent_owns_its_memory(model: Autoencoder) -> None:
    latents = model.encode(random_images())
    for latent in latents:
        assert latent.tokens.untyped_storage().nbytes() == latent.tokens.numel() * 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_pillow_images_are_turned_upright(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(random_array(10, 18)).save(stream, format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(stream))
    assert upright.size == ((18, 10) if orientation < 5 else (10, 18))
    pixels = to_tensor(Image.open(stream))
    assert torch.equal(pixels, to_tensor(np.array(upright)))


def test_an_image_turned_by_the_caller_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(random_array(10, 18)).save(stream, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(stream))
    assert torch.equal(to_tensor(upright), to_tensor(Image.open(stream)))
    assert to_tensor(upright).shape == (3, 18, 10)


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr HSV LAB I F I;16 I;16B I;16L"


@pytest.mark.parametrize("mode", MODES.split())
def test_pillow_images_of_every_mode_are_taken(model: Autoencoder, mode: str) -> None:
    image = Image.new(mode, (20, 9))
    assert upright_rgb(image).mode == "RGB"
    pixels = to_tensor(image)
    assert pixels.shape == (3, 9, 20) and pixels.abs().max() <= 1
    assert model.encode(image)[0].image_size == (9, 20)
    transparent = mode in ("LA", "La", "PA", "RGBA", "RGBa")
    gray = to_tensor(Image.new("RGB", (20, 9), (128, 128, 128)))
    assert torch.equal(pixels, gray) == transparent


def test_premultiplied_gray_with_alpha_is_composited_as_the_plain_one() -> None:
    plain = Image.fromarray(random_array(9, 20)[..., :2], mode="LA")
    difference = to_tensor(plain.convert("La")) - to_tensor(plain)
    assert difference.abs().max() <= 4 / 127.5  # 8 bits of a product round
    assert to_tensor(plain).std() > 0.05


def test_pixels_of_all_levels_survive_a_round_trip_to_pillow() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    levels[..., 1] = levels[::-1, :, 1]
    image = to_pil(to_tensor(levels))
    assert image.mode == "RGB" and image.size == (16, 16)
    np.testing.assert_array_equal(np.asarray(image), levels)
    for dtype in (torch.float16, torch.float64):
        pixels = to_tensor(levels).to(dtype).requires_grad_()
        np.testing.assert_array_equal(np.asarray(to_pil(pixels)), levels)


def test_to_pil_rounds_and_clamps() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.0040, 1.0, 1.5])
    image = to_pil(values.expand(3, 2, 6))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 3)])
def test_to_pil_names_what_it_cannot_draw(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the image has (dtype torch.uint8|shape \[4, 4, 3\])"):
        to_pil(bad)
    with pytest.raises(ValueError, match="the image holds NaN"):
        to_pil(torch.full((3, 4, 4), torch.nan))


def test_a_small_overshoot_is_clamped(model: Autoencoder) -> None:
    pixels = torch.ones(3, 8, 8)
    for overshoot in (1e-3, 5e-4):
        over = pixels * (1 + overshoot)
        assert over.max() > 1
        assert torch.equal(to_tensor(over), pixels)
        assert torch.equal(to_tensor(-over), -pixels)
        assert torch.equal(model.encode(over)[0].tokens, model.encode(pixels)[0].tokens)
    with pytest.raises(ValueError, match="values from 1.002 to 1.002"):
        to_tensor(pixels * 1.002)


def with_value(value: float) -> Tensor:
    pixels = torch.zeros(3, 8, 8)
    pixels[1, 2, 3] = value
    return pixels


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"has no pixels: its shape is \[0, 5, 3\]"),
        (torch.zeros(3, 5, 0), ValueError, r"has no pixels: its shape is \[3, 5, 0\]"),
        (Image.new("RGB", (0, 7)), ValueError, "has no pixels: 7 x 0"),
        (with_value(torch.nan), ValueError, "holds 1 values that are NaN or infinite"),
        (with_value(-torch.inf).double(), ValueError, "holds 1 values that are NaN or infinite"),
        (with_value(torch.nan).half(), ValueError, "holds 1 values that are NaN or infinite"),
        (with_value(1.5), ValueError, r"from 0 to 1.5, not in \[-1, 1\]; scale them"),
        (with_value(-2.0).bfloat16(), ValueError, r"from -2 to 0, not in \[-1, 1\]; scale them"),
        (with_value(255.0), ValueError, "look like 0..255: give uint8, or divide by 127.5"),
        (with_value(200.0).permute(1, 2, 0).numpy(), ValueError, "look like 0..255: give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), ValueError, "dtype torch.int64; give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), ValueError, "dtype torch.bool; give uint8"),
        (np.zeros((8, 8, 3), np.int64), ValueError, "dtype int64; give uint8"),
        (np.zeros((8, 8, 3), bool), ValueError, "dtype bool; give uint8"),
        (np.zeros((8, 8, 3), complex), ValueError, "dtype complex128; give uint8"),
        (torch.zeros(8, 9, 3), ValueError, r"seem to stand last: image.permute\(2, 0, 1\)"),
        (np.zeros((3, 8, 9)), ValueError, r"seem to stand first: image.transpose\(1, 2, 0\)"),
        (torch.zeros(1, 8, 8), ValueError, r"shape \[1, 8, 8\] instead of \[3, H, W\].*gray"),
        (np.zeros((8, 8)), ValueError, r"shape \[8, 8\] instead of \[H, W, 3\].*gray"),
        (np.zeros((8, 8, 4)), ValueError, r"shape \[8, 8, 4\].*alpha"),
        (torch.zeros(5, 8, 8), ValueError, r"shape \[5, 8, 8\].*make it RGB"),
        (torch.zeros(2, 3, 8, 8), ValueError, r"shape \[2, 3, 8, 8\].*one by one"),
        (torch.zeros(()), ValueError, r"shape \[\] instead"),
        ("cat.png", TypeError, r"is of type str; open it: PIL.Image.open\('cat.png'\)"),
        (Path("cat.png"), TypeError, r"open it: PIL.Image.open\('cat.png'\)"),
        (b"\x89PNG", TypeError, r"is of type bytes; open it: PIL.Image.open\(io.BytesIO"),
        (None, TypeError, "is of type NoneType; give a Pillow image, an array"),
        ([[0.0]], TypeError, "is of type list; give a Pillow image, an array"),
    ],
)
def test_a_bad_image_is_named_with_its_position_and_a_remedy(
    model: Autoencoder, bad: object, kind: type[Exception], message: str
) -> None:
    good = random_array(9, 9)
    with pytest.raises(kind, match=f"^image 2 of the batch .*{message}"):
        model.encode([good, good, bad, good])
    with pytest.raises(kind, match=f"^the image .*{message}"):
        to_tensor(bad)


def test_a_single_thing_that_is_no_image_is_the_first_of_its_batch(model: Autoencoder) -> None:
    for bad in ("cat.png", Path("cat.png"), b"\x89PNG", {"image": 1}, 3):
        with pytest.raises(TypeError, match="^image 0 of the batch is of type"):
            model.encode(bad)
    with pytest.raises(ValueError, match=r"^image 0 of the batch has shape \[8, 8\]"):
        model.encode(np.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"^image 0 of the batch .*seem to stand last"):
        model.encode(torch.zeros(2, 8, 8, 3))


def test_a_damaged_file_is_named_with_its_position(model: Autoencoder) -> None:
    stream = io.BytesIO()
    Image.fromarray(random_array(64, 64)).save(stream, "PNG")
    damaged = Image.open(io.BytesIO(stream.getvalue()[:3000]))
    with pytest.raises(ValueError, match="^image 1 of the batch cannot be decoded: .*truncated"):
        model.encode([random_array(9, 9), damaged])


@pytest.mark.parametrize("empty", [[], (), torch.zeros(0, 3, 8, 8), np.zeros((0, 8, 8, 3))])
def test_nothing_to_do_is_an_error(model: Autoencoder, empty: object) -> None:
    with pytest.raises(ValueError, match="no images to encode; give at least one"):
        model.encode(empty)
    with pytest.raises(ValueError, match="no latents to decode; give at least one"):
        model.decode([])


def test_a_map_is_a_view_of_the_tokens_and_leads_back(model: Autoencoder) -> None:
    [latent] = model.encode(random_array(17, 40))
    latent_map = latent.as_map()
    assert latent_map.shape == (6, 3, 5) and latent.grid == (3, 5)
    assert latent_map.data_ptr() == latent.tokens.data_ptr()
    for row in range(3):
        for column in range(5):
            assert torch.equal(latent_map[:, row, column], latent.tokens[row * 5 + column])
    back = Latent.from_map(latent_map, 8, (17, 40))
    assert torch.equal(back.tokens, latent.tokens)
    assert back.image_size == (17, 40) and back.patch_size == 8
    assert Latent.from_map(latent_map, 8).image_size == (24, 40)
    assert torch.equal(model.decode(back)[0], model.decode(latent)[0])


def test_a_map_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size=\(25, 40\).*grid of \(4, 5\).*\(3, 5\)"):
        Latent.from_map(torch.zeros(6, 3, 5), 8, (25, 40))
    with pytest.raises(ValueError, match=r"shape \[2, 6, 3, 5\] is not \[c, rows, columns\]"):
        Latent.from_map(torch.zeros(2, 6, 3, 5), 8)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (Latent(torch.zeros(1, 6), (8, 8), 16), ValueError, "patches of 16 pixels, the model of 8"),
        (Latent(torch.zeros(1, 7), (8, 8), 8), ValueError, "has 7 channels, the model 6"),
        (
            Latent(torch.zeros(3, 6), (8, 16), 8),
            ValueError,
            r"shape \[3, 6\], but image_size=\(8, 16\) is a grid of 1 x 2: give \[2, 6\]",
        ),
        (Latent(torch.zeros(6), (8, 8), 8), ValueError, r"tokens of shape \[6\]"),
        (Latent(torch.zeros(0, 6), (0, 8), 8), ValueError, r"image_size=\(0, 8\), without pixels"),
        (Latent(torch.full((1, 6), torch.nan), (8, 8), 8), ValueError, "is not finite"),
        (Latent(torch.zeros(1, 6).long(), (8, 8), 8), ValueError, "dtype torch.int64"),
        (torch.zeros(6, 1, 1), TypeError, r"type Tensor; .*Latent.from_map"),
    ],
)
def test_a_bad_latent_is_named_with_its_position(
    model: Autoencoder, bad: object, kind: type[Exception], message: str
) -> None:
    good = Latent(torch.zeros(1, 6), (8, 8), 8)
    with pytest.raises(kind, match=f"^latent 1 of the batch .*{message}"):
        model.decode([good, bad])


def test_one_part_alone_does_its_half_and_names_the_other(model: Autoencoder) -> None:
    encoder = Autoencoder(model.config, part="encoder")
    decoder = Autoencoder(model.config, part="decoder")
    for part in (encoder, decoder):
        part.load_state_dict(model.state_dict(), strict=False)
    image = random_array(20, 20)
    [latent] = encoder.encode(image)
    assert torch.equal(latent.tokens, model.encode(image)[0].tokens)
    assert torch.equal(decoder.decode(latent)[0], model.decode(latent)[0])
    with pytest.raises(ValueError, match=re.escape("load it without part='encoder'")):
        encoder.decode(latent)
    with pytest.raises(ValueError, match=re.escape("load it without part='decoder'")):
        decoder.encode(image)


def test_a_saved_model_encodes_as_before(model: Autoencoder, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path / "weights"))
    image = random_array(20, 20)
    expected = model.encode(image)[0].tokens
    loaded = Autoencoder.from_pretrained(tmp_path / "weights")
    assert torch.equal(loaded.encode(image)[0].tokens, expected)
    encoder = Autoencoder.from_pretrained(
        tmp_path / "weights", part="encoder", dtype=torch.bfloat16
    )
    assert encoder.dtype == torch.bfloat16
    torch.testing.assert_close(encoder.encode(image)[0].tokens, expected, atol=0.2, rtol=0.2)
