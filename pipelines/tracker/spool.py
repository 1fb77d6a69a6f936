"""Spool: what a tracking server has not acknowledged yet, on the local disk.

    folder/                       of one run
        TIME-PROCESS-RANDOM/      of one writer; its name sorts by the time of its start
            lock                  held as long as the writer lives, also when it is killed
            records.jsonl         metrics, tags, status: an entry a line, in the order they came
            artifacts.jsonl       images, files, models
            files/                what the artifacts' entries name

An entry is on disk before anyone tries to send it, and a lane's file is emptied when all of its
entries were sent. So a killed writer leaves entries of which some were sent already: whoever sends
them again compares them with the server's. Nothing is synced to the platter: the record survives
the death of a process, not that of its machine.
"""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

RECORDS, ARTIFACTS = "records", "artifacts"
LANES = (RECORDS, ARTIFACTS)

Entry = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    entry: Entry
    num_bytes: int  # of its line and its file


class Spool:
    """A writer's entries; for a writing and a sending thread.

    Waiting entries are kept in memory too: sending needs no reading, and a full disk loses nothing
    but the safety against a kill.

    Args:
        folder: this writer's own.
        max_bytes: of all that waits, files included.

    Attributes:
        dropped: entries that were given up because of max_bytes, by kind.
        unsafe: entries that wait in memory alone, because the disk did not take them.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.dropped: dict[str, int] = {}
        self.unsafe = 0
        self._num_bytes = 0
        self._waiting: dict[str, deque[_Waiting]] = {lane: deque() for lane in LANES}
        self._guard = RLock()
        self._lock: int | None = None

    @classmethod
    def create(cls, run_folder: Path, max_bytes: int) -> "Spool":
        """Start a writer's spool among those of a run.

        A disk that takes no files is no error: the entries then wait in memory alone.
        """
        name = f"{time.time_ns():020}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # Others see it when it is locked, or they would take it for a dead writer's.
        spool = cls(run_folder / f".{name}", max_bytes)
        try:
            run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (spool.folder / "files").mkdir(parents=True)
            locked = spool._try_lock()
            assert locked, f"{name} was given twice"
            spool.folder = spool.folder.rename(run_folder / name)
        except OSError:
            spool._unlock()  # without the lock nothing is written: every entry counts as unsafe
        return spool

    def add(self, lane: str, entry: Entry, file_bytes: int = 0) -> None:
        """Append an entry; images, then files, give way where max_bytes is reached.

        Args:
            file_bytes: of the file that it names.
        """
        line = (json.dumps(entry) + "\n").encode()
        num_bytes = len(line) + file_bytes
        with self._guard:
            if not self._make_room(num_bytes):
                self._drop(entry)
                return
            self.unsafe += not self._write(lane, line)
            self._waiting[lane].append(_Waiting(entry, num_bytes))
            self._num_bytes += num_bytes

    def new_file(self) -> Path:
        """Return a path for a file that an entry will name, as `file`.

        Raises:
            OSError: the disk takes no files.
        """
        if self._lock is None:
            raise OSError(f"{self.folder} cannot be written")
        return self.folder / "files" / uuid.uuid4().hex

    def file_of(self, entry: Entry) -> Path:
        """Return where the file of an entry lies; gone when the entry was dropped."""
        return self.folder / "files" / entry["file"]

    def waiting(self, lane: str) -> list[Entry]:
        """Return what was not sent yet, oldest first."""
        with self._guard:
            return [item.entry for item in self._waiting[lane]]

    def is_waiting(self, lane: str) -> bool:
        """Whether a lane holds anything that was not sent yet."""
        return bool(self._waiting[lane])

    def head(self, lane: str, count: int) -> list[Entry]:
        """Return up to `count` of the oldest entries that were not sent yet."""
        with self._guard:
            items = self._waiting[lane]
            return [items[index].entry for index in range(min(count, len(items)))]

    def settle(self, lane: str, entries: list[Entry]) -> None:
        """Forget entries that were sent, the oldest of the lane."""
        with self._guard:
            items = self._waiting[lane]
            for entry in entries:
                # What was dropped in the meantime is no longer there.
                if items and items[0].entry is entry:
                    self._num_bytes -= items.popleft().num_bytes
                    self._delete_file(entry)
            if not items:
                self._empty(lane)

    def room(self) -> int:
        """Return the bytes that can wait beside what does; images would give way."""
        with self._guard:
            held = (item for items in self._waiting.values() for item in items)
            return self.max_bytes - sum(i.num_bytes for i in held if i.entry["kind"] != "image")

    def close(self) -> None:
        """Give up the lock; what still waits is for the next writer, nothing leaves no trace."""
        with self._guard:
            if self._lock is None:
                return
            if not any(self._waiting.values()):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _try_lock(self) -> bool:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def _write(self, lane: str, line: bytes) -> bool:
        if self._lock is None:
            return False
        path = self.folder / f"{lane}.jsonl"
        try:
            with path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) != len(line):
                    file.truncate(end)  # half a line would spoil the next one
                    return False
        except OSError:
            return False
        return True

    def _empty(self, lane: str) -> None:
        with suppress(OSError):  # what stays is sent once more, and found on the server
            os.truncate(self.folder / f"{lane}.jsonl", 0)

    def _make_room(self, num_bytes: int) -> bool:
        """Drop images, then files, oldest first, until an entry fits; say whether it does."""
        artifacts = self._waiting[ARTIFACTS]
        for kind in ("image", "files"):
            for item in [item for item in artifacts if item.entry["kind"] == kind]:
                if self._num_bytes + num_bytes <= self.max_bytes:
                    return True
                artifacts.remove(item)
                self._num_bytes -= item.num_bytes
                self._drop(item.entry)
        if not artifacts:
            self._empty(ARTIFACTS)  # lines of what was dropped
        return self._num_bytes + num_bytes <= self.max_bytes

    def _drop(self, entry: Entry) -> None:
        self.dropped[entry["kind"]] = self.dropped.get(entry["kind"], 0) + 1
        self._delete_file(entry)

    def _delete_file(self, entry: Entry) -> None:
        if "file" in entry:
            path = self.file_of(entry)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def adopt(run_folder: Path, max_bytes: int) -> list[Spool]:
    """Take over the spools of a run whose writers are dead, oldest first."""
    adopted = []
    for folder in _writers(run_folder):
        spool = Spool(folder, max_bytes)
        try:
            if not spool._try_lock():
                continue  # its writer lives
        except OSError:
            continue  # sent and removed by another
        for lane in LANES:
            for entry in _read(folder / f"{lane}.jsonl"):
                if "file" in entry and not spool.file_of(entry).exists():
                    continue  # dropped for lack of room, or never written to its end
                spool._waiting[lane].append(_Waiting(entry, 0))  # nothing is added to it
        adopted.append(spool)
    return adopted


def unsent(run_folder: Path) -> Iterator[Entry]:
    """Yield the records that any writer of a run, dead or alive, may not have sent yet."""
    for folder in _writers(run_folder):
        yield from _read(folder / f"{RECORDS}.jsonl")


def _writers(run_folder: Path) -> list[Path]:
    try:
        names = sorted(path.name for path in run_folder.iterdir() if path.is_dir())
    except OSError:
        return []
    return [run_folder / name for name in names if not name.startswith(".")]


def _read(path: Path) -> list[Entry]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    entries = []
    # The last line of a writer that was killed may be cut; nobody was told that it was recorded.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # the machine itself died before the disk had it
            logger.warning("%s: line %d is damaged and skipped", path, number)
    return entries


def copy_into(spool: Spool, source: Path) -> str:
    """Copy a file or a folder to where an entry can name it, and return the name.

    Raises:
        OSError: the disk takes no files.
    """
    return fill(spool, lambda path: _copy(source, path))


def fill(spool: Spool, write: Callable[[Path], None]) -> str:
    """Have a file of a spool written, and return its name; nothing is left of a failure.

    Raises:
        OSError: the disk takes no files.
    """
    path = spool.new_file()
    try:
        write(path)
    except OSError:
        spool._delete_file({"file": path.name})
        raise
    return path.name


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        # A folder, so that the file keeps its name.
        target.mkdir()
        shutil.copy(source, target / source.name)
