"""Weights in a folder: encoder.safetensors, decoder.safetensors and config.json."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitok.autoencoder import Autoencoder, AutoencoderConfig, part_of
from vitok.config import read_config, write_config

CONFIG_FILE = "config.json"
PARTS = ("encoder", "decoder")


def save_pretrained(folder: Path, config: AutoencoderConfig, weights: dict[str, Tensor]) -> None:
    """Write weights as the two files of a released model, plus the config.

    Args:
        weights: every parameter of Autoencoder(config) by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        tensors = {name: x.contiguous() for name, x in weights.items() if part_of(name) == part}
        save_file(tensors, folder / f"{part}.safetensors")
    write_config(folder / CONFIG_FILE, config)


def from_pretrained(folder: Path | str, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """Load an autoencoder from a folder that save_pretrained wrote; in eval mode, on the CPU.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is damaged, or the tensors are not those of the config; missing, surplus
            and mis-shaped ones are listed.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, *(f"{part}.safetensors" for part in PARTS)):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {file}; give the folder of exported weights (config.json, "
                "encoder.safetensors, decoder.safetensors), such as RUN/export of a finished run"
            )
    config = read_config(folder / CONFIG_FILE, AutoencoderConfig)
    with torch.device("meta"):
        model = Autoencoder(config)
    weights: dict[str, Tensor] = {}
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; copy it again") from error
    _check_weights(model, weights, folder)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def encoder_digest(model: Autoencoder) -> str:
    """Return the sha256 (hex) of the encoder: its shape and every weight, as float32."""
    digest = hashlib.sha256()
    config = model.config
    shape = (config.patch_size, config.latent_channels, config.encoder_heads)
    digest.update(repr(shape).encode())
    for name, parameter in sorted(model.named_parameters()):
        if part_of(name) == "encoder":
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_weights(model: Autoencoder, weights: dict[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    complaints = [f"{name} missing" for name in expected.keys() - found.keys()]
    complaints += [f"{name} not expected" for name in found.keys() - expected.keys()]
    complaints += [
        f"{name} has shape {found[name]} where the config says {expected[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    if complaints:
        shown = "; ".join(sorted(complaints)[:10])
        more = f" and {len(complaints) - 10} more" if len(complaints) > 10 else ""
        raise ValueError(f"{folder} does not hold the weights of its config: {shown}{more}")
