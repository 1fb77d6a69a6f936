import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracker import outbox as module
from pipelines.tracker.outbox import Outbox
from pipelines.tracker.spool import RECORDS, unsent


class Server:
    """A run whose server fails some times, as told, and has what it took."""

    uri, run_id = "http://server", "run"

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.taken: list[dict[str, Any]] = []

    def send(self, entry: dict[str, Any], spool: object) -> None:
        self.asked.set()
        assert self.answers.wait(20)
        if self.failures:
            self.failures -= 1
            raise TimeoutError("busy")
        self.taken.append(entry)

    def forget(self) -> None:
        pass


def status_of(server: Server, folder: Path, *, closes_while_asking: bool) -> list[str]:
    """Say how a run ended to a server, and return what it took."""
    sent = Outbox(server, folder, 2**20, back_off_s=60.0)  # type: ignore[arg-type]
    sent.add(RECORDS, {"kind": "status", "status": "FINISHED"})
    assert server.asked.wait(20)
    closing = threading.Thread(target=sent.close)
    if closes_while_asking:
        closing.start()
        while not sent._closing:
            closing.join(0.001)
    server.answers.set()
    if not closes_while_asking:
        sent.flush()
        closing.start()
    closing.join(20)
    assert not closing.is_alive()
    return [entry["status"] for entry in server.taken]


@pytest.mark.parametrize("closes_while_asking", [True, False])
def test_last_word_of_a_run_reaches_a_server_that_failed_just_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closes_while_asking: bool
) -> None:
    monkeypatch.setattr(module, "_LAST_PAUSES_S", (0.0, 0.01, 0.01))
    server = Server(failures=2)
    assert status_of(server, tmp_path, closes_while_asking=closes_while_asking) == ["FINISHED"]
    assert list(unsent(tmp_path)) == []


def test_a_server_that_stays_away_leaves_the_last_word_in_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LAST_PAUSES_S", (0.0, 0.01))
    server = Server(failures=1000)
    assert status_of(server, tmp_path, closes_while_asking=True) == []
    assert server.failures == 1000 - 1 - 2
    assert [entry["status"] for entry in unsent(tmp_path)] == ["FINISHED"]
    assert "could not be sent" in caplog.text
    second = Server(failures=0)
    second.answers.set()
    # A killed writer's status would be history; so is that of one that could not say it.
    Outbox(second, tmp_path, 2**20, back_off_s=60.0).close()  # type: ignore[arg-type]
    assert list(unsent(tmp_path)) == []
