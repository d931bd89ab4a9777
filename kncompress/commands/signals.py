"""SIGINT and SIGTERM as exceptions, so that ``finally`` blocks run, and their exit codes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []


class Terminated(SystemExit):
    """SIGTERM arrived; the exit code is 143."""

    def __init__(self) -> None:
        super().__init__(exit_code(signal.SIGTERM))


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
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
