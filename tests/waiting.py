"""Waiting for what another process or thread does, on a machine that may be busy with other things."""

import time
from collections.abc import Callable
from subprocess import Popen
from typing import Any

PATIENCE = 3600.0
"""Seconds. A limit for what hangs, not for what is slow: no test passes or fails by the time that something takes."""


def wait_for(done: Callable[[], Any], process: "Popen[Any] | None" = None) -> None:
    """Return when ``done()`` is true. Raises AssertionError where ``process`` ends before."""
    end = time.monotonic() + PATIENCE
    while not done():
        ended = process is not None and process.poll() is not None
        assert not ended or done(), f"the process has ended: {process.args if process else ''}"
        assert time.monotonic() < end, "this hangs"
        time.sleep(0.01)
