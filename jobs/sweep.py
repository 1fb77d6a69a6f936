"""`vitok sweep`: what a study would take, and what it found."""

import json as json_format
from dataclasses import dataclass

from jobs import positional
from pipelines.sweeps.config import SweepConfig, Trial, trials_of
from pipelines.sweeps.costs import memory_of, work_of
from pipelines.sweeps.report import study_of, to_json, write_report
from vitok.storage import Folder


@dataclass(frozen=True)
class TrialCost:
    """What a trial would take.

    Attributes:
        name: of the trial.
        num_workers: that it takes.
        memory_gb: on each of them.
        images, steps, training_flops: of the whole training.
        worker_hours: of all its workers together, at the sweep's worker_flops.
    """

    name: str
    num_workers: int
    memory_gb: float
    images: int
    steps: int
    training_flops: float
    worker_hours: float


def costs_of(sweep: SweepConfig) -> list[TrialCost]:
    """Return what every trial of a sweep would take; for optuna, num_trials times the base."""
    trials = trials_of(sweep)
    if not trials:
        trials = [Trial(f"trial {i + 1}", {}, sweep.base) for i in range(sweep.num_trials)]
    return [_cost_of(trial, sweep.worker_flops) for trial in trials]


def _cost_of(trial: Trial, worker_flops: float) -> TrialCost:
    settings = trial.settings
    work = work_of(settings)
    return TrialCost(
        name=trial.name,
        num_workers=settings.run.num_workers,
        memory_gb=memory_of(settings, settings.run.num_workers).total / 1e9,
        images=work.images,
        steps=sum(stage.steps for stage in settings.stages),
        training_flops=work.flops,
        worker_hours=work.flops / worker_flops / 3600,
    )


def format_costs(sweep: SweepConfig, costs: list[TrialCost]) -> str:
    """Return what a sweep would take, as a table for a terminal."""
    kind = "GPU" if sweep.base.run.use_gpu else "worker"
    rows = [("trial", f"{kind}s", f"GB/{kind}", "images", "steps", "FLOPs", f"{kind} hours")]
    rows += [
        (
            cost.name,
            str(cost.num_workers),
            f"{cost.memory_gb:.3g}",
            f"{cost.images:,}",
            f"{cost.steps:,}",
            f"{cost.training_flops:.3g}",
            f"{cost.worker_hours:,.3g}",
        )
        for cost in costs
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    hours = sum(cost.worker_hours for cost in costs)
    largest = max(cost.num_workers for cost in costs)
    lines.append(
        f"\n{len(costs)} trials, {hours:,.3g} {kind} hours at {sweep.worker_flops:.3g} operations "
        f"a second on each, computed and not measured; the largest trial takes {largest} "
        f"{kind}{'s' * (largest > 1)}. Memory without perceptual networks; leave a tenth."
    )
    if sweep.scheduler == "asha":
        lines.append("asha will stop some of them early.")
    if sweep.is_evaluated:
        lines.append("Finished trials are evaluated at the end, which is not counted.")
    return "\n".join(lines)


def report(name: positional.Name, /, *, storage: str = "runs", json: bool = False) -> None:
    """Report on a sweep, finished or not, from its records: Markdown, JSON, CSV and plots.

    Args:
        name: of the sweep.
        storage: folder or `s3://` prefix that holds the runs.
        json: print the report as JSON on the last line.
    """
    folder = Folder.of(storage, name)
    written = write_report(folder)
    if json:
        print(json_format.dumps(to_json(study_of(folder))))
        return
    print(written.read_text("report.md"))
    print(f"report: {written.uri}")
