"""Keeps what a library prints by itself, from C, off the terminal."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDOUT = 1


@contextmanager
def c_output_dropped() -> Iterator[None]:
    """What C code prints on standard output in the block goes nowhere.

    HiGHS prints debugging lines, and no option of scipy's ``milp`` stops it. The buffer of C's library is
    emptied on both sides of the change, or a pipe would get those lines later.
    """
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # closed
        yield
        return
    sys.stdout.flush()
    _flush_c()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDOUT)
        yield
    finally:
        sys.stdout.flush()
        _flush_c()
        os.dup2(kept, _STDOUT)
        os.close(kept)
        os.close(nowhere)


def _flush_c() -> None:
    with suppress(OSError, AttributeError, TypeError):  # a system whose C library is found by another name
        ctypes.CDLL(None).fflush(None)
