"""Which faults come when, by a seed, and how each is carried out."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from cluster.services import Service
from pipelines.runs import RunConfig, next_step
from tests.pipelines.faulty_store import FaultyProxy, rarely
from tests.pipelines.recorded_runs import read_notes
from tests.soak.memory import descendants

Kind = Literal["kill trainer", "kill reader", "restart mlflow", "store errors"]

NUM_TRAINERS = 2
# Of the store's answers, always and in a burst. A request has eight attempts.
USUAL_ERRORS, BURST_ERRORS = 0.02, 0.25
_LEAST_BURST = 5
# At the end, for what a fault has left to do.
_QUIET_S = 60.0
_READER = "ray::MapBatches(load)"
_TIMEOUT_S = 180.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Fault:
    """Something that happens to a training.

    Attributes:
        at_s: since its first step.
        length_s: of an outage or a burst.
        rank: of the training worker that is killed.
    """

    kind: Kind
    at_s: float
    length_s: float
    rank: int


def schedule(seed: int, minutes: float, every_s: float) -> list[Fault]:
    """Return the faults of a soak, in order; no kind comes again before each had its turn.

    Args:
        every_s: between two of them, on average; a third less to a third more.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    kinds: list[Kind] = []
    at_s = 0.0
    while True:
        at_s += every_s * rng.uniform(2 / 3, 4 / 3)
        if at_s > 60 * minutes - _QUIET_S:
            return faults
        kinds = kinds or rng.sample(get_args(Kind), len(get_args(Kind)))
        faults.append(Fault(kinds.pop(), at_s, rng.uniform(5, 20), rng.randrange(NUM_TRAINERS)))


@dataclass
class Scene:
    """What faults happen to.

    Attributes:
        driver: pid of the command.
        run: that it trains.
        notes: what its workers write down.
        proxy: between them and the store.
        mlflow: the tracking server.
        start_mlflow: starts it again, with the same address and database, and waits until it
            answers.
    """

    driver: int
    run: RunConfig
    notes: Path
    proxy: FaultyProxy
    mlflow: Service
    start_mlflow: Callable[[], Service]

    def carry_out(self, fault: Fault) -> dict[str, Any]:
        """Let a fault happen; returns what was so at that moment."""
        found: dict[str, Any] = {"kind": fault.kind, "time": time.time()}
        if fault.kind == "kill trainer":
            trainer = self._wait(lambda: self._trainer(fault.rank), "a training worker")
            found |= {"recorded": next_step(self.run.folder), "group": trainer["group"]}
            found |= {"step": trainer["step"]}
            os.kill(trainer["pid"], signal.SIGKILL)
        elif fault.kind == "kill reader":
            self._wait(self._reader, "a task that reads").kill()
        elif fault.kind == "restart mlflow":
            # With its children, all in its process group, as a machine that dies does.
            os.killpg(self.mlflow.pid, signal.SIGKILL)
            psutil.Process(self.mlflow.pid).wait()
            time.sleep(fault.length_s)
            self.mlflow = self.start_mlflow()
        else:
            usual = self.proxy.schedule
            before = self.proxy.injected.total()
            self.proxy.schedule = rarely(BURST_ERRORS, round(1000 * fault.at_s))
            time.sleep(fault.length_s)
            # What is read ahead may last for longer than that.
            self._wait(lambda: self.proxy.injected.total() >= before + _LEAST_BURST, "request")
            self.proxy.schedule = usual
            found |= {"spoiled": self.proxy.injected.total() - before}
        return found

    def _trainer(self, rank: int) -> dict[str, Any] | None:
        """Return the newest note of a worker that lives."""
        alive = {process.pid for process in descendants(self.driver)}
        newest = [note for note in read_notes(self.notes) if note["rank"] == rank][-1:]
        return newest[0] if newest and newest[0]["pid"] in alive else None

    def _reader(self) -> psutil.Process | None:
        for process in descendants(self.driver):
            try:
                if process.cmdline()[:1] == [_READER]:
                    return process
            except psutil.Error:
                continue
        return None

    def _wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (found := condition()):
            if not psutil.pid_exists(self.driver) or time.monotonic() > deadline:
                raise TimeoutError(f"in {_TIMEOUT_S:.0f} s there was no {what}")
            time.sleep(_POLL_S)
        return found
