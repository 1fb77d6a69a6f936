"""What a sweep says: a table, fronts, scaling laws and plots, from its records alone."""

import csv
import io
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.sweeps.config import EVALUATED, SweepConfig
from pipelines.sweeps.records import TrialRecord, read_records, read_sweep
from pipelines.sweeps.scaling import PowerLaw, fit_power_law, pareto_front
from vitok.pretrained import EXPORT
from vitok.storage import Folder

REPORT_FOLDER = "report"


@dataclass(frozen=True)
class Measure:
    """Something by which trials differ.

    Attributes:
        field: of a record, or name of a metric.
        label: as tables and axes show it.
        more_is_better: or less.
        unit: that it is divided by for showing.
    """

    field: str
    label: str
    more_is_better: bool
    unit: float = 1.0


QUALITIES = (
    Measure("eval_psnr", "PSNR (dB)", True),
    Measure("eval_ssim", "SSIM", True),
    Measure("eval_rfid", "rFID", False),
    Measure("eval_rfdd", "rFDD", False),
)
COSTS = (
    Measure("decoder_parameters", "decoder parameters (M)", False, 1e6),
    Measure("flops_256p", "GFLOPs at 256p", False, 1e9),
    Measure("latency_ms", "latency at 256p (ms)", False),
    Measure("compression_ratio", "compression ratio r", True),
)


@dataclass(frozen=True)
class Front:
    """The trials that no other beats in a quality and a cost, by rising cost."""

    quality: Measure
    cost: Measure
    trials: list[str]


@dataclass(frozen=True)
class Law:
    """How the error of a series of trials falls with the decoder's parameters."""

    series: str
    quality: Measure
    error: str
    law: PowerLaw


@dataclass(frozen=True)
class Study:
    """All that a report says.

    Attributes:
        records: of all trials, the best first; those without a result last.
        best: name of the best that is finished; empty if there is none.
    """

    sweep: SweepConfig
    records: list[TrialRecord]
    best: str
    qualities: list[Measure]
    fronts: list[Front]
    laws: list[Law]

    @property
    def done(self) -> list[TrialRecord]:
        """The trials that are finished."""
        return [record for record in self.records if record.state == "finished"]

    @property
    def leaders(self) -> list[TrialRecord]:
        """The best trial, and those on the front of its quality against decoder parameters."""
        fronts = [front.trials for front in self.fronts if front.cost is COSTS[0]]
        names = dict.fromkeys([self.best, *(fronts[0] if fronts else [])])
        return [record for name in names for record in self.done if record.name == name]

    @property
    def metric(self) -> Measure:
        """What trials are judged by."""
        known = {quality.field: quality for quality in QUALITIES}
        name = self.sweep.metric
        return known.get(name, Measure(name, name, self.sweep.mode == "max"))


def study_of(folder: Folder) -> Study:
    """Read a sweep's records, as far as they go, and say what follows from them.

    Raises:
        FileNotFoundError: there is no sweep.
    """
    sweep = read_sweep(folder)
    sign = -1 if sweep.mode == "max" else 1

    def rank(record: TrialRecord) -> tuple[bool, float, str]:
        score = record.latest.get(sweep.metric, math.inf * sign)
        return record.state != "finished", sign * score, record.name

    records = sorted(read_records(folder).values(), key=rank)
    done = [record for record in records if record.state == "finished"]
    best = next((record.name for record in done if sweep.metric in record.results), "")
    qualities = [q for q in QUALITIES if any(q.field in record.results for record in done)]
    study = Study(sweep, records, best, qualities, [], [])
    for quality in qualities or [study.metric]:
        study.fronts.extend(_fronts(done, quality))
        study.laws.extend(_laws(done, quality))
    return study


def value_of(record: TrialRecord, measure: Measure) -> float | None:
    """Return what a trial has of a measure, None if that is not known."""
    value = getattr(record, measure.field, None)
    return record.latest.get(measure.field) if value is None else float(value)


def series_of(record: TrialRecord) -> str:
    """Return the name of the trials that differ in nothing but the decoder and the seed."""
    parts = [f"r = {record.compression_ratio:g}", f"encoder {record.encoder_depth}"]
    parts += [
        f"{field} {value}"
        for field, value in record.values.items()
        if field != "seed" and not field.startswith("model")
    ]
    return ", ".join(parts)


def error_of(quality: Measure, value: float) -> tuple[float, str] | None:
    """Return a quality as an error that can fall to a constant, and what it is called."""
    if quality.field == "eval_psnr":
        return 4 * 10 ** (-value / 10), "mean squared error, pixels in [-1, 1]"
    if quality.field == "eval_ssim":
        return 1 - value, "1 - SSIM"
    return None if quality.more_is_better else (value, quality.label)


def _fronts(done: list[TrialRecord], quality: Measure) -> list[Front]:
    fronts = []
    for cost in COSTS:
        points = [
            (value_of(record, cost), value_of(record, quality), record.name) for record in done
        ]
        known = [(c, q, name) for c, q, name in points if c is not None and q is not None]
        if not known:
            continue
        known.sort()
        costs = np.array([[_less(cost, c), _less(quality, q)] for c, q, _ in known])
        on_front = pareto_front(costs)
        names = [name for (_, _, name), on in zip(known, on_front, strict=True) if on]
        fronts.append(Front(quality, cost, names))
    return fronts


def _less(measure: Measure, value: float) -> float:
    return -value if measure.more_is_better else value


def _laws(done: list[TrialRecord], quality: Measure) -> list[Law]:
    series: dict[str, list[tuple[float, float]]] = {}
    name = ""
    for record in done:
        value = value_of(record, quality)
        error = None if value is None else error_of(quality, value)
        if error is not None and error[0] > 0:
            name = error[1]
            point = (float(record.decoder_parameters), error[0])
            series.setdefault(series_of(record), []).append(point)
    laws = []
    for label, points in sorted(series.items()):
        sizes, errors = np.array(sorted(points)).T
        law = fit_power_law(sizes, errors)
        if law is not None:
            laws.append(Law(label, quality, name, law))
    return laws


def to_json(study: Study) -> dict[str, Any]:
    """Return a report as JSON types."""
    return {
        "sweep": study.sweep.name,
        "metric": study.sweep.metric,
        "mode": study.sweep.mode,
        "states": dict(sorted(Counter(record.state for record in study.records).items())),
        "best": study.best,
        "trials": [_row(record) for record in study.records],
        "fronts": [
            {"quality": front.quality.field, "cost": front.cost.field, "trials": front.trials}
            for front in study.fronts
        ],
        "laws": [
            {"series": law.series, "quality": law.quality.field, "error": law.error}
            | asdict(law.law)
            for law in study.laws
        ],
    }


def _row(record: TrialRecord) -> dict[str, Any]:
    row = asdict(record)
    reports, results = row.pop("reports"), row.pop("results")
    row["steps_done"] = record.steps if results else (reports[-1]["step"] if reports else 0)
    row["metrics"] = {name: value for name, value in sorted(record.latest.items())}
    return row


def to_csv(study: Study) -> str:
    """Return a row for each trial, as spreadsheets read it."""
    fields = [field for field in dict.fromkeys(f for r in study.records for f in r.values)]
    metrics = list(dict.fromkeys([study.sweep.metric, *(q.field for q in study.qualities)]))
    columns = ["name", "state", *(cost.field for cost in COSTS), "training_flops", "images"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *metrics, *fields, "reason"])
    for record in study.records:
        row = [getattr(record, column) for column in columns]
        row += [record.latest.get(metric, "") for metric in metrics]
        writer.writerow([*row, *(record.values.get(f, "") for f in fields), record.reason])
    return text.getvalue()


def to_markdown(study: Study, plots: list[str]) -> str:
    """Return a report as Markdown.

    Args:
        plots: names of PNG files beside it.
    """
    counts = Counter(record.state for record in study.records)
    states = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    lines = [f"# Sweep {study.sweep.name}", "", f"{len(study.records)} trials: {states}."]
    if study.best:
        best = next(record for record in study.records if record.name == study.best)
        lines[-1] += f" The best by {study.sweep.metric}: {best.name}."
        lines += ["", f"Its weights: [{best.name}/{EXPORT}](../{best.name}/{EXPORT})."]
    lines += ["", "## Trials", "", *_trial_table(study), "", "## Fronts", ""]
    lines += ["Trials that no other beats in both, by rising cost.", ""]
    lines += [
        f"- {front.quality.label} against {front.cost.label}: {', '.join(front.trials)}"
        for front in study.fronts
    ]
    lines += ["", "## Scaling with the decoder", "", *_law_lines(study)]
    if plots:
        lines += ["", "## Plots", "", *(f"![{name}]({name})" for name in plots)]
    return "\n".join(lines) + "\n"


def _trial_table(study: Study) -> list[str]:
    shown = list(dict.fromkeys([study.metric, *study.qualities]))
    header = ["trial", "state", *(m.label for m in (*shown, *COSTS)), "steps"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for record in study.records:
        values = [(value_of(record, measure), measure) for measure in (*shown, *COSTS)]
        cells = [f"{v / m.unit:.4g}" if v is not None else "-" for v, m in values]
        done = _row(record)["steps_done"]
        steps = f"{done}/{record.steps}"
        lines.append(f"| {record.name} | {record.state} | {' | '.join(cells)} | {steps} |")
    reasons = [f"- {r.name}, {r.state}: {r.reason}" for r in study.records if r.reason]
    lines += ([""] if reasons else []) + reasons
    if any(measure.field in EVALUATED for measure in shown):
        note = (
            "[The evaluation](../evaluation/report.md) says of how many images rFID and rFDD are."
        )
        lines += ["", note]
    return lines


def _law_lines(study: Study) -> list[str]:
    if not study.laws:
        return ["Too few finished trials: a law takes three decoder sizes of one series."]
    lines = [
        "`error = a (N / N0)^-b + c`, N the decoder's parameters, N0 their geometric mean; in "
        "brackets 95% of the fits to resampled residuals. With three sizes there is no c.",
        "",
        "| series | error | a | b | c | N0 | trials |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in study.laws:
        law = entry.law
        exponent = "{:.3g} to {:.3g}".format(*law.exponent_interval)
        constant = "{:.3g} ({:.3g} to {:.3g})".format(law.constant, *law.constant_interval)
        has_constant = law.constant_interval[1] > 0
        lines.append(
            f"| {entry.series} | {entry.error} | {law.scale:.3g} | {law.exponent:.3g} ({exponent}) "
            f"| {constant if has_constant else '-'} | {law.reference:.3g} | {law.num_points} |"
        )
    if any(entry.law.exponent_interval[0] <= 0 for entry in study.laws):
        lines += ["", "Where the interval of b is not above 0, size has not helped."]
    return lines


def write_report(folder: Folder) -> Folder:
    """Write a sweep's report beside its records: Markdown, JSON, CSV and PNG.

    Returns:
        the folder of these files.
    """
    from pipelines.sweeps.plots import draw_plots

    study = study_of(folder)
    report = folder.child(REPORT_FOLDER)
    plots = draw_plots(study)
    for name, image in plots.items():
        report.write_bytes(name, image)
    report.write_text("trials.csv", to_csv(study))
    report.write_text("report.json", json.dumps(to_json(study), indent=1) + "\n")
    report.write_text("report.md", to_markdown(study, list(plots)))
    return report
