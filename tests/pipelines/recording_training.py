"""Driver of a training whose workers write down which samples they see; the tests disturb it.

Runs `vitok train`, on the cluster that RAY_ADDRESS names.

Usage: recording_training.py CONFIG.json NOTES_FOLDER RECORDING_AS_JSON
where RECORDING are the keyword arguments of recording_worker.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs import cli, recipes
from pipelines import train_autoencoder
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.packed_rows import PackedRow
from tests.pipelines.recorded_runs import note_row
from vitok.config import read_config

# Names a group of workers, or * for all, and the step from which on it waits. What is to happen
# before that step cannot come too late.
HOLD_FILE = "hold"


def recording_worker(
    given: dict[str, Any], notes: Path, fatal_step: int | None = None, pause_s: float = 0.0
) -> None:
    """Run the real training worker, with a note of every packed row before it is used.

    What came of the row, the sums of its loss and its terms, is noted in a file beside it.

    Args:
        fatal_step: rank 1 kills itself there, once.
        pause_s: before every row; makes steps as slow as those of larger models.
    """
    original = train_autoencoder.reconstruction_step
    rank, pid = dist.get_rank(), os.getpid()
    group = os.environ["MASTER_PORT"]
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
        while must_wait(notes, group, row.step):
            time.sleep(0.02)
        time.sleep(pause_s)
        note_row(notes, row)
        terms = original(settings, loss, model, row, device)
        sums = {name: value.item() for name, value in terms.items()}
        with (notes / f"{pid}.losses").open("a") as file:
            file.write(json.dumps({"step": row.step, "group": group, "terms": sums}) + "\n")
        return terms

    train_autoencoder.reconstruction_step = record
    train_autoencoder._worker(given)


def must_wait(notes: Path, group: str, step: int) -> bool:
    """Whether HOLD_FILE says that a group shall not begin a step yet."""
    try:
        waiting, first = (notes / HOLD_FILE).read_text().split()
    except FileNotFoundError:
        return False
    return waiting in ("*", group) and step >= int(first)


def train(config: Path, notes: Path, **recording: Any) -> int:
    """Run `vitok train` with a config and recording workers; returns its exit status."""
    settings = read_config(config, AutoencoderTraining)
    recipes.TRAINING["recorded"] = lambda: settings
    train_autoencoder._worker = functools.partial(recording_worker, notes=notes, **recording)
    return cli.main(["train", "recorded"])


if __name__ == "__main__":
    sys.exit(train(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3])))
