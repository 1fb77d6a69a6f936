"""Checkpoints of a run: read where it goes on, written while it trains."""

import hashlib
import logging
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray.train

from pipelines.failures import Unrecoverable
from pipelines.plan import Plan
from vitok.checkpoint import TrainState
from vitok.storage import Folder

logger = logging.getLogger(__name__)


class Checkpoints:
    """Reads and writes the checkpoints of a training, one at a time; the same calls on every rank.

    Args:
        run: where the checkpoints go.
        state: what changes in training.
        plan: what the cursor counts in.
        story: JSON types, kept in every checkpoint: the config, the MLflow run.
    """

    def __init__(self, run: Folder, state: TrainState, plan: Plan, story: dict[str, Any]) -> None:
        self._run = run
        self._state = state
        self._plan = plan
        self._story = story
        self._is_idle = threading.Event()
        self._is_idle.set()

    def load(self, checkpoint: ray.train.Checkpoint | None) -> dict[str, Any]:
        """Set the state to a checkpoint, if there is one, and delete what killed workers left.

        Returns:
            progress: the cursor, what was skipped and asked again until it, the corpus' digest.

        Raises:
            Unrecoverable: the corpus has changed since.
        """
        if ray.train.get_context().get_local_rank() == 0:
            remove_unfinished(self._run)
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
        folder = tempfile.mkdtemp(prefix=unfinished_prefix(self._run))
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


def remove_unfinished(run: Folder) -> None:
    """Delete from this node the checkpoints of a run whose writers were killed on the way.

    Called before a worker of this node begins one.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{unfinished_prefix(run)}*"):
        logger.warning("deleting %s, which a worker that was killed has left", folder)
        shutil.rmtree(folder, ignore_errors=True)


def unfinished_prefix(run: Folder) -> str:
    """Return how the names of a run's checkpoints begin while they are on their way to it."""
    return f"vitok-checkpoint-{hashlib.sha256(run.uri.encode()).hexdigest()[:16]}-"
