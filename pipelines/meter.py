"""What a training achieves between two log steps: rates, utilisation, memory."""

import resource
import sys
import time

import torch
from torch._dynamo.utils import counters


class Meter:
    """Rates between two log steps. Waiting for data counts, evaluation and checkpoints do not.

    Args:
        tokens_per_pass: tokens, with padding, of one forward pass on all workers.
        peak_flops: operations per second of all workers' devices; 0 if it is not known.
    """

    def __init__(self, tokens_per_pass: int, peak_flops: float) -> None:
        self._tokens_per_pass = tokens_per_pass
        self._peak_flops = peak_flops
        self._images = self._tokens = self._flops = self._capacity = 0.0
        self._elapsed_s = self._waited_s = 0.0
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last call."""
        self._mark = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Count time in which this worker had no data."""
        self._waited_s += seconds

    def add(self, images: float, tokens: float, flops: float, passes: int) -> None:
        """Count global steps that are done by now."""
        now = time.perf_counter()
        self._elapsed_s += now - self._mark
        self._mark = now
        self._images += images
        self._tokens += tokens
        self._flops += flops
        self._capacity += passes * self._tokens_per_pass

    def flush(self) -> dict[str, float]:
        """Return the rates since the last flush, and start anew."""
        seconds = max(self._elapsed_s, 1e-9)
        rates = {
            "images_per_s": self._images / seconds,
            "tokens_per_s": self._tokens / seconds,
            "flops_per_s": self._flops / seconds,
            "token_utilisation": self._tokens / max(1.0, self._capacity),
            "data_wait": min(1.0, self._waited_s / seconds),
        }
        if self._peak_flops:
            rates["mfu"] = rates["flops_per_s"] / self._peak_flops
        self._images = self._tokens = self._flops = self._capacity = 0.0
        self._elapsed_s = self._waited_s = 0.0
        return rates


def process_metrics(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process took, and the graphs that it compiled."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    metrics = {
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        # After the first steps a graph more is a recompilation, and one too many.
        "compiled_graphs": float(counters["stats"]["unique_graphs"]),
    }
    if device.type == "cuda":
        metrics["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return metrics
