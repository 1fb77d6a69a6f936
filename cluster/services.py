"""Server processes on this machine: start them, see whether they answer, end them and no others."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from vitok.config import config

# In the environment of every process that a stack starts, and of those that they start.
MARKER = "VITOK_STACK"
_GRACE_S = 20.0
_POLL_S = 0.2
_LOG_LINES = 12


@config
class Service:
    """A server process.

    Attributes:
        name: what it serves.
        pid: of the process.
        started: when it was created; another process that got the same pid has another time.
        health_url: answers when the server does.
        log: file with what it says.
    """

    name: str
    pid: int
    started: float
    health_url: str
    log: str

    def is_alive(self) -> bool:
        """Whether the process is there, and is the one that was started."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        return False

    def is_healthy(self) -> bool:
        """Whether the server answers; that it asks for a login is an answer."""
        try:
            with urllib.request.urlopen(self.health_url, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            return error.code in (401, 403)
        except OSError:
            return False


def start(
    name: str, command: Sequence[str], environment: Mapping[str, str], health_url: str, log: Path
) -> Service:
    """Start a server in a session of its own, so that Ctrl-C here does not reach it."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Service(
        name=name,
        pid=process.pid,
        started=psutil.Process(process.pid).create_time(),
        health_url=health_url,
        log=str(log),
    )


def wait_until_healthy(service: Service, timeout_s: float) -> None:
    """Wait for the first answer.

    Raises:
        RuntimeError: the process ended, or did not answer in time; with the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while not service.is_healthy():
        if not service.is_alive():
            raise RuntimeError(f"{service.name} ended while it started: {_end_of(service.log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{service.name} did not answer at {service.health_url} within {timeout_s:.0f} s: "
                f"{_end_of(service.log)}"
            )
        time.sleep(_POLL_S)


def end(services: Sequence[Service], marker: str) -> int:
    """End servers and everything that they started; returns how many processes that were.

    Nothing else is touched: a process is known by its pid and the time of its start, or by the
    marker in its environment, which it has from the server that started it.
    """
    processes: dict[int, psutil.Process] = {}
    for service in services:
        if service.is_alive():
            with suppress(psutil.Error):
                server = psutil.Process(service.pid)
                processes |= {child.pid: child for child in server.children(recursive=True)}
                processes[server.pid] = server
    processes |= {process.pid: process for process in marked(marker)}
    # The servers first: they end their children in good order.
    roots = [processes[s.pid] for s in services if s.pid in processes]
    _send(roots, signal.SIGTERM)
    psutil.wait_procs(roots, timeout=_GRACE_S)
    left = [process for process in processes.values() if process.is_running()]
    _send(left, signal.SIGTERM)
    _, left = psutil.wait_procs(left, timeout=3)
    _send(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)
    # What was started in the meantime.
    late = marked(marker)
    _send(late, signal.SIGKILL)
    psutil.wait_procs(late, timeout=5)
    return len(processes) + len(late)


def marked(marker: str) -> list[psutil.Process]:
    """Return the processes of this user that a stack started, directly or not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARKER) == marker:
                found.append(process)
    return found


def check_port(host: str, port: int, option: str) -> None:
    """Refuse a port that is taken.

    Raises:
        OSError: says which option chooses another one.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"port {port} is taken; choose another with --{option}") from error


def free_ports(host: str, count: int) -> list[int]:
    """Return ports that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def remove_folder(folder: str) -> None:
    """Delete a folder of temporary files, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _end_of(log: str) -> str:
    lines = Path(log).read_text(errors="replace").strip().splitlines()
    return "\n".join(["its log ends with", *lines[-_LOG_LINES:]]) if lines else "its log is empty"
