"""launch(): a training on a Ray cluster, seen from the command that started it."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer
from torch import nn

from pipelines import ingest
from pipelines.failures import (
    OutOfMemory,
    Preempted,
    Unrecoverable,
    is_out_of_memory,
    root_cause,
)
from pipelines.loop import Recipe, fit
from pipelines.plan import Plan
from pipelines.progress import progress_bar
from pipelines.runs import RunConfig, next_step
from pipelines.tracker.gauges import RunGauges
from pipelines.tracking import Tracker, system_metrics
from vitok.config import to_dict
from vitok.storage import Folder

# How often an elastic group looks whether it can grow.
_RESIZE_INTERVAL_S = 60.0


def launch(
    worker: Callable[[dict[str, Any]], None],
    settings: Any,
    plan: Plan,
    tracker: Tracker,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> None:
    """Run a training on the connected Ray cluster until it is done; called in the driver.

    Args:
        worker: what every Ray Train worker runs; it is given {"settings", "tracking", "board"}
            and calls work().
        settings: the training's config, with a RunConfig as `run` and an OptimConfig as `optim`.
        callbacks: told of every checkpoint, in Ray Train's controller.

    Raises:
        Unrecoverable: every other attempt would end in the same way; Diverged where a gradient was
            not finite.
        OutOfMemory: a worker asked for more memory than there is.
        RuntimeError: the workers failed more often than max_failures; says why.
    """
    run: RunConfig = settings.run
    folder = run.folder
    if next_step(folder) >= plan.num_steps:
        return

    fewest = run.min_workers or run.num_workers
    check_resources(
        # One more core reads and decodes: without it no data would ever come.
        num_cpus=fewest * run.cpus_per_worker + 1,
        num_gpus=fewest * run.use_gpu,
        remedy="lower run.num_workers or run.cpus_per_worker, or set run.use_gpu to False",
    )
    first_step = next_step(folder)
    with progress_bar("train", plan.num_steps, "step", first_step) as board:
        trainer = TorchTrainer(
            worker,
            train_loop_config={
                "settings": settings,
                "tracking": {
                    "uri": tracker.uri,
                    "run_id": tracker.run_id,
                    "spool": tracker.spool,
                },
                "driver_node": ray.get_runtime_context().get_node_id(),
                "board": board,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=(run.min_workers, run.num_workers)
                if run.min_workers
                else run.num_workers,
                elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
                use_gpu=run.use_gpu,
                resources_per_worker={"CPU": run.cpus_per_worker}
                | ({"GPU": 1} if run.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=Folder.of(run.storage).uri,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.keep_checkpoints),
                failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
                callbacks=list(callbacks),
            ),
            # Not made before it is known for how many workers; see _PlannedData.
            datasets={"train": lambda: ray.data.from_items([0])},
            dataset_config=_PlannedData(plan, folder),
        )
        try:
            with _own_interrupts(), _leaving_on_sigterm(board):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            kind = OutOfMemory if is_out_of_memory(error) else RuntimeError
            raise kind(
                f"the training stopped after step {next_step(folder)}: {root_cause(error)}"
            ) from error
        if failure := ray.get(board.failure.remote()):
            raise type(failure)(f"the training stopped after step {next_step(folder)}: {failure}")
        if ray.get(board.is_leaving.remote()) and next_step(folder) < plan.num_steps:
            raise Preempted(
                f"stopped by SIGTERM with a checkpoint after step {next_step(folder)}; start it "
                "again to go on"
            )
    if next_step(folder) < plan.num_steps:
        raise RuntimeError(
            f"the training ended after step {next_step(folder)} of {plan.num_steps}, without an "
            "error; start it again to go on"
        )


def work(given: dict[str, Any], model: nn.Module, recipe: Recipe, plan: Plan) -> None:
    """Do a worker's part of a training, recorded; called in every Ray Train worker.

    Args:
        given: what `launch` gives to each worker.
        model: on the meta device.
        recipe: its story is written here.
    """
    settings = given["settings"]
    story = {"config": to_dict(settings), "mlflow_run_id": given["tracking"]["run_id"]}
    with _recorded(given) as tracker:
        fit(
            model,
            replace(recipe, story=story),
            plan=plan,
            optim=settings.optim,
            run=settings.run,
            tracker=tracker,
            board=given["board"],
        )


@contextmanager
def _recorded(given: dict[str, Any]) -> Iterator[Tracker | None]:
    """Record a worker's part of the run: gives rank 0 its Tracker, and nobody else one.

    What would end every other attempt in the same way ends the run, and is told to the board.
    The first worker of every node but the driver's, which records its own, samples the node's load.
    """
    context = ray.train.get_context()
    node = ray.get_runtime_context().get_node_id()
    with ExitStack() as stack:
        tracker = None
        if context.get_world_rank() == 0:
            gauges = RunGauges(given["settings"].run.name)
            tracker = stack.enter_context(closing(Tracker(**given["tracking"], also=gauges)))
        if context.get_local_rank() == 0 and node != given["driver_node"]:
            stack.enter_context(system_metrics(node_id=node, **given["tracking"]))
        try:
            yield tracker
        except Unrecoverable as error:
            # Raised on, Ray Train would start the group again; so this attempt ends in peace.
            ray.get(given["board"].fail.remote(error))


class _PlannedData(ray.train.DataConfig):
    """Makes the dataset of each worker group: from the checkpoint it restores, for its size."""

    def __init__(self, plan: Plan, folder: Folder) -> None:
        super().__init__(execution_options=ingest.execution_options(plan))
        self._plan = plan
        self._folder = folder

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """Return the iterators of every worker; called by Ray Train at every start of a group."""
        dataset = ingest.training_dataset(self._plan, next_step(self._folder), world_size)
        return super().configure(dict.fromkeys(datasets, dataset), world_size, *args, **kwargs)


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
def _leaving_on_sigterm(board: Any) -> Iterator[None]:
    """Let SIGTERM, as job managers and spot instances send it, end with a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: board.leave.remote())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
