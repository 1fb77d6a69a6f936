import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.vitok.random_inception import write_inception
from vitok.features import INCEPTION_SHA256, DinoFeatures, InceptionFeatures, to_levels
from vitok.images import to_pil


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size) * 2.4 - 1.2 for size in sizes]


@pytest.fixture
def inception(tmp_path: Path) -> InceptionFeatures:
    file, digest = write_inception(tmp_path / "inception.pt")
    return InceptionFeatures.load(str(file), digest)


def test_levels_are_those_of_a_saved_image() -> None:
    (image,) = images((20, 30))
    saved = torch.tensor(list(to_pil(image).tobytes()), dtype=torch.uint8)
    assert torch.equal(to_levels(image).permute(1, 2, 0).flatten(), saved)


def test_inception_sees_bytes_and_sizes_as_they_are(inception: InceptionFeatures) -> None:
    batch = images((40, 30), (16, 16), (40, 30), (300, 20))
    found = inception(batch)
    assert found.dtype == torch.float32
    for image, features in zip(batch, found, strict=True):
        expected = inception.network(to_levels(image)[None], return_features=True)[0]
        torch.testing.assert_close(features, expected)
    assert (found[0] != found[2]).any()


def test_probabilities_are_those_of_the_network_without_its_last_bias(
    inception: InceptionFeatures,
) -> None:
    batch = images((32, 32), (32, 32))
    levels = torch.stack([to_levels(image) for image in batch])
    found = inception.probabilities(inception(batch))
    torch.testing.assert_close(found, inception.network(levels, no_output_bias=True))
    assert not torch.allclose(found, inception.network(levels)), "there is a bias"
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_only_the_file_of_the_field_or_one_that_the_user_names_is_loaded(tmp_path: Path) -> None:
    file, digest = write_inception(tmp_path / "inception.pt")
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256
    with pytest.raises(ValueError, match=f"set inception_digest to {digest}"):
        InceptionFeatures.load(str(file))
    with pytest.raises(ValueError, match="damaged, or another"):
        InceptionFeatures.load(str(file), "0" * 64)
    assert InceptionFeatures.load(str(file), digest.upper()).digest == digest


def test_files_that_are_no_inception_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Inception-v3 at .*; download https://nvlabs"):
        InceptionFeatures.load(str(tmp_path / "nowhere.pt"))
    with pytest.raises(ValueError, match=r"ftp://x/y\.pt is no https URL"):
        InceptionFeatures.load("ftp://x/y.pt")
    for name, write, complaint in (
        ("text.pt", lambda path: path.write_text("text"), "no TorchScript file"),
        (
            "other.pt",
            lambda path: torch.jit.script(nn.ReLU()).save(str(path)),
            "no layer `output`",
        ),
    ):
        write(tmp_path / name)
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        with pytest.raises(ValueError, match=complaint):
            InceptionFeatures.load(str(tmp_path / name), digest)


def test_dino_features_are_the_class_token_of_the_resized_image(tiny_dino: nn.Module) -> None:
    extractor = DinoFeatures(tiny_dino)
    batch = images((40, 30), (224, 224), (500, 300))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for image, features in zip(batch, extractor(batch), strict=True):
        pixels = to_levels(image).float()[None] / 255
        resized = nn.functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            states = tiny_dino((resized - mean) / std).last_hidden_state
        torch.testing.assert_close(features, states[0, 0], atol=1e-5, rtol=1e-5)


def test_dino_weights_have_a_digest_and_are_named_where_they_are_missing(
    tiny_dino: nn.Module, tmp_path: Path
) -> None:
    tiny_dino.save_pretrained(tmp_path / "dino")
    loaded = DinoFeatures.load(str(tmp_path / "dino"))
    assert loaded.digest == DinoFeatures(tiny_dino).digest
    with torch.no_grad():
        next(loaded.network.parameters()).add_(1)
    assert DinoFeatures(loaded.network).digest != loaded.digest
    with pytest.raises(FileNotFoundError, match="and set networks.dino to FOLDER"):
        DinoFeatures.load(str(tmp_path / "nowhere"))
