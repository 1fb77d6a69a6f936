"""Ray and MLflow on this machine, on loopback, gone when the command ends."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def token_file() -> Path:
    """Return where Ray looks for the user's token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """Whether the user has a token for Ray."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file().is_file()


def trust_own_cluster() -> None:
    """Let Ray show the user's token to a cluster on loopback, such as that of `vitok cluster up`.

    Ray does so for a cluster that it finds, not for one that RAY_ADDRESS names. Another machine is
    shown it where the user says RAY_AUTH_MODE=token. Ray reads that as it is imported: call this
    before.
    """
    host = os.environ.get("RAY_ADDRESS", "").rpartition(":")[0]
    if host in ("127.0.0.1", "localhost") and has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine; then leave.

    A cluster that was started here is stopped with all its processes, also after an interrupt. A
    process that is connected already stays as it is. A submitted job has RAY_ADDRESS from Ray.

    Args:
        num_cpus: cores that a cluster started here offers; all of them by default.

    Raises:
        ValueError: RAY_ADDRESS is an address of another kind.
        ConnectionError: no cluster there lets us in.
    """
    # The screen belongs to the command: its own bars and sentences. Ray's news is in its log files,
    # and what stops a job comes back as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False}
    if address := os.environ.get("RAY_ADDRESS"):
        if address.startswith(("http://", "https://")):
            raise ValueError(
                f"RAY_ADDRESS={address} is a job server, which takes `vitok submit`; to run a "
                "command here set it to the cluster's own address, such as HEAD:6379"
            )
        options = {"address": address}
    try:
        if address:
            _knock(address)
        with _silent_stderr():  # it prints that it obeys the variable; what fails is raised
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except ConnectionError as error:
        if not address:
            raise
        raise ConnectionError(
            f"RAY_ADDRESS={address}: {error}; start the cluster, or where it asks for a token "
            f"put that into {token_file()} and set RAY_AUTH_MODE=token"
        ) from error
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Connect to HOST:PORT for a moment: Ray tries for minutes, and then ends the process.

    Raises:
        ConnectionError: nobody answers there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, or something else that Ray knows
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers there ({error.strerror or error})") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ code of this process prints to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def serve_mlflow(tracking_uri: str, port: int) -> None:
    """Run MLflow's web interface on 127.0.0.1 until it is interrupted.

    Raises:
        OSError: the port is taken.
        RuntimeError: the server failed.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} is taken; choose another with --port") from error
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    # Its job runners are for judging language models, and a dozen processes.
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    print(f"MLflow on http://127.0.0.1:{port} - stop it with Ctrl-C", flush=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        status = 0
    finally:
        # The server has children of its own, all in its process group.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        signal.signal(signal.SIGTERM, before)
    if status:
        raise RuntimeError(f"MLflow's server ended with status {status}; its message is above")
