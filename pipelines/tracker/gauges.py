"""What a run records, for Prometheus too, beside Ray's own metrics of the same nodes."""

import re

from ray.util.metrics import Gauge

_TAGS = ("run",)


class RunGauges:
    """Shows the newest metrics of a run as Ray's gauges: `ray_vitok_NAME{run="..."}`.

    Called with metrics and their step, as Tracker.log_metrics is.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        for name, value in {**metrics, "step": float(step)}.items():
            if "/" not in name:  # the load of nodes, which Ray shows itself
                self._gauge(name).set(float(value), self._tags)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            metric = "vitok_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            self._gauges[name] = Gauge(metric, f"{name} of a run, the newest", _TAGS)
        return self._gauges[name]
