"""``sweep=optuna_shapes``: a search that minimises several metrics at once and keeps a Pareto front, on Optuna.

hydra-optuna-sweeper is not used: it needs Optuna 2, which fails on SQLAlchemy 2 and so cannot resume a study. The
study is ``study.db`` (sqlite) in the sweep's folder; its trials tell their job in the attribute ``job``.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kncompress.cli.engine import Engine
from kncompress.cli.launcher import Launcher
from kncompress.cli.sweep_folder import result_of
from kncompress.errors import UserError
from kncompress.terminal import named_line

TARGET = f"{__name__}.Search"
STUDY = "study.db"
_ASKED = 20
"""The search ends after so many trials in a row without a new job: then the space is small, or exhausted."""

_CHECKED = 16
"""Ranges of at most so many values have every value checked before the search starts."""
_TRIED = 6
"""Most jobs checked for one value until one is valid, since a value may be wrong only beside some others."""


def is_search(composed: DictConfig) -> bool:
    """Whether the composed sweeper is this search."""
    return bool(composed.hydra.sweeper._target_ == TARGET)


@dataclass
class Search:
    """What is searched and for how long: ``conf/hydra/sweeper/pareto.yaml``."""

    metrics: list[str]
    """Names in ``result.json``, all minimised."""
    jobs: int
    parallel: int
    seed: int
    fixed: list[str]
    space: dict[str, Any]
    """``{key in Hydra's grammar: its override}``."""

    @classmethod
    def of(cls, engine: Engine, composed: DictConfig, overrides: Sequence[str]) -> "Search":
        """Read the settings and split ``overrides`` into fixed ones and those that are searched.

        Raises UserError where Optuna is not installed, nothing is searched, or a setting is wrong.
        """
        if importlib.util.find_spec("optuna") is None:
            raise UserError("hydra/sweeper=pareto: needs optuna: pip install 'kncompress[sweeps]'")
        settings = composed.hydra.sweeper
        for name in ("jobs", "parallel"):
            if type(settings[name]) is not int or settings[name] < 1:
                raise UserError(f"hydra.sweeper.{name}={settings[name]}: must be a whole number from 1")
        if type(settings.seed) is not int or settings.seed < 0:
            raise UserError(f"hydra.sweeper.seed={settings.seed}: must be a whole number from 0")
        metrics = OmegaConf.to_container(settings.metrics) if OmegaConf.is_list(settings.metrics) else None
        if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
            raise UserError(f"hydra.sweeper.metrics={settings.metrics}: must be a list of names in result.json")
        last = {override.get_key_element(): override for override in engine.parse(overrides)}
        fixed = [
            f"{key}={override.get_value_element_as_str()}" for key, override in last.items()
            if not override.is_sweep_override()
        ]  # fmt: skip
        space = {key: override for key, override in last.items() if override.is_sweep_override()}
        if not space:
            raise UserError("hydra/sweeper=pareto: nothing to search; give a key several values, key=1,2 or range(1,9)")
        for override in space.values():
            try:
                _distribution(override)
            except ValueError as error:
                raise UserError(f"{str(override.input_line).lstrip('+')}: cannot be searched: {error}") from None
        return cls([str(name) for name in metrics], settings.jobs, settings.parallel, settings.seed, fixed, space)

    def first(self) -> list[str]:
        """A job with the first value of every key, to be checked before anything is written."""
        low = {key: d.choices[0] if hasattr(d, "choices") else d.low for key, d in self._distributions().items()}
        return self._overrides(low)

    def others(self) -> Iterator[list[list[str]]]:
        """For every further value of every key jobs that have it, the rest at their first values, then at others.

        Of a long range and of an interval the last value alone: what divides a number cannot be told from its ends.
        """
        values = {key: _values_of(distribution) for key, distribution in self._distributions().items()}
        first = {key: found[0] for key, found in values.items()}
        for key, found in values.items():
            for value in found[1:]:
                rest = [{k: v[min(n, len(v) - 1)] for k, v in values.items()} for n in range(1, _TRIED)]
                jobs = [self._overrides(params | {key: value}) for params in (first, *rest)]
                yield [job for n, job in enumerate(jobs) if job not in jobs[:n]]

    def run(self, launcher: Launcher) -> None:
        """Go on until the sweep has ``jobs`` jobs, or the space has no new one.

        Raises UserError as soon as a finished job lacks what is to be minimised: no other would have it.
        """
        study = self._study(launcher.folder)
        left = [n for n in range(len(launcher.sweep.jobs)) if not self._told(study, launcher.folder, n)]
        for number in left:
            launcher.run([number])
            self._tell(study, launcher.folder, number)
            self._require_metrics(launcher.folder, number)
            if launcher.stopped:
                return
        while batch := self._batch(study, launcher):
            launcher.run(batch)
            for number in batch:
                self._tell(study, launcher.folder, number)
                self._require_metrics(launcher.folder, number)
            if launcher.stopped:
                return

    def _batch(self, study: Any, launcher: Launcher) -> list[int]:
        """Up to ``parallel`` new jobs; none where there are enough or the space is exhausted.

        Values that do not go together (say three terms of two numbers) are no job: they are told, and recorded in the
        study.
        """
        import optuna

        batch: list[int] = []
        asked = 0
        while len(batch) < self.parallel and len(launcher.sweep.jobs) < self.jobs and asked < _ASKED:
            asked += 1
            trial = study.ask(self._distributions())
            overrides = self._overrides(trial.params)
            if (again := launcher.find(overrides)) is not None:  # known already: nothing runs
                values = self._values(launcher.folder, again)
                state = None if values else optuna.trial.TrialState.FAIL
                study.tell(trial, values, state=state)
                continue
            try:
                launcher.check(overrides)
            except UserError as error:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                words = " ".join(f"{key.lstrip('+')}={trial.params[key]}" for key in self.space)
                print(f"no job: {words}: {error}", file=sys.stderr, flush=True)
                continue
            batch.append(launcher.add(overrides))
            trial.set_user_attr("job", batch[-1])
        return batch

    def _study(self, folder: Path) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = folder / STUDY
        new = not file.exists()
        try:
            study = optuna.create_study(
                storage=optuna.storages.RDBStorage(f"sqlite:///{file}"),
                study_name="shapes",
                directions=["minimize"] * len(self.metrics),
                load_if_exists=True,
            )
            trials = study.trials
        except Exception as error:  # sqlite's, SQLAlchemy's and Optuna's own, and what a flipped bit makes of a value
            if new:
                raise
            raise UserError(f"run_dir={folder}: {STUDY} is damaged ({named_line(error)}); delete it") from None
        # A resumed sampler must not repeat its first proposals.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(trials), n_startup_trials=8)
        return study

    def _tell(self, study: Any, folder: Path, number: int) -> None:
        """Tell the study how job ``number`` ended. One that failed before and now has not is a trial of its own."""
        import optuna

        state = optuna.trial.TrialState
        values = self._values(folder, number)
        trials = [trial for trial in study.trials if trial.user_attrs.get("job") == number]
        for trial in trials:
            if trial.state == state.RUNNING:
                study.tell(trial.number, values, state=None if values else state.FAIL)
                return
        if values and trials and not any(trial.state == state.COMPLETE for trial in trials):
            known = trials[-1]
            study.add_trial(
                optuna.trial.create_trial(
                    values=values, params=known.params, distributions=known.distributions, user_attrs={"job": number}
                )
            )

    def _require_metrics(self, folder: Path, number: int) -> None:
        result = result_of(folder / str(number))
        found = result.get("metrics") or {}
        missing = [name for name in self.metrics if name not in found]
        if result.get("status") == "finished" and missing:
            raise UserError(
                f"hydra.sweeper.metrics=[{','.join(self.metrics)}]: job {number} has no {', '.join(missing)}; "
                f"it has {', '.join(found) or 'none'}"
            )

    def _told(self, study: Any, folder: Path, number: int) -> bool:
        """Whether job ``number`` has finished and the study knows it."""
        from optuna.trial import TrialState

        done = [t for t in study.trials if t.user_attrs.get("job") == number and t.state == TrialState.COMPLETE]
        return bool(done) and result_of(folder / str(number)).get("status") == "finished"

    def _values(self, folder: Path, number: int) -> list[float] | None:
        result = result_of(folder / str(number))
        found = [(result.get("metrics") or {}).get(name) for name in self.metrics]
        finished = result.get("status") == "finished" and all(isinstance(value, int | float) for value in found)
        return [float(value) for value in found if value is not None] if finished else None

    def _distributions(self) -> dict[str, Any]:
        return {key: _distribution(override) for key, override in self.space.items()}

    def _overrides(self, params: dict[str, Any]) -> list[str]:
        return [*self.fixed, *(f"{key}={params[key]}" for key in self.space)]


def _values_of(distribution: Any) -> list[Any]:
    if hasattr(distribution, "choices"):
        return list(distribution.choices)
    low, high = distribution.low, distribution.high
    if isinstance(low, int) and (high - low) // distribution.step < _CHECKED:
        return list(range(low, high + 1, distribution.step))
    return list(dict.fromkeys((low, high)))


def _distribution(override: Any) -> Any:
    """``range(a,b)`` of whole numbers and ``interval(a,b)`` are ordered, everything else is a set of choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if override.is_interval_sweep():
        value = override.value()
        return FloatDistribution(float(value.start), float(value.end), log="log" in value.tags)
    if override.is_range_sweep():
        value = override.value()
        if all(isinstance(part, int) for part in (value.start, value.stop, value.step)) and value.step > 0:
            numbers = range(value.start, value.stop, value.step)
            if not numbers:
                raise ValueError("a range goes from its start up to its stop, range(1,5)")
            return IntDistribution(numbers[0], numbers[-1], step=value.step)
    return CategoricalDistribution([str(text) for text in override.sweep_string_iterator()])
