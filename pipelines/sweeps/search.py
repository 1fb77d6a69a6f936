"""Which trial is next: their order, what optuna draws, what the cluster has room for."""

from typing import Any

import ray
from ray.tune.search import Searcher

from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.sweeps.config import Axis, SweepConfig, Trial, make_trial, number_text, trials_of
from pipelines.sweeps.records import ENDED, TrialRecord, read_records
from pipelines.tracking import TrackingConfig


class OptunaDraws:
    """Draws values with optuna, through Ray Tune's searcher.

    Args:
        records: of an earlier start, which it learns from.
    """

    def __init__(self, sweep: SweepConfig, records: list[TrialRecord]) -> None:
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch

        self._sweep = sweep
        self._axes = {axis.field: axis for axis in sweep.axes}
        told = [r for r in records if r.state in ENDED and sweep.metric in r.latest]
        space = {axis.field: _distribution(axis) for axis in sweep.axes}
        # A sweep that goes on draws from another seed: the same would draw the same values again.
        sampler = TPESampler(seed=sweep.seed + len(records))
        self._search = OptunaSearch(
            space=space,
            metric=sweep.metric,
            mode=sweep.mode,
            sampler=sampler,
            points_to_evaluate=[self._point(r.values) for r in told] or None,
            evaluated_rewards=[r.latest[sweep.metric] for r in told] or None,
        )

    def suggest(self, trial_id: str) -> dict[str, str] | None:
        """Return values for a trial, as text; None if there are none at the moment."""
        drawn = self._search.suggest(trial_id)
        if drawn is None:
            return None
        return {
            field: value if isinstance(value, str) else number_text(value)
            for field, value in drawn.items()
        }

    def tell(self, trial_id: str, score: float | None) -> None:
        """Say what came of a trial; None for one that did not come to its end."""
        result = None if score is None else {self._sweep.metric: score}
        self._search.on_trial_complete(trial_id, result, error=score is None)

    def _point(self, values: dict[str, str]) -> dict[str, Any]:
        return {
            field: value if self._axes[field].values else float(value)
            for field, value in values.items()
        }


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.values:
        return CategoricalDistribution(axis.values)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def draws_of(sweep: SweepConfig, records: list[TrialRecord]) -> OptunaDraws | None:
    """Return the search that draws a sweep's trials, None where they are known before.

    Raises:
        ImportError: optuna is not installed.
    """
    if sweep.search != "optuna":
        return None
    try:
        return OptunaDraws(sweep, records)
    except ImportError as error:
        raise ImportError(
            "search='optuna' needs optuna; `pip install -c constraints.txt -e .[sweep]`, or set "
            "search to random"
        ) from error


class Trials(Searcher):
    """Hands Ray Tune the trials that are left, each as soon as the cluster has room for it.

    A trial's workers and the core that reads for them are not among the resources that Ray Tune
    reserves for it, so this counts them: large and small trials share the cluster.

    Args:
        tracking: of the trials.
    """

    def __init__(self, sweep: SweepConfig, tracking: TrackingConfig) -> None:
        super().__init__()
        self.sweep = sweep
        self.tracking = tracking
        self.records = read_records(sweep.folder)
        self.known = trials_of(sweep)
        self._draws = draws_of(sweep, list(self.records.values()))
        if self._draws:
            self.known = [make_trial(sweep, record.values) for record in self.records.values()]
        self.waiting = [t for t in self.known if not self._has_ended(t)]
        ended = len(self.known) - len(self.waiting)
        drawn = sweep.num_trials - len(self.known) if self._draws else 0
        self._to_draw = max(0, drawn)
        self.total = len(self.waiting) + self._to_draw
        self.ended = ended
        self._running: dict[str, Trial] = {}
        self._assigned: dict[str, Trial] = {}
        self._drawn: dict[str, str] = {}
        for trial in self.waiting:
            self._check_room(trial)

    @property
    def is_done(self) -> bool:
        """Whether no trial is left."""
        return not (self.waiting or self._running or self._to_draw)

    @property
    def running(self) -> list[Trial]:
        """The trials that Ray Tune works at."""
        return list(self._running.values())

    def trial(self, trial_id: str) -> Trial:
        """Return the trial that Ray Tune knows by an id."""
        return self._assigned[trial_id]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial that fits; None while none does; FINISHED at the end."""
        limit = self.sweep.max_concurrent
        if limit and len(self._running) >= limit:
            return None
        if not self.waiting and self._to_draw and self._draws:
            values = self._draws.suggest(trial_id)
            if values is None:
                return None
            trial = make_trial(self.sweep, values)
            self._to_draw -= 1
            if trial.name in self.records:  # drawn a second time
                self.total -= 1
                known = self.records[trial.name].latest
                self._draws.tell(trial_id, known.get(self.sweep.metric))
                return None
            self._drawn[trial.name] = trial_id
            self.waiting.append(trial)
        for trial in self.waiting:
            if self._fits(trial):
                self.waiting.remove(trial)
                self._running[trial_id] = self._assigned[trial_id] = trial
                return {"trial": trial.name, "values": trial.values}
        return None if self.waiting or self._running or self._to_draw else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Make room, and let a search learn from the result."""
        trial = self._running.pop(trial_id, None)
        if trial is None:
            return
        self.ended += 1
        if self._draws and trial.name in self._drawn:
            metrics = self.records[trial.name].latest if trial.name in self.records else {}
            self._draws.tell(self._drawn[trial.name], metrics.get(self.sweep.metric))

    def _has_ended(self, trial: Trial) -> bool:
        record = self.records.get(trial.name)
        return record is not None and record.state in ENDED

    def _fits(self, trial: Trial) -> bool:
        """Whether a trial fits beside those that run; the only one always does."""
        if not self._running:
            return True
        offered = ray.cluster_resources()
        needs = [_needs(t.settings) for t in (trial, *self._running.values())]
        return all(
            sum(need[name] for need in needs) <= offered.get(name, 0) for name in ("CPU", "GPU")
        )

    def _check_room(self, trial: Trial) -> None:
        """Refuse a trial that the whole cluster cannot hold, before any other is begun."""
        offered = ray.cluster_resources()
        for name, asked in _needs(trial.settings, fewest=True).items():
            if asked > offered.get(name, 0):
                raise RuntimeError(
                    f"trial {trial.name} asks for {asked:g} {name}s, the cluster has "
                    f"{offered.get(name, 0):g}; lower base.run.num_workers or "
                    "base.run.cpus_per_worker, or set base.run.use_gpu to False"
                )


def _needs(settings: AutoencoderTraining, *, fewest: bool = False) -> dict[str, float]:
    """Return the resources that a trial takes: its workers, and one core that reads for them."""
    run = settings.run
    num_workers = run.min_workers or run.num_workers if fewest else run.num_workers
    return {
        "CPU": num_workers * run.cpus_per_worker + 1,
        "GPU": float(num_workers * run.use_gpu),
    }
