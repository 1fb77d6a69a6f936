"""What is promised of a training that is disturbed, and whether it was kept."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.runs import RunConfig, next_step
from pipelines.tracking import metric_history
from tests.pipelines.recorded_runs import (
    Attempt,
    check_order,
    read_losses,
    read_notes,
    repeated_steps,
)
from tests.soak.memory import Life, growing, summary

# Of losses, relative: sums of two workers in another order.
_ROUNDING = 2e-4
# step -> group of workers -> term -> mean over the step's images
Losses = dict[int, dict[str, dict[str, float]]]


class Verdict:
    """Figures of a soak, and a sentence for every promise that was broken."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.broken: list[str] = []

    def promise(self, kept: bool, sentence: str) -> None:
        """Note a sentence if a promise was broken."""
        if not kept:
            self.broken.append(sentence)


def judge_training(
    settings: AutoencoderTraining, notes: Path, faults: Sequence[dict[str, Any]]
) -> Verdict:
    """Compare what a training did, and what was recorded of it, with what it should.

    Args:
        faults: as they were carried out.
    """
    verdict = Verdict()
    num_steps = next_step(settings.run.folder)
    kills = [fault for fault in faults if fault["kind"] == "kill trainer"]
    groups = list(dict.fromkeys(note["group"] for note in read_notes(notes)))
    verdict.figures |= {"steps": num_steps, "groups_of_workers": len(groups)}
    verdict.promise(
        len(groups) == 1 + len(kills),
        f"{len(kills)} workers were killed, and {len(groups)} groups of workers trained",
    )
    try:
        attempts = check_order(notes, plan_of(settings), num_steps)
    except AssertionError as error:
        verdict.broken.append(f"the order is not the plan's: {error}")
        return verdict
    _judge_repetitions(verdict, settings.run, attempts, kills)
    _judge_use(verdict, settings, attempts)
    losses = losses_of(read_losses(notes), attempts)
    _judge_losses(verdict, losses)
    _judge_record(verdict, settings.run, num_steps, losses)
    return verdict


def judge_memory(verdict: Verdict, lives: Sequence[Life], left: Sequence[str]) -> None:
    """Judge what processes and folders held.

    Args:
        left: files for temporary use that are there after the end.
    """
    verdict.figures["memory"] = summary(lives)
    verdict.figures["left"] = list(left)
    verdict.broken += growing(lives)
    verdict.promise(not left, f"temporary files were left: {', '.join(left)}")


def _judge_repetitions(
    verdict: Verdict,
    run: RunConfig,
    attempts: Sequence[Attempt],
    kills: Sequence[dict[str, Any]],
) -> None:
    repeated = repeated_steps(list(attempts))
    verdict.figures["repeated_steps"] = repeated
    # The interval that was lost, and the one in which its checkpoint was still on its way.
    limit = 2 * run.checkpoint_every
    verdict.promise(
        max(repeated, default=0) <= limit,
        f"{repeated} steps were repeated, where {limit} are two intervals of checkpoints",
    )
    if len(attempts) == 1 + len(kills):
        for attempt, kill in zip(attempts[1:], kills, strict=True):
            verdict.promise(
                attempt.first_step >= kill["recorded"],
                f"the checkpoint of step {kill['recorded']} was there, and the next group began "
                f"at step {attempt.first_step}",
            )


def _judge_use(
    verdict: Verdict, settings: AutoencoderTraining, attempts: Sequence[Attempt]
) -> None:
    """Judge whether epochs use every sample once."""
    keys_of = {step: rows for attempt in attempts for step, rows in attempt.keys.items()}
    used = Counter(key for rows in keys_of.values() for row in rows for key in row)
    num_samples = plan_of(settings).corpus.num_samples
    verdict.figures["epochs"] = round(used.total() / num_samples, 2)
    verdict.promise(
        len(used) == num_samples and max(used.values()) - min(used.values()) <= 1,
        f"{len(used)} of {num_samples} samples were used, from {min(used.values())} to "
        f"{max(used.values())} times",
    )


def losses_of(noted: Sequence[dict[str, Any]], attempts: Sequence[Attempt]) -> Losses:
    """Return the losses of every attempt at every step that was finished."""
    rows: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for note in noted:
        rows[note["step"], note["group"]].append(note["terms"])
    losses: Losses = defaultdict(dict)
    for attempt in attempts:
        for step, keys in attempt.keys.items():
            passes = -(-len(keys) // attempt.world_size)
            sums = rows[step, attempt.group]
            if len(sums) < passes * attempt.world_size:
                continue  # killed in the middle of it
            num_images = sum(map(len, keys))
            losses[step][attempt.group] = {
                name: sum(terms[name] for terms in sums) / num_images for name in sums[0]
            }
    return losses


def largest_difference(losses: Losses) -> tuple[int, float]:
    """Return how many steps were finished more than once, and how far their losses differ."""
    again = [[terms["loss"] for terms in groups.values()] for groups in losses.values()]
    again = [values for values in again if len(values) > 1]
    return len(again), max((max(v) / min(v) - 1 for v in again), default=0.0)


def _judge_losses(verdict: Verdict, losses: Losses) -> None:
    num_again, difference = largest_difference(losses)
    verdict.figures |= {"steps_done_again": num_again, "largest_loss_difference": difference}
    verdict.promise(
        difference <= _ROUNDING,
        f"the losses of a step that was done again differ by {difference:.1e}",
    )


def _judge_record(verdict: Verdict, run: RunConfig, num_steps: int, losses: Losses) -> None:
    """Judge what MLflow has."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(run.tracking.uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    verdict.promise(len(runs) == 1, f"MLflow has {len(runs)} runs of one training")
    metrics = runs[0].data.metrics
    terms = next(iter(next(iter(losses.values())).values()))
    num_points = 0
    for name in metrics:
        steps = [step for step, _ in metric_history(run.folder, name)]
        num_points += len(steps)
        if name.startswith("system/"):
            verdict.promise(len(set(steps)) == len(steps), f"MLflow has {name} twice at a step")
            continue
        every = run.evaluate_every if name.startswith("eval_") else run.log_every
        expected = list(range(every, num_steps + 1, every))
        if name in terms:
            expected = list(range(1, num_steps + 1))
        verdict.promise(steps == expected, describe_gap(name, steps, expected))
    wrong = [
        step
        for step, value in metric_history(run.folder, "loss")
        if all(abs(value / of["loss"] - 1) > 1e-6 for of in losses[step - 1].values())
    ]
    verdict.promise(not wrong, f"MLflow has other losses than were computed at steps {wrong[:9]}")
    images = [file.path for file in client.list_artifacts(runs[0].info.run_id, "images")]
    drawn = sorted(int(path.split("+")[2]) for path in images if path.endswith(".png"))
    expected = list(range(run.evaluate_every, num_steps + 1, run.evaluate_every))
    verdict.promise(drawn == expected, describe_gap("reconstructions", drawn, expected))
    waiting = [path for path in Path(run.folder.uri, "unsent").rglob("*") if path.is_file()]
    verdict.promise(not waiting, f"{len(waiting)} files wait to be sent to MLflow, which is there")
    verdict.promise(metrics["skipped_samples"] == 0, "samples were skipped as unreadable")
    verdict.figures["mlflow"] = {
        "runs": len(runs),
        "status": runs[0].info.status,
        "metrics": len(metrics),
        "points": num_points,
        "pictures": len(drawn),
    }
    verdict.figures["store_retries"] = metrics["store_retries"]


def describe_gap(name: str, steps: Sequence[int], expected: Sequence[int]) -> str:
    """Say what is wrong with the steps at which something was recorded."""
    twice = sorted(step for step, count in Counter(steps).items() if count > 1)
    missing, surplus = sorted(set(expected) - set(steps)), sorted(set(steps) - set(expected))
    return (
        f"MLflow has {name} twice at steps {twice[:9]}, not at {missing[:9]}, and at "
        f"{surplus[:9]}, where it was not due"
    )
