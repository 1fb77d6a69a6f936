"""Whatever is taken from a training, it goes on as if nothing had been."""

import functools
import json
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray
import torch

from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.checkpoints import unfinished_prefix
from pipelines.runs import next_step
from tests.pipelines.chaos_training import PAUSE_S, WORKER_CPUS, Hit
from tests.pipelines.recorded_runs import (
    Attempt,
    check_losses,
    check_order,
    ended,
    read_notes,
    repeated_steps,
    start_driver,
    wait_for_step,
)
from vitok.parallel import ParallelConfig

TIMEOUT_S = 500


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where workers write down what they see."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


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


def test_elastic_training_survives_nodes_that_leave_die_and_come(
    tiny_training: AutoencoderTraining, notes: Path
) -> None:
    """The end of a node is announced, another one dies without a word, and a new one is added."""
    first, second = tiny_training.stages
    # The node that dies is a failure; the one that says so before is none.
    changes = {"cpus_per_worker": WORKER_CPUS, "min_workers": 1, "max_failures": 1}
    changes |= {"log_every": 3, "checkpoint_every": 24, "evaluate_every": 1000}
    settings = replace(
        tiny_training,
        stages=(replace(first, steps=54), replace(second, steps=4)),
        run=replace(tiny_training.run, **changes),
    )
    draw = random.Random(0)
    hits = [
        Hit("announce", draw.randint(4, 7), draw.randrange(2), draw.uniform(0, 0.1)),
        Hit("kill node", draw.randint(30, 33), draw.randrange(2), draw.uniform(0, 0.3)),
        Hit("add node", draw.randint(42, 44)),
    ]
    attempts, recorded = train_with_hits(settings, notes, num_nodes=3, hits=hits)
    assert [attempt.world_size for attempt in attempts] == [2, 2, 1, 2]
    assert next_step(settings.run.folder) == plan_of(settings).num_steps
    assert recorded[0] == 0, "there was no checkpoint before the notice"
    assert min(recorded[1:]) > 0
    for attempt, checkpoint in zip(attempts[1:], recorded, strict=True):
        assert attempt.first_step >= checkpoint

    saved = attempts[1].first_step
    assert hits[0].step <= saved < settings.run.checkpoint_every, "saved because of the notice"
    assert saved % settings.run.log_every == 0, "the next step that logs saves"
    nodes_of: dict[str, dict[int, str]] = {}
    for note in read_notes(notes):
        nodes_of.setdefault(note["group"], {})[note["rank"]] = note["node"]
    of_notice, of_next, *_ = nodes_of.values()
    assert of_notice[hits[0].rank] not in of_next.values(), "the next group has left the node"
    check_losses(settings)


def test_a_worker_and_drivers_that_are_killed_or_told_to_leave_change_no_step(
    ray_cluster: None, tiny_training: AutoencoderTraining, notes: Path
) -> None:
    """A worker dies; its driver is told to leave, the next one killed; and one worker ends it."""
    first, second = tiny_training.stages
    settings = replace(
        tiny_training,
        # KL latents are trained with noise, which must come back too.
        model=replace(tiny_training.model, latent="kl"),
        stages=(replace(first, steps=34), second),
        run=replace(
            tiny_training.run,
            # The worker that dies is a failure, leaving is none.
            max_failures=1,
            log_every=2,
            checkpoint_every=7,
            evaluate_every=1000,
            parallel=ParallelConfig(checkpoint_every=2),
        ),
    )
    run, num_steps = settings.run, plan_of(settings).num_steps
    address = ray.get_runtime_context().gcs_address
    start = functools.partial(start_driver, "recording_training", RAY_ADDRESS=address)
    recording = json.dumps({"fatal_step": 9, "pause_s": PAUSE_S})

    driver = start(settings, notes, recording)
    with ended(driver):
        wait_for_note(driver, notes, random.Random(2).randint(14, 18))
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(TIMEOUT_S) == 143, (notes / "driver.log").read_text()
    assert (notes / "killed").exists()
    left = next_step(run.folder)
    assert f"stopped by SIGTERM with a checkpoint after step {left};" in (
        notes / "driver.log"
    ).read_text().replace("\n", " ")
    assert 14 <= left < 28

    driver = start(settings, notes, recording)
    with ended(driver):
        wait_for_step(driver, run, left + 1, TIMEOUT_S)
    assert driver.wait() == -signal.SIGKILL
    assert left < next_step(run.folder) < num_steps

    # As a kill in the middle of an upload leaves it.
    prefix = unfinished_prefix(run.folder)
    (Path(tempfile.mkdtemp(prefix=prefix)) / "__0_0.distcp").write_bytes(b"half")
    last = replace(settings, run=replace(run, num_workers=1))
    with ended(driver := start(last, notes, "{}")):
        assert driver.wait(TIMEOUT_S) == 0, (notes / "driver.log").read_text()
    assert next_step(run.folder) == num_steps
    assert list(Path(tempfile.gettempdir()).glob(f"{prefix}*")) == []

    attempts = check_order(notes, plan_of(settings))
    assert [attempt.world_size for attempt in attempts] == [2, 2, 2, 1]
    of_worker, of_leaving, of_driver = repeated_steps(attempts)
    assert of_leaving == 0
    assert attempts[2].first_step == left
    # Each kill costs the steps since the newest checkpoint. These steps are so short that the
    # checkpoint before may still be on its way into Ray's record.
    assert max(of_worker, of_driver) <= 2 * run.checkpoint_every
    weights = check_losses(settings)
    trained = load_autoencoder(run.folder.uri).state_dict()
    for name, expected in weights.items():
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=2e-3, msg=name)


def wait_for_note(driver: subprocess.Popen[bytes], notes: Path, step: int) -> None:
    """Wait until workers have come to a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while not any(note["step"] >= step for note in read_notes(notes)):
        assert driver.poll() is None, (notes / "driver.log").read_text()
        assert time.monotonic() < deadline, f"step {step} was not reached in {TIMEOUT_S} s"
        time.sleep(0.05)
