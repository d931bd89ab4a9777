"""What a process is and how it ends: its rank among others, its status and exit code."""

import os
import sys
from typing import Literal

from kncompress.errors import UserError

Status = Literal["finished", "failed", "interrupted"]


def process_rank() -> int:
    """Return this process's rank as its launcher tells it by environment variables; 0 where there is none."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    # Lightning's own launcher tells only these two: both are 0 in the first process of the first node alone.
    parts = (os.environ.get(name, "") for name in ("LOCAL_RANK", "NODE_RANK"))
    return sum(int(part) for part in parts if part.isdecimal())


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        return ("failed" if code else "finished"), code
    return "failed", 2 if isinstance(error, UserError) else 1
