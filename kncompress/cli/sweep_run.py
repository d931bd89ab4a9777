"""A sweep from its words to its table: its jobs checked, its folder found or made, what is missing launched."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kncompress.cli.elsewhere import check_tasks
from kncompress.cli.engine import Engine, LostJob
from kncompress.cli.job import FAILED, Interrupted, Job
from kncompress.cli.launcher import Launcher
from kncompress.cli.overrides import Line, to_hydra
from kncompress.cli.pareto_search import Search, is_search
from kncompress.cli.presets import References, defaults_of
from kncompress.cli.resume import not_own
from kncompress.cli.streams import message
from kncompress.cli.sweep_folder import (
    FILE,
    Sweep,
    changed_job,
    find_sweep,
    missing,
    read_sweep,
    refuse_code,
    result_of,
)
from kncompress.cli.sweep_jobs import SweepErrors, SweepJobs, choices_of, listed_jobs
from kncompress.cli.sweep_table import sweep_rows, sweep_table, write_sweep_table
from kncompress.errors import UserError
from kncompress.runs import run_folder
from kncompress.runs.config_file import to_yaml
from kncompress.runs.lock import held


def is_hydras(override: str) -> bool:
    """Whether an override is Hydra's own, such as its launcher."""
    return override.lstrip("+").startswith(("hydra.", "hydra/"))


def run_sweep(engine: Engine, job: Job, line: Line, composed: DictConfig, overrides: list[str], fresh: bool) -> int:
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
        overrides = to_hydra(words, defaults_of(verb.name), References(job.spoken), True, texts=verb.texts) + overrides
        own.append("hydra.sweeper.params=null")
        overrides.append("hydra.sweeper.params=null")
    task = [override for override in overrides if not is_hydras(override)]
    search = Search.of(engine, composed, task) if is_search(composed) else None
    words_of_jobs = [search.first()] if search else listed_jobs(engine, composed, overrides)
    if len({word for words in words_of_jobs or () for word in words if word.startswith("++run_dir=")}) > 1 or (
        search and "++run_dir" in search.space
    ):
        raise UserError("run_dir: the jobs of a sweep share one folder; give run_dir one value")
    jobs = SweepJobs(engine, verb, own)
    ready = jobs.ready(words_of_jobs if words_of_jobs is not None else [[]], checks=not line.show)
    configs = [found.config for found in ready]
    check_tasks(composed, configs)
    if line.show:
        print("---\n".join(to_yaml(asdict(config)) for config in configs), end="")
        return 0
    if search:
        _check_space(jobs, search)
    name = run_folder.default_name(verb.name, [choices_of(found.composed) for found in ready])
    job = replace(job, fail_fast=configs[0].fail_fast)
    if words_of_jobs is None:
        folder = run_folder.take(configs[0].run_dir, name)
        return _by_other_sweeper(engine, replace(job, sweep_dir=folder), [*own, *task])
    sweep = Sweep(verb.name, not_own(line.words), not_own(task), search.metrics if search else [], [], [])
    if search is None:
        sweep.jobs = [not_own(words) for words in words_of_jobs]
        sweep.job_words = [job.words(words) for words in sweep.jobs]

    def begun_configs(found: Path) -> Sequence[Any]:
        """Of the jobs that a search has had so far, as they are composed today."""
        begun = read_sweep(found)
        if begun is not None:
            refuse_code(found, begun)
        return [found.config for found in jobs.ready(begun.jobs if begun else [], checks=False)]

    with _folder(job, configs, begun_configs, name, sweep, fresh) as folder:
        (folder / FAILED).unlink(missing_ok=True)
        launcher = Launcher(engine, replace(job, sweep_dir=folder), folder, sweep, jobs)
        try:
            code = 0
            if search:
                search.run(launcher)
            else:
                launcher.run(range(len(sweep.jobs)))
        except Interrupted as interrupted:
            code = interrupted.code
        except LostJob as error:
            print(message(f"kncompress: {error}; the same command runs what is missing"), file=sys.stderr, flush=True)
            code = 1
        write_sweep_table(folder)
    print(f"{sweep_table(folder)}\n{folder / 'sweep.csv'}", flush=True)
    return code or _exit_code(folder)


def _check_space(jobs: SweepJobs, search: Search) -> None:
    """Raises UserError, a line each, for values of the space with which no job is valid that has been tried."""
    wrong: dict[str, None] = {}
    for others in search.others():
        errors = []
        for words in others:
            try:
                jobs.ready([words])
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


def _by_other_sweeper(engine: Engine, job: Job, overrides: list[str]) -> int:
    """A sweeper of another package: it chooses and starts its jobs itself, and keeps no table."""
    assert job.sweep_dir is not None
    print(f"{job.verb.name}: a sweep in {job.sweep_dir}", flush=True)
    try:
        engine.multirun(job, job.sweep_dir, overrides)
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
