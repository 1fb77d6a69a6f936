"""Driver of a training whose workers write down which samples they see; the tests kill it.

Usage: recording_training.py CONFIG.json NOTES_FOLDER [STEP_AT_WHICH_RANK_1_KILLS_ITSELF_ONCE]
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines import train_autoencoder
from pipelines.ingest import PackedRow
from pipelines.launch import launch
from pipelines.tracking import open_run
from pipelines.train_autoencoder import AutoencoderTraining, plan_of, prepare
from vitok.config import read_config


def recording_worker(given: dict[str, Any], notes: Path, fatal_step: int | None) -> None:
    """Run the real training worker, with a note of every packed row before it is used."""
    original = train_autoencoder.reconstruction_step
    rank, pid = dist.get_rank(), os.getpid()
    marker = notes / "killed"

    def record(
        settings: AutoencoderTraining,
        loss: nn.Module,
        model: nn.Module,
        row: PackedRow,
        device: torch.device,
    ) -> dict[str, Tensor]:
        if rank == 1 and row.step == fatal_step and not marker.exists():
            marker.touch()
            os.kill(pid, signal.SIGKILL)
        note = {
            "step": row.step,
            "rank": rank,
            "world_size": dist.get_world_size(),
            "group": os.environ["MASTER_PORT"],
            "keys": row.keys,
        }
        with (notes / f"{pid}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return original(settings, loss, model, row, device)

    train_autoencoder.reconstruction_step = record
    train_autoencoder._worker(given)


def main() -> None:
    """Train by the config, on the cluster that RAY_ADDRESS names."""
    settings = read_config(Path(sys.argv[1]), AutoencoderTraining)
    notes = Path(sys.argv[2])
    fatal_step = int(sys.argv[3]) if len(sys.argv) > 3 else None
    worker = functools.partial(recording_worker, notes=notes, fatal_step=fatal_step)
    prepare(settings)
    ray.init(log_to_driver=False)
    run = settings.run
    with open_run(run.folder, run.name, run.tracking, run.storage, settings) as tracker:
        launch(worker, settings, plan_of(settings), tracker)


if __name__ == "__main__":
    main()
