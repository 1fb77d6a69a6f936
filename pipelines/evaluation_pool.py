"""Slices of images over Ray actors: time limits, actors that die, and images that cannot be had."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.evaluation_worker import EvaluatedImage, Evaluator, SliceResult
from pipelines.failures import root_cause
from pipelines.subjects import SubjectFacts
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
        self._idle = [start() for _ in range(num_workers)]
        self.facts, self.digests = _load(self._idle)[0]

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of one worker.

        Raises:
            RuntimeError: the worker died of it.
        """
        result, reason = _fetch(getattr(self._idle[0], method).remote(*arguments))
        if result is None:
            raise RuntimeError(f"{method}: {reason}")
        return result

    def evaluate(
        self, slices: Sequence[Slice], transform: Transform
    ) -> Iterator[tuple[Slice, SliceResult]]:
        """Evaluate slices, and hand out what is finished, in the order in which it finishes."""
        waiting = deque(slices)
        running: dict[Any, tuple[Any, Slice, float]] = {}
        while waiting or running:
            while waiting and self._idle:
                actor, part = self._idle.pop(), waiting.popleft()
                deadline = time.monotonic() + self._timeout_s * len(part.keys)
                running[actor.evaluate.remote(part.sample_ids, transform)] = (actor, part, deadline)
            patience_s = min(deadline for *_, deadline in running.values()) - time.monotonic()
            done, _ = ray.wait(list(running), timeout=max(0.0, patience_s))
            late = [ref for ref, (*_, deadline) in running.items() if deadline <= time.monotonic()]
            for reference in done or late:
                actor, part, _ = running.pop(reference)
                result, reason = _fetch(reference) if done else (None, self._timeout)
                if result is not None:
                    self._idle.append(actor)
                    yield part, result
                    continue
                ray.kill(actor)
                if len(part.keys) > 1:
                    waiting.extendleft(part.alone())
                else:
                    yield part, SliceResult([EvaluatedImage(part.keys[0], status=reason)])
                self._replace()

    @property
    def _timeout(self) -> str:
        return f"timed out after {self._timeout_s:g} s"

    def close(self) -> None:
        """End the workers."""
        for actor in self._idle:
            ray.kill(actor)

    def _replace(self) -> None:
        """Start a worker in place of one that is gone, and wait until its weights are loaded."""
        actor = self._start()
        _load([actor])
        self._idle.append(actor)


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
        for part in slices:
            yield part, self._evaluator.evaluate(part.sample_ids, transform)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


def _load(actors: Sequence[Any]) -> list[tuple[SubjectFacts, dict[str, str]]]:
    try:
        return ray.get([actor.load.remote() for actor in actors])
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
