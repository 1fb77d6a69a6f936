"""launch(): a training on a Ray cluster, seen from the command that started it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from pipelines import ingest
from pipelines.failures import root_cause
from pipelines.plan import Plan
from pipelines.progress import progress_bar
from pipelines.runs import RunConfig, next_step
from pipelines.tracking import Tracker
from vitok.storage import Folder


def launch(
    worker: Callable[[dict[str, Any]], None], settings: Any, plan: Plan, tracker: Tracker
) -> None:
    """Run a training on the connected Ray cluster until it is done; called in the driver.

    Args:
        worker: what every Ray Train worker runs; it is given {"settings", "tracking", "board"}
            and calls fit().
        settings: the training's config, with a RunConfig as `run`.

    Raises:
        RuntimeError: the workers failed more often than max_failures; says why.
    """
    run: RunConfig = settings.run
    folder = run.folder
    if next_step(folder) >= plan.num_steps:
        return

    def remaining() -> Any:
        # Called at every start of the worker group, with the checkpoint that it will restore.
        return ingest.training_dataset(plan, next_step(folder), run.num_workers)

    check_resources(
        # One more core reads and decodes: without it no data would ever come.
        num_cpus=run.num_workers * run.cpus_per_worker + 1,
        num_gpus=run.num_workers * run.use_gpu,
        remedy="lower run.num_workers or run.cpus_per_worker, or set run.use_gpu to False",
    )
    first_step = next_step(folder)
    with progress_bar("train", plan.num_steps, "step", first_step) as board:
        trainer = TorchTrainer(
            worker,
            train_loop_config={
                "settings": settings,
                "tracking": {"uri": tracker.uri, "run_id": tracker.run_id},
                "board": board,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=run.num_workers,
                use_gpu=run.use_gpu,
                resources_per_worker={"CPU": run.cpus_per_worker}
                | ({"GPU": 1} if run.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=Folder.of(run.storage).uri,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.keep_checkpoints),
                failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            ),
            datasets={"train": remaining},
            dataset_config=ray.train.DataConfig(execution_options=ingest.execution_options(plan)),
        )
        try:
            with _own_interrupts():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RuntimeError(
                f"the training stopped after step {next_step(folder)}: {root_cause(error)}"
            ) from error
    if next_step(folder) < plan.num_steps:
        raise RuntimeError(
            f"the training ended after step {next_step(folder)} of {plan.num_steps}, without an "
            "error; start it again to go on"
        )


def check_resources(num_cpus: float, num_gpus: float, remedy: str) -> None:
    """Refuse a job for which the connected cluster is too small: Ray would wait for ever.

    Raises:
        RuntimeError: says what is asked for, what is there, and the remedy.
    """
    offered = ray.cluster_resources()
    for name, asked in (("CPU", num_cpus), ("GPU", num_gpus)):
        if asked > offered.get(name, 0):
            raise RuntimeError(
                f"the job asks for {asked:g} {name}s, the cluster has {offered.get(name, 0):g}; "
                f"{remedy}"
            )


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Make Ctrl-C during a training a KeyboardInterrupt, and nothing else after it.

    Ray Train takes over SIGINT, aborts its workers, exits with SystemExit, and leaves its handler.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
