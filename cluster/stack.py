"""`vitok cluster`: Ray, MLflow and an S3-compatible store on one machine, on loopback.

The same three that a cluster has, so that every recipe and every job can be tried here first. The
addresses that `up` prints, in RAY_ADDRESS and MLFLOW_TRACKING_URI, are all that a command needs.
"""

import getpass
import json as json_format
import os
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from cluster.services import (
    MARKER,
    Service,
    check_port,
    end,
    free_ports,
    remove_folder,
    start,
    wait_until_healthy,
)
from pipelines.tracker.credentials import masked
from vitok.config import config, read_config, write_config

STATE_FILE = "stack.json"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_START_TIMEOUT_S = 120.0
# The embedded store lets everybody in, but its clients want something to sign with.
_STAND_IN_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "local",
    "AWS_SECRET_ACCESS_KEY": "local",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@config
class StackConfig:
    """Start Ray with its dashboard, MLflow and an S3-compatible store on this machine.

    Attributes:
        folder: state, logs and MLflow's SQLite database.
        host: address that all of them listen on. Anything but loopback lets others in.
        database: MLflow's, such as postgresql://USER@HOST/NAME; by default the variable
            MLFLOW_BACKEND_STORE_URI, which is the place for a URL with a password, else SQLite.
        store: URL of an S3-compatible store that runs already, with credentials from the standard
            AWS chain; by default one is started, which keeps its objects in memory.
        bucket: for artifacts of MLflow; made where it is missing.
        num_cpus: cores that Ray offers; all of them if 0.
        ray_port: of the cluster.
        dashboard_port: of Ray's dashboard and job server.
        metrics_port: where Prometheus finds Ray's metrics and those of runs.
        mlflow_port: of MLflow.
        store_port: of the store that is started.
    """

    folder: str = "runs/stack"
    host: str = "127.0.0.1"
    database: str = ""
    store: str = ""
    bucket: str = "vitok"
    num_cpus: int = 0
    ray_port: int = 6379
    dashboard_port: int = 8265
    metrics_port: int = 8080
    mlflow_port: int = 5000
    store_port: int = 9000


@config
class StackState:
    """What `up` writes down for `status` and `down`; holds no credential.

    Attributes:
        marker: in the environment of all processes of this stack.
        services: its servers.
        ray_address: for RAY_ADDRESS.
        dashboard: Ray's dashboard and job server.
        metrics: of Ray and of runs, for Prometheus.
        mlflow: for MLFLOW_TRACKING_URI.
        store: endpoint of the store.
        store_is_embedded: whether the stack started it.
        bucket: of the store.
        database: MLflow's, without a password.
        ray_folder: temporary files of Ray.
        asks_for_token: whether Ray does.
    """

    marker: str
    services: tuple[Service, ...]
    ray_address: str
    dashboard: str
    metrics: str
    mlflow: str
    store: str
    store_is_embedded: bool
    bucket: str
    database: str
    ray_folder: str
    asks_for_token: bool


def up(settings: Annotated[StackConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """Start Ray with its dashboard, MLflow and an S3-compatible store on this machine."""
    folder = Path(settings.folder).absolute()
    if (folder / STATE_FILE).exists():
        raise FileExistsError(
            f"a stack was started in {folder}; see it with `vitok cluster status`, end it with "
            "`vitok cluster down`"
        )
    if settings.host not in _LOOPBACK:
        print(
            f"warning: listening on {settings.host}, not on loopback alone. MLflow and the store "
            "let everybody read, change and delete: keep them behind a firewall",
            file=sys.stderr,
        )
    for option in ("ray_port", "dashboard_port", "metrics_port", "mlflow_port"):
        check_port(settings.host, getattr(settings, option), option.replace("_", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    state = start_stack(settings, folder)
    print(describe(state))


def start_stack(settings: StackConfig, folder: Path) -> StackState:
    """Start all servers and wait until they answer; a failure ends those that were started.

    Raises:
        RuntimeError: one does not start; with the end of its log.
    """
    marker, host = uuid.uuid4().hex, settings.host
    services: list[Service] = []
    environment = os.environ | {
        MARKER: marker,
        "RAY_AUTH_MODE": token_mode(),
        # So that the `python` and the `vitok` of a job are those of this command.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    database = settings.database or os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    database = database or f"sqlite:///{folder}/mlflow.db"
    mlflow = f"http://{host}:{settings.mlflow_port}"
    store = settings.store or f"http://{host}:{settings.store_port}"
    ray_folder = tempfile.mkdtemp(prefix="vitok-ray-")
    try:
        if not settings.store:
            check_port(host, settings.store_port, "store-port")
            environment |= _STAND_IN_CREDENTIALS
            services.append(_start_store(settings, environment, folder))
        environment |= {"AWS_ENDPOINT_URL": store}
        services.append(_start_mlflow(settings, environment, folder, database))
        environment |= {"MLFLOW_TRACKING_URI": mlflow}
        services.append(_start_ray(settings, environment, folder, ray_folder))
        for service in services:
            wait_until_healthy(service, _START_TIMEOUT_S)
        _make_bucket(settings, environment, store)
        state = StackState(
            marker=marker,
            services=tuple(services),
            ray_address=f"{host}:{settings.ray_port}",
            dashboard=f"http://{host}:{settings.dashboard_port}",
            metrics=f"http://{host}:{settings.metrics_port}/metrics",
            mlflow=mlflow,
            store=store,
            store_is_embedded=not settings.store,
            bucket=settings.bucket,
            database=masked(database),
            ray_folder=ray_folder,
            asks_for_token=environment["RAY_AUTH_MODE"] == "token",
        )
        write_config(folder / STATE_FILE, state)
    except BaseException:  # Ctrl-C too: nothing is left behind
        end(services, marker)
        remove_folder(ray_folder)
        raise
    return state


def _start_store(settings: StackConfig, environment: dict[str, str], folder: Path) -> Service:
    import importlib.util

    if importlib.util.find_spec("moto") is None:
        raise ModuleNotFoundError(
            "the store that `vitok cluster up` starts is moto's; pip install -c constraints.txt "
            "'moto[server]', or give the URL of another with --store"
        )
    address = ["-H", settings.host, "-p", str(settings.store_port)]
    return start(
        "store",
        [sys.executable, "-m", "moto.server", *address],
        environment,
        f"http://{settings.host}:{settings.store_port}/moto-api/",
        folder / "store.log",
    )


def _start_mlflow(
    settings: StackConfig, environment: dict[str, str], folder: Path, database: str
) -> Service:
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", settings.host, "--port", str(settings.mlflow_port)]
    command += ["--serve-artifacts", "--artifacts-destination", f"s3://{settings.bucket}/mlflow"]
    command += ["--uvicorn-opts", "--log-level warning"]
    return start(
        "mlflow",
        command,
        environment
        | {
            # Not an argument: others can read those, and a URL may hold a password.
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            # Its job runners are for judging language models, and a dozen processes.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        f"http://{settings.host}:{settings.mlflow_port}/health",
        folder / "mlflow.log",
    )


def _start_ray(
    settings: StackConfig, environment: dict[str, str], folder: Path, ray_folder: str
) -> Service:
    agent_port, grpc_port, client_port = free_ports(settings.host, 3)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = {
        "node-ip-address": settings.host,
        "port": settings.ray_port,
        "dashboard-host": settings.host,
        "dashboard-port": settings.dashboard_port,
        "dashboard-agent-listen-port": agent_port,
        "dashboard-agent-grpc-port": grpc_port,
        "ray-client-server-port": client_port,
        "metrics-export-port": settings.metrics_port,
        # Any free ports, instead of a range that another cluster on this machine has too.
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": ray_folder,
    }
    if settings.num_cpus:
        options["num-cpus"] = settings.num_cpus
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--disable-usage-stats"]
    return start(
        "ray",
        command,
        # A command that is meant for another cluster must not reach into this one.
        {name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
        f"http://{settings.host}:{settings.dashboard_port}/api/version",
        folder / "ray.log",
    )


def _make_bucket(settings: StackConfig, environment: dict[str, str], store: str) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    credentials = (
        {}
        if settings.store
        else {
            "aws_access_key_id": environment["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
            "region_name": environment["AWS_DEFAULT_REGION"],
        }
    )
    style = Config(s3={"addressing_style": "path"})
    client = boto3.session.Session().client("s3", endpoint_url=store, config=style, **credentials)
    try:
        client.head_bucket(Bucket=settings.bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise PermissionError(
                f"bucket {settings.bucket} of {store} cannot be used ({error}); give another with "
                "--bucket, or credentials that may use it"
            ) from error
        client.create_bucket(Bucket=settings.bucket)


def token_mode() -> str:
    """Return how Ray lets others in: `token`, unless RAY_AUTH_MODE says otherwise.

    Ray's dashboard keeps to the host that it is given, but the cluster itself listens on every
    address of the machine, and runs any code that is sent to it. So it asks for a token: that of
    the user, in a file that is made here, for its owner alone, where there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token":
        print(
            f"warning: RAY_AUTH_MODE={mode}. Ray listens on all addresses of this machine, and "
            f"whoever reaches it runs code as {getpass.getuser()}; leave the variable unset",
            file=sys.stderr,
        )
        return mode
    from ray._private.authentication.authentication_token_setup import generate_and_save_token
    from ray._raylet import AuthenticationTokenLoader

    if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        before = os.umask(0o077)
        try:
            generate_and_save_token()
        finally:
            os.umask(before)
    return mode


def describe(state: StackState) -> str:
    """Say where the servers are and what to set."""
    token = "; asks for the user's token, which commands find" if state.asks_for_token else ""
    in_memory = ", in memory until `vitok cluster down`" if state.store_is_embedded else ""
    lines = [
        f"Ray     {state.ray_address}, dashboard and jobs {state.dashboard}{token}",
        f"MLflow  {state.mlflow}, records in {state.database}",
        f"store   {state.store}, bucket {state.bucket}{in_memory}",
        "",
        "Every command of this machine uses them with",
        "",
        f"  export RAY_ADDRESS={state.ray_address} MLFLOW_TRACKING_URI={state.mlflow}",
        "",
        f"and runs, latents and shards may lie in s3://{state.bucket}/ with",
        "",
    ]
    variables = {"AWS_ENDPOINT_URL": state.store}
    if state.store_is_embedded:
        variables |= _STAND_IN_CREDENTIALS
    lines.append("  export " + " ".join(f"{name}={value}" for name, value in variables.items()))
    return "\n".join(lines)


def status(folder: str = "runs/stack", json: bool = False) -> None:
    """Say whether the servers run and answer; fails where one does not.

    Args:
        folder: that `vitok cluster up` was given.
        json: print JSON.
    """
    state = _read_state(folder)
    found = {
        service.name: "healthy"
        if service.is_healthy() and service.is_alive()
        else "does not answer"
        if service.is_alive()
        else "ended"
        for service in state.services
    }
    if json:
        addresses = {name: getattr(state, name) for name in ("ray_address", "mlflow", "store")}
        print(json_format.dumps({"services": found} | addresses))
    else:
        for service in state.services:
            print(f"{service.name:<7} {found[service.name]:<16} {service.health_url}")
    if bad := [service for service in state.services if found[service.name] != "healthy"]:
        raise RuntimeError(
            f"{', '.join(service.name for service in bad)} cannot be used, see {bad[0].log}; "
            "`vitok cluster down` and `up` start anew"
        )


def down(folder: str = "runs/stack", purge: bool = False) -> None:
    """End the servers and everything that they started, jobs too.

    Args:
        folder: that `vitok cluster up` was given.
        purge: delete its logs and MLflow's SQLite database too.
    """
    state = _read_state(folder)
    count = end(state.services, state.marker)
    remove_folder(state.ray_folder)
    path = Path(folder).absolute()
    (path / STATE_FILE).unlink()
    if purge:
        remove_folder(str(path))
    kept = "" if purge else f"; logs and records are in {path}, --purge deletes them too"
    print(f"ended {count} processes{kept}")


def _read_state(folder: str) -> StackState:
    file = Path(folder).absolute() / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no stack was started in {file.parent}; start one with `vitok cluster up`, or name "
            "its folder with --folder"
        )
    return read_config(file, StackState)


CLUSTER_COMMANDS: dict[str, Callable[..., None]] = {"up": up, "status": status, "down": down}
