"""Driver of a recorded training on a cluster of its own, whose parts it takes away.

The cluster lives on this machine: a head node for the driver and the data, and nodes with room for
one worker each. A thread waits for the steps at which something is to happen; what it did is in
NOTES_FOLDER/done.json.

Usage: chaos_training.py CONFIG.json NOTES_FOLDER NUM_NODES HITS_AS_JSON
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines import launch
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.runs import RunConfig, next_step
from tests.pipelines.recorded_runs import read_notes
from tests.pipelines.recording_training import HOLD_FILE, train
from vitok.config import read_config

WORKER_CPUS = 2
PAUSE_S = 0.05
# Of a drained node; long enough for the notice to be seen and a checkpoint to be written.
DEADLINE_S = 10.0
_TIMEOUT_S = 200.0
# So many steps after the one at which something should happen, workers wait until it has.
_MARGIN = 6

# What Ray does every few seconds or minutes, it does at once here.
_IMPATIENCE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
_SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


@dataclass(frozen=True)
class Hit:
    """Something that happens to a training.

    Attributes:
        kind: a worker's node dies, a node is added, or the node's end is announced.
        step: when a worker is there.
        rank: of that worker.
        delay_s: and then so much later.
    """

    kind: Literal["kill node", "add node", "announce"]
    step: int
    rank: int = 0
    delay_s: float = 0.0


class Chaos(threading.Thread):
    """Carries out hits, one after another; ends the process if one cannot be."""

    def __init__(self, cluster: Any, hits: list[Hit], notes: Path, run: RunConfig) -> None:
        super().__init__(daemon=True)
        self._cluster = cluster
        self._hits = hits
        self._notes = notes
        self._run = run
        self._old_groups: set[str] = set()

    def run(self) -> None:
        done = []
        try:
            for hit in self._hits:
                if hit.kind != "announce":
                    self._hold("*", hit.step + _MARGIN)
                victim = self._wait(partial(self._find, hit))
                time.sleep(hit.delay_s)
                recorded = next_step(self._run.folder)
                self._carry_out(hit, victim)
                self._old_groups.add(victim["group"])
                done.append(asdict(hit) | {"recorded": recorded})
            # The last hit has done its work when there is another group.
            self._wait(lambda: any(note["group"] not in self._old_groups for note in self._read()))
            (self._notes / HOLD_FILE).unlink()
            (self._notes / "done.json").write_text(json.dumps(done))
        except BaseException:
            traceback.print_exc()
            os._exit(99)

    def _find(self, hit: Hit) -> dict[str, Any] | None:
        """Return the note that says that the moment of a hit has come."""
        for note in self._read():
            if (
                note["group"] not in self._old_groups
                and note["step"] >= hit.step
                and note["rank"] == hit.rank
            ):
                return note
        return None

    def _carry_out(self, hit: Hit, victim: dict[str, Any]) -> None:
        alive = num_alive()
        if hit.kind == "kill node":
            kill_node(self._cluster, victim["node"])
            self._look_at_nodes(alive - 1)
        elif hit.kind == "add node":
            # Hooks are for the main thread alone, and what a thread starts would end with it.
            self._cluster._shutdown_at_exit = False
            add_node(self._cluster)
            self._look_at_nodes(alive + 1)
        else:
            before = next_step(self._run.folder)
            announce_end(self._cluster, victim["node"])
            self._wait(lambda: next_step(self._run.folder) > before)
            # What is trained between this checkpoint and the end is lost; it shall not be all.
            self._hold(victim["group"], 0)
            gone = {victim["group"], *self._old_groups}
            self._wait(lambda: any(note["group"] not in gone for note in self._read()))

    def _look_at_nodes(self, expected: int) -> None:
        """Have Ray's elastic groups count nodes now; they do every 20 s."""
        import ray
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        self._wait(lambda: num_alive() == expected)
        coordinator = get_or_create_autoscaling_coordinator()
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True))

    def _hold(self, group: str, step: int) -> None:
        """Let a group of workers, or * for any, wait from a step on."""
        new = self._notes / "hold.new"
        new.write_text(f"{group} {step}")
        new.rename(self._notes / HOLD_FILE)

    def _read(self) -> list[dict[str, Any]]:
        return read_notes(self._notes)

    def _wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing in {_TIMEOUT_S} s of what was waited for")
            time.sleep(0.05)
        return found


def num_alive() -> int:
    """Return the nodes that the cluster takes for alive."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def add_node(cluster: Any) -> None:
    """Add a node with room for one worker."""
    cluster.add_node(num_cpus=WORKER_CPUS)


def kill_node(cluster: Any, node_id: str) -> None:
    """Kill all processes of a node at once, as a machine that loses its power does."""
    import psutil

    node = next(node for node in cluster.worker_nodes if node.node_id == node_id)
    raylet = node.all_processes["raylet"][0].process
    children = psutil.Process(raylet.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def announce_end(cluster: Any, node_id: str) -> None:
    """Tell Ray that a node will be taken away, as a spot instance's daemon does."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    accepted, reason = GcsClient(address=cluster.address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "spot instance is taken back",
        int((time.time() + DEADLINE_S) * 1000),
    )
    assert accepted, reason


def main() -> int:
    """Train on the cluster while it is hit; returns the exit status of `vitok train`."""
    config, notes, num_nodes, hits = sys.argv[1:]
    # Sockets need a short path; and no other process on this machine may find this cluster.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ |= _IMPATIENCE | {"RAY_TMPDIR": folder, "RAY_BACKEND_LOG_LEVEL": "fatal"}
    from ray.cluster_utils import Cluster

    launch._RESIZE_INTERVAL_S = 1.0
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": _SYSTEM_CONFIG}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(int(num_nodes)):
            add_node(cluster)
        os.environ["RAY_ADDRESS"] = cluster.address
        run = read_config(Path(config), AutoencoderTraining).run
        Chaos(cluster, [Hit(**hit) for hit in json.loads(hits)], Path(notes), run).start()
        return train(Path(config), Path(notes), pause_s=PAUSE_S)
    finally:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
