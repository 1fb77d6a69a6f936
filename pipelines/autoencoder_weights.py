"""Weights of autoencoders: loaded for use, started from, exported from a run."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from pipelines.autoencoder_training import FRESH_STARTS, AutoencoderTraining, read_settings
from pipelines.ingest import load_step
from pipelines.plan import Plan
from pipelines.runs import CONFIG_FILE, latest_checkpoint, newest_checkpoint
from vitok.autoencoder import Autoencoder
from vitok.config import flatten
from vitok.initialize import start_at_random, start_from_pca
from vitok.pretrained import EXPORT, WEIGHT_FILES, load_checkpoint, load_pretrained, save_pretrained
from vitok.storage import Folder
from vitok.variants import AutoencoderConfig, Part

_PCA_PATCHES = 16_384
# What weights may have been trained with, and go on without.
_NOT_OF_WEIGHTS = ("layer_scale", "latent_noise")


def load_autoencoder(
    location: str,
    *,
    part: Part | None = None,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
) -> Autoencoder:
    """Load a model for use, in eval mode on the CPU.

    Args:
        location: a training run (its newest checkpoint is taken), or what load_pretrained takes: a
            folder of weights, a checkpoint, a released model, a Hugging Face repository.
        part: load the encoder or the decoder alone.
        dtype: of the weights.
        meta: read no weights: the model stays on the meta device once it is known that they fit.

    Raises:
        FileNotFoundError: there is none of these, or the run has no checkpoint yet.
        ValueError: the tensors are not those of the config; it is a run of another kind.
    """
    folder = Folder.of(location)
    has_weights = any(folder.exists(file) for file in WEIGHT_FILES)
    if has_weights or not folder.exists(CONFIG_FILE):
        return load_pretrained(location, part=part, dtype=dtype, meta=meta)
    if latest_checkpoint(folder) is None and folder.child(EXPORT).names():
        return load_pretrained(location, part=part, dtype=dtype, meta=meta)
    model = read_settings(folder).model
    checkpoint, _ = newest_checkpoint(folder)
    return load_checkpoint(checkpoint, model, part=part, dtype=dtype, meta=meta)


def check_weights(location: str, model: AutoencoderConfig) -> None:
    """Check that the weights of a model are at a location, without reading them."""
    try:
        found = load_autoencoder(location, meta=True).config
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"start={location!r} is neither {' nor '.join(FRESH_STARTS)}, and there are no "
            f"weights: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"start={location!r} cannot be loaded: {error}") from error
    wanted, given = flatten(model), flatten(found)
    differences = [
        f"model.{name}={wanted[name]} where they have {given[name]}"
        for name in wanted
        if wanted[name] != given[name] and name not in _NOT_OF_WEIGHTS
    ]
    if differences:
        raise ValueError(
            f"the weights of start={location!r} are of another architecture "
            f"({', '.join(differences)}); change the model, or start from others"
        )


def export_weights(settings: AutoencoderTraining) -> Folder:
    """Write the run's newest weights for load_pretrained into its folder `export`."""
    run = settings.run.folder
    export, _ = export_run(run, run.child(EXPORT))
    return export


def export_run(run: Folder, target: Folder, *, average: bool = True) -> tuple[Folder, int]:
    """Write the weights of a run's newest checkpoint as a folder that load_pretrained takes.

    Args:
        target: what is in it already is replaced.
        average: the moving average of the weights where the run keeps one, else as they are.

    Returns:
        the target, and the steps that made the weights.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
    """
    settings = read_settings(run)
    checkpoint, metrics = newest_checkpoint(run)
    model = load_checkpoint(checkpoint, settings.model, average=average)
    with tempfile.TemporaryDirectory() as scratch:
        save_pretrained(Path(scratch), settings.model, model.state_dict())
        target.upload(Path(scratch))
    return target, int(metrics["cursor"]["step"])


def initialize(model: Autoencoder, settings: AutoencoderTraining, plan: Plan) -> None:
    """Set a model, sharded or not, to the weights at the start of a training."""
    if settings.start not in FRESH_STARTS:
        _start_from_weights(model, settings.start)
        return
    start_at_random(model, settings.seed)
    if settings.start == "pca":
        start_from_pca(model, _sample_patches(plan))


def _start_from_weights(model: Autoencoder, location: str) -> None:
    """Set a model to weights that rank 0 reads; it sends one parameter after another.

    So the store is read once, and the others hold no more than their shards and one parameter.
    """
    sends = dist.is_initialized()
    reads = not sends or dist.get_rank() == 0
    set_model_state_dict(
        model,
        load_autoencoder(location).state_dict() if reads else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=sends),
    )


def _sample_patches(plan: Plan) -> Tensor:
    """Return at least _PCA_PATCHES normalised patches [N, 3P^2] of the first steps, or all."""
    found: list[Tensor] = []
    for step in range(plan.num_steps):
        for row in load_step(plan, step):
            packed, _ = row.to_packed(torch.device("cpu"))
            found.append(packed.tokens[: row.num_tokens])
        if sum(len(patches) for patches in found) >= _PCA_PATCHES:
            break
    return torch.cat(found)
