"""Files and folders that are there whole or not at all, whenever the process dies."""

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its place once the block has ended without an error.

    The temporary file lies in the same folder, so that the last step is a rename within one file system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


_LEFT_OVER = re.compile(r"\..+\.\d+\.tmp|\..+\.part-[a-z0-9_]{8}|\.(onnx\.|moments-)[a-z0-9_]{8}")
"""Names of the temporary files and folders of ``replacing``, ``filling``, ``export`` and ``plan``."""


def remove_left_overs(folder: Path, pattern: str = "**/.*") -> None:
    """Remove what killed processes have left half-written in a folder that this process has the lock of."""
    for path in list(folder.glob(pattern)):
        if _LEFT_OVER.fullmatch(path.name) and not path.is_symlink():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name at one stroke, once the block has ended well.

    A folder that has the name already is exchanged for it, so that at every moment one of the two is there whole. What
    is in the new one is on the disk before, with the mode that the umask gives new files.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.part-", dir=folder.parent) as parent:
        fresh = Path(parent) / folder.name
        fresh.mkdir()
        yield fresh
        for path in [*fresh.rglob("*"), fresh]:
            if path.is_file():
                give_usual_mode(path)
            to_disk(path)
        if folder.exists():
            _exchange(fresh, folder)
        else:
            fresh.replace(folder)
        to_disk(folder.parent)


def give_usual_mode(file: Path) -> None:
    """Give a file the mode that the umask gives a new one: safetensors writes 0600, which a team cannot read."""
    umask = os.umask(0o077)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the system can tell."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(fresh: Path, folder: Path) -> None:
    """Swap two folders of one file system: by one system call where there is one, else by two renames."""
    if _renamed_at_once(fresh, folder):
        return
    stale = fresh.with_name(f"{fresh.name}.old")
    folder.replace(stale)
    try:
        fresh.replace(folder)
    except OSError:
        stale.replace(folder)
        raise


def _renamed_at_once(first: Path, second: Path) -> bool:
    """Linux's ``renameat2`` with RENAME_EXCHANGE; False where system or file system has none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(error, os.strerror(error), str(second))
