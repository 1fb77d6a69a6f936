"""Run a function of a test on several ranks, each a process of its own."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_on_ranks(function: Callable[[Path], None], num_ranks: int, folder: Path) -> None:
    """Call a module's function with the folder on every rank of a gloo group."""
    # Ranks are forked from a process that has imported everything once.
    multiprocessing.set_forkserver_preload(["tests.conftest", "torch._dynamo"])
    torch.multiprocessing.start_processes(
        _run, (function, num_ranks, folder), nprocs=num_ranks, start_method="forkserver"
    )


def _run(rank: int, function: Callable[[Path], None], num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        function(folder)
    finally:
        dist.destroy_process_group()
