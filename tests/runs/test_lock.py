"""One process at a time works in a folder."""

from pathlib import Path

import pytest
from filelock import FileLock

from kncompress.errors import UserError
from kncompress.runs.lock import LOCK, held, in_use, lock
from kncompress.runs.record import RunRecord


def test_a_folder_is_in_use_while_it_is_held(tmp_path: Path) -> None:
    assert not in_use(tmp_path) and not (tmp_path / LOCK).exists()  # to ask leaves nothing behind
    with held(tmp_path):
        assert in_use(tmp_path)
        with pytest.raises(UserError, match=f"resume={tmp_path}: another process is at work in it"):
            lock(tmp_path, "resume")
    assert not in_use(tmp_path)
    with pytest.raises(ValueError, match="gone wrong"), held(tmp_path):
        raise ValueError("gone wrong")
    assert not in_use(tmp_path)


def test_who_only_asks_keeps_nobody_out(tmp_path: Path) -> None:
    """The other holds the lock for a moment; a record waits for it."""
    with held(tmp_path):
        assert in_use(tmp_path)
    asking = FileLock(tmp_path / LOCK)
    asking.acquire()
    asking.release()
    with RunRecord.open(tmp_path, "train", {}, 0):
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
