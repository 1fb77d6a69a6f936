"""Tell Ray that this node will be taken away, so that a training writes a checkpoint and goes on.

`python -m cluster.leave` is the preStop hook of the pods in cluster/kubernetes: it announces the
end and returns when nothing works here any more, or at the deadline. With --on-spot-notice it waits
on an EC2 spot instance until AWS says that it takes the instance back, two minutes before it does.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

import tyro

METADATA_SERVICE = "http://169.254.169.254"
_NOTICE_PATH = "/latest/meta-data/spot/instance-action"
_TOKEN_PATH = "/latest/api/token"
_TOKEN_TTL_S = 21600
_POLL_S = 2.0


def leave(deadline_s: float = 600.0, on_spot_notice: bool = False, address: str = "") -> None:
    """Announce to Ray that this node goes, and wait until its work has left.

    Args:
        deadline_s: seconds until the node goes; with a spot notice AWS says when.
        on_spot_notice: wait for AWS to announce it first.
        address: the cluster; by default RAY_ADDRESS, or that of the node that runs here.
    """
    end = time.time() + deadline_s
    if on_spot_notice:
        metadata = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA_SERVICE
        end = wait_for_notice(metadata.rstrip("/"))
    announce(address, end)


def wait_for_notice(metadata: str, poll_s: float = 5.0) -> float:
    """Return the time at which AWS takes this spot instance back, once it says so."""
    while (notice := _read_notice(metadata)) is None:
        time.sleep(poll_s)
    at = datetime.strptime(notice["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    print(f"AWS takes this instance back at {notice['time']} ({notice['action']})", flush=True)
    return at.timestamp()


def _read_notice(metadata: str) -> dict[str, str] | None:
    try:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
        token = _request("PUT", metadata + _TOKEN_PATH, lifetime)
        answer = _request("GET", metadata + _NOTICE_PATH, {"X-aws-ec2-metadata-token": token})
        return dict(json.loads(answer))
    except urllib.error.HTTPError as error:
        if error.code == 404:  # there is none
            return None
        raise
    except OSError as error:  # the service is away for a moment; an instance always has it
        print(f"{metadata} does not answer: {error}", file=sys.stderr, flush=True)
        return None


def _request(method: str, url: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


def announce(address: str, end: float) -> bool:
    """Drain the node that this process runs on; returns whether its work left in time.

    Raises:
        RuntimeError: the cluster does not accept it.
    """
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", log_to_driver=False)
    try:
        context: Any = ray.get_runtime_context()
        node = context.get_node_id()
        accepted, reason = GcsClient(address=context.gcs_address).drain_node(
            node,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the node will be taken away",
            int(end * 1000),
        )
        if not accepted:
            raise RuntimeError(f"Ray refuses to drain node {node}: {reason}")
        print(f"node {node} leaves the cluster", flush=True)
        while time.time() < end:
            if _is_idle(node):
                return True
            time.sleep(_POLL_S)
        return False
    finally:
        ray.shutdown()


def _is_idle(node: str) -> bool:
    """Whether no task and no actor holds a resource of a node; one that is gone holds none."""
    import ray
    from ray._private.state import available_resources_per_node

    offered = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == node and n["Alive"]), {})
    free = available_resources_per_node().get(node, {})
    return all(free.get(name, 0.0) >= offered.get(name, 0.0) for name in ("CPU", "GPU"))


if __name__ == "__main__":
    tyro.cli(leave, prog="python -m cluster.leave")
