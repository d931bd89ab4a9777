"""Files and folders that are there whole or not at all, whenever the process dies."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; nothing where the file is missing, cannot be read, or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which must not exist; it takes that name once the block ended well."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        fresh = Path(parent) / folder.name
        fresh.mkdir()
        yield fresh
        fresh.replace(folder)
