import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from jobs import doctor
from jobs.cli import main


@contextmanager
def web_server(skew_s: float, body: bytes) -> Iterator[str]:
    """A server whose clock is off."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", formatdate(time.time() + skew_s, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment and a home that say nothing of Ray, MLflow or AWS."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "MLFLOW_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_versions_that_differ_from_the_constraints_are_named(
    bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = doctor.check_versions()
    assert found.level == "ok", "the tests run in an environment that follows the constraints"
    text = doctor.CONSTRAINTS_FILE.read_text()
    file = tmp_path / "constraints.txt"
    file.write_text(text.replace("\nray==", "\nray==9.").replace("\ntorch==", "\ntorch==9."))
    bare.setattr(doctor, "CONSTRAINTS_FILE", file)
    (found,) = doctor.check_versions()
    assert found.level == "problem"
    assert "ray 2." in found.found and "torch 2." in found.found and "mlflow" not in found.found
    assert "pip install -c constraints.txt" in found.remedy


def test_a_token_that_is_missing_or_that_others_can_read_is_a_problem(
    bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = doctor.check_token()
    assert (found.level, "runs code" in found.found) == ("note", True)
    bare.setenv("RAY_AUTH_MODE", "token")
    (found,) = doctor.check_token()
    assert found.level == "problem" and "--generate" in found.remedy
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("token")
    file.chmod(0o644)
    (found,) = doctor.check_token()
    assert found.level == "problem" and f"chmod 600 {file}" in found.remedy
    file.chmod(0o600)
    (found,) = doctor.check_token()
    assert found.level == "ok"


def test_limits_and_disk_are_judged(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(doctor.resource, "getrlimit", lambda which: (1024, 4096))
    assert next(doctor.check_limits()).remedy.startswith("ulimit -n 65536")
    bare.setattr(doctor.resource, "getrlimit", lambda which: (65536, 65536))
    assert next(doctor.check_limits()).level == "ok"
    bare.setattr(doctor, "_MIN_FREE_DISK_GB", 1e9)
    (found,) = doctor.check_disk()
    assert found.level == "problem" and "--temp-dir" in found.remedy


def test_credentials_in_the_environment_are_named_and_not_shown(bare: pytest.MonkeyPatch) -> None:
    assert list(doctor.check_environment()) == []
    bare.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    bare.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://mlflow:hush-hush@db/mlflow")
    found = list(doctor.check_environment())
    assert "AWS_SECRET_ACCESS_KEY" in found[0].found
    assert "MLFLOW_BACKEND_STORE_URI" in found[1].found
    assert "hush" not in str(found)


def test_a_store_is_probed_and_left_as_it_was(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setattr(doctor, "_PROBE_BYTES", 1000)
    (found,) = doctor.check_store(str(tmp_path / "store"))
    assert found.level == "ok" and "MiB/s" in found.found
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "file").write_text("")
    (found,) = doctor.check_store(str(tmp_path / "file"))
    assert found.level == "problem" and found.remedy
    (found,) = doctor.check_store("")
    assert found.level == "note"


def test_mlflow_that_is_away_and_a_clock_that_is_off_are_found(bare: pytest.MonkeyPatch) -> None:
    here = doctor.version("mlflow")
    with web_server(0.0, here.encode()) as uri:
        server, clock = doctor.check_mlflow(uri)
        assert (server.level, clock.level) == ("ok", "ok")
    with web_server(-3600.0, b"0.1") as uri:
        server, clock = doctor.check_mlflow(uri)
        assert server.level == "note" and "MLflow 0.1" in server.found
        assert clock.level == "problem" and "NTP" in clock.remedy
        seconds = float(clock.found.split()[0])
        assert seconds == pytest.approx(3600, abs=10), "the date of an answer has whole seconds"
    (found,) = doctor.check_mlflow(uri)
    assert found.level == "problem"


def test_the_exit_status_says_whether_there_is_a_problem(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.setattr(doctor, "_MIN_FREE_DISK_GB", 0.0)
    assert main(["doctor", "--json"]) == 0
    (findings,) = json.loads(capsys.readouterr().out).values()
    levels = {finding["check"]: finding["level"] for finding in findings}
    assert {"versions", "gpu", "disk", "token", "store", "mlflow"} <= set(levels)
    assert "problem" not in levels.values()
    bare.setattr(doctor, "_MIN_FREE_DISK_GB", 1e9)
    assert main(["doctor"]) == 1
    out = capsys.readouterr()
    assert "problem  disk" in out.out and "1 problems (disk)" in out.err
