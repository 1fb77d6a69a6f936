"""Outbox: a thread that sends what a writer logged, in order, however often the server is away."""

import atexit
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.tracker.server_run import ServerRun, brief, is_refusal
from pipelines.tracker.spool import ARTIFACTS, LANES, RECORDS, Entry, Spool, adopt

_POINTS_PER_SEND = 1000
# Before each of the last tries: how a run ended is said once, and by nobody afterwards.
_LAST_PAUSES_S = (0.0, 1.0, 3.0)

logger = logging.getLogger(__name__)


class Outbox:
    """Entries on their way to a run's server.

    They are sent in the order of their lane; what killed writers left in the spool comes first.
    Artifacts wait for no metric and no metric for them: they may go to a store of their own.

    Args:
        server: the run.
        run_folder: its spools.
        max_bytes: of what waits.
        back_off_s: a server that did not answer is left alone for so long.
    """

    def __init__(
        self, server: ServerRun, run_folder: Path, max_bytes: int, back_off_s: float
    ) -> None:
        self.run_folder = run_folder
        self._server = server
        self._max_bytes = max_bytes
        self._back_off_s = back_off_s
        self._retry_at = dict.fromkeys(LANES, 0.0)  # on the monotonic clock
        self._away: set[str] = set()  # lanes
        self._own: Spool | None = None
        self._adopted: list[Spool] = []
        self._sender: threading.Thread | None = None
        self._closing = False
        # Guards all of the above; never held while the server is asked.
        self._change = threading.Condition()
        with self._change:
            self._adopt()

    def spool(self) -> Spool:
        """Return the spool of this writer, for files that an entry will name."""
        with self._change:
            if self._own is None:
                self._own = Spool.create(self.run_folder, self._max_bytes)
            return self._own

    def add(self, lane: str, entry: Entry, file_bytes: int = 0) -> None:
        """Have an entry sent; returns at once.

        Args:
            file_bytes: of the file in the spool that it names.
        """
        spool = self.spool()
        with self._change:
            safe = not spool.unsafe
            spool.add(lane, entry | {"time_ms": int(time.time() * 1000)}, file_bytes)
            if safe and spool.unsafe:
                logger.warning(
                    "%s cannot be written; metrics wait for MLflow in memory, where a kill loses "
                    "them; free some space there",
                    spool.folder,
                )
            self._start_sender()
            self._change.notify_all()

    def waiting(self, lane: str) -> list[Entry]:
        """Return what was not sent yet, oldest first."""
        with self._change:
            return [entry for spool in self._spools() for entry in spool.waiting(lane)]

    def may_ask(self, lane: str = RECORDS) -> bool:
        """Whether the server may be asked, and is not left alone after a failure."""
        return time.monotonic() >= self._retry_at[lane]

    @contextmanager
    def noting_failure(self, lane: str = RECORDS) -> Iterator[None]:
        """Turn a server that is away into a warning, and leave it alone for a while."""
        try:
            yield
        # The clients of artifact stores raise what they like, and no record is worth a training.
        except Exception as error:
            self._note_failure(lane, error)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until all is sent, or the server turns out to be away."""
        with self._change:
            self._change.wait_for(lambda: not self._is_due(), timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """Try to send what waits, also of killed writers, and stop the thread.

        What could not be sent stays in the spool, for the next tracker of the run there.
        """
        atexit.unregister(self.close)
        with self._change:
            self._adopt()
            sender = self._sender
            self._closing = True
            self._change.notify_all()
        if sender is not None:
            sender.join(timeout_s)
        if num_waiting := len(self.waiting(RECORDS)) + len(self.waiting(ARTIFACTS)):
            logger.warning(
                "%d entries of MLflow run %s could not be sent to %s and wait in %s; the same "
                "command, started again here when the server is back, sends them",
                *(num_waiting, self._server.run_id, self._server.uri, self.run_folder),
            )
        if sender is not None and sender.is_alive():
            return  # it goes on as long as the process lives, and still holds the spool
        with self._change:
            for spool in self._spools():
                _report_dropped(spool)
                spool.close()
            self._own, self._adopted, self._sender = None, [], None

    def _spools(self) -> list[Spool]:
        return [*self._adopted, *([self._own] if self._own else [])]

    def _adopt(self) -> None:
        self._adopted += adopt(self.run_folder, self._max_bytes)
        if self._adopted:
            self._start_sender()

    def _start_sender(self) -> None:
        if self._sender is None or not self._sender.is_alive():
            self._closing = False
            self._sender = threading.Thread(target=self._send_for_ever, name="mlflow", daemon=True)
            self._sender.start()
            atexit.register(self.close)

    def _note_failure(self, lane: str, error: Exception) -> None:
        with self._change:
            lanes = [lane] if lane == ARTIFACTS else [RECORDS, ARTIFACTS]
            for name in lanes:
                self._retry_at[name] = time.monotonic() + self._back_off_s
            if lane not in self._away:
                logger.warning(
                    "MLflow at %s could not be reached for %s, which wait in %s until it answers: "
                    "%s",
                    *(self._server.uri, lane, self.run_folder, brief(error)),
                )
            self._away.update(lanes)
            self._change.notify_all()

    def _note_success(self, lane: str, num_sent: int) -> None:
        with self._change:
            if lane in self._away:
                self._away.remove(lane)
                logger.warning(
                    "MLflow at %s answers again and has the %d %s that waited",
                    *(self._server.uri, num_sent, lane),
                )
                for spool in self._spools():
                    _report_dropped(spool)

    def _next_try(self) -> float:
        """Return when there is something to send, on the monotonic clock."""
        lanes = (lane for spool in self._spools() for lane in LANES if spool.is_waiting(lane))
        return min((self._retry_at[lane] for lane in lanes), default=math.inf)

    def _is_due(self) -> bool:
        return self._next_try() <= time.monotonic()

    def _send_for_ever(self) -> None:
        while True:
            with self._change:
                while not self._closing and not self._is_due():
                    seconds = self._next_try() - time.monotonic()
                    self._change.wait(None if math.isinf(seconds) else max(0.0, seconds))
                closing = self._closing
            if closing:
                self._send_last()
            else:
                self._send_all()
            with self._change:
                self._change.notify_all()
            if closing:
                return

    def _send_last(self) -> None:
        """Send all that waits; a server that is only slow for a moment is asked again."""
        for pause_s in _LAST_PAUSES_S:
            time.sleep(pause_s)
            with self._change:
                self._retry_at = dict.fromkeys(LANES, 0.0)
            self._send_all()
            if not any(spool.is_waiting(lane) for spool in self._spools() for lane in LANES):
                return

    def _send_all(self) -> None:
        for lane in LANES:
            if not self.may_ask(lane):
                continue
            with self._change:
                spools = self._spools()
            # A thread that died of an error would record nothing more.
            with self.noting_failure(lane):
                num_sent = 0
                for spool in spools:
                    # Its writer may have sent some of it since the server was last asked.
                    if spool is not self._own and spool.is_waiting(lane):
                        self._server.forget()
                    while entries := _next_entries(spool, lane):
                        self._send(spool, entries)
                        spool.settle(lane, entries)
                        num_sent += len(entries)
                if num_sent:
                    self._note_success(lane, num_sent)
        with self._change:
            for spool in [s for s in self._adopted if not any(map(s.is_waiting, LANES))]:
                spool.close()
                self._adopted.remove(spool)

    def _send(self, spool: Spool, entries: list[Entry]) -> None:
        entry = entries[0]
        # A killed writer's status is history: the run goes on in whoever adopted its spool.
        if entry["kind"] == "status" and spool is not self._own:
            return
        try:
            if entry["kind"] == "metrics":
                self._server.send_metrics(entries)
            else:
                self._server.send(entry, spool)
        except Exception as error:
            # What failed may have been written all the same.
            self._server.forget()
            if not is_refusal(error, entry["kind"]):
                raise
            logger.warning("MLflow refuses %s: %s", entry, brief(error))


def _next_entries(spool: Spool, lane: str) -> list[Entry]:
    """Return the metrics of as many steps as one call takes, or one entry of another kind."""
    head = spool.head(lane, _POINTS_PER_SEND)
    num_entries = num_points = 0
    for entry in head:
        num_points += len(entry.get("metrics", ()))
        if entry["kind"] != "metrics" or num_points > _POINTS_PER_SEND:
            break
        num_entries += 1
    return head[: max(1, num_entries)]


def _report_dropped(spool: Spool) -> None:
    if spool.dropped:
        counts = ", ".join(f"{kind}: {count}" for kind, count in spool.dropped.items())
        logger.warning(
            "the record has a gap, more waited for MLflow than %d bytes (%s)",
            *(spool.max_bytes, counts),
        )
        spool.dropped = {}
