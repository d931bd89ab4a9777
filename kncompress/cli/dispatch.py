"""From the words behind a verb to its jobs: compose, validate, take the run folder, hand over to Hydra."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from kncompress.cli.compose import compose, home, open_hydra
from kncompress.cli.job import Interrupted, Job
from kncompress.cli.overrides import Line, quoted, to_hydra
from kncompress.cli.presets import References, defaults_of
from kncompress.cli.resume import find_run, register_saved
from kncompress.cli.sweep_folder import not_own, read_sweep
from kncompress.cli.sweep_jobs import SweepErrors, choices_of, validated
from kncompress.cli.sweep_run import OUR_SETTINGS, is_hydras, run_sweep
from kncompress.cli.verbs import Verb
from kncompress.errors import UserError
from kncompress.runs import run_folder
from kncompress.runs.process import process_rank
from kncompress.training.signals import signals_as_exceptions

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
    if resume not in (None, "never", "auto"):
        begun = read_sweep(home(str(resume), "resume"))
        if begun is not None and not child:
            return _dispatch(verb, _line_of_sweep(verb, line, str(resume), begun.verb, begun.words))
        if sweep:
            raise UserError(f"resume={resume}: no sweep in this folder; a sweep goes on by its own command")
        return _resume(hydra, verb, line, str(resume), overrides)
    if resume is not None:
        overrides = [word for word in overrides if word.lstrip("+").partition("=")[0] != "resume"] + ["++resume=null"]
    job = Job(verb, references.words)
    if sweep:
        return run_sweep(hydra, job, line, composed, overrides, fresh=resume == "never")
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
        own = [word for word in overrides if is_hydras(word)]
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
    own = [override for override in overrides if is_hydras(override)]
    validated(hydra, verb, config_name, [[]], own, checks=process_rank() == 0)
    return _single(hydra, Job(verb, words_of_all=tuple(line.words)), config_name, own, folder)


def _single(hydra: Hydra, job: Job, config_name: str, overrides: list[str], folder: Path) -> int:
    settings = [*OUR_SETTINGS, f"hydra.run.dir={quoted(str(folder))}"]
    if process_rank() != 0:
        settings += _CHILD_SETTINGS
    else:
        print(f"{job.verb.name}: {folder}", flush=True)
    try:
        outcome: Any = hydra.run(config_name, job, settings + overrides).return_value
    except Interrupted as interrupted:
        return interrupted.code
    return int(outcome["exit_code"])


def _line_of_sweep(verb: Verb, line: Line, folder: str, begun: str, words: list[str]) -> Line:
    """The command that began the sweep in ``folder``, to be repeated there."""
    if begun != verb.name:
        raise UserError(f"resume={folder}: a sweep of {begun}, not of {verb.name}")
    other = [word for word in not_own(line.words) if not is_hydras(word)]
    if other:
        raise UserError(f"{other[0]}: resume={folder} takes every value from the sweep there; leave it out")
    kept = [word for word in line.words if not word.lstrip("+").startswith(("resume=", "run_dir="))]
    return replace(line, words=[*words, *kept, f"run_dir={folder}"], multirun=True)
