"""Progress of work that runs elsewhere on the cluster, drawn by the command that started it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

_POLL_S = 0.5


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where remote work says how far it is; the command that started it reads it."""

    def __init__(self, done: int, status: str) -> None:
        self._done = done
        self._status = status
        self._messages: list[str] = []
        self._is_leaving = False
        self._failure: Exception | None = None

    def fail(self, failure: Exception) -> None:
        """Say why the work ended for good."""
        self._failure = failure

    def failure(self) -> Exception | None:
        """Return why the work ended for good; None if it did not."""
        return self._failure

    def leave(self) -> None:
        """Ask the work to stop at the next point from which it can go on."""
        self._is_leaving = True

    def is_leaving(self) -> bool:
        """Whether the work was asked to stop."""
        return self._is_leaving

    def update(self, done: int, status: str) -> None:
        """Say how much is done, in the units of the bar, and what there is to say about it."""
        self._done = done
        self._status = status

    def advance(self, count: int, status: str = "") -> None:
        """Say that so much more is done."""
        self.update(self._done + count, status)

    def message(self, text: str) -> None:
        """Leave a line that is printed above the bar."""
        self._messages.append(text)

    def read(self) -> tuple[int, str, list[str]]:
        """Return how much is done, the status, and the lines since the last call."""
        messages, self._messages = self._messages, []
        return self._done, self._status, messages


@contextmanager
def progress_bar(title: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
    """Draw a bar while the body runs; gives the ProgressBoard to hand to remote work."""
    # On the node of the command, so that both live equally long.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ProgressBoard.options(scheduling_strategy=here).remote(done, "starting workers")  # type: ignore[attr-defined]
    finished = threading.Event()
    # A log file gets a line now and then, a terminal a bar that moves.
    interval_s = _POLL_S if sys.stderr.isatty() else 10.0

    def draw(bar: Any) -> None:
        count, status, messages = ray.get(board.read.remote(), timeout=10)
        for message in messages:
            tqdm.write(message, file=sys.stderr)
        bar.set_postfix_str(status, refresh=False)
        bar.update(max(0, count - bar.n))

    def watch(bar: Any) -> None:
        while not finished.wait(_POLL_S):
            draw(bar)

    with tqdm(
        total=total,
        desc=title,
        unit=unit,
        initial=done,
        mininterval=interval_s,
        dynamic_ncols=True,
        file=sys.stderr,
    ) as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True)
        watcher.start()
        try:
            yield board
            finished.set()
            watcher.join()
            draw(bar)
        finally:
            finished.set()
            watcher.join()
