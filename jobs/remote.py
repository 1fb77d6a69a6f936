"""Jobs on a Ray cluster: connect to its job server, follow a job, `vitok jobs`."""

import asyncio
import difflib
import json as json_format
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from jobs import positional
from pipelines.failures import Preempted

RUN_KEY = "run"
COMMAND_KEY = "command"
REVISION_KEY = "revision"

_RECONNECTIONS = 5
_END_TIMEOUT_S = 30.0


def connect(address: str) -> Any:
    """Return a client of a cluster's job server.

    The token of a cluster that asks for one is Ray's: RAY_AUTH_TOKEN, the file that
    RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token.

    Args:
        address: `http://HOST:8265`, or the address of the cluster itself; empty takes
            RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster on this machine.

    Raises:
        ConnectionError: nothing answers there.
    """
    # The file of the token is looked for by Ray only where authentication is switched on.
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # It says at every connection that there is a token.
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    if address:
        # Ray takes its variables, where they are set, for more important than the argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address or None)
    except (ConnectionError, ValueError) as error:
        named = address or os.environ.get("RAY_ADDRESS")
        where = f"at {named}" if named else "on this machine"
        raise ConnectionError(
            f"no job server answers {where}; give --address http://HEAD:8265 (on Kubernetes "
            "after `kubectl port-forward`), or start a cluster with `vitok cluster up`"
        ) from error


def follow(client: Any, job_id: str) -> None:
    """Print a job's log as it comes, until the job ends.

    A connection that breaks is made again, and goes on where it broke.

    Raises:
        RuntimeError: the job failed.
        Preempted: somebody stopped it.
    """
    try:
        _print_log(client, job_id)
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on; `vitok jobs logs {job_id} --follow` shows it, "
            f"`vitok jobs stop {job_id}` ends it",
            file=sys.stderr,
        )
        raise
    deadline = time.monotonic() + _END_TIMEOUT_S
    while not (details := client.get_job_info(job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the log of job {job_id} has ended, the job has not; see `vitok jobs status`"
            )
        time.sleep(0.2)
    _raise_unless_succeeded(job_id, details)


def _raise_unless_succeeded(job_id: str, details: Any) -> None:
    if details.status.value == "STOPPED":
        raise Preempted(f"job {job_id} was stopped; submit it again to go on")
    if details.status.value == "FAILED":
        # The log, which is above, ends with the sentence that says why.
        reason = (details.message or "").strip().splitlines()
        raise RuntimeError(f"job {job_id} failed: {reason[0] if reason else 'see its log'}")


def _print_log(client: Any, job_id: str) -> None:
    import aiohttp

    num_printed = 0

    async def stream() -> None:
        nonlocal num_printed
        position = 0
        async for chunk in client.tail_job_logs(job_id):
            position += len(chunk)
            if position > num_printed:  # a new connection begins with the first line again
                print(chunk[len(chunk) - (position - num_printed) :], end="", flush=True)
                num_printed = position

    num_failed = 0
    while True:
        before = num_printed
        try:
            asyncio.run(stream())
            if client.get_job_info(job_id).status.is_terminal():
                return
            reason = "the connection was closed"
        # A server that restarts refuses, breaks off, or answers with a page of its own.
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            reason = str(error) or type(error).__name__
        num_failed = 0 if num_printed > before else num_failed + 1
        if num_failed == _RECONNECTIONS:
            raise ConnectionError(
                f"the log of job {job_id} does not come ({reason}), the job may go on; see `vitok "
                f"jobs status {job_id}`"
            )
        time.sleep(2.0**num_failed)


def job_at_work(client: Any, command: str, run: str) -> str | None:
    """Return the job that is at work on a run of a command, if any."""
    for details in client.list_jobs():
        metadata = details.metadata or {}
        is_same = (metadata.get(COMMAND_KEY), metadata.get(RUN_KEY)) == (command, run)
        if is_same and not details.status.is_terminal():
            return str(details.submission_id)
    return None


def ls(address: str = "", json: bool = False) -> None:
    """List the jobs of a cluster, the newest first.

    Args:
        address: the job server, http://HOST:8265; by default as Ray's variables say.
        json: print JSON.
    """
    described = [_describe(job) for job in connect(address).list_jobs() if job.submission_id]
    described.sort(key=lambda job: job["started"] or "", reverse=True)
    if json:
        print(json_format.dumps(described))
        return
    if not described:
        print("no job was submitted to this cluster")
        return
    columns = ("job", "status", "command", "run", "started")
    widths = [max(len(str(job[name] or "")) for job in [*described, _heads()]) for name in columns]
    for job in (_heads(), *described):
        cells = (f"{job[name] or '':<{width}}" for name, width in zip(columns, widths, strict=True))
        print("  ".join(cells).rstrip())


def _heads() -> dict[str, Any]:
    return {name: name for name in ("job", "status", "command", "run", "started")}


def status(job: positional.Job, /, *, address: str = "", json: bool = False) -> None:
    """Say how a job is, and where.

    Args:
        job: its name, as submit and ls print it.
        address: the job server, http://HOST:8265; by default as Ray's variables say.
        json: print JSON.
    """
    details = _job(connect(address), job)
    described = _describe(details) | {"message": details.message, "entrypoint": details.entrypoint}
    if json:
        print(json_format.dumps(described))
        return
    width = max(map(len, described))
    for name, value in described.items():
        print(f"{name:<{width}}  {value or ''}".rstrip())


def logs(job: positional.Job, /, *, address: str = "", follow: bool = False) -> None:
    """Print what a job has said.

    Args:
        job: its name, as submit and ls print it.
        address: the job server, http://HOST:8265; by default as Ray's variables say.
        follow: go on until the job ends, with its exit status.
    """
    client = connect(address)
    _job(client, job)
    if follow:
        _follow(client, job)
    else:
        print(client.get_job_logs(job), end="")


_follow = follow  # the option above has its name


def stop(job: positional.Job, /, *, address: str = "", wait: bool = True) -> None:
    """Ask a job to end; a training writes a checkpoint first, and can be gone on with.

    Args:
        job: its name, as submit and ls print it.
        address: the job server, http://HOST:8265; by default as Ray's variables say.
        wait: until it has ended.
    """
    client = connect(address)
    details = _job(client, job)
    if not client.stop_job(job):
        print(f"{job} has ended already: {details.status.value}")
        return
    if not wait:
        print(f"{job}: asked to stop")
        return
    print(f"{job}: asked to stop; waiting for its checkpoint", flush=True)
    while not client.get_job_info(job).status.is_terminal():
        time.sleep(0.5)
    print(f"{job}: {client.get_job_info(job).status.value}")


def _job(client: Any, job: str) -> Any:
    """Return what a cluster knows of a job.

    Raises:
        ValueError: there is no such job; names the nearest.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
    known = [str(details.submission_id) for details in client.list_jobs() if details.submission_id]
    near = difflib.get_close_matches(job, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`vitok jobs ls` lists them"
    raise ValueError(f"there is no job {job!r} on this cluster; {hint}")


def _describe(details: Any) -> dict[str, Any]:
    metadata = details.metadata or {}
    return {
        "job": details.submission_id or details.job_id,
        "status": details.status.value,
        "command": metadata.get(COMMAND_KEY),
        "run": metadata.get(RUN_KEY),
        "revision": metadata.get(REVISION_KEY),
        "started": _when(details.start_time),
        "ended": _when(details.end_time),
    }


def _when(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))


JOBS_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "status": status,
    "logs": logs,
    "stop": stop,
}
