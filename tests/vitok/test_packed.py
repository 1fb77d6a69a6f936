import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitok.autoencoder import Autoencoder
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.packed import PackedTokens, layout_of, pack_images, unpack_images

PATCH = 8


def random_images(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    return [torch.rand(3, height, width) * 2 - 1 for height, width in sizes]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 32)), max_size=4),
    free_tokens=st.integers(0, 5),
    free_slots=st.integers(0, 2),
)
@example(sizes=[], free_tokens=3, free_slots=1)
def test_layout_equals_one_made_by_loops(sizes, free_tokens, free_slots):
    row_tokens = sum(-(-height // 8) * -(-width // 8) for height, width in sizes) + free_tokens
    max_images = max(1, len(sizes) + free_slots)
    packed = layout_of(
        sizes, patch_size=8, row_tokens=row_tokens, max_images=max_images, max_seqlen=12
    )

    coordinates, segments, bounds, grids = [], [], [0], []
    for segment, (height, width) in enumerate(sizes):
        rows, columns = (height + 7) // 8, (width + 7) // 8
        grids.append([rows, columns])
        for row in range(rows):
            for column in range(columns):
                coordinates.append([row, column])
                segments.append(segment)
        bounds.append(len(segments))
    padding, unused = row_tokens - len(segments), max_images - len(sizes)

    assert packed.patch_coord.tolist() == coordinates + [[0, 0]] * padding
    assert packed.segment_ids.tolist() == segments + [-1] * padding
    assert packed.cu_seqlens.tolist() == bounds + [len(segments)] * unused
    assert packed.grid.tolist() == grids + [[0, 0]] * unused
    assert packed.image_size.tolist() == [list(size) for size in sizes] + [[0, 0]] * unused
    assert packed.max_seqlen == 12
    assert packed.tokens.shape == (row_tokens, 0)
    for tensor in (packed.patch_coord, packed.segment_ids, packed.cu_seqlens, packed.grid):
        assert tensor.dtype == torch.int32
    assert packed.num_images() == len(sizes)
    assert packed.num_tokens() == len(segments)
    assert (
        packed.token_image_size().tolist()
        == [list(sizes[s]) for s in segments] + [[0, 0]] * padding
    )


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"max_images": 1}, "2 images exceed the 1 slots of a row"),
        ({"row_tokens": 7}, "8 tokens exceed the row of 7; pack fewer images"),
        ({"max_seqlen": 5}, r"an image of 6 tokens exceeds max_seqlen=5; resize it or raise"),
    ],
)
def test_layout_refuses_what_does_not_fit(limits, sentence):
    fitting = {"row_tokens": 8, "max_images": 2, "max_seqlen": 6}
    layout_of([(16, 24), (8, 9)], patch_size=8, **fitting)
    with pytest.raises(ValueError, match=sentence):
        layout_of([(16, 24), (8, 9)], patch_size=8, **(fitting | limits))
    with pytest.raises(ValueError, match=sentence):
        pack_images(random_images([(16, 24), (8, 9)]), patch_size=8, **(fitting | limits))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    patch_size=st.integers(1, 8),
    extra_tokens=st.integers(0, 5),
    extra_slots=st.integers(0, 2),
)
def test_unpacking_gives_back_the_images_in_order(sizes, patch_size, extra_tokens, extra_slots):
    images = random_images(sizes)
    exact = pack_images(images, patch_size=patch_size)
    padded = pack_images(
        images,
        patch_size=patch_size,
        row_tokens=len(exact.tokens) + extra_tokens,
        max_images=len(images) + extra_slots,
    )

    assert (exact.segment_ids >= 0).all()
    assert len(exact.tokens) == padded.num_tokens()
    assert not padded.tokens[len(exact.tokens) :].any()
    for packed in (exact, padded):
        unpacked = unpack_images(packed, patch_size)
        assert len(unpacked) == len(images)
        assert all(torch.equal(a, b) for a, b in zip(unpacked, images, strict=True))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.zeros(3, 0, 8), r"image 1 has shape \[3, 0, 8\]; give \[3, H, W\] with at least"),
        (torch.zeros(1, 8, 8), r"image 1 has shape \[1, 8, 8\]"),
        (torch.zeros(8, 8), r"image 1 has shape \[8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"image 1 is torch.uint8; give floats in"),
    ],
)
def test_what_is_no_image_is_not_packed(image: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pack_images([torch.zeros(3, 8, 8), image], patch_size=8)


def test_other_tokens_keep_the_layout():
    packed = pack_images(random_images([(9, 9), (8, 8)]), patch_size=8, row_tokens=7)
    other = packed.with_tokens(torch.zeros(7, 2)).to("cpu")
    assert other.tokens.shape == (7, 2)
    for name in ("patch_coord", "segment_ids", "cu_seqlens", "image_size", "grid"):
        assert torch.equal(getattr(other, name), getattr(packed, name))
    assert other.max_seqlen == packed.max_seqlen


def row_of(images: Sequence[Tensor], extra_tokens: int = 0, extra_slots: int = 0) -> PackedTokens:
    """Pack images, or none at all, with anything but zeros in the padding."""
    num_tokens = sum(-(-image.shape[1] // PATCH) * -(-image.shape[2] // PATCH) for image in images)
    layout = layout_of(
        [(image.shape[1], image.shape[2]) for image in images],
        patch_size=PATCH,
        row_tokens=num_tokens + extra_tokens,
        max_images=len(images) + extra_slots,
        max_seqlen=100,
    )
    tokens = torch.randn(num_tokens + extra_tokens, 3 * PATCH**2)
    if images:
        tokens[:num_tokens] = pack_images(images, patch_size=PATCH).tokens
    return layout.with_tokens(tokens)


def run_rows(
    model: Autoencoder, loss: nn.Module, rows: Sequence[tuple[PackedTokens, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Return the summed terms, the gradients of the loss, and the outputs without padding."""
    model.zero_grad()
    totals: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    for row, position in rows:
        output = model(row)
        terms = loss(output, row, position)
        terms["loss"].backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.detach()
        outputs.append(output.pixels.tokens.detach()[: int(row.num_tokens())])
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return totals, gradients, outputs


def assert_same(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-4) -> None:
    """Compare up to the order of float32 sums."""
    difference = (actual - expected).norm()
    assert difference <= tolerance * expected.norm(), f"{name} is off by {difference:.1e}"


@pytest.fixture(scope="module")
def loss(tiny_dino: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ReconstructionLoss:
    folder = tmp_path_factory.mktemp("dino")
    tiny_dino.save_pretrained(folder)
    config = LossConfig(ssim=0.5, ssim_tile=16, dino=500.0, dino_weights=str(folder))
    return ReconstructionLoss(config)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=4),
    extra_tokens=st.integers(0, 6),
    extra_slots=st.integers(0, 2),
    cut=st.integers(0, 4),
    order=st.integers(0, 2**32),
)
@example(sizes=[(1, 1), (40, 33)], extra_tokens=0, extra_slots=0, cut=1, order=1)
@example(sizes=[(17, 39), (8, 8), (24, 16)], extra_tokens=5, extra_slots=1, cut=0, order=3)
def test_packing_changes_no_output_no_loss_and_no_gradient(
    make_autoencoder: Callable[..., Autoencoder],
    loss: ReconstructionLoss,
    sizes: list[tuple[int, int]],
    extra_tokens: int,
    extra_slots: int,
    cut: int,
    order: int,
) -> None:
    torch.manual_seed(len(sizes) + order)
    model = make_autoencoder(encoder_depth=2)
    images, positions = random_images(sizes), torch.rand(len(sizes), 2)
    alone = [(row_of([image]), positions[i : i + 1]) for i, image in enumerate(images)]
    expected_terms, expected_gradients, expected_outputs = run_rows(model, loss, alone)
    # A single token attends to itself whatever its q and k are.
    queries_matter = any(len(row.tokens) > 1 for row, _ in alone)
    for name, gradient in expected_gradients.items():
        assert gradient.any() or (not queries_matter and "attn.norm_" in name), name
    assert set(expected_terms) == {"loss", "charbonnier", "ssim_loss", "dino"}

    places = list(range(len(images)))
    random.Random(order).shuffle(places)
    for split in ([places], [places[:cut], places[cut:]]):
        rows = [
            (
                row_of([images[i] for i in members], extra_tokens or not members, extra_slots + 1),
                torch.cat([positions[members], torch.rand(extra_slots + 1, 2)]),
            )
            for members in split
        ]
        terms, gradients, outputs = run_rows(model, loss, rows)

        assert_same(torch.cat(outputs), torch.cat([expected_outputs[i] for i in places]), "output")
        for name, value in expected_terms.items():
            assert_same(terms[name], value, name)
        for name, gradient in expected_gradients.items():
            # Charbonnier's gradient is steep where a pixel is met to a thousandth.
            assert_same(gradients[name], gradient, name, tolerance=2e-3)


def test_a_row_without_images_gives_every_parameter_a_gradient_of_zeros(make_autoencoder, loss):
    model = make_autoencoder()
    row = row_of([], extra_tokens=6, extra_slots=2)
    terms, gradients, _ = run_rows(model, loss, [(row, torch.rand(2, 2))])
    assert all(value == 0 for value in terms.values())
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())
