"""A metric of flow trainings against the operations they took: what the same compute buys."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from pipelines.tracking import metric_history
from pipelines.train_flow import read_settings, read_statistics
from vitok.flops import training_flops
from vitok.storage import Folder

_SIZE, _DPI = (7.0, 4.5), 110  # inches, pixels an inch


@dataclass(frozen=True)
class Curve:
    """A metric along one training.

    Attributes:
        name: of the run.
        steps: at which it was recorded.
        flops: cumulative operations of the generator's training up to each step.
        values: of the metric.
    """

    name: str
    steps: list[int]
    flops: list[float]
    values: list[float]


def curve_of(run: Folder, metric: str, smooth: int = 1) -> Curve:
    """Read a metric of a flow training.

    Args:
        smooth: means over so many neighbouring records: a training loss is noisy.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it has no record of this metric.
    """
    settings = read_settings(run)
    history = metric_history(run, metric)
    if not history:
        raise ValueError(
            f"{run.uri} has no record of {metric!r}; give another --metric, such as loss"
        )
    tokens = read_statistics(run).tokens_per_latent
    of_a_step = settings.images_per_step * training_flops(settings.model, [tokens])
    groups = [history[i : i + smooth] for i in range(0, len(history), smooth)]
    steps = [group[-1][0] for group in groups]
    return Curve(
        name=settings.run.name,
        steps=steps,
        flops=[step * of_a_step for step in steps],
        values=[fmean(value for _, value in group) for group in groups],
    )


def best_for_compute(curves: Sequence[Curve]) -> list[tuple[float, float, str]]:
    """Return the points that no other reaches with as few operations: (flops, value, run).

    Lower is better.
    """
    points = sorted(
        (flops, value, curve.name)
        for curve in curves
        for flops, value in zip(curve.flops, curve.values, strict=True)
    )
    front: list[tuple[float, float, str]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def draw_curves(curves: Sequence[Curve], metric: str) -> bytes:
    """Draw curves and the best for the compute, as PNG; the same curves give the same bytes."""
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.flops, curve.values, "-", label=curve.name, linewidth=1.2)
    front = best_for_compute(curves)
    flops, values = [point[0] for point in front], [point[1] for point in front]
    # In steps: between two points nothing better than the first is known.
    axes.step(flops, values, "k--", where="post", linewidth=0.8, label="best for the compute")
    axes.set(xscale="log", xlabel="operations of the generator's training", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    image = io.BytesIO()
    # Without the version of the software.
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
