"""Load of this machine: processor, memory, disk, network and GPUs."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.tracker.import_mlflow import import_mlflow

LogMetrics = Callable[[dict[str, float], int], None]

logger = logging.getLogger(__name__)


@contextmanager
def sampled(log: LogMetrics, uri: str, run_id: str, node_id: str) -> Iterator[None]:
    """Log this machine's load at every interval of MLflow's settings, 10 s where there are none.

    Args:
        log: is given metrics and a step.
        node_id: part of the metrics' names; empty for none.
    """
    stop = threading.Event()
    arguments = (log, uri, run_id, node_id, stop)
    sampler = threading.Thread(target=_sample, args=arguments, name="system", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join(10)


def _sample(log: LogMetrics, uri: str, run_id: str, node_id: str, stop: threading.Event) -> None:
    """Log the means of MLflow's own samples; its own thread ends at the first lost request."""
    try:
        import_mlflow()
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, node_id=node_id or None, tracking_uri=uri)
        prefix = f"system/{monitor.node_id}/" if monitor.node_id else "system/"
        while True:
            for _ in range(monitor.samples_before_logging):
                monitor.collect_metrics()
                if stop.wait(monitor.sampling_interval):
                    return
            means = monitor.aggregate_metrics()
            # The step is the time: restarts share no step, also where the server cannot tell
            # which was the last.
            now_s = int(time.time())
            log({prefix + name: mean for name, mean in means.items()}, now_s)
            for part in monitor.monitors:
                part.clear_metrics()
    # Drivers and containers fail in many ways; a training does not depend on them.
    except Exception as error:
        logger.warning("no system metrics of %s from here on: %s", node_id or "the driver", error)
