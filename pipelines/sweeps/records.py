"""What is known of a sweep's trials: one small file each, which outlives every process."""

import json
import math
from dataclasses import field
from typing import Any, Literal

import torch

from pipelines.sweeps.config import EVALUATED, SweepConfig, Trial, same_study
from pipelines.sweeps.costs import work_of
from vitok.autoencoder import Autoencoder
from vitok.config import config, parse_json, to_dict
from vitok.patches import num_tokens
from vitok.storage import Folder

State = Literal["running", "finished", "stopped", "diverged", "out of memory", "failed"]

SWEEP_FILE = "sweep.json"
_RECORDS = "trials"
_SIDE = 256  # of the image by which models are compared, in pixels
# States of trials that would end in the same way again, and of those that are done.
ENDED = ("finished", "stopped", "diverged", "out of memory")


@config
class Report:
    """What a trial reported with a checkpoint.

    Attributes:
        step: steps done.
        images, flops: work done.
        metrics: of the training.
    """

    step: int
    images: int
    flops: float
    metrics: dict[str, float]


@config
class TrialRecord:
    """A trial: what it costs, how far it is, how it ended.

    Attributes:
        name, values: of the trial.
        state: `running` also where the sweep itself was ended; `stopped` is asha's word.
        reason: why it did not finish.
        starts: processes that worked at it, one after another.
        num_workers, steps, images, training_flops: of the whole training.
        patch_size, latent_channels, encoder_depth, decoder_depth, decoder_width: of the model.
        compression_ratio: r.
        encoder_parameters, decoder_parameters: of the model's halves.
        flops_256p: operations of reconstructing an image of 256 x 256.
        latency_ms: median time of that on one worker; None where it was not measured.
        reports: at its checkpoints.
        results: metrics at its end; eval_rfid and eval_rfdd once it is evaluated.
        mlflow_run: its id; empty where it has none yet.
    """

    name: str
    values: dict[str, str]
    state: State = "running"
    reason: str = ""
    starts: int = 0
    num_workers: int
    steps: int
    images: int
    training_flops: float
    patch_size: int
    latent_channels: int
    encoder_depth: int
    decoder_depth: int
    decoder_width: int
    compression_ratio: float
    encoder_parameters: int
    decoder_parameters: int
    flops_256p: float
    latency_ms: float | None = None
    reports: tuple[Report, ...] = ()
    results: dict[str, float] = field(default_factory=dict)
    mlflow_run: str = ""

    @classmethod
    def of(cls, trial: Trial) -> "TrialRecord":
        """Return the record of a trial that has not begun."""
        model = trial.settings.model
        with torch.device("meta"):
            built = Autoencoder(model)
        work = work_of(trial.settings)
        tokens = num_tokens(_SIDE, _SIDE, model.patch_size)
        return cls(
            name=trial.name,
            values=trial.values,
            num_workers=trial.settings.run.num_workers,
            steps=sum(stage.steps for stage in trial.settings.stages),
            images=work.images,
            training_flops=work.flops,
            patch_size=model.patch_size,
            latent_channels=model.latent_channels,
            encoder_depth=model.encoder_depth,
            decoder_depth=model.decoder_depth,
            decoder_width=model.decoder_width,
            compression_ratio=model.compression_ratio,
            encoder_parameters=built.num_parameters("encoder"),
            decoder_parameters=built.num_parameters("decoder"),
            flops_256p=tokens * model.flops_per_token(tokens),
        )

    @property
    def latest(self) -> dict[str, float]:
        """The metrics at its end, or at its last checkpoint."""
        return self.results or (self.reports[-1].metrics if self.reports else {})


def read_sweep(folder: Folder) -> SweepConfig:
    """Return the config of the sweep in a folder.

    Raises:
        FileNotFoundError: there is no sweep.
    """
    text = folder.read_text(SWEEP_FILE)
    if text is None:
        raise FileNotFoundError(
            f"{folder.uri} holds no sweep (no {SWEEP_FILE}); give the name of one, and the folder "
            "of the runs with --storage"
        )
    return parse_json(SweepConfig, text, f"{folder.uri}/{SWEEP_FILE}")


def claim_sweep(sweep: SweepConfig) -> None:
    """Write a sweep's config into its folder; new trials may have been added since the last time.

    Raises:
        ValueError: the sweep of this name compares something else; the differences are listed.
    """
    if sweep.folder.exists(SWEEP_FILE) and (records := read_records(sweep.folder)):
        is_evaluated = any(EVALUATED.keys() & record.results for record in records.values())
        differences = same_study(read_sweep(sweep.folder), sweep, is_evaluated=is_evaluated)
        if differences:
            raise ValueError(
                f"the sweep {sweep.name!r} in {sweep.folder.uri} compares something else "
                f"({'; '.join(differences)}); choose another name, or undo the change"
            )
    sweep.folder.write_text(SWEEP_FILE, json.dumps(to_dict(sweep), indent=2) + "\n")


def read_records(folder: Folder) -> dict[str, TrialRecord]:
    """Return the records of a sweep's trials, by name."""
    records: dict[str, TrialRecord] = {}
    place = folder.child(_RECORDS)
    for name in place.names():
        if name.endswith(".json"):
            text = place.read_bytes(name).decode()
            record = parse_json(TrialRecord, text, f"{place.uri}/{name}")
            records[record.name] = record
    return records


def write_record(folder: Folder, record: TrialRecord) -> None:
    """Write the record of a trial into the folder of its sweep."""
    text = json.dumps(to_dict(record), indent=1) + "\n"
    folder.child(_RECORDS).write_text(f"{record.name}.json", text)


def finite(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among what a training reported, without those that are none."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
