"""Every benchmark in one go, each in a process of its own, beside what the project aims at."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs import positional
from jobs.bench.output import finish

# What is run: a label, the benchmark, and its options where the defaults are not meant.
RUNS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "ingest": ("ingest",),
    "encode": ("encode",),
    "encode-linear": ("encode", "--model", "linear-B/16x64", "--copies", "16"),
    "train": ("train",),
    "flow": ("flow",),
    "inference": ("inference",),
    "evaluate": ("evaluate",),
    "quality": ("quality",),
}


@dataclass(frozen=True)
class Aim:
    """What a figure of a run should be.

    Attributes:
        run: label of the run.
        meaning: of the figure, in a few words.
        figure: its name in the run's JSON; a name of a name after a dot.
        limit: what it should reach, or not exceed.
    """

    run: str
    meaning: str
    figure: str
    side: Literal["at least", "at most"]
    limit: float

    def is_met(self, value: float) -> bool:
        """Whether a measured value is as it should be."""
        return value >= self.limit if self.side == "at least" else value <= self.limit


AIMS = (
    Aim(
        "ingest", "tar to packed rows, over bare decoding", "pipeline_over_decode", "at least", 0.75
    ),
    Aim("ingest", "tokens used of rows of 8,192", "token_utilisation", "at least", 0.99),
    Aim("encode", "caching over the bare encoder", "over_bare_encoder", "at least", 0.95),
    Aim(
        "encode-linear",
        "caching over a plain loop, decoding-bound",
        "over_plain_loop",
        "at least",
        2,
    ),
    Aim("train", "share of the matrix peak", "mfu", "at least", 0.70),
    Aim("train", "what Ray costs a step", "ray_overhead", "at most", 0.05),
    Aim("flow", "what Ray costs a step of flow training", "ray_overhead", "at most", 0.05),
    Aim(
        "inference",
        "time per pixel at 4096 over 1024, window 8",
        "time_per_pixel_4096_over_1024.8",
        "at most",
        1.15,
    ),
    Aim(
        "inference",
        "memory per pixel at 4096 over 1024, window 8",
        "memory_per_pixel_4096_over_1024.8",
        "at most",
        1.15,
    ),
    Aim("quality", "PSNR after ten minutes, dB", "psnr", "at least", 25),
)


def run(labels: positional.Names = (), /, *, json: bool = False) -> None:
    """Every benchmark with its defaults, one after the other, beside what the project aims at.

    Takes most of an hour on two cores, and means something only where nothing else runs.

    Args:
        labels: some of them alone: attention, ingest, encode, encode-linear, train, flow,
            inference, evaluate, quality.
        json: print the JSON alone.
    """

    def show(line: str) -> None:
        if not json:
            print(line, flush=True)

    finish("all", run_all(labels, show), threads=os.cpu_count() or 1)


def run_all(labels: Sequence[str], show: Callable[[str], None]) -> dict[str, Any]:
    """Run benchmarks one after the other; one that fails is noted, and the others go on.

    Args:
        labels: which of RUNS; all if empty.
        show: called with lines for the reader.

    Returns:
        "runs", the JSON of each by its label, and "aims", a row for each aim of these.

    Raises:
        ValueError: there is no such benchmark.
    """
    if unknown := [label for label in labels if label not in RUNS]:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(RUNS)}")
    runs: dict[str, Any] = {}
    for label in labels or RUNS:
        start = time.monotonic()
        runs[label] = _run(RUNS[label])
        said = runs[label].get("failed", "done")
        show(f"{label:<14} {time.monotonic() - start:6.0f} s  {said}")
    aims = [_judge(aim, runs[aim.run]) for aim in AIMS if aim.run in runs]
    for row in aims:
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        met = "" if row["met"] is None else "met" if row["met"] else "missed"
        show(f"{row['meaning']:<46} {value:>12}  {row['side']} {row['limit']:<5g} {met}")
    return {"runs": runs, "aims": aims}


def _run(command: Sequence[str]) -> dict[str, Any]:
    """Return the JSON that ends a benchmark, or why there is none, as `failed`."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "bench", *command, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"failed": said[-1] if said else f"exit status {done.returncode}"}


def _judge(aim: Aim, figures: dict[str, Any]) -> dict[str, Any]:
    value: Any = figures
    for name in aim.figure.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    met = None if value is None else aim.is_met(value)
    return vars(aim) | {"value": value, "met": met}
