"""MLflow, imported when it is needed: that takes seconds."""

import threading

_importing = threading.Lock()


def import_mlflow() -> None:
    """Import what is used of MLflow; call it before any import of a part of it.

    Its modules import each other. Two threads that begin with different ones, such as the one that
    sends and the one that samples the machine's load, find them half done, and what failed once
    fails as long as the process lives. So one thread does it, and others wait.
    """
    with _importing:
        import mlflow.system_metrics.system_metrics_monitor
        import mlflow.tracking  # noqa: F401
