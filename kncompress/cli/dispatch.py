"""From the words behind a verb to its jobs: compose, validate, take the run folder, hand over to Hydra."""

import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from hydra.types import RunMode
from omegaconf import DictConfig

from kncompress.cli.engine import Engine
from kncompress.cli.job import Interrupted, Job
from kncompress.cli.overrides import Line, hydras_folders, to_hydra
from kncompress.cli.presets import References, defaults_of
from kncompress.cli.resume import find_run, not_own, register_saved, stopped_run
from kncompress.cli.streams import message
from kncompress.cli.sweep_folder import read_sweep, refuse_code
from kncompress.cli.sweep_jobs import ReadyJob, SweepErrors, check_jobs, choices_of
from kncompress.cli.sweep_run import is_hydras, run_sweep
from kncompress.cli.typed_config import home
from kncompress.cli.verbs import Verb
from kncompress.errors import UserError
from kncompress.runs import run_folder
from kncompress.runs.config_file import to_yaml
from kncompress.runs.process import LEFT_OVER, drop_left_over, process_rank
from kncompress.training.signals import Terminated, received, signals_as_exceptions

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
    for name, value in drop_left_over():
        print(message(f"kncompress: {name}={value}: {LEFT_OVER}"), file=sys.stderr)
    with signals_as_exceptions():
        try:
            return _dispatch(verb, line)
        except SweepErrors as errors:
            for text in errors.lines:
                print(message(f"kncompress: {text}"), file=sys.stderr)
            return 2
        except Exception as error:
            if (number := received()) is not None:  # a library that it was raised in may make another error of it
                raise Terminated(number) from error
            raise


def _dispatch(verb: Verb, line: Line) -> int:
    child = process_rank() != 0
    words = [verb.canonical(word) for word in line.words]
    line = replace(line, words=words if child else hydras_folders(words, line.multirun))
    engine = Engine(verb.name)
    references = References()
    overrides = to_hydra(line.words, defaults_of(verb.name), references, line.multirun, child, verb.texts)
    composed = engine.compose([*_settings(), *overrides], sweep=line.multirun)
    sweep = line.multirun if composed.hydra.mode is None else composed.hydra.mode == RunMode.MULTIRUN
    resume = composed.get("resume")
    if resume not in (None, "never", "auto"):
        begun = read_sweep(home(str(resume), "resume"))
        if begun is not None and not child:
            refuse_code(home(str(resume), "resume"), begun)
            return _dispatch(verb, _line_of_sweep(verb, line, str(resume), begun.verb, begun.words))
        if sweep:
            raise UserError(f"resume={resume}: no sweep in this folder; a sweep goes on by its own command")
        return _resume(engine, verb, line, str(resume), overrides, composed)
    if resume is not None:
        overrides = _without_resume(overrides)
        composed.resume = None
        composed.hydra.overrides.task = _without_resume(composed.hydra.overrides.task)
    job = Job(verb, references.words)
    if sweep:
        return run_sweep(engine, job, line, composed, overrides, fresh=resume == "never")
    ready = ReadyJob.of(verb, composed)
    if line.show:
        print(to_yaml(asdict(ready.config)), end="")
        return 0
    run_dir = ready.config.run_dir
    run_folder.refuse_unknown(run_dir)
    name = run_folder.default_name(verb.name, [choices_of(composed)])
    # A training is gone on with by resume=; what is shorter, and a suite of cells, by the same command.
    stopped = None if child or resume is not None or verb.name == "train" else stopped_run(verb, ready.config)
    found = find_run(verb, ready.config, name) if resume == "auto" and not child else None
    if stopped is not None and verb.resumes:
        found, stopped = stopped, None
    if found is not None:
        words = [word for word in line.words if not word.startswith(("resume=", "run_dir="))]
        own = [word for word in overrides if is_hydras(word)]
        line = replace(line, words=[*words, f"resume={found}"])
        return _resume(engine, verb, line, str(found), own, composed, whole=True)
    if not child:
        check_jobs(verb, [ready])
    new = run_dir is None or not Path(run_dir).expanduser().exists()
    if child:
        folder = run_folder.inherited() or Path(str(run_dir)).expanduser().absolute()
    else:
        folder = stopped or run_folder.take(run_dir, name, verb.name)
    code = _single(engine, job, ready, folder)
    if code == 2 and not child and not (folder / "run.json").exists():
        run_folder.discard(folder, made=new)
    return code


def _resume(
    engine: Engine, verb: Verb, line: Line, text: str, overrides: list[str], composed: DictConfig, whole: bool = False
) -> int:
    """Go on with the run in the folder ``text``; ``composed`` is what ``overrides`` make. ``whole``: as there."""
    folder, name = register_saved(verb, text, overrides, composed, whole)
    own = [override for override in overrides if is_hydras(override)]
    ready = ReadyJob.of(verb, engine.compose([*_settings(), *own], name))
    if process_rank() == 0:
        check_jobs(verb, [ready])
    return _single(engine, Job(verb, words_of_all=tuple(line.words)), ready, folder)


def _settings() -> list[str]:
    return [] if process_rank() == 0 else _CHILD_SETTINGS


def _without_resume(words: Iterable[str]) -> list[str]:
    return [word for word in words if word.lstrip("+").partition("=")[0] != "resume"] + ["++resume=null"]


def _single(engine: Engine, job: Job, ready: ReadyJob, folder: Path) -> int:
    if process_rank() == 0:
        print(f"{job.verb.name}: {folder}", flush=True)
    try:
        outcome = engine.run(replace(job, ready={str(folder): ready}), ready.composed, folder)
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
