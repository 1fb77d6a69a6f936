"""Plots of a sweep, as PNG."""

import io
from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.sweeps.records import TrialRecord
from pipelines.sweeps.report import Front, Measure, Study, error_of, series_of, value_of

_PANEL = (5.5, 4.0)  # inches
_DPI = 110
_TICK_RATIO = 1.25  # of neighbouring ticks on a logarithmic axis, at least
_MAX_LEGEND = 24  # trials that are named beside a plot


def draw_plots(study: Study) -> dict[str, bytes]:
    """Return the plots that the finished trials have something to show on, by file name.

    `quality.png` shows the quality by decoder size, a line for each compression ratio and encoder
    depth: the study of Figure 2 of arXiv 2605.05331. `pareto_psnr.png`, and so on for every
    quality, shows it against every cost, with the trials that nothing beats. `scaling.png` has the
    fitted laws, `progress.png` the trials on their way.
    """
    plots: dict[str, bytes] = {}
    qualities = study.qualities or [study.metric]
    known = [q for q in qualities if any(value_of(r, q) is not None for r in study.done)]
    if known:
        plots["quality.png"] = _draw(
            [lambda axes, q=q: _quality(axes, study, q) for q in known]  # type: ignore[misc]
        )
    for quality in known:
        fronts = [front for front in study.fronts if front.quality == quality]
        plots[f"pareto_{quality.field.removeprefix('eval_')}.png"] = _draw(
            [lambda axes, f=f: _front(axes, study, f) for f in fronts]  # type: ignore[misc]
        )
    if study.laws:
        shown = list(dict.fromkeys(law.quality for law in study.laws))
        plots["scaling.png"] = _draw(
            [lambda axes, q=q: _laws(axes, study, q) for q in shown]  # type: ignore[misc]
        )
    if any(len(_course(study, record)) for record in study.records):
        plots["progress.png"] = _draw([lambda axes: _progress(axes, study)], width=2.0)
    return plots


def _draw(panels: list[Callable[[Axes], None]], width: float = 1.0) -> bytes:
    """Draw panels side by side, at most two in a row, so many times as wide as usual."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(width * columns * _PANEL[0], rows * _PANEL[1]), dpi=_DPI, layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    image = io.BytesIO()
    # Without the version of the software, the same records give the same bytes.
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _series(study: Study) -> dict[str, str]:
    """Return the colour of every series of finished trials."""
    names = sorted({series_of(record) for record in study.done})
    return {name: f"C{index % 10}" for index, name in enumerate(names)}


def _logarithmic(axes: Axes, values: Iterable[float]) -> None:
    """Make the horizontal axis logarithmic, with ticks at the values themselves."""
    axes.set_xscale("log")
    ticks: list[float] = []
    for value in sorted(values):
        if not ticks or value > _TICK_RATIO * ticks[-1]:
            ticks.append(value)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _towards(quality: Measure) -> str:
    return quality.label if quality.more_is_better else f"{quality.label}, less is better"


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def _quality(axes: Axes, study: Study, quality: Measure) -> None:
    for name, colour in _series(study).items():
        members = [r for r in study.done if series_of(r) == name]
        points = [(r.decoder_parameters / 1e6, value_of(r, quality)) for r in members]
        known = sorted((x, y) for x, y in points if y is not None)
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=colour, label=name, markersize=4)
    _logarithmic(axes, (r.decoder_parameters / 1e6 for r in study.done))
    axes.set(xlabel="decoder parameters (M)", ylabel=_towards(quality))
    _legend(axes)


def _front(axes: Axes, study: Study, front: Front) -> None:
    quality, cost = front.quality, front.cost
    on_front: list[tuple[float, float]] = []
    labelled: set[str] = set()
    colours = _series(study)
    for record in study.done:
        x, y = value_of(record, cost), value_of(record, quality)
        if x is None or y is None:
            continue
        name = series_of(record)
        label = "" if name in labelled else name
        labelled.add(name)
        axes.plot(x / cost.unit, y, "o", color=colours[name], label=label, markersize=5)
        if record.name in front.trials:
            on_front.append((x / cost.unit, y))
    axes.plot(*zip(*sorted(on_front), strict=True), "k--", linewidth=1, label="front", zorder=0)
    known = (value_of(record, cost) for record in study.done)
    _logarithmic(axes, (x / cost.unit for x in known if x is not None))
    axes.set(xlabel=cost.label, ylabel=_towards(quality))
    _legend(axes)


def _laws(axes: Axes, study: Study, quality: Measure) -> None:
    colours = _series(study)
    name = ""
    for entry in (law for law in study.laws if law.quality == quality):
        name, law = entry.error, entry.law
        members = [r for r in study.done if series_of(r) == entry.series]
        pairs = [(r.decoder_parameters, value_of(r, quality)) for r in members]
        errors = [(n, error_of(quality, v)) for n, v in pairs if v is not None]
        known = np.array([(n, error[0]) for n, error in errors if error is not None])
        colour = colours[entry.series]
        axes.plot(known[:, 0] / 1e6, known[:, 1], "o", color=colour, markersize=4)
        sizes = np.geomspace(known[:, 0].min() / 1.2, known[:, 0].max() * 1.2, 100)
        label = f"{entry.series}: b = {law.exponent:.2g}"
        if law.constant:
            label += f", c = {law.constant:.2g}"
        axes.plot(sizes / 1e6, law.at(sizes), "-", color=colour, label=label)
    _logarithmic(axes, (record.decoder_parameters / 1e6 for record in study.done))
    axes.set(xlabel="decoder parameters (M)", ylabel=name)
    _legend(axes)


def _course(study: Study, record: TrialRecord) -> list[tuple[float, float]]:
    """Return (work, metric) at the checkpoints of a trial and at its end."""

    metric, unit = study.sweep.metric, study.sweep.progress
    course = [
        (float(getattr(report, unit)), report.metrics[metric])
        for report in record.reports
        if metric in report.metrics
    ]
    if metric in record.results:
        total = record.training_flops if unit == "flops" else record.images
        course.append((float(total), record.results[metric]))
    return course


def _progress(axes: Axes, study: Study) -> None:
    for record in study.records:
        course = _course(study, record)
        if course:
            ended = record.state in ("finished", "running")
            label = record.name if ended else f"{record.name} ({record.state})"
            axes.plot(*zip(*course, strict=True), "o-", label=label, markersize=3)
    unit = "training FLOPs" if study.sweep.progress == "flops" else "images"
    axes.set(xlabel=unit, ylabel=study.metric.label)
    if len(study.records) <= _MAX_LEGEND:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
