"""Sharded checkpoints of a training in progress (torch.distributed.checkpoint)."""

import json
import warnings
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from vitok.ema import Ema
from vitok.optim import Optimizers

PROGRESS_FILE = "progress.json"
CHECKPOINT_METADATA = ".metadata"  # torch.distributed.checkpoint writes it last
_MODEL, _AVERAGE = "model.", "ema.average."


class TrainState:
    """Model, optimizer and average of one rank: what `dcp` saves, and reshards as ranks change.

    Made by all ranks together: writing in the background talks over a process group of its own.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers, ema: Ema | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self._ranks = dist.new_group(backend="gloo")

    def save(self, folder: Path, progress: dict[str, Any]) -> "Future[Any]":
        """Copy this rank's shards to host memory, and write them in the background.

        Called by every rank. The training may go on when this returns; one save must be finished
        before the next one begins.

        Args:
            folder: every rank may give a folder of its own; together they are the checkpoint.
            progress: JSON types; written by rank 0: step, cursor, config and the like.

        Returns:
            what is done, or has failed, when the shards are written.
        """
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=2))
        saving = dcp.async_save(
            self._state(),
            storage_writer=dcp.FileSystemWriter(folder),
            process_group=self._ranks,
        )
        return saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving

    def load(self, folder: Path) -> dict[str, Any]:
        """Read a checkpoint into model and optimizer, whatever number of ranks wrote it.

        Returns:
            the progress that `save` was given.

        Raises:
            ValueError: the checkpoint is of another architecture.
        """
        state = self._state()
        _check_shapes(folder, state["model"])
        if not _stored_shapes(folder, _AVERAGE):
            state.pop("ema", None)
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if self.ema is not None:
            if "ema" in state:
                self.ema.load_state_dict(state["ema"])
            else:
                self.ema.begin(self.model)
        return json.loads((folder / PROGRESS_FILE).read_text())

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state


def is_checkpoint(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is a finished checkpoint."""
    return {CHECKPOINT_METADATA, PROGRESS_FILE} <= set(names)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters in a checkpoint, by name."""
    return _stored_shapes(folder, _MODEL)


def _stored_shapes(folder: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(prefix): tuple(stored.size)
        for name, stored in metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def load_weights(model: nn.Module, folder: Path, *, average: bool = False) -> None:
    """Read the weights alone of a checkpoint into an unsharded model, in one process.

    Args:
        average: take the moving average of the weights where the checkpoint has it.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    weights = model.state_dict()
    _check_shapes(folder, weights)
    averaged = _stored_shapes(folder, _AVERAGE) if average else {}
    state: dict[str, Any] = {
        "model": {name: x for name, x in weights.items() if name not in averaged},
        "ema": {"average": {name: x for name, x in weights.items() if name in averaged}},
    }
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
