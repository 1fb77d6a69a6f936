"""What a sweep tries: its config, and the trainings that follow from it."""

import difflib
import itertools
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.evaluation.config import EvaluationConfig
from pipelines.sweeps.costs import memory_of, work_of
from vitok.config import config, flatten, parse_config, require_choice, to_dict
from vitok.storage import Folder
from vitok.variants import AutoencoderConfig

Search = Literal["grid", "random", "optuna"]
Scheduler = Literal["none", "asha", "pbt"]
Progress = Literal["images", "flops"]
Mode = Literal["max", "min"]

# A name of a whole model sets these fields of `model` alone; the others stay the base's.
_NAMED_BY_MODEL = (
    "patch_size",
    "latent_channels",
    *(f"{part}_{of}" for part in ("encoder", "decoder") for of in ("width", "depth", "heads")),
)
_MAX_NAME = 100
_MEMORY_SHARE = 0.9  # the plan of a worker's memory does not count everything
_DIGITS = 4  # of a number that is drawn: its text is its value
# What an evaluation adds to the metrics of a training, and the network that it takes.
EVALUATED = {"eval_rfid": "inception", "eval_rfdd": "dino"}
# Fields of an evaluation that no figure depends on, or that a sweep sets itself.
_FREE_OF_EVALUATION = (
    "subjects",
    "out",
    "timeout_s",
    "num_workers",
    "cpus_per_worker",
    "use_gpu",
    "num_pictures",
    "benchmark",
    "json",
)


@config
class Axis:
    """A field that differs between trials.

    Attributes:
        field: of the training's config, as on the command line of `vitok train`: `optim.lr`; or
            `model`, whose values are names of models.
        values: what it takes, written as on the command line.
        low: instead of values, for random and optuna search, the least number.
        high: and the greatest.
        log: numbers are drawn evenly on a logarithmic scale.
    """

    field: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def __post_init__(self) -> None:
        if bool(self.values) == (self.low < self.high):
            raise ValueError(
                f"axis {self.field}: give either values={self.values} or a range with "
                f"low={self.low} below high={self.high}"
            )
        if self.log and not self.values and self.low <= 0:
            raise ValueError(f"axis {self.field}: low={self.low} must be positive with log")


@config
class SweepConfig:
    """A study: trainings that differ in some fields, compared with each other.

    Attributes:
        name: the same name continues the same sweep; its trials are runs in the folder of this
            name, below base.run.storage.
        base: the training that all trials are made from.
        axes: fields and what they take; every combination is a trial (grid), or num_trials are
            drawn (random, optuna).
        points: trials one by one instead, each as `FIELD=VALUE FIELD=VALUE`.
        search: how trials are chosen; optuna learns from those that are finished.
        num_trials: that random and optuna search make.
        seed: of what is drawn.
        metric: by which trials are judged: a metric of the training, such as eval_psnr or loss.
        mode: whether more or less of it is better.
        progress: what makes trials comparable: with `images` all see the same images; with `flops`
            their steps are set so that all do the work of the base. ASHA's rungs are in the same
            unit.
        scheduler: none, or asha, which stops the worse trials early. (pbt is refused: see there.)
        first_rung: the share of a trial after which asha stops trials for the first time.
        reduction: of so many trials asha lets one go on, and its rungs are so far apart.
        max_concurrent: trials at the same time; 0 for as many as the cluster has room for.
        max_failures: restarts of a trial whose own process was lost, with its node for instance.
        worker_memory_gb: memory of one worker's device; a trial takes twice, four times ... the
            base's workers until it fits. 0 leaves their number alone.
        max_hours: that a trial may take at worker_flops; a longer one takes more workers too, as
            far as max_workers. 0 for any.
        max_workers: that a trial may take so.
        worker_flops: operations that a worker does in a second, to estimate hours.
        latency: measure the time of reconstructing an image of 256 x 256 at the end of a trial.
        evaluation: of the finished trials, when all have ended, as `vitok evaluate` does it; off
            without networks. Its subjects are the trials; without data it takes the held-out
            images of the base. rFID and rFDD come into the report, everything into its folder
            `evaluation`.
        dry_run: print what it would take, and start nothing.
    """

    name: str
    base: AutoencoderTraining
    axes: tuple[Axis, ...] = ()
    points: tuple[str, ...] = ()
    search: Search = "grid"
    num_trials: int = 0
    seed: int = 0
    metric: str = "eval_psnr"
    mode: Mode = "max"
    progress: Progress = "images"
    scheduler: Scheduler = "none"
    first_rung: float = 0.125
    reduction: float = 2.0
    max_concurrent: int = 0
    max_failures: int = 3
    worker_memory_gb: float = 0.0
    max_hours: float = 0.0
    max_workers: int = 64
    worker_flops: float = 1e14
    latency: bool = True
    evaluation: EvaluationConfig = EvaluationConfig(square=(256,))
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain name: it becomes a folder")
        for field, choices in (("search", Search), ("scheduler", Scheduler), ("mode", Mode)):
            require_choice(field, getattr(self, field), choices)
        require_choice("progress", self.progress, Progress)
        if self.scheduler == "pbt":
            raise ValueError(
                "scheduler='pbt': population-based training copies weights from one trial to "
                "another and changes their config on the way, so that no trial is the run of one "
                "config: it could neither be resumed nor compared at equal work; use asha or none"
            )
        if bool(self.axes) == bool(self.points):
            raise ValueError("give either axes or points: they say what the trials are")
        if self.points and self.search != "grid":
            raise ValueError(f"search={self.search!r} draws from axes; give axes instead of points")
        if self.search != "grid" and self.num_trials < 1:
            raise ValueError(
                f"search={self.search!r} needs num_trials={self.num_trials} to be at least 1"
            )
        ranges = [axis.field for axis in self.axes if not axis.values]
        if ranges and self.search == "grid":
            raise ValueError(
                f"a grid needs values, but {', '.join(ranges)} has a range; set search to random"
            )
        if not 0 < self.first_rung < 1 or self.reduction <= 1:
            raise ValueError(
                f"first_rung={self.first_rung} must be a share between 0 and 1, and "
                f"reduction={self.reduction} above 1"
            )
        run = self.base.run
        if (
            self.scheduler == "asha"
            and self.metric.startswith("eval_")
            and run.checkpoint_every % run.evaluate_every
        ):
            raise ValueError(
                f"asha judges at checkpoints: base.run.checkpoint_every={run.checkpoint_every} "
                f"must be a multiple of base.run.evaluate_every={run.evaluate_every}, or "
                f"{self.metric} is not known there"
            )
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        evaluation = self.evaluation
        if evaluation.subjects:
            raise ValueError(
                f"evaluation.subjects={evaluation.subjects} must be empty: they are the trials; "
                "others are for `vitok evaluate`"
            )
        resolutions = [transform.name for transform in evaluation.transforms()]
        if len(resolutions) > 1:
            raise ValueError(
                f"evaluation has the resolutions {', '.join(resolutions)}; trials are compared at "
                "one: empty the others, as in --evaluation.square"
            )
        if self.is_evaluated and not (evaluation.data or self.base.data.eval_manifest):
            raise ValueError(
                "evaluation has networks and no images; set evaluation.data or "
                "base.data.eval_manifest"
            )
        if network := EVALUATED.get(self.metric):
            if not getattr(evaluation.networks, network):
                raise ValueError(
                    f"metric={self.metric!r} comes from an evaluation; set "
                    f"evaluation.networks.{network}"
                )
            if self.scheduler == "asha" or self.search == "optuna":
                raise ValueError(
                    f"metric={self.metric!r} is not known before all trials have ended: asha and "
                    "optuna cannot go by it; take eval_psnr, or grid and random search"
                )

    @property
    def is_evaluated(self) -> bool:
        """Whether finished trials are evaluated."""
        networks = self.evaluation.networks
        return bool(networks.inception or networks.dino)

    @property
    def folder(self) -> Folder:
        """The sweep's folder: its config, its records, its report, its trials."""
        return Folder.of(self.base.run.storage, self.name)


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    Attributes:
        name: of its run; follows from the values.
        values: the fields in which it differs from the base, and what they are, as text.
        settings: the training.
    """

    name: str
    values: dict[str, str]
    settings: AutoencoderTraining


def trials_of(sweep: SweepConfig) -> list[Trial]:
    """Return the trials that are known before a sweep starts: none of an optuna search.

    Raises:
        ValueError: a value is none of its field; two trials are the same; a trial does not fit.
    """
    if sweep.points:
        chosen = [parse_point(point) for point in sweep.points]
    elif sweep.search == "grid":
        names = [axis.field for axis in sweep.axes]
        product = itertools.product(*(axis.values for axis in sweep.axes))
        chosen = [dict(zip(names, values, strict=True)) for values in product]
    elif sweep.search == "random":
        rng = random.Random(sweep.seed)
        chosen = []
        # Values without a range may all have been drawn.
        for _ in range(100 * sweep.num_trials):
            if len(chosen) == sweep.num_trials:
                break
            drawn = {axis.field: _draw(axis, rng) for axis in sweep.axes}
            if drawn not in chosen:
                chosen.append(drawn)
    else:
        return []
    trials = [make_trial(sweep, values) for values in chosen]
    names = [trial.name for trial in trials]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"there is more than one trial {', '.join(sorted(twice))}; leave one out")
    return trials


def make_trial(sweep: SweepConfig, values: dict[str, str]) -> Trial:
    """Return the trial of a sweep with these values.

    Raises:
        ValueError: a value is none of its field; the training does not fit into the memory.
    """
    name = trial_name(values)
    base = sweep.base
    fields = to_dict(base)
    # Single fields of a model win over its name.
    for field in sorted(values, key=lambda field: field != "model"):
        _set(fields, field, values[field])
    settings = parse_config(AutoencoderTraining, fields, f"trial {name}")
    if sweep.progress == "flops":
        share = work_of(base).flops / work_of(settings).flops
        stages = tuple(
            replace(stage, steps=max(1, round(stage.steps * share))) for stage in settings.stages
        )
        settings = replace(settings, stages=stages)
    run = replace(
        settings.run,
        name=name,
        storage=sweep.folder.uri,
        num_workers=_workers(sweep, settings, name),
    )
    return Trial(name, values, replace(settings, run=run))


def _workers(sweep: SweepConfig, settings: AutoencoderTraining, name: str) -> int:
    """Return the fewest workers on which a training fits, and is short enough if that can be."""
    num_workers = settings.run.num_workers
    room = _MEMORY_SHARE * sweep.worker_memory_gb * 1e9
    while room and (memory := memory_of(settings, num_workers)).total > room:
        num_workers *= 2
        if num_workers > sweep.max_workers:
            raise ValueError(
                f"trial {name} takes {memory.total / 1e9:.0f} GB on each of {num_workers // 2} "
                f"workers, {memory.activations / 1e9:.0f} of it activations, more than "
                f"{_MEMORY_SHARE:.0%} of worker_memory_gb={sweep.worker_memory_gb:g}; set "
                "base.run.parallel.checkpoint_every or lower base.data.row_tokens, or raise "
                f"max_workers={sweep.max_workers}"
            )
    worker_hours = work_of(settings).flops / sweep.worker_flops / 3600
    while sweep.max_hours and worker_hours / num_workers > sweep.max_hours:
        if 2 * num_workers > sweep.max_workers:
            break
        num_workers *= 2
    return num_workers


def rungs_of(sweep: SweepConfig, trials: Iterable[Trial]) -> tuple[float, float]:
    """Return the first rung of asha, and where rungs end: before the shortest trial does."""
    trainings = [trial.settings for trial in trials] or [sweep.base]
    shortest = min(getattr(work_of(training), sweep.progress) for training in trainings)
    # A trial that ends is not judged: there is nothing left to save.
    return sweep.first_rung * shortest, 0.95 * shortest


def trial_name(values: dict[str, str]) -> str:
    """Return the name of the run with these values: the same values have the same name."""
    parts = []
    for field, value in values.items():
        last = field.rpartition(".")[2]
        shared = sum(other.rpartition(".")[2] == last for other in values) > 1
        label = "" if field == "model" else f"{field if shared else last}_"
        parts.append(re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{label}{value}").strip("_"))
    name = "-".join(parts)
    if len(name) <= _MAX_NAME:
        return name
    number = random.Random(name).getrandbits(32)  # the same for the same text
    return f"{name[: _MAX_NAME - 9]}-{number:08x}"


def number_text(value: float) -> str:
    """Return a drawn number as text, rounded to what stands there."""
    return f"{value:.{_DIGITS}g}"


def _draw(axis: Axis, rng: random.Random) -> str:
    if axis.values:
        return rng.choice(axis.values)
    if axis.log:
        return number_text(math.exp(rng.uniform(math.log(axis.low), math.log(axis.high))))
    return number_text(rng.uniform(axis.low, axis.high))


def parse_point(text: str) -> dict[str, str]:
    """Read `FIELD=VALUE FIELD=VALUE`.

    Raises:
        ValueError: it has another form.
    """
    values: dict[str, str] = {}
    for word in text.split():
        field, equals, value = word.partition("=")
        if not (field and equals and value):
            raise ValueError(f"point {text!r}: {word!r} is no FIELD=VALUE")
        values[field] = value
    if not values:
        raise ValueError("a point is empty; write it as FIELD=VALUE FIELD=VALUE")
    return values


def _set(fields: dict[str, Any], name: str, text: str) -> None:
    """Set a field of a config, given as JSON types, to a value as the command line has it."""
    if name == "model":
        model = to_dict(AutoencoderConfig.from_name(text))
        fields["model"] |= {field: model[field] for field in _NAMED_BY_MODEL}
        return
    set_field(fields, name, text)


def set_field(fields: dict[str, Any], name: str, text: str) -> None:
    """Set a field of a training, given as JSON types, to a value as the command line has it.

    Raises:
        ValueError: there is no such field; says which is near.
    """
    node: Any = fields
    *groups, last = name.split(".")
    try:
        for group in groups:
            node = node[int(group)] if isinstance(node, list) else node[group]
        key: Any = int(last) if isinstance(node, list) else last
        before = node[key]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        near = difflib.get_close_matches(name, flatten(fields), n=1)
        hint = f"did you mean {near[0]}?" if near else "its recipe's --help shows all"
        raise ValueError(f"a training has no field {name!r}; {hint}") from error
    if isinstance(before, dict):
        raise ValueError(f"{name!r} is a group of fields; name one of {', '.join(before)}")
    node[key] = json.loads(text) if isinstance(before, list) else text


def same_study(before: SweepConfig, after: SweepConfig, *, is_evaluated: bool = False) -> list[str]:
    """List what makes trials of two configs of a sweep incomparable, as `name: old -> new`.

    Args:
        is_evaluated: there are figures of an evaluation, which others have to be compared with.
    """
    old, new = flatten(before), flatten(after)
    fixed = ("base.", "metric", "mode", "progress", *(("evaluation.",) if is_evaluated else ()))
    free = ("base.run.", *(f"evaluation.{name}" for name in _FREE_OF_EVALUATION))
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name.startswith(fixed) and not name.startswith(free) and old.get(name) != new.get(name)
    ]
