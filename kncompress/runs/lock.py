"""The lock of a folder in which a run or a sweep is at work: one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kncompress.errors import UserError

LOCK = ".lock"
"""The lock's file in the folder."""
_PATIENCE = 1.0
"""Seconds to wait for the lock: a process that only asks whether the folder is in use holds it for a moment."""


def lock(folder: Path, key: str = "run_dir") -> FileLock:
    """The lock of ``folder``, taken. Raises UserError, which names ``key``, where another process is at work in it."""
    taken = FileLock(folder / LOCK)
    try:
        taken.acquire(timeout=_PATIENCE)
    except Timeout:
        raise UserError(f"{key}={folder}: another process is at work in it; wait or name another folder") from None
    return taken


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder`` for the time of the block. Raises UserError as ``lock``."""
    taken = lock(folder)
    try:
        yield
    finally:
        taken.release()


def in_use(folder: Path) -> bool:
    """Whether another process holds the lock."""
    if not (folder / LOCK).exists():
        return False
    asked = FileLock(folder / LOCK)
    try:
        asked.acquire(timeout=0)
    except Timeout:
        return True
    asked.release()
    return False
