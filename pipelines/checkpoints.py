"""Checkpoints of a run: read where it goes on, written while it trains."""

import tempfile
import threading
from pathlib import Path
from typing import Any

import ray.train

from pipelines.failures import Unrecoverable
from pipelines.plan import Plan
from vitok.checkpoint import TrainState


class Checkpoints:
    """Reads and writes the checkpoints of a training, one at a time; the same calls on every rank.

    Args:
        state: what changes in training.
        plan: what the cursor counts in.
        story: JSON types, kept in every checkpoint: the config, the MLflow run.
    """

    def __init__(self, state: TrainState, plan: Plan, story: dict[str, Any]) -> None:
        self._state = state
        self._plan = plan
        self._story = story
        self._is_idle = threading.Event()
        self._is_idle.set()

    def load(self, checkpoint: ray.train.Checkpoint | None) -> dict[str, Any]:
        """Set the state to a checkpoint, if there is one.

        Returns:
            progress: the cursor, what was skipped and asked again until it, the corpus' digest.

        Raises:
            Unrecoverable: the corpus has changed since.
        """
        progress = {
            "cursor": self._plan.cursor(0),
            "skipped": 0,
            "store_retries": 0,
            "corpus": self._plan.corpus.digest,
        }
        if checkpoint is None:
            return progress
        with checkpoint.as_directory() as folder:
            saved = self._state.load(Path(folder))
        if saved["corpus"] != progress["corpus"]:
            raise Unrecoverable(
                f"{self._plan.corpus.location} has changed since the run's last checkpoint, and "
                "with it the order of samples; restore the manifests, or choose another run.name"
            )
        return {name: saved[name] for name in progress}

    def save(
        self, progress: dict[str, Any], metrics: dict[str, float], done: int, *, wait: bool
    ) -> None:
        """Copy the state, write it and report it to Ray Train.

        Args:
            done: steps behind it.
            wait: until it is in the run's storage.
        """
        self._is_idle.wait()
        self._is_idle.clear()
        folder = tempfile.mkdtemp(prefix="vitok-checkpoint-")
        saving = self._state.save(Path(folder), progress | self._story)
        storage = ray.train.get_context().get_storage()

        def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            try:
                saving.result()
                # Every rank uploads its own shards, and the checkpoint counts once all are there.
                return storage.persist_current_checkpoint(checkpoint, name)
            finally:
                self._is_idle.set()

        modes = ray.train.CheckpointUploadMode
        ray.train.report(
            metrics | progress,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{done:08d}",
            checkpoint_upload_mode=modes.SYNC if wait else modes.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=upload,
        )
