"""Standard output and error: a reader that goes away (``| head``) is no error, and a message fits two lines of a
terminal."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from kncompress.reading import one_line

_LINES = 2
_LONGEST = 1000
"""Characters of a message where there is no terminal: a log keeps what a person would not read."""


class _Pipe:
    """A stream whose output is dropped once its reader has gone (``| head -1``), so that the run ends as usual."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._forget()
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._forget()

    def _forget(self) -> None:
        """Redirect the descriptor to nowhere, so that the rest of the buffer and the output of children are dropped."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def open_pipes() -> Iterator[None]:
    """Standard output and error stay usable in the block, whoever closes their other end."""
    before = sys.stdout, sys.stderr
    patient = [_Pipe(stream) for stream in before]
    sys.stdout, sys.stderr = patient
    try:
        yield
    finally:
        for stream in patient:
            stream.flush()
        sys.stdout, sys.stderr = before


def message(text: str) -> str:
    """``text`` as one line, its middle left out where it would take more than two lines of the terminal.

    It may come from a stranger's file: what is not printed, such as codes that move the cursor, is dropped.
    """
    text = one_line(text)
    room = _LINES * shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else _LONGEST
    if len(text) <= room:
        return text
    head = (room - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (room - 5 - head) :]}"
