"""Slices of images over Ray actors: time limits, actors that die, and images that cannot be had."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.evaluation.subjects import SubjectFacts
from pipelines.evaluation.worker import EvaluatedImage, Evaluator, SliceResult
from pipelines.failures import root_cause
from pipelines.whole_images import Transform


@dataclass(frozen=True, eq=False)
class Slice:
    """Neighbouring samples that one worker reconstructs, packed among themselves alone.

    The result of a slice depends on nothing but the slice: not on who else works, nor in which
    order.
    """

    sample_ids: NDArray[np.int64]
    keys: list[str]

    def alone(self) -> "list[Slice]":
        """Return a slice for each of the images."""
        return [Slice(self.sample_ids[i : i + 1], [key]) for i, key in enumerate(self.keys)]


def cut(sample_ids: NDArray[np.int64], keys: list[str], slice_images: int) -> list[Slice]:
    """Cut samples into slices."""
    starts = range(0, len(keys), slice_images)
    return [Slice(sample_ids[i : i + slice_images], keys[i : i + slice_images]) for i in starts]


class SliceQueues:
    """What waits for each of several workers, so that a worker knows what it does next.

    Slices are dealt out in turn. A worker that has none left takes the last of the one with the
    most: the one that this worker comes to at the latest.
    """

    def __init__(self, slices: Sequence[Slice], num_workers: int) -> None:
        self._queues = [deque(slices[worker::num_workers]) for worker in range(num_workers)]

    def __bool__(self) -> bool:
        return any(self._queues)

    def take(self, worker: int) -> tuple[Slice, NDArray[np.int64] | None]:
        """Return a slice for a worker, and the samples of the one that it can expect next."""
        mine = self._queues[worker]
        part = mine.popleft() if mine else max(self._queues, key=len).pop()
        return part, mine[0].sample_ids if mine else None

    def put_back(self, worker: int, slices: Sequence[Slice]) -> None:
        """Let a worker do slices before all others."""
        self._queues[worker].extendleft(reversed(slices))


class WorkerPool:
    """Actors that hold one subject; whatever ends one of them costs no more than an image.

    Args:
        start: starts an actor of evaluation_worker.Evaluator.
        num_workers: of them at a time.
        timeout_s: for each image; the actor that takes longer is killed, and its images tried one
            by one.

    Attributes:
        facts: what is known of the subject.
        digests: of the networks that judge it, by name.

    Raises:
        FileNotFoundError, ImportError, RuntimeError, ValueError: the subject cannot be loaded.
    """

    def __init__(self, start: Callable[[], Any], num_workers: int, timeout_s: float) -> None:
        self._start, self._timeout_s = start, timeout_s
        self._actors = [start() for _ in range(num_workers)]
        self._loading: dict[Any, int] = {}  # what their loading returns, and who loads
        self.facts, self.digests = _loaded([actor.load.remote() for actor in self._actors])[0]

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of one worker.

        Raises:
            RuntimeError: the worker died of it.
        """
        result, reason = _fetch(getattr(self._actors[0], method).remote(*arguments))
        if result is None:
            raise RuntimeError(f"{method}: {reason}")
        return result

    def evaluate(
        self, slices: Sequence[Slice], transform: Transform
    ) -> Iterator[tuple[Slice, SliceResult]]:
        """Evaluate slices, and hand out what is finished, in the order in which it finishes."""
        waiting = SliceQueues(slices, len(self._actors))
        idle = set(range(len(self._actors))) - set(self._loading.values())
        running: dict[Any, tuple[int, Slice, float]] = {}
        while waiting or running:
            while waiting and idle:
                worker = idle.pop()
                part, following = waiting.take(worker)
                deadline = time.monotonic() + self._timeout_s * len(part.keys)
                reference = self._actors[worker].evaluate.remote(
                    part.sample_ids, transform, following
                )
                running[reference] = (worker, part, deadline)
            idle |= self._wait(running)
            late = {ref for ref, (*_, deadline) in running.items() if deadline <= time.monotonic()}
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for reference in done or late:
                worker, part, _ = running.pop(reference)
                result, reason = _fetch(reference) if done else (None, self._timeout)
                if result is not None:
                    idle.add(worker)
                    yield part, result
                    continue
                self._replace(worker)
                if len(part.keys) > 1:
                    waiting.put_back(worker, part.alone())
                else:
                    yield part, SliceResult([EvaluatedImage(part.keys[0], status=reason)])

    @property
    def _timeout(self) -> str:
        return f"timed out after {self._timeout_s:g} s"

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors:
            ray.kill(actor)

    def _wait(self, running: dict[Any, tuple[int, Slice, float]]) -> set[int]:
        """Wait until something is done or late; returns the workers that have loaded weights."""
        deadlines = [deadline for *_, deadline in running.values()]
        patience_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        done, _ = ray.wait([*running, *self._loading], timeout=patience_s)
        ready = [reference for reference in done if reference in self._loading]
        _loaded(ready)
        return {self._loading.pop(reference) for reference in ready}

    def _replace(self, worker: int) -> None:
        """Start an actor in place of one that is gone; the others go on while it loads."""
        ray.kill(self._actors[worker])
        self._actors[worker] = self._start()
        self._loading[self._actors[worker].load.remote()] = worker


class InProcess:
    """The same as WorkerPool without Ray: in this process, without time limits."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.facts, self.digests = evaluator.load()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the evaluator."""
        return getattr(self._evaluator, method)(*arguments)

    def evaluate(
        self, slices: Sequence[Slice], transform: Transform
    ) -> Iterator[tuple[Slice, SliceResult]]:
        """Evaluate slices one after the other."""
        waiting = SliceQueues(slices, num_workers=1)
        while waiting:
            part, following = waiting.take(0)
            yield part, self._evaluator.evaluate(part.sample_ids, transform, following)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


def _loaded(references: Sequence[Any]) -> list[tuple[SubjectFacts, dict[str, str]]]:
    """Return what actors know when they have loaded their weights."""
    try:
        return ray.get(list(references))
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(
            f"a process died while it loaded weights ({root_cause(error).splitlines()[0]}); it "
            "needs more memory, or fewer workers beside it"
        ) from error


def _fetch(reference: Any) -> tuple[Any, str]:
    """Return a result, or why its worker is gone."""
    try:
        return ray.get(reference), ""
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        return None, f"the process died: {root_cause(error).splitlines()[0]}"
