"""What an evaluation leaves: JSON, Parquet, a table, plots, pictures, and its place in MLflow."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipelines.evaluate import EvaluationResult, Scores, statistics_name
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.published import PUBLISHED, PublishedFigures
from pipelines.evaluation.worker import OK
from pipelines.reconstruction import METRICS, flat, sheet_of
from pipelines.runs import next_step
from pipelines.tracking import Tracker, run_around, tracker_of
from vitok.checkpoint import PROGRESS_FILE
from vitok.config import to_dict
from vitok.storage import Folder

RESULTS, IMAGES, SAMPLES, REPORT = "results.json", "images.parquet", "samples.txt", "report.md"
PICTURE = "reconstructions.png"

# Columns of the table: heading (none: no column), name in a row of Scores, digits behind the point.
_COLUMNS = (
    ("r", "compression_ratio", 1),
    ("bits/pixel", "bits_per_pixel", 2),
    ("rFID", "rfid", 2),
    ("rFDD", "rfdd", 2),
    *((shown["heading"], name, shown["digits"]) for name, shown in METRICS.items()),
    ("s/image", "seconds", 4),
    ("MB", "peak_mb", 0),
)
_SCORES_IN_MLFLOW = (*METRICS, "rfid", "rfdd", "seconds", "peak_mb")


def write_results(settings: EvaluationConfig, result: EvaluationResult, out: Path) -> None:
    """Write everything into a folder; what an earlier evaluation left there is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(_document(settings, result), indent=1) + "\n")
    (out / SAMPLES).write_text("".join(f"{key}\n" for key in result.keys))
    pq.write_table(_table(result), out / IMAGES)
    (out / REPORT).write_text(markdown(settings, result))
    (out / "statistics").mkdir(exist_ok=True)
    for (resolution, network), gaussian in result.references.items():
        gaussian.save(out / "statistics" / statistics_name(network, resolution))
    _draw_pictures(result, out)
    draw_plots(result.scores, out / "plots")


def log_to_runs(settings: EvaluationConfig, result: EvaluationResult, out: Path) -> None:
    """Record scores and files under the MLflow run of every subject that is one of ours.

    The name of the folder tells evaluations of one run apart.
    """
    place = "/".join(dict.fromkeys(["evaluation", out.name]))
    for spec in settings.specs():
        scores = [score for score in result.scores if score.subject == spec.title]
        run = run_around(Folder.of(spec.location)) if scores and spec.is_ours else None
        tracker = tracker_of(run) if run else None
        if run is None or tracker is None:
            continue
        metrics = {
            f"{place}/{score.resolution.replace(' ', '_')}/{name}": float(value)
            for score in scores
            for row in [flat(score)]
            for name in _SCORES_IN_MLFLOW
            if (value := row[name]) is not None
        }
        tracker.log_metrics(metrics, _step_of(Folder.of(spec.location), run))
        log_results(tracker, out, place)
        tracker.close()


def log_results(tracker: Tracker, out: Path, place: str) -> None:
    """Add the files of an evaluation to an MLflow run, as artifacts below a place."""
    for name in (RESULTS, IMAGES, SAMPLES, REPORT, PICTURE, "plots", "pictures"):
        if (out / name).exists():
            below = "" if (out / name).is_file() else f"/{name}"
            tracker.log_files(out / name, place + below)


def markdown(settings: EvaluationConfig, result: EvaluationResult) -> str:
    """Return the table of an evaluation, with published figures, marked as such, below it."""
    scores = [flat(score) for score in result.scores]
    columns = [
        column
        for column in _COLUMNS
        if column[0] and any(score[column[1]] is not None for score in scores)
    ]
    header = ["subject", "resolution", "images", *(heading for heading, *_ in columns)]
    rows = [
        [score.subject, score.resolution, _count(score)]
        + [_number(values[name], digits) for _, name, digits in columns]
        for score, values in zip(result.scores, scores, strict=True)
    ]
    if settings.benchmark:
        rows += [
            [f"{figures.subject} (published)", settings.benchmark, ""]
            + [_number(_published(figures, name), digits) for _, name, digits in columns]
            for figures in PUBLISHED[settings.benchmark]
        ]
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    warnings = {
        f"- {score.resolution}: {warning}." for score in result.scores for warning in score.warnings
    }
    lines += sorted(warnings)
    lines += [f"- {name} could not be evaluated: {why}" for name, why in result.failed.items()]
    lines += _losses(result) + _captions(result)
    note = f"{len(result.keys):,} images, list {result.samples_digest[:12]} of seed {settings.seed}"
    if settings.benchmark:
        note += "; what is marked as published was measured by others (arXiv 2605.05331)"
    return "\n".join([*lines, "", f"{note}.", ""])


def _losses(result: EvaluationResult) -> list[str]:
    """Say which images are not in the means, and why the first of them are not."""
    lines = []
    for (subject, resolution), images in result.images.items():
        if lost := [image for image in images if image.status != OK]:
            lines.append(
                f"- {subject}, {resolution}: {len(lost):,} of {len(images):,} images failed; the "
                f"first, {lost[0].key}: {lost[0].status}"
            )
    if result.left_out:
        name, reason = result.left_out[0]
        lines.append(
            f"- {len(result.left_out):,} images that cannot be used are left out; the first, "
            f"{name}: {reason}"
        )
    return lines


def _captions(result: EvaluationResult) -> list[str]:
    """Say which images the pictures show."""
    lines = []
    for place, strips in result.pictures.items():
        if not strips:
            continue
        metrics = {image.key: image.metrics for image in result.images[place]}
        shown = ", ".join(f"{key} ({metrics[key].psnr:.2f} dB)" for key in strips)
        lines.append(f"- pictures/{_picture_name(*place)}, worst first: {shown}")
    return lines


def draw_plots(scores: Sequence[Scores], folder: Path) -> None:
    """Draw metrics over r, quality over bits, and latency over resolution, where there are some."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    plots = [
        ("psnr_over_r", "compression_ratio", "psnr", "r = 3 f^2 / c", "PSNR (dB)"),
        ("rfid_over_r", "compression_ratio", "rfid", "r = 3 f^2 / c", "rFID"),
        ("rfdd_over_r", "compression_ratio", "rfdd", "r = 3 f^2 / c", "rFDD"),
        ("rate_distortion", "bits_per_pixel", "psnr", "bits per pixel", "PSNR (dB)"),
    ]
    for name, x, y, x_label, y_label in plots:
        points = [
            (score, row[x], row[y])
            for score in scores
            for row in [flat(score)]
            if row[x] is not None and row[y] is not None
        ]
        if not points:
            continue
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
        for score, horizontal, vertical in points:
            axes.plot(horizontal, vertical, "o", label=f"{score.subject}, {score.resolution}")
        _tick_at(axes.xaxis, {horizontal for _, horizontal, _ in points})
        axes.legend(fontsize="small")
        figure.savefig(folder / f"{name}.png", dpi=120)
    _draw_latency(scores, folder)


def _draw_latency(scores: Sequence[Scores], folder: Path) -> None:
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for score in scores:
        if score.seconds is not None:
            size = int(score.resolution.rpartition(" ")[2])
            lines.setdefault(score.subject, []).append((size, score.seconds))
    if not any(len(points) > 1 for points in lines.values()):
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="resolution", ylabel="seconds an image")
    for subject, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=subject)
    _tick_at(axes.xaxis, {size for points in lines.values() for size, _ in points})
    axes.legend(fontsize="small")
    figure.savefig(folder / "latency.png", dpi=120)


def _tick_at(axis: Any, values: Iterable[float]) -> None:
    """Label a logarithmic axis with the values that there are, not with powers of ten."""
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(sorted(values), labels=[f"{value:g}" for value in sorted(values)])


def _document(settings: EvaluationConfig, result: EvaluationResult) -> dict[str, Any]:
    return {
        "settings": to_dict(settings),
        "samples": {"count": len(result.keys), "digest": result.samples_digest, "list": SAMPLES},
        "scores": [flat(score) for score in result.scores],
        "failed_subjects": result.failed,
        "left_out": result.left_out,
        "failed_images": [
            {"subject": subject, "resolution": resolution, "key": image.key, "why": image.status}
            for (subject, resolution), images in result.images.items()
            for image in images
            if image.status != OK
        ],
        "torch": torch.__version__,
    }


def _table(result: EvaluationResult) -> pa.Table:
    """Return a row an image, subject and resolution."""
    bits = {(score.subject, score.resolution): score.bits_per_pixel for score in result.scores}
    return pa.Table.from_pylist(
        [
            {"subject": place[0], "resolution": place[1], "bits_per_pixel": bits[place]}
            | flat(image)
            for place, images in result.images.items()
            for image in images
        ],
        schema=_IMAGE_SCHEMA,
    )


_IMAGE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("subject", "resolution", "key", "status")),
        *((name, pa.int32()) for name in ("height", "width", "num_tokens")),
        *((name, pa.float64()) for name in (*METRICS, "bits_per_pixel", "seconds", "peak_mb")),
    ]
)


def _draw_pictures(result: EvaluationResult, out: Path) -> None:
    (out / "pictures").mkdir(exist_ok=True)
    first = next((strips for strips in result.pictures.values() if strips), None)
    if first is not None:
        Image.fromarray(sheet_of(list(first.values()))).save(out / PICTURE)
    for (subject, resolution), strips in result.pictures.items():
        if strips:
            sheet = Image.fromarray(sheet_of(list(strips.values())))
            sheet.save(out / "pictures" / _picture_name(subject, resolution))


def _step_of(location: Folder, run: Folder) -> int:
    """Return the steps behind the weights: those of a checkpoint, or of the run's newest."""
    if location.exists(PROGRESS_FILE):
        return int(json.loads(location.read_bytes(PROGRESS_FILE))["cursor"]["step"])
    return next_step(run)


def _count(score: Scores) -> str:
    failed = f" ({score.num_failed} failed)" if score.num_failed else ""
    return f"{score.num_images:,}{failed}"


def _published(figures: PublishedFigures, name: str) -> float | None:
    return getattr(figures, name, None)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _picture_name(subject: str, resolution: str) -> str:
    return f"{_file_name(subject)}-{_file_name(resolution)}.png"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text).strip("_")
