"""Processes beside the main one: which was lost, and an end that is recorded though the main thread hangs."""

import os
import signal
import subprocess
import sys

import pytest
from waiting import wait_for

from kncompress.training import ranks
from kncompress.training.ranks import Launcher, lost


@pytest.fixture
def two():
    """Two processes that sleep."""
    found = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) for _ in range(2)]
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_a_killed_process_is_named(two):
    assert lost(two) is None
    two[1].kill()
    wait_for(lambda: two[1].poll() is not None)
    text = str(lost(two))
    assert f"rank 2 of this machine (process {two[1].pid}) was killed by SIGKILL; perhaps for lack of memory" in text


@pytest.mark.parametrize("hangs", [True, False])
def test_the_end_is_recorded_where_the_main_thread_hangs(two, monkeypatch, hangs):
    monkeypatch.setattr(ranks, "PATIENCE", 0.3 if hangs else 60.0)
    monkeypatch.setattr(ranks, "_EVERY", 0.01)
    left, told = [], []
    monkeypatch.setattr(os, "_exit", left.append)
    launcher = Launcher.__new__(Launcher)
    launcher.procs, launcher.give_up = list(two), lambda error: told.append(str(error))
    two[0].send_signal(signal.SIGTERM)
    wait_for(lambda: two[0].poll() is not None)
    if not hangs:  # the main thread ends by itself, and is through with its processes
        launcher.procs.clear()
    launcher.watch()
    assert bool(left) == bool(told) == hangs
    if hangs:
        assert left == [1] and "rank 1 " in told[0] and "SIGTERM" in told[0]
        assert two[1].wait() == -signal.SIGKILL
