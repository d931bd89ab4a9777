"""What a process is and how it ends: its rank among others, its status and exit code."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

from kncompress.errors import UserError
from kncompress.terminal import first_line

Status = Literal["finished", "failed", "interrupted"]


RUN_DIR = "KNCOMPRESS_RUN_DIR"
"""Set by a process while its job runs: processes that it starts for DDP use the same folder."""
LEFT_OVER = "left over from another launcher (this process is started by neither torchrun nor srun); ignored"
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def process_rank() -> int:
    """Return this process's rank as its launcher tells it by environment variables; 0 where there is none.

    A rank counts only together with other variables of its launcher. A shell, a container or a notebook may keep an
    old rank, and a run that takes itself for a second process writes no record.
    """
    rank = os.environ.get("RANK", "")
    if "TORCHELASTIC_RUN_ID" in os.environ and rank.isdecimal():
        return int(rank)
    rank = os.environ.get("SLURM_PROCID", "")
    if rank.isdecimal() and int(rank) < _slurm_tasks():
        return int(rank)
    if RUN_DIR not in os.environ:
        return 0
    # Lightning's own launcher tells only these two: both are 0 in the first process of the first node alone.
    parts = (os.environ.get(name, "") for name in ("LOCAL_RANK", "NODE_RANK"))
    return sum(int(part) for part in parts if part.isdecimal())


@cache
def tell(line: str) -> None:
    """Say something on standard error: once in a process, and in the first process of a run alone."""
    if process_rank() == 0:
        print(f"kncompress: {line}", file=sys.stderr, flush=True)


def drop_left_over() -> list[tuple[str, str]]:
    """Take ranks that no launcher has given out of the environment, where Lightning would believe them.

    Returns (name, value) of those that would have changed something.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or RUN_DIR in os.environ:
        return []
    slurm = _slurm_tasks() > 1
    names = [name for name in _OF_LAUNCHERS if name in os.environ and not (name == "SLURM_PROCID" and slurm)]
    found = [(name, os.environ.pop(name)) for name in names]
    return [(name, value) for name, value in found if value not in ("", "1" if name == "WORLD_SIZE" else "0")]


def _slurm_tasks() -> int:
    """Processes of this step of SLURM; 0 outside one, and in an interactive shell."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(tasks) if tasks.isdecimal() and "SLURM_JOB_ID" in os.environ and not shell else 0


_ELSEWHERE: ContextVar[str | None] = ContextVar("elsewhere", default=None)


@contextmanager
def checking_for(launcher: str | None) -> Iterator[None]:
    """What is checked in the block runs later on other machines, started by ``launcher``; None: here."""
    before = _ELSEWHERE.set(launcher)
    try:
        yield
    finally:
        _ELSEWHERE.reset(before)


def checked_for() -> str | None:
    """``SLURM`` or ``Ray`` where what is being checked will run on other machines, whose devices nobody knows here."""
    return _ELSEWHERE.get()


def is_requeued(error: BaseException) -> bool:
    """Whether submitit ends this process because SLURM takes its machine away; the job is back in the queue by then."""
    return isinstance(error, SystemExit) and error.code == -1 and "SUBMITIT_EXECUTOR" in os.environ


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_IN_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors tells the number of an error."""


def disk_error(error: BaseException | None) -> str | None:
    """What the system says of a disk that takes no more, where that is behind ``error``; None: it is something else.

    torch puts an error of its own on top of it, whose text says nothing.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := _IN_RUST.search(str(error))):
            number = int(found[1])
        if number in _DISK:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def memory_error(error: BaseException) -> str | None:
    """The first line of what torch or Python says where memory has run out; None: it is something else."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # without importing torch
    return first_line(error) if named or "can't allocate memory" in str(error) else None


def outcome(error: BaseException | None) -> tuple[Status, int]:
    """Return the status and the process's exit code after ``error``: 130 and 143 are SIGINT and SIGTERM.

    Lightning turns a KeyboardInterrupt into ``SystemExit(1)``; it is found again in the chain of causes.
    """
    if error is None:
        return "finished", 0
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, KeyboardInterrupt):
            return "interrupted", 130
        link = link.__cause__ or link.__context__ if isinstance(link, SystemExit) else None
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code in (130, 143):
            return "interrupted", code
        if is_requeued(error):
            return "interrupted", 143
        return ("failed" if code else "finished"), code
    return "failed", 2 if isinstance(error, UserError) else 1
