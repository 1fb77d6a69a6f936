import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.generation import flow_curves
from pipelines.generation.flow_curves import Curve, best_for_compute, curve_of, draw_curves
from pipelines.train_flow import FlowTraining, prepare
from tests.pipelines.flow_runs import GRIDS, flow_training
from vitok.flops import training_flops
from vitok.storage import Folder


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowTraining:
    """A flow training of which a loss was recorded at every step."""
    settings = prepare(flow_training(tmp_path))

    def history(run: Folder, metric: str) -> list[tuple[int, float]]:
        return [(step, 1 / step) for step in range(1, 9)] if metric == "loss" else []

    monkeypatch.setattr(flow_curves, "metric_history", history)
    return settings


def test_curve_counts_the_operations_of_all_steps_before(recorded: FlowTraining) -> None:
    curve = curve_of(recorded.run.folder, "loss")
    assert curve.steps == list(range(1, 9)) and curve.values[3] == 1 / 4
    tokens = sum(rows * columns for rows, columns in GRIDS) / len(GRIDS)
    step = 10 * training_flops(recorded.model, [tokens])
    assert curve.flops == pytest.approx([step * n for n in range(1, 9)])
    smooth = curve_of(recorded.run.folder, "loss", smooth=3)
    assert smooth.steps == [3, 6, 8]
    assert smooth.values[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_best_for_compute_is_what_no_cheaper_point_beats() -> None:
    small = Curve("small", [1, 2, 3], [1.0, 2.0, 3.0], [5.0, 3.0, 2.9])
    large = Curve("large", [1, 2], [2.5, 5.0], [4.0, 1.0])
    front = best_for_compute([large, small])
    assert front == [
        (1.0, 5.0, "small"), (2.0, 3.0, "small"), (3.0, 2.9, "small"), (5.0, 1.0, "large")
    ]  # fmt: skip


def test_curves_are_drawn_alike_and_differ_with_what_they_show() -> None:
    curve = Curve("one", [1, 2], [1e9, 2e9], [0.5, 0.4])
    drawn = draw_curves([curve], "loss")
    assert drawn == draw_curves([curve], "loss")
    other = draw_curves([replace(curve, values=[0.5, 0.1])], "loss")
    assert np.asarray(Image.open(io.BytesIO(drawn))).std() > 0 and other != drawn


def test_command_names_the_best_run_and_a_metric_that_is_not_there(
    recorded: FlowTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = recorded.run.folder.uri, tmp_path / "figures" / "curves.png"
    assert main(["curves", run, "--smooth", "1", "--out", str(out)]) == 0
    assert "best loss: 0.125 of flow after" in capsys.readouterr().out
    assert Image.open(out).size[0] > 500
    assert main(["curves", run, "--metric", "gfid"]) == 1
    assert "has no record of 'gfid'" in capsys.readouterr().err
    assert main(["curves"]) == 1
    assert "there are no runs; give the folders" in capsys.readouterr().err
