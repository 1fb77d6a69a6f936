import builtins
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.vitok.packed_rows import image_pairs, pack, padded_to, paint_beyond_edges, tile_of
from vitok.autoencoder import Reconstruction
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.packed import PackedTokens, layout_of, pack_images
from vitok.perceptual import TILE, DinoTileLoss, LpipsTileLoss

PATCH = 16
TILE_PATCHES = TILE // PATCH


class StandInLpips(nn.Module):
    """Built and called as lpips.LPIPS is, around a random trunk with a few of VGG16's layers."""

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | None = None,
        eval_mode: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        assert pnet_rand, "downloads VGG16"
        assert pretrained and lpips and net == "vgg" and version == "0.1" and model_path is None
        assert not spatial and not verbose
        self.net = nn.Module()
        self.net.slice1 = nn.Sequential()
        self.net.slice1.add_module("0", nn.Conv2d(3, 4, 3, padding=1))
        self.net.slice1.add_module("1", nn.Tanh())
        self.net.slice2 = nn.Sequential()
        self.net.slice2.add_module("4", nn.AvgPool2d(16))
        self.net.slice2.add_module("5", nn.Conv2d(4, 6, 3, padding=1))
        self.lin0 = nn.Sequential(nn.Dropout(), nn.Conv2d(4, 1, 1, bias=False))
        self.lin1 = nn.Sequential(nn.Dropout(), nn.Conv2d(6, 1, 1, bias=False))
        for layer in (self.lin0[1], self.lin1[1]):
            layer.weight.data.abs_()
        self.train(not eval_mode)

    def forward(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor:
        assert not retPerLayer and not normalize
        distance = in0.new_zeros(len(in0), 1, 1, 1)
        a, b = in0, in1
        for part, linear in ((self.net.slice1, self.lin0), (self.net.slice2, self.lin1)):
            a, b = part(a), part(b)
            unit_a, unit_b = (x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            distance = distance + linear((unit_a - unit_b) ** 2).mean((2, 3), keepdim=True)
        return distance


def random_lpips() -> StandInLpips:
    return StandInLpips(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture(params=["dino", "lpips"])
def tile_loss(request: pytest.FixtureRequest, tiny_dino: nn.Module) -> DinoTileLoss | LpipsTileLoss:
    return DinoTileLoss(tiny_dino) if request.param == "dino" else LpipsTileLoss(random_lpips())


def rows_of(sizes: list[tuple[int, int]], extra_slots: int = 2) -> tuple[PackedTokens, ...]:
    """Return a reconstruction, painted beyond the edges and ready for gradients, and its source."""
    outputs, targets = image_pairs(sizes)
    output = pack(outputs, PATCH, extra_slots=extra_slots)
    output = paint_beyond_edges(output, PATCH)
    return output.with_tokens(output.tokens.requires_grad_()), pack(targets, PATCH, 5, extra_slots)


def tile_pairs(
    outputs: list[Tensor], targets: list[Tensor], position: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Slice the tiles [3, 224, 224] of images, padded with gray."""
    return [
        (padded_to(a, TILE, TILE), padded_to(b, TILE, TILE))
        for a, b in (
            [tile_of(image, where, TILE_PATCHES, PATCH) for image in pair]
            for *pair, where in zip(outputs, targets, position, strict=False)
        )
    ]


def dino_distance(network: nn.Module, output: Tensor, target: Tensor) -> float:
    """Follow the definition on one pair of tiles [3, 224, 224], block by block."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: states.append(out))
        for layer in network.model.layer
    ]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        for tile in (output, target):
            network((((tile + 1) / 2 - mean) / std)[None])
    for hook in hooks:
        hook.remove()
    depth = len(hooks)
    assert len(states) == 2 * depth
    distances = []
    for a, b in zip(states[:depth], states[depth:], strict=True):
        a, b = (state[0].double() for state in (a, b))
        a, b = (state / state.norm(dim=-1, keepdim=True) for state in (a, b))
        distances.append(float(((a - b) ** 2).mean()))
    return sum(distances) / depth


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare up to the order of float32 sums; there must be something to compare."""
    assert expected.norm() > 0
    assert (actual - expected).norm() <= tolerance * expected.norm()


SIZES = [(232, 248), (40, 33), (9, 300)]


def test_each_loss_equals_its_definition_on_each_tile(
    tile_loss: DinoTileLoss | LpipsTileLoss,
) -> None:
    outputs, targets = image_pairs(SIZES)
    position = torch.rand(5, 2)
    output = paint_beyond_edges(pack(outputs, PATCH), PATCH)
    actual = tile_loss(output, pack(targets, PATCH), position)

    expected = 0.0
    for a, b in tile_pairs(outputs, targets, position):
        if isinstance(tile_loss, DinoTileLoss):
            expected += dino_distance(tile_loss.network, a, b)
        else:
            expected += float(tile_loss.network(a[None], b[None]))
    assert expected > 1e-4
    assert float(actual) == pytest.approx(expected, rel=1e-4)


def test_dino_loss_and_its_gradient_equal_those_of_dino_perceptual(
    tiny_dino: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("dino_perceptual.perceptual")
    requested = []

    def give_ours(name: str) -> nn.Module:
        requested.append(name)
        return tiny_dino

    monkeypatch.setattr(package, "AutoModel", SimpleNamespace(from_pretrained=give_ours))
    reference = package.DINOPerceptual(model_size="S")
    assert requested == ["facebook/dinov3-vits16-pretrain-lvd1689m"]

    outputs, targets = image_pairs([(TILE, TILE)] * 3)
    tiles = torch.stack(outputs).requires_grad_()
    expected = reference(tiles, torch.stack(targets))
    assert expected.shape == (3,)
    assert expected.min() > 1e-4
    expected.sum().backward()

    output, target = pack(outputs, PATCH), pack(targets, PATCH)
    output.tokens.requires_grad_()
    actual = DinoTileLoss(tiny_dino)(output, target, torch.rand(5, 2))
    actual.backward()
    assert_near(actual, expected.sum(), 1e-5)
    gradient = pack(list(tiles.grad), PATCH, extra_tokens=0).tokens
    assert_near(output.tokens.grad[: len(gradient)], gradient)


def test_what_lies_beyond_the_image_neither_counts_nor_gets_a_gradient(
    tile_loss: DinoTileLoss | LpipsTileLoss,
) -> None:
    outputs, targets = image_pairs(SIZES)
    target, position = pack(targets, PATCH), torch.rand(5, 2)
    plain = pack(outputs, PATCH)
    losses, gradients = [], []
    for row in (plain, paint_beyond_edges(plain, PATCH)):
        row = row.with_tokens(row.tokens.detach().clone().requires_grad_())
        losses.append(tile_loss(row, target, position))
        losses[-1].backward()
        gradients.append(row.tokens.grad)
    assert losses[0] == losses[1] > 0
    assert torch.equal(*gradients)
    # Noise may lie where the gradient is 0 alone.
    beyond = paint_beyond_edges(plain, PATCH).tokens != plain.tokens
    assert beyond.any() and gradients[0].any()
    assert not gradients[0][beyond].any()


def saved_bytes(
    tile_loss: DinoTileLoss | LpipsTileLoss, output: PackedTokens, target: PackedTokens
) -> int:
    """Count what a forward pass keeps for the way back."""
    sizes: list[int] = []

    def count(saved: Tensor) -> Tensor:
        sizes.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        tile_loss(output, target, torch.zeros(3, 2))
    return sum(sizes)


def test_the_source_keeps_no_graph(tile_loss: DinoTileLoss | LpipsTileLoss) -> None:
    output, target = rows_of([(TILE, TILE)])
    kept = saved_bytes(tile_loss, output, target)
    assert kept > 2 * target.tokens.nbytes
    target.tokens.requires_grad_()
    assert saved_bytes(tile_loss, output, target) == kept
    plain = output.with_tokens(output.tokens.detach())
    assert tile_loss(plain, target, torch.zeros(3, 2)).grad_fn is None
    assert saved_bytes(tile_loss, plain, target) == 0


def test_gradients_reach_the_reconstruction_and_not_the_network(
    tile_loss: DinoTileLoss | LpipsTileLoss,
) -> None:
    output, target = rows_of([(40, 33)])
    assert tile_loss(target, target, torch.rand(3, 2)) == 0
    tile_loss(output, target, torch.rand(3, 2)).backward()
    assert output.tokens.grad[:9].abs().sum(1).all()
    assert not output.tokens.grad[9:].any()
    assert list(tile_loss.parameters())
    assert all(p.grad is None and not p.requires_grad for p in tile_loss.parameters())


def test_networks_stay_in_eval_mode(tile_loss: DinoTileLoss | LpipsTileLoss) -> None:
    output, target = rows_of([(40, 33)])
    position = torch.rand(3, 2)
    before = tile_loss(output, target, position)
    nn.ModuleList([tile_loss]).train()
    assert not any(module.training for module in tile_loss.modules())
    assert tile_loss(output, target, position) == before


class NothingOnGray(nn.Module):
    """A network whose features of a constant tile are NaN, as are their gradients."""

    def forward(self, pixels: Tensor, output_hidden_states: bool) -> SimpleNamespace:
        contrast = (pixels - pixels[..., :1, :1]).abs().sum((1, 2, 3))[:, None, None]
        return SimpleNamespace(hidden_states=(pixels, pixels[:, 0] * contrast.sqrt() / contrast))


def test_unused_slots_add_nothing_even_if_the_network_fails_on_gray() -> None:
    without_bias = random_lpips()
    for layer in (without_bias.net.slice1[0], without_bias.net.slice2[1]):
        layer.bias.data.zero_()
    gray = torch.zeros(1, 3, TILE, TILE, requires_grad=True)
    without_bias(gray, gray).backward()
    assert gray.grad.isnan().all()
    assert NothingOnGray()(gray, True).hidden_states[1].isnan().all()

    for loss in (DinoTileLoss(NothingOnGray()), LpipsTileLoss(without_bias)):
        outputs, targets = image_pairs([(TILE, TILE)])
        position = torch.rand(3, 2)
        rows = []
        for extra_slots in (0, 2):
            output = pack(outputs, PATCH, extra_slots=extra_slots)
            output.tokens.requires_grad_()
            target = pack(targets, PATCH, extra_slots=extra_slots)
            value = loss(output, target, position[: 1 + extra_slots])
            value.backward()
            rows.append((value, output.tokens.grad))
        (alone, expected), (actual, gradient) = rows
        assert_near(actual, alone, 1e-6)
        assert_near(gradient, expected)
        assert not gradient[TILE_PATCHES**2 :].any()


def test_a_row_without_images_adds_exactly_nothing(
    tile_loss: DinoTileLoss | LpipsTileLoss,
) -> None:
    row = layout_of([], patch_size=PATCH, row_tokens=4, max_images=2, max_seqlen=4)
    target = row.with_tokens(torch.randn(4, 3 * PATCH**2))
    output = row.with_tokens(torch.full((4, 3 * PATCH**2), torch.nan, requires_grad=True))
    loss = tile_loss(output, target, torch.rand(2, 2))
    assert loss == 0
    loss.backward()
    assert torch.equal(output.tokens.grad, torch.zeros_like(output.tokens))


@pytest.mark.parametrize("how", ["bfloat16 network", "autocast"])
def test_dino_loss_in_mixed_precision_is_near_that_in_float32(
    how: str, tiny_dino: nn.Module
) -> None:
    output, target = rows_of([(232, 248), (40, 33)])
    position = torch.rand(4, 2)
    expected = DinoTileLoss(tiny_dino)(output, target, position)
    loss = DinoTileLoss(copy.deepcopy(tiny_dino))
    if how == "bfloat16 network":
        loss.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = loss(output, target, position)
    assert actual.dtype == torch.float32
    assert actual != expected
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0)
    actual.backward()
    assert output.tokens.grad.isfinite().all()
    assert output.tokens.grad.any()


class GivesStates(nn.Module):
    """A network whose only block gives the pixels in bfloat16, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pixels: Tensor, output_hidden_states: bool) -> SimpleNamespace:
        states = (pixels.mean(2).mT * self.factor).bfloat16()
        return SimpleNamespace(hidden_states=(states, states))


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_dino_features_are_normalised_in_float32_and_features_of_zero_are_no_nan(
    factor: float,
) -> None:
    outputs, targets = image_pairs([(TILE, TILE)])
    output, target = pack(outputs, PATCH), pack(targets, PATCH)
    output.tokens.requires_grad_()
    loss = DinoTileLoss(GivesStates(factor))(output, target, torch.rand(3, 2))
    loss.backward()
    assert output.tokens.grad.isfinite().all()

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    states = [
        ((((image + 1) / 2 - mean) / std).mean(1).T * factor).bfloat16().double()
        for image in (outputs[0], targets[0])
    ]
    a, b = (state / state.norm(dim=-1, keepdim=True).clamp(min=1e-6) for state in states)
    assert loss.item() == pytest.approx(float(((a - b) ** 2).mean()), rel=1e-3)


def test_dino_loss_compiles_as_one_graph_for_all_images_of_a_row_shape(
    tiny_dino: nn.Module,
) -> None:
    def rows(sizes: list[tuple[int, int]]) -> list[PackedTokens]:
        return [
            pack_images(images, patch_size=PATCH, row_tokens=300, max_images=3, max_seqlen=256)
            for images in image_pairs(sizes)
        ]

    loss = DinoTileLoss(tiny_dino)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    def assert_same(sizes: list[tuple[int, int]]) -> None:
        output, target = rows(sizes)
        position, values, gradients = torch.rand(3, 2), [], []
        for run in (loss, compiled):
            tokens = output.tokens.clone().requires_grad_()
            values.append(run(output.with_tokens(tokens), target, position))
            values[-1].backward()
            gradients.append(tokens.grad)
        assert_near(values[1], values[0])
        assert_near(gradients[1], gradients[0])

    assert_same([(40, 50), (256, 240)])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same([(100, 50), (226, 240), (16, 33)])
        assert_same([(1, 1)])


def test_dino_weights_come_from_a_folder_or_are_named_as_missing(
    tiny_dino: nn.Module, tmp_path: Path
) -> None:
    tiny_dino.save_pretrained(tmp_path / "dino")
    loaded = DinoTileLoss.from_pretrained(str(tmp_path / "dino")).network
    tiles = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded(tiles).last_hidden_state, tiny_dino(tiles).last_hidden_state)
    (tmp_path / "empty").mkdir()
    for missing in (str(tmp_path / "empty"), str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"no DINOv3 weights at .* request access to"):
            DinoTileLoss.from_pretrained(missing)


@pytest.fixture
def vgg_file(tmp_path: Path) -> Path:
    """Write random tensors under torchvision's names for the layers that the stand-in has."""
    tensors = {
        name.split(".", 1)[1]: torch.randn_like(tensor)
        for name, tensor in random_lpips().net.state_dict().items()
    }
    named = {f"features.{name}": tensor for name, tensor in tensors.items()}
    save_file(named | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.safetensors")
    return tmp_path / "vgg16.safetensors"


@pytest.fixture
def lpips_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=StandInLpips))


@pytest.mark.usefixtures("lpips_package")
def test_lpips_term_is_built_from_the_file_and_weighed(vgg_file: Path) -> None:
    config = LossConfig(lpips=0.5, lpips_weights=str(vgg_file))
    torch.manual_seed(1)
    loss = ReconstructionLoss(config)
    tensors = load_file(vgg_file)
    trunk = loss.lpips.network.net
    assert torch.equal(trunk.slice1[0].weight, tensors["features.0.weight"])
    assert torch.equal(trunk.slice2[1].bias, tensors["features.5.bias"])

    output, target = rows_of([(40, 33), (232, 248)])
    position = torch.rand(4, 2)
    terms = loss(Reconstruction(pixels=output, latents=output, kl_T=None), target, position)
    assert set(terms) == {"loss", "charbonnier", "ssim_loss", "lpips"}
    assert terms["lpips"].shape == () and terms["lpips"].dtype == torch.float32
    assert terms["lpips"] > 0
    torch.testing.assert_close(terms["lpips"], loss.lpips(output, target, position))
    others = terms["charbonnier"] + 0.1 * terms["ssim_loss"]
    torch.testing.assert_close(terms["loss"], others + 0.5 * terms["lpips"])


@pytest.mark.usefixtures("lpips_package")
def test_lpips_weights_that_are_missing_or_of_another_network_are_refused(
    tmp_path: Path,
) -> None:
    other, text = tmp_path / "other.safetensors", tmp_path / "vgg16.pth"
    save_file({"features.0.weight": torch.zeros(4, 3, 3, 3)}, other)
    text.write_text("not a tensor in sight")
    for location, refusal, sentence in (
        (tmp_path / "nowhere", FileNotFoundError, "no VGG16 weights at .*hf download timm/vgg16"),
        (other, ValueError, r"does not hold VGG16 .*: features.0.bias is missing; use"),
        (text, ValueError, "vgg16.pth is no safetensors file .*; use model.safetensors of timm"),
    ):
        with pytest.raises(refusal, match=sentence):
            ReconstructionLoss(LossConfig(lpips=1.0, lpips_weights=str(location)))


@pytest.mark.parametrize("failure", [ModuleNotFoundError("lpips"), RuntimeError("no nms")])
def test_lpips_that_cannot_be_imported_is_refused_as_the_loss_is_built(
    failure: Exception, vgg_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torchvision of another torch fails with a RuntimeError."""
    plain_import: Callable[..., Any] = builtins.__import__

    def fail_on_lpips(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "lpips":
            raise failure
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail_on_lpips)
    config = LossConfig(lpips=1.0, lpips_weights=str(vgg_file))
    with pytest.raises(ImportError, match=r"needs the package lpips .* with .pip install lpips."):
        ReconstructionLoss(config)
    ReconstructionLoss(LossConfig())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.popitem(), "missing"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "extra not expected"),
        (lambda weights: weights.update({"norm.weight": torch.zeros(3)}), "of another shape"),
    ],
)
def test_dino_weights_that_are_not_whole_are_refused(
    tiny_dino: nn.Module, tmp_path: Path, change, complaint: str
) -> None:
    tiny_dino.save_pretrained(tmp_path)
    DinoTileLoss.from_pretrained(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "norm.weight" in weights
    change(weights)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not hold a whole DINOv3: .*{complaint}"):
        DinoTileLoss.from_pretrained(str(tmp_path))
