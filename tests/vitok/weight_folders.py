"""Folders of weights for the tests of loading."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vitok.autoencoder import Autoencoder, part_of


def forget_config(folder: Path) -> None:
    """Leave nothing but the tensors, as in weights that others wrote."""
    (folder / "config.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        file.unlink()
        save_file(tensors, file)


def assert_same(loaded: Autoencoder, model: Autoencoder, part: str | None = None) -> None:
    """Compare the weights of a model, or of the part of it that was loaded, bit for bit."""
    expected = {
        name: x for name, x in model.state_dict().items() if part is None or part_of(name) == part
    }
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
