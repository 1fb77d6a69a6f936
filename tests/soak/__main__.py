"""The quickstart's recipe for half an hour, while its parts are taken away from it.

A training by `vitok train` on this machine, from shards in a store that fails, recorded by an
MLflow server. By a seed, every few minutes a training worker or a task that reads is killed, the
MLflow server is killed and started again, or the store fails in a burst. At the end SIGTERM stops
the training, and what it did is compared with what it should have: see verdict.py.

Prints one JSON on the last line of stdout; the exit status is 1 where a promise was broken.

Usage: python -m tests.soak [--minutes 30] [--seed 0] [--every-s 180] [--folder FOLDER]
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from cluster.services import MARKER, Service, end, free_ports, start, wait_until_healthy
from jobs import recipes
from jobs.sample_corpus import make_sample_corpus
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.corpus import index_shard, write_manifest
from pipelines.plan import Stage
from tests.pipelines.faulty_store import FaultyProxy, rarely, running
from tests.pipelines.recorded_runs import ended, read_notes, start_driver
from tests.soak.faults import NUM_TRAINERS, USUAL_ERRORS, Fault, Scene, schedule
from tests.soak.memory import Watch, folder_bytes, object_store_bytes
from tests.soak.verdict import Verdict, judge_memory, judge_training

_BUCKET = "soak"
# A quarter of the quickstart's stages, again and again; no machine does as many of them a minute.
_SHARE, _MOST_CYCLES_PER_MIN = 4, 4
_START_TIMEOUT_S = 300.0
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# Of the environment, what would lead a process elsewhere.
_OTHER_PLACES = (
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_TRACKING_URI",
    "RAY_ADDRESS",
)


def soak(minutes: float = 30.0, seed: int = 0, every_s: float = 180.0, folder: str = "") -> None:
    """Train under faults, and judge.

    Args:
        minutes: from the first step on.
        seed: of the faults.
        every_s: seconds between two faults, on average.
        folder: for everything, kept; by default one that is deleted where all went well.
    """
    if min(minutes, every_s) <= 0:
        sys.exit(f"{minutes=} and {every_s=} must be positive")
    place = Path(folder or tempfile.mkdtemp(prefix="soak-", dir="/tmp")).absolute()
    for name in ("notes", "mlflow", "tmp", "ray"):
        (place / name).mkdir(parents=True)
    faults = schedule(seed, minutes, every_s)
    say(f"{len(faults)} faults in {minutes:g} minutes; everything is in {place}")
    with ExitStack() as stack:
        marker = uuid.uuid4().hex
        services: list[Service] = []
        stack.callback(lambda: end(services, marker))
        os.environ |= _CREDENTIALS | {MARKER: marker}
        for name in _OTHER_PLACES:
            os.environ.pop(name, None)
        store_port, mlflow_port = free_ports("127.0.0.1", 2)
        services.append(start_store(place, store_port))
        start_server = partial(start_mlflow, place, mlflow_port, services)
        mlflow = start_server()
        store = f"http://127.0.0.1:{store_port}"
        manifests = make_corpus(place, store)
        proxy = FaultyProxy(store)
        stack.enter_context(running(proxy))
        proxy.schedule = rarely(USUAL_ERRORS, seed)
        settings = training(
            manifests,
            cycles=math.ceil(_MOST_CYCLES_PER_MIN * minutes),
            storage=str(place / "runs"),
            tracking_uri=f"http://127.0.0.1:{mlflow_port}",
            max_failures=len(faults),
        )
        driver = start_driver(
            "recording_training",
            settings,
            place / "notes",
            "{}",
            AWS_ENDPOINT_URL=proxy.url,
            TMPDIR=str(place / "tmp"),
            RAY_TMPDIR=str(place / "ray"),
        )
        stack.enter_context(ended(driver))
        scene = Scene(driver.pid, settings.run, place / "notes", proxy, mlflow, start_server)
        verdict = disturb(scene, driver, settings, faults, minutes, place)
        verdict.figures["store"] = {
            "requests": len(proxy.requests),
            "spoiled": dict(proxy.injected),
        }
    if not verdict.broken and not folder:
        shutil.rmtree(place)
    for sentence in verdict.broken:
        say(f"broken: {sentence}")
    print(json.dumps(verdict.figures | {"broken": verdict.broken}))
    sys.exit(bool(verdict.broken))


def disturb(
    scene: Scene,
    driver: subprocess.Popen[bytes],
    settings: AutoencoderTraining,
    faults: list[Fault],
    minutes: float,
    place: Path,
) -> Verdict:
    """Let faults happen to a training that was started, end it, and judge it."""
    wait_for_first_step(driver, place / "notes")
    watch = Watch(
        driver.pid,
        {
            "object store": lambda: object_store_bytes(driver.pid),
            "temporary files": lambda: folder_bytes(place / "tmp"),
            "Ray's files without logs": lambda: folder_bytes(place / "ray", without="logs"),
            "the run's folder": lambda: folder_bytes(Path(settings.run.folder.uri)),
        },
        place / "memory.jsonl",
    )
    watch.start()
    began = time.monotonic()
    done: list[dict[str, Any]] = []
    for fault in faults:
        wait_until(driver, began + fault.at_s)
        if driver.poll() is not None:
            break
        done.append(scene.carry_out(fault))
        say(f"{time.monotonic() - began:6.0f} s  {done[-1]}")
    wait_until(driver, began + 60 * minutes)
    elapsed_s = time.monotonic() - began
    driver.send_signal(signal.SIGTERM)
    watch.stop()
    status = driver.wait(_START_TIMEOUT_S)
    verdict = judge_training(settings, place / "notes", done)
    verdict.promise(
        status in (0, 143), f"the command ended with {status}; see {place}/notes/driver.log"
    )
    judge_memory(verdict, watch.lives, sorted(os.listdir(place / "tmp")))
    verdict.figures |= {
        "minutes": round(elapsed_s / 60, 2),
        "exit_status": status,
        "faults": dict(Counter(fault["kind"] for fault in done)),
    }
    return verdict


def training(
    manifests: tuple[Path, Path], *, cycles: int, storage: str, tracking_uri: str, max_failures: int
) -> AutoencoderTraining:
    """Return the quickstart's recipe with its stages again and again, and more checkpoints."""
    base = recipes.quickstart()
    train, held_out = manifests
    stages: tuple[Stage, ...] = tuple(
        replace(stage, steps=stage.steps // _SHARE) for stage in base.stages
    )
    assert base.run.num_workers == NUM_TRAINERS
    return replace(
        base,
        data=replace(base.data, manifest=str(train), eval_manifest=str(held_out)),
        stages=stages * cycles,
        run=replace(
            base.run,
            storage=storage,
            checkpoint_every=20,
            max_failures=max_failures,
            tracking=replace(base.run.tracking, uri=tracking_uri),
        ),
    )


def start_store(place: Path, port: int) -> Service:
    """Start a store that keeps its objects in memory."""
    store = start(
        "store",
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        os.environ,
        f"http://127.0.0.1:{port}/moto-api/",
        place / "store.log",
    )
    wait_until_healthy(store, _START_TIMEOUT_S)
    return store


def start_mlflow(place: Path, port: int, services: list[Service]) -> Service:
    """Start the tracking server on its database, new or not, and note it among the services."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{place}/mlflow/mlflow.db"]
    command += ["--artifacts-destination", str(place / "mlflow" / "artifacts")]
    server = start(
        "mlflow",
        command,
        os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        f"http://127.0.0.1:{port}/health",
        place / "mlflow.log",
    )
    services.append(server)
    wait_until_healthy(server, _START_TIMEOUT_S)
    return server


def make_corpus(place: Path, store: str) -> tuple[Path, Path]:
    """Put the quickstart's corpus into the store; returns its manifests (train, eval)."""
    import boto3

    client = boto3.session.Session().client("s3", endpoint_url=store)
    client.create_bucket(Bucket=_BUCKET)
    make_sample_corpus(place / "corpus")
    manifests = []
    for split in ("train", "eval"):
        shards = sorted((place / "corpus" / "shards").glob(f"{split}-*.tar"))
        assert shards, f"the corpus has no shards of {split}"
        for shard in shards:
            client.put_object(Bucket=_BUCKET, Key=shard.name, Body=shard.read_bytes())
        indexes = (replace(index_shard(str(s)), uri=f"s3://{_BUCKET}/{s.name}") for s in shards)
        manifests.append(write_manifest(indexes, place / split).path)
    return manifests[0], manifests[1]


def wait_for_first_step(driver: subprocess.Popen[bytes], notes: Path) -> None:
    """Wait until a worker has begun to train."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not read_notes(notes):
        assert driver.poll() is None, (notes / "driver.log").read_text()
        assert time.monotonic() < deadline, f"no step was begun in {_START_TIMEOUT_S:.0f} s"
        time.sleep(0.5)


def wait_until(driver: subprocess.Popen[bytes], moment: float) -> None:
    """Wait for a moment of the monotonic clock, or for the end of the training."""
    while driver.poll() is None and time.monotonic() < moment:
        time.sleep(0.2)


def say(line: str) -> None:
    """Print a line for whoever watches."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    tyro.cli(soak)
