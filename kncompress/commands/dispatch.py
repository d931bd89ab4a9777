"""From the words behind a verb to its jobs: compose, validate, take the run folder, hand over to Hydra."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kncompress.commands import run_folder
from kncompress.commands.compose import compose, open_hydra
from kncompress.commands.job import Interrupted, Job
from kncompress.commands.overrides import Line, quoted, to_hydra
from kncompress.commands.presets import References, defaults_of
from kncompress.commands.resume import find_run, register_saved
from kncompress.commands.sweep import SweepErrors, choices_of, expand, validated
from kncompress.commands.sweep_table import sweep_rows, sweep_table, write_sweep_table
from kncompress.commands.verbs import Verb
from kncompress.errors import UserError
from kncompress.tracking.process import process_rank
from kncompress.tracking.signals import signals_as_exceptions

_OUR_SETTINGS = ["hydra.job.chdir=false", "hydra/hydra_logging=none"]
# No log file: under torchrun this process may be the first, and the main one refuses a folder that holds files.
_CHILD_SETTINGS = [
    "hydra.output_subdir=null",
    "hydra/job_logging=stdout",
    "+hydra.job_logging.handlers.console.level=WARNING",
]


def dispatch(verb: Verb, line: Line) -> int:
    """Run ``verb`` with the words of ``line``; returns the exit code.

    Raises UserError before anything is written.
    """
    with signals_as_exceptions():
        try:
            return _dispatch(verb, line)
        except SweepErrors as errors:
            for text in errors.lines:
                print(f"kncompress: {text}", file=sys.stderr)
            return 2


def _dispatch(verb: Verb, line: Line) -> int:
    child = process_rank() != 0
    line = replace(line, words=[verb.canonical(word) for word in line.words])
    hydra = open_hydra(verb.name)
    references = References()
    overrides = to_hydra(line.words, defaults_of(verb.name), references, line.multirun, child)
    composed = compose(hydra, verb.name, overrides, sweep=line.multirun)
    sweep = line.multirun if composed.hydra.mode is None else composed.hydra.mode == RunMode.MULTIRUN
    resume = composed.get("resume")
    if resume not in (None, "never", "auto") or (resume == "auto" and sweep):
        if sweep:
            raise UserError(f"resume={resume}: not in a sweep (-m); resume one run at a time")
        return _resume(hydra, verb, line, str(resume), overrides)
    if resume is not None:
        overrides = [word for word in overrides if word.lstrip("+").partition("=")[0] != "resume"] + ["++resume=null"]
    job = Job(verb, references.words)
    if sweep:
        return _sweep(hydra, job, line, composed, overrides)
    configs, nodes = validated(hydra, verb, verb.name, [[]], overrides, checks=not (line.show or child))
    if line.show:
        print(OmegaConf.to_yaml(OmegaConf.structured(configs[0])), end="")
        return 0
    run_dir = configs[0].run_dir
    run_folder.refuse_unknown(run_dir)
    name = run_folder.default_name(verb.name, [choices_of(nodes[0])])
    found = find_run(verb, configs[0], name) if resume == "auto" and not child else None
    if found is not None:
        words = [word for word in line.words if not word.startswith(("resume=", "run_dir="))]
        own = [word for word in overrides if _is_hydras(word)]
        return _resume(hydra, verb, replace(line, words=[*words, f"resume={found}"]), str(found), own)
    new = run_dir is None or not Path(run_dir).expanduser().exists()
    if child:
        folder = run_folder.inherited() or Path(str(run_dir)).expanduser().absolute()
    else:
        folder = run_folder.take(run_dir, name)
    code = _single(hydra, job, verb.name, overrides, folder)
    if code == 2 and not child and not (folder / "run.json").exists():
        run_folder.discard(folder, made=new)
    return code


def _resume(hydra: Hydra, verb: Verb, line: Line, text: str, overrides: list[str]) -> int:
    folder, config_name = register_saved(hydra, verb, text, overrides)
    own = [override for override in overrides if _is_hydras(override)]
    validated(hydra, verb, config_name, [[]], own, checks=process_rank() == 0)
    return _single(hydra, Job(verb, words_of_all=tuple(line.words)), config_name, own, folder)


def _single(hydra: Hydra, job: Job, config_name: str, overrides: list[str], folder: Path) -> int:
    settings = [*_OUR_SETTINGS, f"hydra.run.dir={quoted(str(folder))}"]
    if process_rank() != 0:
        settings += _CHILD_SETTINGS
    else:
        print(f"{job.verb.name}: {folder}", flush=True)
    try:
        outcome: Any = hydra.run(config_name, job, settings + overrides).return_value
    except Interrupted as interrupted:
        return interrupted.code
    return int(outcome["exit_code"])


def _sweep(hydra: Hydra, job: Job, line: Line, composed: DictConfig, overrides: list[str]) -> int:
    verb = job.verb
    params = dict(composed.hydra.sweeper.get("params") or {})
    own = [override for override in overrides if _is_hydras(override)]
    if params:  # written in an experiment: the same as words of the command line, which win
        words = [f"{key}={value}" for key, value in params.items()]
        references = References(job.spoken)
        overrides = to_hydra(words, defaults_of(verb.name), references, multirun=True) + overrides
        own.append("hydra.sweeper.params=null")
        overrides.append("hydra.sweeper.params=null")
    jobs = expand(hydra, composed, overrides)
    if len({word for words in jobs or () for word in words if word.startswith("++run_dir=")}) > 1:
        raise UserError("run_dir: the jobs of a sweep share one folder; give run_dir one value")
    fixed = [override for override in overrides if override not in own]
    configs, nodes = validated(hydra, verb, verb.name, jobs if jobs is not None else [[]], own, checks=not line.show)
    if line.show:
        print("---\n".join(OmegaConf.to_yaml(OmegaConf.structured(config)) for config in configs), end="")
        return 0
    name = run_folder.default_name(verb.name, [choices_of(node) for node in nodes])
    folder = run_folder.take(configs[0].run_dir, name)
    listed = tuple(tuple(job.words(words)) for words in jobs or ())
    print(f"{verb.name}: {len(listed) or 'a sweep of'} jobs in {folder}", flush=True)
    settings = [
        *_OUR_SETTINGS,
        f"hydra.sweep.dir={quoted(str(folder))}",
        "hydra.sweep.subdir=${hydra.job.num}",
    ]
    settings.append("hydra.mode=MULTIRUN")
    code = 0
    try:
        hydra.multirun(verb.name, replace(job, sweep_dir=folder, sweep_jobs=listed), settings + own + fixed)
    except Interrupted as interrupted:
        code = interrupted.code
    if not listed:
        return code
    write_sweep_table(folder, listed)
    print(f"{sweep_table(folder, listed)}\n{folder / 'sweep.csv'}", flush=True)
    return code or _exit_code(folder, listed)


def _is_hydras(override: str) -> bool:
    return override.lstrip("+").startswith(("hydra.", "hydra/"))


def _exit_code(folder: Path, jobs: tuple[tuple[str, ...], ...]) -> int:
    """0 where every job finished, 2 where all that failed were the user's to fix, else 1."""
    failed = [row for row in sweep_rows(folder, jobs) if row["status"] != "finished"]
    if not failed:
        return 0
    return 2 if all(row["exit_code"] == 2 for row in failed) else 1
