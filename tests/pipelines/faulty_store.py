"""HTTP servers on loopback that misbehave on schedule."""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What is done to an answer, and the reason under which its repetition must be counted.
FAULTS = {
    "503": "status 503",
    "500": "status 500",
    "429": "status 429",
    "400 RequestTimeout": "status 400",
    "garbage status": "connection",
    "hang up": "connection",
    "reset": "connection",
    "truncated": "truncated",
    "short length": "bad answer",
    "shifted range": "bad answer",
}


def rarely(
    fraction: float, seed: int, faults: Iterable[str] = FAULTS
) -> Callable[[str], str | None]:
    """Return a schedule with faults of all kinds in this fraction of the answers."""
    rng = random.Random(seed)
    return lambda path: rng.choice(list(faults)) if rng.random() < fraction else None


def in_turn(*faults: str | None) -> Callable[[str], str | None]:
    """Return a schedule with these faults first, and none after them."""
    remaining = iter(faults)
    return lambda path: next(remaining, None)


# What may happen to the answer to a PUT, which has no body: the object is written all the same.
PUT_FAULTS = ("503", "500", "429", "400 RequestTimeout", "garbage status", "hang up", "reset")


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a server and spoils the answers as its schedule says.

    schedule gets the path of a request; what it returns is a key of FAULTS, or "stalled",
    "trickled", "surplus", "403", "412", "416", "another etag", or None. It may do other things.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.upstream = urlsplit(upstream).netloc
        self.lock = threading.Lock()
        self.reset()

    def reset(self, schedule: Callable[[str], str | None] = lambda path: None) -> None:
        self.schedule = schedule
        self.rng = random.Random(0)
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.put_schedule: Callable[[str], str | None] = lambda path: None
        self.extra_query = ""
        self.dropped_headers: set[str] = set()

    def expected_retries(self) -> dict[str, int]:
        expected: Counter[str] = Counter()
        for fault, count in self.injected.items():
            expected[FAULTS[fault]] += count
        return dict(expected)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are expected."""


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._pass_on("GET")

    def do_PUT(self) -> None:
        self._pass_on("PUT")

    def do_DELETE(self) -> None:
        self._pass_on("DELETE")

    def _pass_on(self, method: str) -> None:
        proxy = self.server
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with proxy.lock:
            fault = (proxy.schedule if method == "GET" else proxy.put_schedule)(self.path)
            part = proxy.rng.random()
            proxy.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            if fault is not None:
                proxy.injected[fault] += 1
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=30)
        dropped = proxy.dropped_headers | {"expect"}
        kept = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        query = proxy.extra_query if method == "GET" else ""
        upstream.request(method, self.path + query, body=sent or None, headers=kept)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        headers = {name.title(): value for name, value in answer.getheaders()}
        headers = {k: v for k, v in headers.items() if k not in ("Connection", "Transfer-Encoding")}
        headers["Content-Length"] = str(len(body))
        self._spoil(fault, answer.status, headers, body, int(part * len(body)))

    def _spoil(
        self, fault: str | None, status: int, headers: dict[str, str], body: bytes, cut: int
    ) -> None:
        match fault:
            case None:
                self._send(status, headers, body)
            case "503" | "500" | "429" | "400 RequestTimeout" | "403" | "412" | "416":
                number, _, code = fault.partition(" ")
                code = code or {"503": "SlowDown", "403": "AccessDenied"}.get(number, "Other")
                error = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                self._send(int(number), {"Content-Length": str(len(error))}, error)
            case "garbage status":
                self.wfile.write(b"\0\1garbage\r\n\r\n")
                self._hang_up()
            case "hang up":
                self._hang_up()
            case "reset":
                if body:  # an answer without one would be whole
                    self._send(status, headers, body[:cut])
                # With this, closing a socket tells the other side that the connection broke.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close()
                self.connection.close()
                self._hang_up()
            case "truncated":
                self._send(status, headers, body[:cut])
                self._hang_up()
            case "short length":
                self._send(status, headers | {"Content-Length": str(cut)}, body[:cut])
            case "shifted range":
                unit, _, numbers = headers.get("Content-Range", "bytes 0-0/1").partition(" ")
                first, last, total = map(int, numbers.replace("/", "-").split("-"))
                shifted = f"{unit} {first + 1}-{last + 1}/{total}"
                self._send(status, headers | {"Content-Range": shifted}, body)
            case "stalled":
                self._send(status, headers, body[:cut])
                self.connection.settimeout(10)
                self.connection.recv(1)  # until the client gives up
                self._hang_up()
            case "trickled":
                self._send(status, headers, body[:1])
                for position in range(1, len(body)):
                    self.wfile.write(body[position : position + 1])
            case "surplus":
                self._send(status, headers, body + b"HTTP/1.1 200 surplus\r\n\r\n")
                self._hang_up()
            case "another etag":
                self._send(status, headers | {"Etag": '"another"'}, body)
            case _:
                raise AssertionError(fault)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
        self.wfile.write("\r\n".join([*lines, "\r\n"]).encode() + body)

    def _hang_up(self) -> None:
        self.close_connection = True


class Origin(ThreadingHTTPServer):
    """Serves the bytes in `files` under their paths.

    knows_ranges: whether it answers Range with 206. etag: how an ETag is made of a hash, or None
    for no ETag. redirects: from path to location.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _OriginHandler)
        self.files: dict[str, bytes] = {}
        self.reset()

    def reset(self) -> None:
        self.knows_ranges = True
        self.etag: str | None = '"{}"'
        self.redirects: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _OriginHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        origin = self.server
        if self.path in origin.redirects:
            self._send(302, {"Location": origin.redirects[self.path]}, b"moved")
        elif self.path not in origin.files:
            self._send(404, {}, b"no such file")
        else:
            self._send_file(origin.files[self.path])

    def _send_file(self, data: bytes) -> None:
        etag = self.server.etag
        headers = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if etag is not None:
            headers = {"ETag": etag.format(f"{hash(data):x}")}
        condition = self.headers.get("If-Range")
        wanted = self.headers.get("Range")
        if not wanted or not self.server.knows_ranges or condition not in (None, *headers.values()):
            self._send(200, headers, data)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            self._send(416, {}, b"")
            return
        content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._send(206, headers | content_range, data[start:stop])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """Serve in a thread while the body runs."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
