import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster import leave


@contextmanager
def metadata_service(answers: list[str | None]) -> Iterator[tuple[str, list[str]]]:
    """EC2's metadata service, version 2: a token by PUT, the notice or 404 by GET."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append(f"PUT {self.headers['X-aws-ec2-metadata-token-ttl-seconds']}")
            self._send(200, "the-token")

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != "the-token":
                self._send(401, "")
                return
            asked.append(f"GET {self.path}")
            answer = answers.pop(0)
            self._send(404 if answer is None else 200, answer or "")

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_spot_notice_is_awaited_and_its_time_is_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[tuple[str, float]] = []
    monkeypatch.setattr(leave, "announce", lambda address, end: announced.append((address, end)))
    notice = '{"action": "terminate", "time": "2031-05-04T03:02:01Z"}'
    wait = leave.wait_for_notice
    monkeypatch.setattr(leave, "wait_for_notice", lambda url: wait(url, poll_s=0.01))
    with metadata_service([None, None, notice]) as (url, asked):
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url + "/")
        leave.leave(on_spot_notice=True, address="head:6379")
    expected = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC).timestamp()
    assert announced == [("head:6379", expected)]
    assert asked.count("GET /latest/meta-data/spot/instance-action") == 3
    assert "PUT 21600" in asked


def test_without_a_notice_the_deadline_counts_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[float] = []
    monkeypatch.setattr(leave, "announce", lambda address, end: announced.append(end))
    leave.leave(deadline_s=100.0)
    assert announced[0] - time.time() == pytest.approx(100, abs=5)
