"""Files and folders that are there whole or not at all, and that others may read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kncompress
from kncompress.runs import whole_file
from kncompress.runs.whole_file import filling, give_usual_mode, replacing


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_folder_takes_its_name_whole_and_its_files_the_mode_of_the_umask(tmp_path, umask):
    with filling(tmp_path / "model") as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "weights").touch(0o600)
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "inner" / "weights").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_the_mode_of_a_file(tmp_path, umask):
    (tmp_path / "file").touch(0o600)
    give_usual_mode(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert os.umask(umask) == umask


@pytest.mark.parametrize("at_once", [True, False])
def test_an_old_folder_is_exchanged(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(whole_file, "_renamed_at_once", lambda *_: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with filling(tmp_path / "model") as fresh:
        (fresh / "new").touch()
        assert (tmp_path / "model" / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_what_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with pytest.raises(RuntimeError), filling(tmp_path / "model") as fresh:
        (fresh / "new").touch()
        raise RuntimeError
    with pytest.raises(RuntimeError), replacing(tmp_path / "file"):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "old"]


KILLED = """
import os, signal, sys
from pathlib import Path
from kncompress.runs import whole_file
calls, fatal = 0, int(sys.argv[1])
def counted(frame, event, argument):
    global calls
    if event == "c_call" and "__main__" not in frame.f_globals.get("__name__", ""):
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[2])
with whole_file.filling(folder) as fresh:
    (fresh / "weights").write_text("new")
    (fresh / "config").write_text("new")
    sys.setprofile(counted)
sys.setprofile(None)
print(calls)
"""


def test_a_kill_between_any_two_calls_leaves_one_of_the_two_whole(tmp_path):
    """SIGKILL at each call of the last step, over an old folder: what is there is all old or all new."""
    environment = os.environ | {"PYTHONPATH": str(Path(kncompress.__file__).parents[1])}

    def run(fatal, folder):
        words = [sys.executable, "-c", KILLED, str(fatal), str(folder)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    (tmp_path / "counted").mkdir()
    calls = int(run(0, tmp_path / "counted" / "model").stdout)
    assert calls > 10
    seen = set()
    for fatal in range(1, calls + 1, max(1, calls // 12)):
        folder = tmp_path / str(fatal) / "model"
        folder.mkdir(parents=True)
        for name in ("weights", "config"):
            (folder / name).write_text("old")
        done = run(fatal, folder)
        assert done.returncode == -signal.SIGKILL, done.stderr
        held = {(folder / name).read_text() for name in ("weights", "config")}
        assert len(held) == 1, (fatal, held)
        seen |= held
    assert "old" in seen
