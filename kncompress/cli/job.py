"""One job as Hydra's launchers call it: its environment, its outcome, and what is written when it fails.

``run_job`` never raises an ordinary exception, so that one failing job does not stop a sweep. Its outcome is
in ``result.json``: ``status``, ``metrics`` and, where it failed, ``error`` and ``exit_code``.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kncompress.cli.resume import not_own
from kncompress.cli.saved_paths import with_absolute_paths
from kncompress.cli.streams import message
from kncompress.cli.sweep_folder import FILE, done_elsewhere
from kncompress.cli.sweep_jobs import ReadyJob
from kncompress.cli.sweep_table import write_sweep_table
from kncompress.cli.typed_config import typed
from kncompress.cli.verbs import Verb
from kncompress.errors import CheckFailed, UserError
from kncompress.runs.config_file import literal
from kncompress.runs.lock import in_use
from kncompress.runs.process import RUN_DIR, disk_error, is_requeued, memory_error, process_rank
from kncompress.runs.process import outcome as outcome_of
from kncompress.runs.record import began, forget, keep_outcome
from kncompress.runs.run_folder import begun_before, discard, inherited
from kncompress.runs.whole_file import write_text
from kncompress.training import signals

_DISTRIBUTED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RUN_DIR)
FAILED = ".failed"
"""File that marks a sweep's folder once a job has failed and ``fail_fast`` is to stop the others."""
_CHILD_WAITS = 30.0
"""Seconds that a failed process of a distributed run gives the main process to fail by itself."""
_TOLD = UserError, CheckFailed
"""Errors that say all in one line."""
_OWN_HANDLERS = ("lightning", "lightning.pytorch", "lightning.fabric")


@dataclass(frozen=True)
class Job:
    """What every job of one command has in common; plain data, so that launchers can send it elsewhere.

    ``ready`` stays in this process: in another one, perhaps on another machine hours later, a job is checked again.
    """

    verb: Verb
    spoken: dict[str, str] = field(default_factory=dict)
    """``{Hydra's override: the user's word}`` for presets that stand for paths."""
    sweep_dir: Path | None = None
    fail_fast: bool = False
    """Whether a failed job of the sweep keeps the later ones from starting."""
    words_of_all: tuple[str, ...] | None = None
    """The user's words where Hydra's overrides do not tell them (``resume=``)."""
    ready: dict[str, ReadyJob] = field(default_factory=dict)
    """{folder: the job in it} of those that are checked already."""
    sent: bool = False
    """Whether a launcher has sent it to another process, whose program is the launcher's own."""

    def words(self, overrides: list[str]) -> list[str]:
        """``overrides`` of Hydra as the user would type them for this job alone."""
        if self.words_of_all is not None:
            return list(self.words_of_all)
        return [self.spoken.get(word.lstrip("+"), word.removeprefix("++")) for word in overrides]

    def __call__(self, composed: DictConfig) -> dict[str, Any]:
        """Hydra's task function: returns the outcome."""
        try:
            return run_job(self, composed)
        finally:
            _close_logs()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ready": {}, "sent": True}


class Interrupted(BaseException):
    """A signal ended a job, and with it the command; carries the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_job(job: Job, composed: DictConfig) -> dict[str, Any]:
    """Run one job in the folder that Hydra has made; return ``{"status", "exit_code", ...}``.

    Raises Interrupted after a signal, when the outcome is written, and SystemExit where SLURM takes the machine away
    and starts the job again.
    """
    hydra = HydraConfig.get()
    folder = inherited() or Path(hydra.runtime.output_dir)
    words = job.words(list(hydra.overrides.task))
    _one_handler()
    if job.sweep_dir is not None and job.fail_fast and (job.sweep_dir / FAILED).exists():
        if "resume" not in composed or composed.resume is None:
            discard(folder, made=True)
        return {"status": "pending", "exit_code": 0}
    if job.sweep_dir is not None and process_rank() == 0 and done_elsewhere(folder):
        # A queue such as SLURM's may still hold the jobs of an earlier command that was killed.
        print(f"job {folder.name}: finished or at work elsewhere", flush=True)
        return {"status": "elsewhere", "exit_code": 0}
    if job.sweep_dir is not None:
        print(f"job {folder.name}: {' '.join(words)}", flush=True)
    forget(folder)
    try:
        ready = job.ready.get(str(folder)) or ReadyJob(composed, typed(job.verb.config, composed))
        if _is_started_again(job, composed, folder):
            config: Any = ready.config
            config.resume = str(folder)
        with _environment(job, words, folder):
            ready.check(job.verb)
            ready.config = with_absolute_paths(ready.config)
            ready.config.run_dir = str(folder)
            returned = job.verb.run(ready.config, folder, ready.found)
        outcome: dict[str, Any] = {"status": "finished", "exit_code": 0}
        if isinstance(returned, dict):
            outcome["metrics"] = {k: v for k, v in returned.items() if isinstance(v, int | float)}
    except BaseException as error:
        if is_requeued(error):
            raise
        outcome = _failure(error)
        again = f", then resume={folder} goes on" if job.verb.resumes else ", then the same command goes on"
        if full := disk_error(error):
            outcome |= {"error": f"run_dir={folder}: {full}; make room{again}"}
        elif short := memory_error(error):
            outcome |= {"error": f"out of memory ({short}); take fewer tokens at once{again}"}
        elif outcome["status"] == "failed" and signals.received() is None and not isinstance(error, _TOLD):
            _log_traceback(error, on_stderr=job.sweep_dir is None)
    number = signals.received()
    if number is not None:
        failed = outcome["status"] == "failed"  # what went wrong while it stopped is told all the same
        error_after = f"interrupted; while it stopped: {outcome['error']}" if failed else "interrupted"
        if failed:
            print(message(f"kncompress: {error_after}"), file=sys.stderr, flush=True)
        outcome = {"status": "interrupted", "exit_code": signals.exit_code(number), "error": error_after}
    if process_rank() == 0:
        try:
            _record(job, folder, outcome, words, began(folder))
        except OSError as error:  # a full disk, say
            if not outcome["exit_code"]:
                outcome = {"status": "failed", "exit_code": 1, "error": f"the outcome cannot be written: {error}"}
    elif inherited() is not None:
        return _end_of_child(outcome)
    if outcome["status"] == "interrupted":
        raise Interrupted(outcome["exit_code"])
    if outcome["exit_code"]:
        name = f"job {folder.name}: " if job.sweep_dir is not None else ""
        print(message(f"kncompress: {name}{outcome['error']}"), file=sys.stderr, flush=True)
    return outcome


def _is_started_again(job: Job, composed: DictConfig, folder: Path) -> bool:
    """Whether a queue (SLURM after a preemption, Ray after the loss of a worker) repeats a job of a sweep that had
    begun: by its first words, which say nothing of the run that it has left."""
    first = job.sweep_dir is not None and process_rank() == 0 and composed.get("resume") is None
    return first and job.verb.resumes and begun_before(folder, job.verb.name)


def _end_of_child(outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome with which a process that Lightning has started beside the main one leaves.

    Lightning kills the main process, and a whole sweep with it, when a child ends with an exit code. So a stop that
    all processes agreed on is no error here; and after a failure the main process, whose connection is closed by now,
    gets the time to fail in order and to end this one (``end_children``). If it hangs instead, it is killed.
    """
    if outcome["exit_code"] and outcome["status"] != "interrupted":
        parent, until = os.getppid(), time.monotonic() + _CHILD_WAITS
        while os.getppid() == parent and time.monotonic() < until:
            time.sleep(0.2)
        return outcome
    return outcome | {"exit_code": 0}


def _failure(error: BaseException) -> dict[str, Any]:
    status, code = outcome_of(error)
    text = " ".join(str(error).split())
    if status == "failed" and not isinstance(error, _TOLD):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return {"status": status, "exit_code": code} | ({"error": text} if code else {})


def _record(job: Job, folder: Path, outcome: dict[str, Any], words: list[str], own: bool) -> None:
    """Complete ``result.json`` and ``run.json``, which a verb writes itself when it ends, and the sweep's table.

    ``own``: whether the run in ``folder`` is that of this job, and not an earlier one that could not be resumed.
    """
    if in_use(folder):
        return  # another process is at work in the folder, so this job was refused
    if job.sweep_dir is None and not own and (outcome["exit_code"] == 2 or outcome["status"] == "interrupted"):
        return  # a single run that never began leaves nothing, or what the same command takes again
    keep_outcome(folder, job.verb.name, outcome, own)
    hydra_words = folder / ".hydra" / "overrides.yaml"
    if hydra_words.exists():
        kept = not_own(words) if job.sweep_dir is not None else words
        write_text(hydra_words, OmegaConf.to_yaml(OmegaConf.create(literal(kept))))
    if job.sweep_dir is not None and outcome["exit_code"] and job.fail_fast:
        (job.sweep_dir / FAILED).touch()
    if job.sweep_dir is not None and (job.sweep_dir / FILE).exists():
        write_sweep_table(job.sweep_dir)


@contextlib.contextmanager
def _environment(job: Job, words: list[str], folder: Path) -> Iterator[None]:
    """Make this process look as if it ran this job alone: DDP starts its children by ``__main__`` and ``sys.argv``.

    Afterwards the process group and the variables of the distributed run are gone: the next job of a sweep
    would wait for processes that no longer exist.
    """
    main = sys.modules["__main__"]
    argv, spec, before = sys.argv, main.__spec__, {name: os.environ.get(name) for name in _DISTRIBUTED}
    single = ["hydra.mode=RUN"] if job.sweep_dir is not None else []
    sys.argv = [argv[0], job.verb.name, *words, *single]
    os.environ[RUN_DIR] = str(folder)
    if job.sent:
        main.__spec__ = find_spec("kncompress.__main__")
    try:
        yield
    finally:
        sys.argv, main.__spec__ = argv, spec
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _one_handler() -> None:
    """Leave Hydra's handlers alone to write log lines: Lightning's own would write each a second time.

    Hydra's line about the next job of a sweep would stand in the log of the job before.
    """
    logging.raiseExceptions = False  # on a full disk every line would print a traceback
    logging.getLogger("hydra").setLevel(logging.WARNING)
    for name in _OWN_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _files_of_logs() -> list[logging.FileHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]


def _close_logs() -> None:
    """Close the log file of a job at its end. Hydra would when the next job begins, but a handler that is closed and
    still there opens its file again for a late line."""
    for handler in _files_of_logs():
        logging.getLogger().removeHandler(handler)
        handler.close()


def _log_traceback(error: BaseException, on_stderr: bool) -> None:
    """The traceback to the log file of the job, and to standard error in a single run."""
    info: tuple[type[BaseException], BaseException, TracebackType | None]
    info = (type(error), error, error.__traceback__)
    record = logging.getLogger("kncompress").makeRecord(
        "kncompress", logging.ERROR, __file__, 0, "the job failed", (), info
    )
    files = _files_of_logs()
    for handler in files:
        handler.handle(record)
    if on_stderr or not files:
        traceback.print_exception(*info)
