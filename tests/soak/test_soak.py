"""What a soak judges with: its schedule, the flatness of memory, the order, the losses."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from tests.pipelines.recorded_runs import Attempt, check_order, read_losses, repeated_steps
from tests.soak.faults import schedule
from tests.soak.memory import WARM_UP_S, Life, growing, growth_of, summary
from tests.soak.verdict import describe_gap, largest_difference, losses_of


def test_faults_follow_from_the_seed_and_every_kind_has_its_turn() -> None:
    faults = schedule(0, 30, 180)
    assert faults == schedule(0, 30, 180) != schedule(1, 30, 180)
    assert 7 <= len(faults) <= 14
    kinds = [fault.kind for fault in faults]
    assert all(
        len(set(kinds[start : start + 4])) == 4 for start in (0, 4) if start + 4 <= len(kinds)
    )
    times = [0.0, *(fault.at_s for fault in faults)]
    assert all(120 <= b - a <= 240 for a, b in pairwise(times))
    assert times[-1] <= 29 * 60
    assert {fault.rank for fault in schedule(0, 300, 180)} == {0, 1}


def life(
    minutes: float, mb_per_min: float, *, warm_up_mb: float = 0.0, tooth_mb: float = 0.0
) -> Life:
    """Sample memory every 5 s: a warm-up, a slope, a saw with teeth of 40 s, and noise."""
    rng = random.Random(0)
    found = Life("reader")
    for time_s in range(0, int(minutes * 60), 5):
        warm = min(1.0, time_s / WARM_UP_S) * warm_up_mb
        tooth = tooth_mb * (time_s % 40) / 40
        held = 500 + warm + tooth + mb_per_min * time_s / 60 + rng.gauss(0, 3)
        found.add(1000.0 + time_s, held)
    return found


@pytest.mark.parametrize("minutes", [8, 28])
def test_memory_that_saws_and_warms_up_is_flat_and_a_leak_is_not(minutes: float) -> None:
    assert growing([life(minutes, 0.0, warm_up_mb=400, tooth_mb=60)]) == []
    assert growing([life(minutes, -20.0)]) == []
    (sentence,) = growing([life(minutes, 9.5, tooth_mb=60), life(minutes, 0.0)])
    assert sentence.startswith("reader grew by ")
    growth = growth_of(life(minutes, 9.0))
    assert growth is not None
    assert growth.mb_per_min == pytest.approx(9.0, abs=0.5)
    assert growth.minutes == pytest.approx(minutes - WARM_UP_S / 60, abs=0.2)


def test_small_leak_shows_in_a_long_life_and_none_in_one_too_short_to_judge() -> None:
    assert growing([life(28, 2.5)]) != []
    assert growth_of(life(5, 50.0)) is None
    figures = summary([life(5, 50.0), life(28, 2.5), life(28, 0.0)])
    assert (figures["reader"]["lives"], figures["reader"]["judged"]) == (3, 2)
    assert figures["reader"]["mb_per_min"] == pytest.approx(2.5, abs=0.2), "of the steepest"


def write_notes(notes: Path, settings: AutoencoderTraining, spans: dict[str, range]) -> None:
    """Write down what groups of two workers would have seen and computed."""
    plan = plan_of(settings)
    for group, steps in spans.items():
        for step in steps:
            planned = plan.step(step)
            key_of = dict(zip(planned.records.sample_id.tolist(), planned.records.key, strict=True))
            rows = [[str(key_of[view.sample_id]) for view in row] for row in planned.rows]
            rows += [[]] * (len(rows) % 2)
            for i, keys in enumerate(rows):
                note = {"time": step + 0.01 * i, "step": step, "rank": i % 2, "world_size": 2}
                note |= {"group": group, "keys": keys}
                outcome = {"step": step, "group": group, "terms": {"loss": float(len(keys))}}
                for suffix, line in (("jsonl", note), ("losses", outcome)):
                    with (notes / f"{group}-{i % 2}.{suffix}").open("a") as file:
                        file.write(json.dumps(line) + "\n")


def test_order_of_a_training_that_was_ended_is_compared_up_to_there(
    tiny_training: AutoencoderTraining, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    write_notes(notes, tiny_training, {"a": range(4), "b": range(2, 5)})
    attempts = check_order(notes, plan_of(tiny_training), num_steps=5)
    assert repeated_steps(attempts) == [2]
    with pytest.raises(AssertionError):
        check_order(notes, plan_of(tiny_training))  # has six steps
    other = replace(tiny_training, seed=1)
    with pytest.raises(AssertionError, match="step 0 of attempt a"):
        check_order(notes, plan_of(other), num_steps=5)

    losses = losses_of(read_losses(notes), attempts)
    assert largest_difference(losses) == (2, 0.0)
    assert losses[0] == {"a": {"loss": 1.0}}, "the mean over images"
    file = notes / "b-0.losses"
    first, *rest = file.read_text().splitlines(keepends=True)
    spoiled = json.loads(first)
    spoiled["terms"]["loss"] *= 1.1
    file.write_text("".join([json.dumps(spoiled) + "\n", *rest]))
    num_steps, difference = largest_difference(losses_of(read_losses(notes), attempts))
    assert num_steps == 2
    assert difference > 0.02
    file.write_text("".join(rest))
    losses = losses_of(read_losses(notes), attempts)
    assert largest_difference(losses)[0] == 1, "a step that one worker did not finish is left out"


def test_repetitions_are_counted_from_the_furthest_step() -> None:
    spans = [range(30), range(20, 25), range(20, 60)]
    attempts = [Attempt(str(i), 2, {step: [] for step in span}) for i, span in enumerate(spans)]
    assert repeated_steps(attempts) == [10, 10]


def test_gaps_and_doubles_of_a_record_are_named() -> None:
    sentence = describe_gap("loss", [1, 2, 2, 5], [1, 2, 3, 4])
    assert sentence == (
        "MLflow has loss twice at steps [2], not at [3, 4], and at [5], where it was not due"
    )
