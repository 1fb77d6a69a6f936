"""Folders of weights for the tests of loading."""

from pathlib import Path

from safetensors.torch import load_file, save_file


def forget_config(folder: Path) -> None:
    """Leave nothing but the tensors, as in weights that others wrote."""
    (folder / "config.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        file.unlink()
        save_file(tensors, file)
