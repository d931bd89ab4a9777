"""The jobs of a command, one or those of a sweep (``-m``): each is composed and checked once, before any starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kncompress.cli.elsewhere import launcher_elsewhere
from kncompress.cli.engine import Engine
from kncompress.cli.resume import OWN, not_own
from kncompress.cli.typed_config import check_homes, typed
from kncompress.cli.verbs import Verb
from kncompress.config import ModelRunConfig, RunConfig
from kncompress.errors import UserError
from kncompress.hub import check_model
from kncompress.runs.process import checking_for


class SweepErrors(UserError):
    """Several jobs are wrong; ``lines`` has one line for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


@dataclass
class ReadyJob:
    """A job that is composed and typed, and may be checked."""

    composed: DictConfig
    """Hydra's config, the node ``hydra`` included."""
    config: RunConfig
    is_checked: bool = False
    found: Any = None
    """What the verb's ``check`` returned, for its ``run``."""

    @classmethod
    def of(cls, verb: Verb, composed: DictConfig) -> "ReadyJob":
        """The job that ``composed`` describes, by the verb's schema. Raises UserError."""
        config = typed(verb.config, composed, choices_of(composed))
        check_homes(config, verb.texts)
        return cls(composed, config)

    def check(self, verb: Verb) -> None:
        """Ask the verb's ``check``, once. Raises UserError."""
        if not self.is_checked:
            self.found = verb.check(self.config)
            self.is_checked = True


def check_jobs(verb: Verb, jobs: Sequence[ReadyJob]) -> None:
    """Check every job. Raises UserError: SweepErrors with one line for each wrong job where there are several jobs."""
    # A model that cannot be had is answered before the verb's module, which takes seconds to import.
    _each(_check_model, jobs)
    _each(lambda job: job.check(verb), jobs)


def _check_model(job: ReadyJob) -> None:
    if isinstance(job.config, ModelRunConfig) and not job.is_checked:
        check_model(job.config.model.path, job.config.model.gguf_file)


def _each(do: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    done, wrong = [], {}
    for number, job in enumerate(jobs):
        try:
            done.append(do(job))
        except UserError as error:
            wrong[number] = error
    if wrong and len(jobs) == 1:
        raise next(iter(wrong.values()))
    if wrong:
        raise SweepErrors([f"job {number}: {error}" for number, error in wrong.items()])
    return done


@dataclass
class SweepJobs:
    """The jobs of a sweep by their overrides, each composed and checked once."""

    engine: Engine
    verb: Verb
    own: list[str]
    """Overrides of Hydra's own settings."""
    _known: dict[tuple[str, ...], ReadyJob] = field(default_factory=dict)

    def ready(self, jobs: Sequence[Sequence[str]], checks: bool = True) -> list[ReadyJob]:
        """The jobs with these overrides; with ``checks`` the verb has checked them. Raises as ``check_jobs``."""
        found = _each(self._job, jobs)
        if checks:
            with checking_for(launcher_elsewhere(found[0].composed) if found else None):
                check_jobs(self.verb, found)
        return found

    def _job(self, words: Sequence[str]) -> ReadyJob:
        key = tuple(not_own(words))
        if key not in self._known:
            self._known[key] = ReadyJob.of(self.verb, self.engine.compose([*self.own, *words]))
        return self._known[key]

    def alone(self, words: Sequence[str]) -> ReadyJob | None:
        """A checked job as if it had been asked for without the keys of ``OWN``; None where it is not checked."""
        job = self._known.get(tuple(not_own(words)))
        if job is None or not job.is_checked:
            return None
        defaults = {item.name: item.default for item in fields(job.config)}
        OmegaConf.set_struct(job.composed, False)
        given = {word.lstrip("+").partition("=")[0] for word in job.composed.hydra.overrides.task}
        for name in given.intersection(OWN):
            job.composed.pop(name, None)
            setattr(job.config, name, defaults[name])
        job.composed.hydra.overrides.task = list(words)
        return job


def listed_jobs(engine: Engine, composed: DictConfig, overrides: list[str]) -> list[list[str]] | None:
    """The overrides of each job, by Hydra's own sweeper; None for a sweeper that chooses as it goes.

    Raises UserError where a key has no values, or some that this sweeper cannot count up.
    """
    if not engine.lists_jobs(composed):
        return None
    parsed = engine.parse([override for override in overrides if not override.lstrip("+~").startswith("hydra")])
    swept = ", ".join((override.input_line or "").lstrip("+") for override in parsed if override.is_sweep_override())
    try:
        jobs = engine.jobs(parsed)
    except ValueError as error:  # interval(...)
        raise UserError(f"{swept}: {error}; give values, or hydra/sweeper=pareto") from None
    if not jobs:
        raise UserError(f"{swept}: a key has no values; a range goes from its start up to its stop, range(1,5)")
    return jobs


def choices_of(node: DictConfig) -> dict[str, object]:
    """``{group: preset}`` that Hydra chose."""
    choices = OmegaConf.to_container(node.hydra.runtime.choices)
    assert isinstance(choices, dict)
    return {str(group): option for group, option in choices.items() if not str(group).startswith("hydra/")}
