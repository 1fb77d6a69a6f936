from dataclasses import replace

import pytest

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.sweeps.config import Axis, SweepConfig, make_trial
from pipelines.sweeps.records import TrialRecord
from pipelines.sweeps.search import draws_of


@pytest.fixture
def sweep(tiny_training: AutoencoderTraining) -> SweepConfig:
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    return SweepConfig(
        name="study",
        base=tiny_training,
        axes=(
            Axis(field="optim.lr", low=1e-5, high=1e-1, log=True),
            Axis(field="optim.algorithm", values=("adamw", "muon")),
        ),
        search="optuna",
        num_trials=40,
        metric="eval_psnr",
    )


def score(values: dict[str, str]) -> float:
    """The best learning rate is 1e-3 with Muon."""
    from math import log10

    return -abs(log10(float(values["optim.lr"])) + 3) + (values["optim.algorithm"] == "muon")


def test_optuna_comes_closer_to_what_is_best(sweep: SweepConfig) -> None:
    draws = draws_of(sweep, [])
    assert draws is not None
    found = []
    for number in range(sweep.num_trials):
        values = draws.suggest(str(number))
        assert values is not None
        assert make_trial(sweep, values).settings.optim.lr == float(values["optim.lr"])
        found.append(score(values))
        # One in ten does not come to its end.
        draws.tell(str(number), None if number % 10 == 9 else found[-1])
    assert sum(found[-10:]) > sum(found[:10]) + 2
    assert max(found) > 0.8


def test_optuna_goes_on_from_the_trials_of_an_earlier_start(sweep: SweepConfig) -> None:
    records = []
    for exponent in range(-50, -10):
        for algorithm in ("adamw", "muon"):
            values = {"optim.lr": f"{10 ** (exponent / 10):.4g}", "optim.algorithm": algorithm}
            record = TrialRecord.of(make_trial(sweep, values))
            results = {"eval_psnr": score(values)}
            records.append(replace(record, state="finished", results=results))
    draws = draws_of(sweep, records)
    assert draws is not None
    first = [draws.suggest(str(number)) for number in range(10)]
    assert all(values is not None for values in first)
    assert sum(score(values) for values in first if values) / 10 > 0.2
