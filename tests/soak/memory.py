"""What processes and folders hold over time, and whether it stays what it is."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from scipy.stats import theilslopes

# Of a life: imports, first batches, as many checkpoints as are kept, what allocators keep.
WARM_UP_S = 240.0
# Shorter lives say nothing.
_LEAST_SPAN_S = 120.0
# What a process may grow by in all its life, for noise, and beyond that with time. A step of the
# quickstart moves several MB: a leak of one in fifty of them would be more.
_GROWTH_MB = 24.0
_GROWTH_MB_PER_MIN = 1.0
# Torch's matrix libraries keep kernels for every shape that they have met, which come more and more
# seldom: a training worker's memory still grows after hundreds of steps. That steps of shapes that
# it knows take nothing is held by test_loop.py; here only more than all these kernels is a leak.
_KERNELS_MB = {"RayTrainWorker": 600.0}
_INTERVAL_S = 5.0


@dataclass
class Life:
    """What one process or folder held, from its first sample to its last.

    Attributes:
        role: what it is; restarted processes have many lives in one role.
        times_s: of the samples, since the watch began.
        held_mb: at these times.
    """

    role: str = ""
    times_s: list[float] = field(default_factory=list)
    held_mb: list[float] = field(default_factory=list)

    def add(self, time_s: float, held_mb: float) -> None:
        """Append a sample."""
        self.times_s.append(time_s)
        self.held_mb.append(held_mb)

    def warm(self) -> "Life":
        """Return the part after the warm-up."""
        start = next(
            (i for i, t in enumerate(self.times_s) if t - self.times_s[0] >= WARM_UP_S),
            len(self.times_s),
        )
        return Life(self.role, self.times_s[start:], self.held_mb[start:])


@dataclass(frozen=True)
class Growth:
    """How a life went on after its warm-up.

    Attributes:
        allowed_mb: for noise, and for what its role keeps.
        minutes: from the first sample to the last.
        mb_per_min: median slope between any two samples (Theil-Sen): blind to single peaks.
        start_mb: first sample.
        end_mb: last sample.
    """

    allowed_mb: float
    minutes: float
    mb_per_min: float
    start_mb: float
    end_mb: float

    @property
    def is_flat(self) -> bool:
        """Whether it grew by no more than is allowed."""
        return self.mb_per_min * self.minutes <= self.allowed_mb


def growth_of(life: Life) -> Growth | None:
    """Judge a life; None if it was too short to be judged."""
    warm = life.warm()
    if not warm.times_s or warm.times_s[-1] - warm.times_s[0] < _LEAST_SPAN_S:
        return None
    slope_per_s = float(theilslopes(warm.held_mb, warm.times_s)[0])
    minutes = (warm.times_s[-1] - warm.times_s[0]) / 60
    allowed_mb = _GROWTH_MB + _GROWTH_MB_PER_MIN * minutes + _KERNELS_MB.get(life.role, 0.0)
    return Growth(allowed_mb, minutes, 60 * slope_per_s, warm.held_mb[0], warm.held_mb[-1])


def growing(lives: Iterable[Life]) -> list[str]:
    """Return a sentence for each life that is not flat."""
    return [
        f"{life.role} grew by {growth.mb_per_min:.1f} MB a minute for {growth.minutes:.0f} minutes "
        f"after its warm-up, from {growth.start_mb:.0f} to {growth.end_mb:.0f} MB"
        for life in lives
        if (growth := growth_of(life)) is not None and not growth.is_flat
    ]


def summary(lives: Iterable[Life]) -> dict[str, dict[str, float]]:
    """Return, for each role, its lives, those that were judged, and the steepest of these."""
    by_role: dict[str, list[Life]] = {}
    for life in lives:
        by_role.setdefault(life.role, []).append(life)
    found = {}
    for role, members in sorted(by_role.items()):
        judged = [growth for life in members if (growth := growth_of(life)) is not None]
        found[role] = {
            "lives": len(members),
            "judged": len(judged),
            "most_mb": round(max(max(life.held_mb) for life in members), 1),
        }
        if judged:
            steepest = max(judged, key=lambda growth: growth.mb_per_min)
            found[role] |= {name: round(value, 2) for name, value in vars(steepest).items()}
    return found


class Watch(threading.Thread):
    """Samples a process with all its descendants, and other figures, until it is told to stop.

    Of a process that is what it alone holds: pages of the object store that it has mapped count as
    the object store's.

    Args:
        root: pid of the process.
        others: from a role to what gives its bytes.
        log: gets a line of JSON for every sample.
    """

    def __init__(self, root: int, others: Mapping[str, Callable[[], int]], log: Path) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._others = others
        self._log = log
        self._start = time.monotonic()
        self._lives: dict[tuple[str, float], Life] = {}
        self._stop_event = threading.Event()

    @property
    def lives(self) -> list[Life]:
        """Everything that was seen; processes that never did any work are left out."""
        return [life for life in self._lives.values() if life.role]

    def run(self) -> None:
        while not self._stop_event.wait(_INTERVAL_S):
            time_s = time.monotonic() - self._start
            sample = {}
            for process in descendants(self._root):
                with suppress(psutil.Error):
                    memory, role = process.memory_info(), role_of(process, self._root)
                    life = self._life(str(process.pid), process.create_time(), role)
                    life.add(time_s, (memory.rss - memory.shared) / 1e6)
                    sample[f"{process.pid} {life.role}"] = life.held_mb[-1]
            for name, held in self._others.items():
                life = self._life(name, 0.0, name)
                life.add(time_s, held() / 1e6)
                sample[name] = life.held_mb[-1]
            with self._log.open("a") as file:
                file.write(json.dumps({"time_s": time_s, "mb": sample}) + "\n")

    def stop(self) -> None:
        """Take no more samples."""
        self._stop_event.set()
        self.join()

    def _life(self, name: str, started: float, role: str) -> Life:
        life = self._lives.setdefault((name, started), Life())
        life.role = role or life.role
        return life


def descendants(root: int) -> list[psutil.Process]:
    """Return a process and everything that it started, directly or not."""
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def role_of(process: psutil.Process, root: int) -> str:
    """Return what a process of a Ray driver does; empty while it waits for work."""
    if process.pid == root:
        return "driver"
    command = process.cmdline()
    title = command[0] if command else ""
    if title.startswith("ray::"):
        # The same processes plan and read, in turn: MapBatches(plan_groups), MapBatches(load).
        role = re.split(r"[.( ]", title.removeprefix("ray::"))[0]
        return "" if role == "IDLE" else role
    scripts = [Path(part).stem for part in command if part.endswith(".py")]
    return scripts[0] if scripts else Path(title).name


def object_store_bytes(root: int) -> int:
    """Return the shared memory that the object store of a driver's own cluster has touched."""
    files = {}
    for process in descendants(root):
        with suppress(psutil.Error, OSError):
            if "raylet" not in process.name():
                continue
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if os.readlink(link).startswith("/dev/shm/"):
                    stat = link.stat()
                    files[stat.st_ino] = 512 * stat.st_blocks
    return sum(files.values())


def folder_bytes(folder: Path, without: str = "") -> int:
    """Return the bytes of all files below a folder, but for folders of a name."""
    total = 0
    for path, names, files in os.walk(folder):
        names[:] = [name for name in names if name != without]
        for file in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, file)).st_size
    return total
