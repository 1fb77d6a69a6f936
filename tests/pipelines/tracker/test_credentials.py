import subprocess
from pathlib import Path

import pytest

from pipelines.tracker.credentials import credential_in, masked, names_a_credential
from pipelines.tracking import TrackingConfig, tracking_uri

# Put together here, so that no scanner of secrets takes this file for a leak.
AWS_KEY_ID = "AKIA" + "IOSFODNN7EXAMPLE"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "value",
    [
        AWS_KEY_ID,
        AWS_SECRET,
        f"--token={'ghp_' + 'a1B2' * 9}",
        "hf_" + "aBcD" * 8,
        "postgresql://mlflow:hunter2@db/mlflow",
        "https://user:pw@registry/x.git",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=abc",
        "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiJ4In0." + "c2lnbmF0dXJl",
    ],
)
def test_what_looks_like_a_credential_is_recognised_and_not_repeated(value: str) -> None:
    found = credential_in(value)
    assert found
    assert value not in found


def test_values_of_every_day_are_no_credentials() -> None:
    root = Path(__file__).parents[3]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    harmless = [
        *("runs/mine", "s3://bucket/prefix/of/a/run", "http://mlflow.vitok:5000", "3e-4", ""),
        *("postgresql://mlflow@db/mlflow", "facebook/dinov3-vits16-pretrain-lvd1689m"),
        *("vitok-5b-f16x64-8gpu", "http://[::1]:5000", "a" * 64, commit, "task-oriented"),
    ]
    assert [value for value in harmless if credential_in(value)] == []
    assert len(commit) == 40


def test_names_of_variables_that_hold_credentials() -> None:
    names = (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "api_key",
        "RAY_TOKEN",
    )
    assert all(map(names_a_credential, names))
    others = ("AWS_ENDPOINT_URL", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "MONKEY", "RAY_AUTH_MODE")
    assert not any(map(names_a_credential, others))


def test_passwords_in_urls_are_masked_and_nothing_else_is() -> None:
    text = "cannot reach postgresql://mlflow:hunter2@db:5432/x, see http://host:5000/a@b"
    assert (
        masked(text) == "cannot reach postgresql://mlflow:***@db:5432/x, see http://host:5000/a@b"
    )


def test_a_tracking_server_with_a_password_in_its_address_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would stand in the run's config, in its parameters and in its log."""
    uri = "http://me:hunter2@host:5000"
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME") as refusal:
        TrackingConfig(uri=uri)
    assert "hunter2" not in str(refusal.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        tracking_uri(TrackingConfig(), "s3://bucket/runs")
    assert "hunter2" not in str(refusal.value)


def test_the_address_of_the_server_comes_from_the_config_then_from_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), "/runs") == "sqlite:////runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://variable:5000")
    assert tracking_uri(TrackingConfig(), "/runs") == "http://variable:5000"
    assert tracking_uri(TrackingConfig(uri="http://field:5000"), "/runs") == "http://field:5000"
