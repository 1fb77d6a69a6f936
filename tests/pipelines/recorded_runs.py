"""What recorded trainings have to equal, and how they are started and read."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.autoencoder_weights import initialize
from pipelines.ingest import load_step
from pipelines.packed_rows import PackedRow
from pipelines.plan import Plan
from pipelines.runs import RunConfig, next_step
from pipelines.tracking import metric_history
from pipelines.train_autoencoder import latent_noise
from vitok.autoencoder import Autoencoder
from vitok.config import write_config
from vitok.losses import ReconstructionLoss
from vitok.optim import build_optimizer, learning_rate

REPOSITORY = Path(__file__).parents[2]


@cache
def train_plainly(settings: AutoencoderTraining) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process without Ray, sharding or accumulation tricks: the reference.

    Args:
        settings: `run` has no influence; give always the same, and this runs once.

    Returns:
        the mean loss of every step, and the final weights.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow where cores are busy
    try:
        return _train_plainly(settings)
    finally:
        torch.set_num_threads(num_threads)


def _train_plainly(settings: AutoencoderTraining) -> tuple[list[float], dict[str, torch.Tensor]]:
    plan = plan_of(settings)
    model = Autoencoder(settings.model)
    initialize(model, settings, plan)
    optimizer = build_optimizer(model, settings.optim)
    loss_of = ReconstructionLoss(settings.loss)
    num_images = sum(stage.steps * stage.images_per_step for stage in plan.stages)
    losses, before = [], 0
    for step in range(plan.num_steps):
        rows = load_step(plan, step)
        images = sum(len(row.keys) for row in rows)
        assert images == plan.stage_of(step).images_per_step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.optim, (before + images / 2) / num_images)
        before += images
        total = torch.zeros(())
        for row in rows:
            packed, position = row.to_packed(torch.device("cpu"))
            noise = latent_noise(settings, row, packed.tokens.device)
            total = total + loss_of(model(packed, noise=noise), packed, position)["loss"]
        (total / images).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / images)
    return losses, model.state_dict()


def check_losses(settings: AutoencoderTraining) -> dict[str, torch.Tensor]:
    """Compare the recorded losses with a plain training's, and return its final weights."""
    losses, weights = train_plainly(replace(settings, run=RunConfig(name="plain")))
    recorded = metric_history(settings.run.folder, "loss")
    steps = [step for step, _ in recorded]
    assert steps == list(range(1, len(losses) + 1)), f"not once a step: {steps}"
    torch.testing.assert_close([value for _, value in recorded], losses, rtol=2e-4, atol=0)
    return weights


def start_driver(
    script: str, settings: AutoencoderTraining, notes: Path, *arguments: str, **environment: str
) -> subprocess.Popen[bytes]:
    """Start a driver script of this folder; what it says is in NOTES/driver.log."""
    config = notes / "config.json"
    write_config(config, settings)
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.pipelines.{script}", str(config), str(notes), *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=(notes / "driver.log").open("a"),
        stderr=subprocess.STDOUT,
    )


@contextmanager
def ended(driver: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a driver that the body did not see end."""
    try:
        yield
    finally:
        driver.kill()
        driver.wait()


def wait_for_step(
    driver: subprocess.Popen[bytes], run: RunConfig, step: int, timeout_s: float
) -> None:
    """Wait until a checkpoint holds so many steps."""
    deadline = time.monotonic() + timeout_s
    while next_step(run.folder) < step:
        assert driver.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {timeout_s} s"
        time.sleep(0.05)


@dataclass
class Attempt:
    """What one group of workers trained on.

    Attributes:
        group: its name.
        keys: of every step that all workers began, those of its rows.
    """

    group: str
    world_size: int
    keys: dict[int, list[list[str]]]

    @property
    def first_step(self) -> int:
        """The step at which the group took over."""
        return min(self.keys)

    @property
    def next_step(self) -> int:
        """The step after the last that all workers began."""
        return max(self.keys) + 1


def read_notes(notes: Path) -> list[dict[str, Any]]:
    """Return what recording workers wrote, in the order in which they did."""
    return sorted(_read_lines(notes, "*.jsonl"), key=lambda note: note["time"])


def read_losses(notes: Path) -> list[dict[str, Any]]:
    """Return what came of the rows that recording workers used, in no order."""
    return _read_lines(notes, "*.losses")


def _read_lines(notes: Path, pattern: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in notes.glob(pattern)
        # The last line of a worker that was killed may be cut.
        for line in file.read_text().split("\n")[:-1]
    ]


def note_row(notes: Path, row: PackedRow) -> None:
    """Write down that this worker begins a packed row."""
    note = {
        "time": time.time(),
        "step": row.step,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "group": os.environ["MASTER_PORT"],
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
        "keys": row.keys,
    }
    with (notes / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")


def check_order(notes: Path, plan: Plan, num_steps: int | None = None) -> list[Attempt]:
    """Compare the ordered keys of every step, in every attempt that ran it, with the plan.

    Args:
        num_steps: that were trained; all of the plan by default.

    Returns:
        the attempts in their order, without those that were killed before their first step.
    """
    num_steps = plan.num_steps if num_steps is None else num_steps
    planned = [_planned_keys(plan, step) for step in range(num_steps)]
    # group -> step -> rank -> keys of its rows
    groups: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    world_sizes: dict[str, int] = {}
    for note in read_notes(notes):
        groups[note["group"]][note["step"]][note["rank"]].append(note["keys"])
        world_sizes[note["group"]] = note["world_size"]
    attempts = []
    for group, steps in groups.items():
        attempt = Attempt(group, world_sizes[group], {})
        ranks = range(attempt.world_size)
        for step, by_rank in steps.items():
            expected = planned[step]
            passes = -(-len(expected) // attempt.world_size)
            if any(len(by_rank[rank]) < passes for rank in ranks):
                continue  # killed in the middle of this step
            in_turn = [by_rank[rank][i] for i in range(passes) for rank in ranks]
            assert in_turn[: len(expected)] == expected, f"step {step} of attempt {group}"
            attempt.keys[step] = expected
        if attempt.keys:
            whole = list(range(attempt.first_step, attempt.next_step))
            assert list(attempt.keys) == whole, f"attempt {group} left steps out"
            attempts.append(attempt)
    assert {step for attempt in attempts for step in attempt.keys} == set(range(num_steps))
    return attempts


def _planned_keys(plan: Plan, step: int) -> list[list[str]]:
    """Return the keys of a step's rows."""
    planned = plan.step(step)
    key_of = dict(zip(planned.records.sample_id.tolist(), planned.records.key, strict=True))
    return [[str(key_of[view.sample_id]) for view in row] for row in planned.rows]


def repeated_steps(attempts: list[Attempt]) -> list[int]:
    """Return how many steps each attempt but the first did again."""
    repeated, done = [], 0
    for attempt in attempts:
        repeated.append(done - attempt.first_step)
        done = max(done, attempt.next_step)
    return repeated[1:]
