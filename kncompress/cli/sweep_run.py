"""A sweep from its words to its table: its jobs checked, its folder found or made, what is missing launched."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from kncompress.cli.job import FAILED, Interrupted, Job
from kncompress.cli.overrides import Line, quoted, to_hydra
from kncompress.cli.pareto_search import Search, is_search
from kncompress.cli.presets import References, defaults_of
from kncompress.cli.sweep_folder import (
    FILE,
    Sweep,
    changed_job,
    find_sweep,
    held,
    launched,
    missing,
    not_own,
    read_sweep,
    result_of,
)
from kncompress.cli.sweep_jobs import SweepErrors, choices_of, expand, validated
from kncompress.cli.sweep_table import sweep_rows, sweep_table, write_sweep_table
from kncompress.errors import UserError
from kncompress.runs import run_folder
from kncompress.runs.whole_file import write_text

OUR_SETTINGS = ["hydra.job.chdir=false", "hydra/hydra_logging=none"]


def is_hydras(override: str) -> bool:
    """Whether an override is Hydra's own, such as its launcher."""
    return override.lstrip("+").startswith(("hydra.", "hydra/"))


def run_sweep(hydra: Hydra, job: Job, line: Line, composed: DictConfig, overrides: list[str], fresh: bool) -> int:
    """Run the sweep that ``composed`` and ``overrides`` describe, or what is missing of it; returns the exit code.

    Args:
        fresh: begin anew even where there is a folder of the same sweep.

    Raises UserError before anything is written.
    """
    verb = job.verb
    own = [override for override in overrides if is_hydras(override)]
    params = dict(composed.hydra.sweeper.get("params") or {})
    if params:  # written in a preset: the same as words of the command line, which win
        words = [f"{key}={value}" for key, value in params.items()]
        overrides = to_hydra(words, defaults_of(verb.name), References(job.spoken), multirun=True) + overrides
        own.append("hydra.sweeper.params=null")
        overrides.append("hydra.sweeper.params=null")
    task = [override for override in overrides if not is_hydras(override)]
    search = Search.of(hydra, composed, task) if is_search(composed) else None
    jobs = [search.first()] if search else expand(hydra, composed, overrides)
    if len({word for words in jobs or () for word in words if word.startswith("++run_dir=")}) > 1 or (
        search and "++run_dir" in search.space
    ):
        raise UserError("run_dir: the jobs of a sweep share one folder; give run_dir one value")
    configs, nodes = validated(hydra, verb, verb.name, jobs if jobs is not None else [[]], own, checks=not line.show)
    if line.show:
        print("---\n".join(OmegaConf.to_yaml(OmegaConf.structured(config)) for config in configs), end="")
        return 0
    if search:
        _check_space(hydra, job, search, own)
    name = run_folder.default_name(verb.name, [choices_of(node) for node in nodes])
    job = replace(job, fail_fast=configs[0].fail_fast)
    if jobs is None:
        folder = run_folder.take(configs[0].run_dir, name)
        return _by_other_sweeper(hydra, replace(job, sweep_dir=folder), [*own, *task])
    sweep = Sweep(verb.name, not_own(line.words), not_own(task), search.metrics if search else [])
    if search is None:
        sweep.jobs = [not_own(words) for words in jobs]
        sweep.job_words = [job.words(words) for words in sweep.jobs]

    def begun_configs(found: Path) -> Sequence[Any]:
        """Of the jobs that a search has had so far, as they are composed today."""
        begun = read_sweep(found)
        return validated(hydra, verb, verb.name, begun.jobs if begun else [], own, checks=False)[0]

    with _folder(job, configs, begun_configs, name, sweep, fresh) as folder:
        (folder / FAILED).unlink(missing_ok=True)
        launcher = Launcher(hydra, replace(job, sweep_dir=folder), folder, sweep, own)
        try:
            code = 0
            if search:
                search.run(launcher)
            else:
                launcher.run(range(len(sweep.jobs)))
        except Interrupted as interrupted:
            code = interrupted.code
        write_sweep_table(folder)
    print(f"{sweep_table(folder)}\n{folder / 'sweep.csv'}", flush=True)
    return code or _exit_code(folder)


def _check_space(hydra: Hydra, job: Job, search: Search, own: list[str]) -> None:
    """Raises UserError, a line each, for values of the space with which no job is valid that has been tried."""
    wrong: dict[str, None] = {}
    for jobs in search.others():
        errors = []
        for words in jobs:
            try:
                validated(hydra, job.verb, job.verb.name, [words], own)
                break
            except UserError as error:
                errors.append(str(error))
        else:
            wrong[errors[0]] = None
    if wrong:
        raise SweepErrors(list(wrong))


@contextlib.contextmanager
def _folder(
    job: Job,
    configs: Sequence[Any],
    begun_configs: Callable[[Path], Sequence[Any]],
    name: str,
    sweep: Sweep,
    fresh: bool,
) -> Iterator[Path]:
    """The folder of the same sweep, whose jobs so far are then in ``sweep``, or a new one; other commands are kept out.

    Raises UserError where another process is at work in it, or has begun a sweep in a new one at the same moment.
    """
    run_dir = configs[0].run_dir
    found = None if fresh else find_sweep(run_dir, name, sweep)
    changed = None
    if found is not None:
        changed = changed_job(job.verb, found, begun_configs(found) if sweep.metrics else configs)
    if changed and run_dir is not None:
        raise UserError(f"run_dir={run_dir}: {changed}; give a new folder")
    if found is None or changed:
        folder = run_folder.take(run_dir, name)
        with held(folder):
            if (folder / FILE).exists():
                raise UserError(f"run_dir={folder}: another process has just begun a sweep in it; give a new folder")
            sweep.write(folder)
            what = "a search" if sweep.metrics else f"{len(sweep.jobs)} jobs"
            print(f"{job.verb.name}: {what} in {folder}", flush=True)
            yield folder
        return
    with held(found):
        if sweep.metrics:
            begun = read_sweep(found)
            assert begun is not None
            sweep.jobs, sweep.job_words = begun.jobs, begun.job_words
        left = len(missing(found, range(len(sweep.jobs))))
        again = "" if left or sweep.metrics else "; resume=never begins a new one"
        print(f"{job.verb.name}: {left} of {len(sweep.jobs)} jobs missing in {found}{again}", flush=True)
        yield found


@dataclass
class Launcher:
    """Starts jobs of a sweep in their folders through Hydra's launcher (local, joblib, submitit)."""

    hydra: Hydra
    job: Job
    folder: Path
    sweep: Sweep
    own: list[str]
    """Overrides of Hydra's own settings."""

    def add(self, overrides: Sequence[str]) -> int:
        """A new job; returns its number."""
        self.sweep.jobs.append(not_own(overrides))
        self.sweep.job_words.append(self.job.words(not_own(overrides)))
        self.sweep.write(self.folder)
        return len(self.sweep.jobs) - 1

    def check(self, overrides: Sequence[str]) -> None:
        """Raises UserError where no job can have these overrides."""
        validated(self.hydra, self.job.verb, self.job.verb.name, [list(overrides)], self.own)

    def find(self, overrides: Sequence[str]) -> int | None:
        """The number of the job that has these overrides; None where it is new."""
        words = not_own(overrides)
        return self.sweep.jobs.index(words) if words in self.sweep.jobs else None

    @property
    def stopped(self) -> bool:
        """Whether a failed job keeps others from starting."""
        return (self.folder / FAILED).exists()

    def run(self, numbers: Sequence[int]) -> None:
        """Run those of the jobs that have not finished; returns when all have ended."""
        numbers = missing(self.folder, numbers)
        if not numbers:
            return
        settings = [
            *OUR_SETTINGS,
            f"hydra.sweep.dir={quoted(str(self.folder))}",
            "hydra.sweep.subdir=${hydra.job.num}",
            "hydra.mode=MULTIRUN",
        ]
        # A preset may choose the launcher, so a job's own words are part of what the launcher is read from.
        words = [*settings, *self.own, *self.sweep.jobs[numbers[0]]]
        node = self.hydra.compose_config(self.job.verb.name, words, run_mode=RunMode.MULTIRUN)
        write_text(self.folder / "multirun.yaml", OmegaConf.to_yaml(node))
        callbacks = Callbacks(node)
        context = HydraContext(config_loader=self.hydra.config_loader, callbacks=callbacks)
        callbacks.on_multirun_start(config=node, config_name=self.job.verb.name)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=self.job, config=node)
        size = node.hydra.sweeper.get("max_batch_size") or len(numbers)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            jobs = [launched(self.job.verb, self.folder, n, self.sweep.jobs[n]) for n in batch]
            for returned in launcher.launch(jobs, initial_job_idx=batch[0]):
                _ = returned.return_value  # raises what a job of another process has raised
        callbacks.on_multirun_end(config=node, config_name=self.job.verb.name)


def _by_other_sweeper(hydra: Hydra, job: Job, overrides: list[str]) -> int:
    """A sweeper of another package: it chooses and starts its jobs itself, and keeps no table."""
    assert job.sweep_dir is not None
    print(f"{job.verb.name}: a sweep in {job.sweep_dir}", flush=True)
    settings = [
        *OUR_SETTINGS,
        f"hydra.sweep.dir={quoted(str(job.sweep_dir))}",
        "hydra.sweep.subdir=${hydra.job.num}",
        "hydra.mode=MULTIRUN",
    ]
    try:
        hydra.multirun(job.verb.name, job, settings + overrides)
    except Interrupted as interrupted:
        return interrupted.code
    results = [result_of(file.parent) for file in job.sweep_dir.rglob("result.json")]
    codes = {result.get("exit_code") for result in results if result.get("status") != "finished"}
    return 0 if not codes else 2 if codes == {2} else 1


def _exit_code(folder: Path) -> int:
    """0 where every job finished, 2 where all that failed were the user's to fix, else 1."""
    left = [row for row in sweep_rows(folder) if row["status"] != "finished"]
    codes = {row["exit_code"] for row in left if row["status"] != "pending"}  # fail_fast starts no further job
    return 0 if not left else 2 if codes == {2} else 1
