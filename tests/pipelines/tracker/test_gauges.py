from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipelines.tracker import gauges, outbox
from pipelines.tracker.gauges import RunGauges
from pipelines.tracking import Tracker


class RecordingGauge:
    made: ClassVar[list["RecordingGauge"]] = []

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys, self.values = name, tag_keys, []
        self.made.append(self)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


def test_what_a_run_records_is_a_gauge_of_that_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gauges, "Gauge", RecordingGauge)
    monkeypatch.setattr(RecordingGauge, "made", [])
    # A server that is away keeps nothing from Prometheus.
    tracker = Tracker("http://127.0.0.1:1", "run-id", str(tmp_path), also=RunGauges("mine"))
    tracker.log_metrics({"loss": 0.5, "eval.psnr": 20, "system/cpu": 99.0}, step=3)
    tracker.log_metrics({"loss": 0.25}, step=4)
    tracker.log_metrics({}, step=5)
    monkeypatch.setattr(outbox, "_LAST_PAUSES_S", ())
    tracker.close()  # what it still tried would be heard in other tests
    tags: dict[str, Any] = {"run": "mine"}
    assert {gauge.name: gauge.values for gauge in RecordingGauge.made} == {
        "vitok_loss": [(0.5, tags), (0.25, tags)],
        "vitok_eval_psnr": [(20.0, tags)],
        "vitok_step": [(3.0, tags), (4.0, tags)],
    }
    assert {gauge.tag_keys for gauge in RecordingGauge.made} == {("run",)}
