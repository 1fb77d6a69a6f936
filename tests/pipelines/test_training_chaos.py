"""Whatever is taken from a training, it goes on as if nothing had been."""

import json
import random
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray

from pipelines.runs import next_step
from pipelines.train_autoencoder import AutoencoderTraining, plan_of
from tests.pipelines.chaos_training import PAUSE_S, WORKER_CPUS, Hit
from tests.pipelines.recorded_runs import (
    Attempt,
    check_losses,
    check_order,
    ended,
    read_notes,
    repeated_steps,
    start_driver,
)

TIMEOUT_S = 500


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where workers write down what they see."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


def training(settings: AutoencoderTraining, **run: object) -> AutoencoderTraining:
    """Return a longer training, each worker of which fills a node."""
    stages = (replace(settings.stages[0], steps=40), replace(settings.stages[1], steps=4))
    changes = {"cpus_per_worker": WORKER_CPUS, "mfu": False, "evaluate_every": 1000}
    return replace(settings, stages=stages, run=replace(settings.run, **(changes | run)))


def train_with_hits(
    settings: AutoencoderTraining, notes: Path, num_nodes: int, hits: list[Hit]
) -> tuple[list[Attempt], list[int]]:
    """Train on a cluster that is hit.

    Returns:
        the attempts, and the steps of the newest checkpoint when each of the hits came.
    """
    arguments = (str(num_nodes), json.dumps([asdict(hit) for hit in hits]))
    driver = start_driver("chaos_training", settings, notes, *arguments)
    with ended(driver):
        assert driver.wait(TIMEOUT_S) == 0, (notes / "driver.log").read_text()
    done = json.loads((notes / "done.json").read_text())
    assert len(done) == len(hits)
    return check_order(notes, plan_of(settings)), [hit["recorded"] for hit in done]


def test_elastic_training_loses_workers_and_nodes_and_takes_new_ones_in(
    tiny_training: AutoencoderTraining, notes: Path
) -> None:
    settings = training(
        tiny_training, min_workers=1, log_every=3, checkpoint_every=4, max_failures=4
    )
    draw = random.Random(0)
    hits = [
        Hit("kill worker", draw.randint(5, 9), draw.randrange(2), draw.uniform(0, 0.3)),
        Hit("kill node", draw.randint(16, 20), draw.randrange(2), draw.uniform(0, 0.3)),
        Hit("add node", draw.randint(27, 30)),
    ]
    attempts, recorded = train_with_hits(settings, notes, num_nodes=2, hits=hits)
    assert [attempt.world_size for attempt in attempts] == [2, 2, 1, 2]
    assert next_step(settings.run.folder) == plan_of(settings).num_steps
    for attempt, checkpoint in zip(attempts[1:], recorded, strict=True):
        assert attempt.first_step >= checkpoint > 0
    # A checkpoint is written while the training goes on: the newest may not have arrived.
    assert max(repeated_steps(attempts)) <= 2 * settings.run.checkpoint_every
    check_losses(settings)


def test_node_that_is_announced_to_go_costs_no_step_before_the_notice_and_counts_as_no_failure(
    tiny_training: AutoencoderTraining, notes: Path
) -> None:
    settings = training(
        tiny_training, log_every=3, checkpoint_every=1000, max_failures=0, keep_checkpoints=9
    )
    draw = random.Random(1)
    hits = [Hit("announce", draw.randint(6, 12), draw.randrange(2), draw.uniform(0, 0.3))]
    attempts, recorded = train_with_hits(settings, notes, num_nodes=3, hits=hits)
    assert [attempt.world_size for attempt in attempts] == [2, 2]
    assert recorded == [0], "there was no checkpoint before the notice"
    saved = attempts[1].first_step
    assert saved >= hits[0].step
    assert saved % settings.run.log_every == 0, "the next step that logs saves"
    assert (Path(settings.run.folder.uri) / f"step-{saved:08d}").is_dir()
    group_of_notice, nodes = read_notes(notes)[0]["group"], []
    for is_first in (True, False):
        members = [n for n in read_notes(notes) if (n["group"] == group_of_notice) == is_first]
        nodes.append({note["rank"]: note["node"] for note in members})
    left = nodes[0][hits[0].rank]
    assert left not in nodes[1].values(), "the group has left the node"
    check_losses(settings)


def test_sigterm_leaves_with_a_checkpoint_from_which_no_step_is_repeated(
    ray_cluster: None, tiny_training: AutoencoderTraining, notes: Path
) -> None:
    settings = training(
        tiny_training, cpus_per_worker=0.5, log_every=4, checkpoint_every=1000, max_failures=0
    )
    recording = json.dumps({"pause_s": PAUSE_S})
    address = ray.get_runtime_context().gcs_address

    def start() -> subprocess.Popen[bytes]:
        return start_driver("recording_training", settings, notes, recording, RAY_ADDRESS=address)

    first = start()
    with ended(first):
        wait_for_note(first, notes, random.Random(2).randint(5, 15))
        first.send_signal(signal.SIGTERM)
        assert first.wait(TIMEOUT_S) == 143, (notes / "driver.log").read_text()
    left = next_step(settings.run.folder)
    assert "stopped by SIGTERM with a checkpoint after step" in (notes / "driver.log").read_text()
    assert 0 < left < plan_of(settings).num_steps
    assert left % settings.run.log_every == 0

    second = start()
    with ended(second):
        assert second.wait(TIMEOUT_S) == 0, (notes / "driver.log").read_text()
    attempts = check_order(notes, plan_of(settings))
    assert [attempt.world_size for attempt in attempts] == [2, 2]
    assert repeated_steps(attempts) == [0]
    assert attempts[1].first_step == left
    check_losses(settings)


def wait_for_note(driver: subprocess.Popen[bytes], notes: Path, step: int) -> None:
    """Wait until workers have come to a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while not any(note["step"] >= step for note in read_notes(notes)):
        assert driver.poll() is None, (notes / "driver.log").read_text()
        assert time.monotonic() < deadline, f"step {step} was not reached in {TIMEOUT_S} s"
        time.sleep(0.05)
