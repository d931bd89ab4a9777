"""SIGINT and SIGTERM as exceptions, so that ``finally`` blocks run, and their exit codes.

While a model trains they wait for the end of the optimiser step (``postponed``), so that a checkpoint can be
saved; a second signal is raised at once. Python raises in the main thread, between two of its instructions. A main
thread that waits in C code, as for a process that takes no more part in a collective, never comes to one: it is left
to its fate some seconds after the second signal.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = 5.0
"""Seconds for the main thread to see a second signal."""
APART = 2.0
"""Seconds between two signals that are one and another: Python makes one of two that come at once."""
before_giving_up: list[Callable[[], None]] = []
"""Called before a process ends whose main thread hangs."""
_received: list[int] = []
_postponing = False
_handled: set[int] = set()
"""Signals that ``signals_as_exceptions`` is in force for."""


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
    with _insisting():
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _handle)
                _handled.add(number)
        try:
            yield
        finally:
            _handled.clear()
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _insisting() -> Iterator[None]:
    """End this process where its main thread does not see a second signal."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_insist, args=(read,), daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(write)


def _insist(read: int) -> None:
    """Read the numbers that C writes as signals come, until the pipe ends."""
    first = 0.0
    while byte := os.read(read, 1):
        if byte[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        first = first or time.monotonic()
        if time.monotonic() - first > APART:
            time.sleep(PATIENCE)
            if len(_received) < 2:
                for act in before_giving_up:
                    with suppress(Exception):
                        act()
                os._exit(exit_code(byte[0]))
    os.close(read)


def postpone(active: bool) -> None:
    """From now on only take note of the first signal (``received`` tells it), or raise again.

    Nothing changes where ``signals_as_exceptions`` is not in force. Lightning's own handler of SIGTERM, which
    communicates at any moment, is replaced: also where SIGINT is ignored, as in the background of a shell.
    """
    global _postponing
    _postponing = active
    if threading.current_thread() is threading.main_thread() and signal.SIGTERM in _handled:
        signal.signal(signal.SIGTERM, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    first = not _received
    _received.append(number)
    if _postponing and first:
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
