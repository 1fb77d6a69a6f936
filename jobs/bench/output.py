"""How a benchmark ends: its figures in lines, and as JSON on the last one."""

import json
import platform
from typing import Any

import torch


def rounded(figures: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Return figures with four decimals, after a line for each."""
    found = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    if not quiet:
        for name, figure in found.items():
            print(f"{name:<30} {figure}")
    return found


def finish(name: str, figures: dict[str, Any], threads: int) -> None:
    """Print the figures of a benchmark and where they were measured, as one line of JSON."""
    cuda = torch.cuda.is_available()
    device = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": name, **figures, **device}))
