"""Objects of a store read without losing or doubling a byte, whatever the store does.

A request that fails is repeated from the first byte that is missing. Before a byte of an answer is
taken, the answer must show that it holds the bytes asked for, of an object of the same length and
ETag as before. What cannot be read is a failure that names the object and the reason.
"""

import io
import logging
import random
import re
import threading
from collections import Counter
from time import monotonic, sleep
from typing import Any

from pipelines.reading.stores import (
    CHUNK_BYTES,
    Answer,
    Body,
    Fault,
    ObjectChanged,
    PastTheEnd,
    delete,
    get,
    list_page,
    put,
)

__all__ = [
    "ObjectChanged",
    "RemoteObject",
    "StoreUnavailable",
    "check_length",
    "delete_object",
    "list_objects",
    "put_object",
    "retry_counts",
]

# At most this many attempts, over this time, without PROGRESS_BYTES having come in between.
MAX_ATTEMPTS = 8
MAX_RETRY_S = 300.0
PROGRESS_BYTES = 8 * 2**20
# After the n-th failure in a row a random pause of 0 to FIRST_PAUSE_S * 2^(n - 1), or MAX_PAUSE_S:
# "full jitter", which spreads clients that failed together as far as it can be done.
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 20.0

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_LENGTH = re.compile(r"\d{1,18}")

logger = logging.getLogger(__name__)
# Not the shared generator: workers seeded alike would all come back at the same moment.
_jitter = random.SystemRandom()
_retries: Counter[str] = Counter()
_retries_lock = threading.Lock()


class StoreUnavailable(OSError):
    """A store kept failing until no attempt was left."""


def retry_counts() -> dict[str, int]:
    """Return how many requests of this process were repeated, by reason."""
    with _retries_lock:
        return dict(_retries)


class RemoteObject:
    """One object of a store, to be read by ranges or front to back.

    Its length and its ETag (else its Last-Modified) are those of the first answer; one that
    differs raises ObjectChanged. Where a server sends neither, the length alone tells.

    Args:
        num_bytes: the length it must have, where that is known.
    """

    def __init__(self, uri: str, num_bytes: int | None = None) -> None:
        self.uri = uri
        self.num_bytes = num_bytes
        self._version: str | None = None

    def read_range(self, start: int, num_bytes: int) -> bytearray:
        """Read exactly the bytes start .. start + num_bytes - 1.

        Raises:
            ObjectChanged, FileNotFoundError, PermissionError, StoreUnavailable, OSError: it cannot
                be read; each names the object.
        """
        data = bytearray(num_bytes)
        missing = memoryview(data)
        with _Reader(self, start, start + num_bytes) as reader:
            while missing:
                missing = missing[reader.readinto(missing) :]
        return data

    def stream(self) -> io.BufferedReader:
        """Read all of it from front to back; it fails as read_range does, when it is read."""
        return io.BufferedReader(_Reader(self, 0, None), CHUNK_BYTES)

    def ask_length(self) -> int:
        """Ask the store for the length; errors as those of read_range."""
        with _Reader(self, 0, 1) as reader:
            reader.readinto(bytearray(1))
        assert self.num_bytes is not None
        return self.num_bytes

    def open_body(self, start: int, stop: int | None) -> Body:
        """Send one request for the bytes from start to stop, or to the end, and check the answer.

        Raises:
            Fault: this attempt failed.
            OSError: as read_range.
        """
        wanted = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            answer = get(self.uri, wanted, self._version)
        except PastTheEnd:
            if start > 0:
                raise ObjectChanged(
                    f"{self.uri}: it has no byte {start}, so it is shorter than it was; bring back "
                    "the shard that was indexed, or index the shards anew"
                ) from None
            self._check_same(0, self._version)
            return Body(None, 0, 0)
        try:
            return self._checked_body(answer, start, stop)
        except BaseException:
            answer.response.close()
            raise

    def _checked_body(self, answer: Answer, start: int, stop: int | None) -> Body:
        claimed_length = answer.headers.get("content-length")
        if answer.status == 206:
            content_range = answer.headers.get("content-range", "")
            numbers = _CONTENT_RANGE.fullmatch(content_range)
            if numbers is None:
                raise Fault("bad answer", f"Content-Range {content_range!r}")
            first, last, total = map(int, numbers.groups())
            if first != start or (stop is None and last + 1 != total):
                raise Fault("bad answer", f"{content_range} where {start}-{stop or ''} was wanted")
        elif answer.status == 200:
            if claimed_length is None or not _LENGTH.fullmatch(claimed_length):
                raise Fault("bad answer", f"Content-Length {claimed_length!r}")
            total = int(claimed_length)
            first, last = 0, total - 1
        else:
            raise Fault("bad answer", f"status {answer.status}")
        num_bytes = last + 1 - first
        if claimed_length is not None and claimed_length != str(num_bytes):
            raise Fault("bad answer", f"Content-Length {claimed_length} for {num_bytes} bytes")
        self._check_same(total, answer.headers.get("etag") or answer.headers.get("last-modified"))
        if answer.status == 206:
            if stop is not None and last + 1 != stop:
                raise Fault("bad answer", f"bytes {first}-{last} instead of {start}-{stop - 1}")
            return Body(answer.response, 0, num_bytes)
        if stop is not None:
            raise OSError(
                f"{self.uri}: the server sends the whole shard where a range of it was asked for; "
                "use one that answers Range requests, or copy the shard to a disk"
            )
        return Body(answer.response, start, total - start)

    def _check_same(self, num_bytes: int, version: str | None) -> None:
        if self.num_bytes is None:
            self.num_bytes = num_bytes
        check_length(self.uri, num_bytes, self.num_bytes)
        if self._version is None:
            self._version = version
        if version != self._version:
            raise ObjectChanged(
                f"{self.uri}: replaced while it was read (now {version}, before {self._version}); "
                "index the shards anew when nothing writes to them"
            )


def check_length(uri: str, num_bytes: int, expected_bytes: int) -> None:
    """Refuse a shard of another length than before.

    Raises:
        ObjectChanged: it is not expected_bytes long.
    """
    if num_bytes != expected_bytes:
        raise ObjectChanged(
            f"{uri}: {num_bytes} bytes long where {expected_bytes} are expected; bring back the "
            "shard that was indexed, or index the shards anew"
        )


def list_objects(uri: str, *, recursive: bool) -> list[str]:
    """Return the objects whose URIs begin with s3://BUCKET/PREFIX, in the order of their keys.

    Args:
        recursive: with those that have a slash behind the prefix.

    Raises:
        FileNotFoundError, PermissionError, StoreUnavailable, OSError: they cannot be listed.
    """
    found: list[str] = []
    attempts = _Attempts()
    token = None
    while True:
        try:
            page, token = list_page(uri, token, recursive=recursive)
        except Fault as fault:
            attempts.failed(fault, f"{uri}: the list of objects after {found[-1:]}")
            continue
        attempts.reset()
        found += page
        if token is None:
            return sorted(found)


def put_object(uri: str, data: bytes, *, only_new: bool = False) -> bool:
    """Write a whole object s3://BUCKET/KEY; a reader sees all of it or nothing.

    Args:
        only_new: leave an object of that name as it is. After a lost answer, it may be ours.

    Returns:
        whether it was written.

    Raises:
        FileNotFoundError, PermissionError, StoreUnavailable, OSError: it cannot be written.
    """
    if not uri.startswith("s3://"):
        raise ValueError(f"{uri}: cannot be written; give a local folder or s3://BUCKET/PREFIX")
    attempts = _Attempts("written")
    while True:
        try:
            return put(uri, data, only_new=only_new)
        except Fault as fault:
            attempts.failed(fault, uri)


def delete_object(uri: str) -> None:
    """Delete an object s3://BUCKET/KEY, if it is there; errors as those of put_object."""
    attempts = _Attempts("deleted")
    while True:
        try:
            return delete(uri)
        except Fault as fault:
            attempts.failed(fault, uri)


class _Attempts:
    """Failed attempts since it last went forward.

    Args:
        goal: what is attempted, as a participle.
    """

    def __init__(self, goal: str = "read") -> None:
        self._goal = goal
        self._num_failed = 0
        self._failing_since = 0.0

    def reset(self) -> None:
        self._num_failed = 0

    def failed(self, fault: Fault, what: str) -> None:
        """Count a failed attempt and wait before the next one.

        Raises:
            StoreUnavailable: no attempt is left.
        """
        now = monotonic()
        if self._num_failed == 0:
            self._failing_since = now
        self._num_failed += 1
        pause_s = _jitter.uniform(0, min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._num_failed - 1)))
        elapsed_s = now - self._failing_since
        if self._num_failed >= MAX_ATTEMPTS or elapsed_s + pause_s > MAX_RETRY_S:
            remedy = ", or leave the shard out" if self._goal == "read" else ""
            raise StoreUnavailable(
                f"{what} could not be {self._goal} in {self._num_failed} attempts over "
                f"{elapsed_s:.0f} s, the last one: {fault}; try again when the store is "
                f"well{remedy}"
            ) from fault
        with _retries_lock:
            _retries[fault.reason] += 1
        logger.log(
            logging.INFO if self._num_failed < 3 else logging.WARNING,
            "%s: attempt %d of %d failed: %s; the next one in %.1f s",
            what,
            self._num_failed,
            MAX_ATTEMPTS,
            fault,
            pause_s,
        )
        sleep(pause_s)


class _Reader(io.RawIOBase):
    """The bytes of an object from start to stop, or to its end; resumes where an attempt failed."""

    def __init__(self, remote: RemoteObject, start: int, stop: int | None) -> None:
        super().__init__()
        self._remote = remote
        self._position = start
        self._stop = stop
        self._body: Body | None = None
        self._attempts = _Attempts()
        self._progress_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                if self._body is None:
                    self._body = self._remote.open_body(self._position, self._stop)
                num_bytes = self._body.readinto(buffer)
                break
            except Fault as fault:
                self._drop_body()
                last = "" if self._stop is None else self._stop - 1
                self._attempts.failed(fault, f"{self._remote.uri}: bytes {self._position}-{last}")
        self._position += num_bytes
        self._progress_bytes += num_bytes
        if self._progress_bytes >= PROGRESS_BYTES:
            self._progress_bytes = 0
            self._attempts.reset()
        return num_bytes

    def close(self) -> None:
        self._drop_body()
        super().close()

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
