"""Ray and MLflow on this machine, on loopback, gone when the command ends."""

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine; then leave.

    A cluster that was started here is stopped with all its processes, also after an interrupt.

    Args:
        num_cpus: cores that a cluster started here offers; all of them by default.
    """
    # Ray prints its own news by default; a command's screen belongs to the command.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import ray

    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    address = os.environ.get("RAY_ADDRESS")
    options = (
        {"address": address} if address else {"num_cpus": num_cpus, "include_dashboard": False}
    )
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def serve_mlflow(tracking_uri: str, port: int) -> None:
    """Run MLflow's web interface on 127.0.0.1 until it is interrupted.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} is taken; choose another with --port") from error
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    print(f"MLflow on http://127.0.0.1:{port} - stop it with Ctrl-C", flush=True)
    with subprocess.Popen(command) as server:
        try:
            server.wait()
        except KeyboardInterrupt:
            server.terminate()
