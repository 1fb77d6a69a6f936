import os
import socket
from pathlib import Path

import pytest

from cluster import local
from cluster.local import ray_session, trust_own_cluster


@pytest.mark.parametrize(
    ("address", "has_token", "mode", "expected"),
    [
        ("127.0.0.1:6379", True, None, "token"),
        ("localhost:6379", True, None, "token"),
        ("127.0.0.1:6379", True, "disabled", "disabled"),
        ("127.0.0.1:6379", False, None, None),
        ("10.0.0.1:6379", True, None, None),
        (None, True, None, None),
    ],
)
def test_a_cluster_on_loopback_is_shown_the_users_token_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    address: str | None,
    has_token: bool,
    mode: str | None,
    expected: str | None,
) -> None:
    token = tmp_path / "token"
    if has_token:
        token.write_text("secret")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for name, value in (("RAY_ADDRESS", address), ("RAY_AUTH_MODE", mode)):
        if value is not None:
            monkeypatch.setenv(name, value)
    trust_own_cluster()
    assert os.environ.get("RAY_AUTH_MODE") == expected


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", None)  # would fail if it were called
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(ConnectionError, match=rf"{address}: nobody answers there \(.*; start the"),
        ray_session(),
    ):
        pass


def test_a_cluster_that_lets_nobody_in_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(local, "_knock", lambda address: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match=r"^Failed to connect$"), ray_session():
        pass
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with (
        pytest.raises(
            ConnectionError, match=r"RAY_ADDRESS=10\.0\.0\.1:6379: .*set RAY_AUTH_MODE=token"
        ),
        ray_session(),
    ):
        pass
