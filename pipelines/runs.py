"""A run: how and where it goes, and what its folder says of it."""

import json
from dataclasses import fields
from typing import Any, TypeVar

from pipelines.tracking import TrackingConfig
from vitok.config import config, describe_difference, parse_config, parse_json, to_dict
from vitok.parallel import ParallelConfig
from vitok.storage import Folder

CONFIG_FILE = "config.json"
# Ray Train's own record of what was committed: a checkpoint that it does not name is half-written.
_SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
# A field that the config of one kind of training alone has -> what that trains, and with what.
_KINDS = {"stages": "an autoencoder (`vitok train`)", "cache": "a generator (`vitok flow`)"}

TrainingT = TypeVar("TrainingT")


@config
class RunConfig:
    """How and where a training runs; nothing here changes what is learned, but for rounding.

    Attributes:
        name: the same name continues the same run.
        storage: folder or `s3://` prefix that holds runs.
        num_workers: training processes, one for each GPU; the most of them if min_workers is set.
        min_workers: go on with as few where nodes are lost, and take new ones in as they come; the
            global batch stays what it is. 0 always waits for all num_workers. Growing takes cores
            that are free: nodes need more than the workers take, or nothing is left to read with.
        cpus_per_worker: CPU cores that Ray sets aside for each of them.
        use_gpu: train on GPUs.
        compute_dtype: of matrix products; master weights and reductions are float32.
        parallel: activation checkpointing, compilation and float8 of the blocks.
        log_every: steps between two records of rates and norms; the last step has one too.
        evaluate_every: steps between two evaluations; the last step has one too.
        checkpoint_every: steps between two checkpoints; the last step has one too.
        keep_checkpoints: older ones are deleted.
        max_failures: worker failures after which the run gives up; nodes that are taken away with
            notice are not counted.
        mfu: log the share of the devices' peak that is reached. On CPUs the peak is measured, which
            takes 2 s at every start.
        accept_changes: continue a run although its config has changed.
        tracking: the MLflow run.
    """

    name: str
    storage: str = "runs"
    num_workers: int = 8
    min_workers: int = 0
    cpus_per_worker: float = 8.0
    use_gpu: bool = True
    compute_dtype: str = "bfloat16"
    parallel: ParallelConfig = ParallelConfig()
    log_every: int = 10
    evaluate_every: int = 5000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_failures: int = 3
    mfu: bool = True
    accept_changes: bool = False
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain name: it becomes a folder")
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers} must be at least 1")
        if not 0 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} must be from 1 to num_workers="
                f"{self.num_workers}, or 0 for a fixed number"
            )
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints} must be at least 1")
        if min(self.log_every, self.evaluate_every, self.checkpoint_every) < 1:
            raise ValueError("log_every, evaluate_every and checkpoint_every must be at least 1")
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} must be bfloat16 or float32")

    @property
    def folder(self) -> Folder:
        """The run's folder: its config, its checkpoints, its export."""
        return Folder.of(self.storage, self.name)


def claim_folder(settings: Any) -> None:
    """Write a run's config into its folder, or check that the run that is there has the same.

    A run without a checkpoint has nothing to lose, and takes the new config.

    Raises:
        ValueError: a run of this name has another config; the differences are listed.
    """
    folder: Folder = settings.run.folder
    text = folder.read_text(CONFIG_FILE)
    if text is None or latest_checkpoint(folder) is None:
        folder.write_text(CONFIG_FILE, json.dumps(to_dict(settings), indent=2) + "\n")
        return
    before = parse_json(type(settings), text, f"{folder.uri}/{CONFIG_FILE}")
    differences = [
        line for line in describe_difference(before, settings) if not line.startswith("run.")
    ]
    if differences and not settings.run.accept_changes:
        raise ValueError(
            f"the run {settings.run.name!r} in {folder.uri} has another config "
            f"({'; '.join(differences)}); choose another run.name, undo the change, or set "
            "run.accept_changes to go on with it"
        )
    if differences:
        folder.write_text(CONFIG_FILE, json.dumps(to_dict(settings), indent=2) + "\n")


def read_run(folder: Folder, cls: type[TrainingT]) -> TrainingT:
    """Return the config of the training in a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is a run of another kind.
    """
    text, source = folder.read_text(CONFIG_FILE), f"{folder.uri}/{CONFIG_FILE}"
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    (wanted,) = [kind for field, kind in _KINDS.items() if field in names]
    if text is None:
        raise FileNotFoundError(
            f"{folder.uri} holds no run (no {CONFIG_FILE}); give the folder of a run of {wanted}, "
            "such as runs/NAME"
        )
    found = parse_json(dict[str, Any], text, source)
    kinds = [kind for field, kind in _KINDS.items() if field in found]
    if wanted not in kinds:
        what = f"the run of {kinds[0]}" if kinds else "no run"
        raise ValueError(f"{folder.uri} is {what}; give the run of {wanted}")
    return parse_config(cls, found, source)


def latest_checkpoint(folder: Folder) -> tuple[Folder, dict[str, Any]] | None:
    """Return a run's newest complete checkpoint and the metrics reported with it, if any.

    It is the one that `ray.train.get_checkpoint()` gives to a restarted worker.
    """
    text = folder.read_text(_SNAPSHOT_FILE)
    latest = json.loads(text)["latest_checkpoint_result"] if text else None
    return (folder.child(latest["checkpoint_dir_name"]), latest["metrics"]) if latest else None


def newest_checkpoint(folder: Folder) -> tuple[Folder, dict[str, Any]]:
    """Return what latest_checkpoint does, of a run that has one.

    Raises:
        FileNotFoundError: it has none yet.
    """
    latest = latest_checkpoint(folder)
    if latest is None:
        raise FileNotFoundError(
            f"the run in {folder.uri} has no complete checkpoint yet; wait for its first, or lower "
            "run.checkpoint_every"
        )
    return latest


def next_step(folder: Folder) -> int:
    """Return the first step of a run that no complete checkpoint contains."""
    latest = latest_checkpoint(folder)
    return int(latest[1]["cursor"]["step"]) if latest else 0
