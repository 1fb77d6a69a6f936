"""How much memory a piece of work takes at its peak: of the GPU, or of this process."""

import ctypes
import sys
from pathlib import Path

import psutil
import torch


def start_peak(device: torch.device) -> None:
    """Forget the peak of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Return bytes in use now and at the peak since start_peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        now = psutil.Process().memory_info().rss
        return now, now
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak
