"""Sharded checkpoints of a training in progress (torch.distributed.checkpoint)."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)

PROGRESS_FILE = "progress.json"
_METADATA_FILE = ".metadata"  # torch.distributed.checkpoint writes it last
_MODEL = "model."


class TrainState:
    """Model and optimizer of one rank: what `dcp` saves, and reshards when the ranks change."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def save(self, folder: Path, progress: dict[str, Any]) -> None:
        """Write this rank's shards, and on rank 0 where the run stands; called by every rank.

        Args:
            folder: every rank may give a folder of its own; together they are the checkpoint.
            progress: JSON types, under 1 KB: step, cursor and the like.
        """
        dcp.save(self._state(), storage_writer=dcp.FileSystemWriter(folder))
        if torch.distributed.get_rank() == 0:
            (folder / PROGRESS_FILE).write_text(json.dumps(progress))

    def load(self, folder: Path) -> dict[str, Any]:
        """Read a checkpoint into model and optimizer, whatever number of ranks wrote it.

        Returns:
            the progress that `save` was given.

        Raises:
            ValueError: the checkpoint is of another architecture.
        """
        state = self._state()
        _check_shapes(folder, state["model"])
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return json.loads((folder / PROGRESS_FILE).read_text())

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def is_checkpoint(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is a finished checkpoint."""
    return {_METADATA_FILE, PROGRESS_FILE} <= set(names)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters in a checkpoint, by name."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(_MODEL): tuple(stored.size)
        for name, stored in metadata.items()
        if name.startswith(_MODEL) and isinstance(stored, TensorStorageMetadata)
    }


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read the weights alone of a checkpoint into an unsharded model, in one process.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    state = {"model": model.state_dict()}
    _check_shapes(folder, state["model"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def _check_shapes(folder: Path, weights: dict[str, Any]) -> None:
    stored = weight_shapes(folder)
    for name, tensor in weights.items():
        shape = stored.get(name)
        if shape != tuple(tensor.shape):
            found = "nothing" if shape is None else f"shape {shape}"
            raise ValueError(
                f"{folder} is a checkpoint of another architecture: {name} should have shape "
                f"{tuple(tensor.shape)}, it holds {found}; use the model it was trained with, or "
                "another run name"
            )
