"""A second signal ends a process, also one whose main thread waits in C code."""

import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from waiting import PATIENCE

from kncompress.training import signals

PROGRAM = """
import ctypes, sys, time
from kncompress.training import signals

with signals.signals_as_exceptions():
    signals.postpone(True)
    signals.before_giving_up.append(lambda: print("gave up", flush=True))
    print("ready", flush=True)
    if sys.argv[1] == "hangs":
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second time for ever
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("sigint", [signal.default_int_handler, signal.SIG_IGN])
def test_postponed_signals_are_ours_whoever_took_them(sigint: Any) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    others: list[int] = []
    try:
        signal.signal(signal.SIGINT, sigint)  # ignored where a shell has started the program in its background
        with signals.signals_as_exceptions():
            signal.signal(signal.SIGTERM, lambda number, _: others.append(number))  # as Lightning does
            signals.postpone(True)
            signal.raise_signal(signal.SIGTERM)
            assert signals.received() == signal.SIGTERM and not others
            signals.postpone(False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a mutex of glibc")
@pytest.mark.parametrize(("how", "told"), [("hangs", "gave up\n"), ("runs", "")])
def test_the_second_signal_ends_it(how: str, told: str) -> None:
    line = [sys.executable, "-c", PROGRAM, how]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(2 if how == "hangs" else 1):  # two at once may be one to Python
        process.send_signal(signal.SIGTERM)
    time.sleep(signals.APART + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, told), err
