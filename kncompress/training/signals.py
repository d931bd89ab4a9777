"""SIGINT and SIGTERM as exceptions, so that ``finally`` blocks run, and their exit codes.

While a model trains they wait for the end of the optimiser step (``postponed``), so that a checkpoint can be
saved; a second signal is raised at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []
_postponing = False


class Terminated(SystemExit):
    """A signal ended the work in an orderly way; the exit code is 143 after SIGTERM, 130 after SIGINT."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(exit_code(number))
        self.number = number


def received() -> int | None:
    """The first signal since ``signals_as_exceptions`` began, even if its exception was swallowed."""
    return _received[0] if _received else None


def exit_code(number: int) -> int:
    """130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and Terminated on SIGTERM; an ignored one (nohup) stays ignored."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def postpone(active: bool) -> None:
    """From now on only take note of the first signal (``received`` tells it), or raise again.

    Nothing changes where ``signals_as_exceptions`` is not in force. Lightning's own handler of SIGTERM, which
    communicates at any moment, is replaced.
    """
    global _postponing
    _postponing = active
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGTERM, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    first = not _received
    _received.append(number)
    if _postponing and first:
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
