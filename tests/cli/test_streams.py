"""A reader who has enough is no error; a message is short on a terminal and whole in a log."""

import json
import os
import subprocess
import sys

import pytest

from kncompress.cli.streams import message


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_closed_pipe_is_no_error(words, tmp_path, environment):
    assert _closed_at_once(words, tmp_path, environment) == (0, b"")


def test_a_run_ends_as_it_ended_when_nobody_reads(tmp_path, environment):
    assert _closed_at_once(["inspect", "every_map=true", "run_dir=run"], tmp_path, environment) == (0, b"")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


def test_an_error_keeps_its_exit_code_when_nobody_reads(tmp_path, environment):
    code, _ = _closed_at_once(["inspect", "model=./nowhere"], tmp_path, environment)
    assert code == 2


def _closed_at_once(words, folder, environment):
    """Exit code and standard error of a command whose standard output is a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "kncompress", *words]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, cwd=folder, env=environment, timeout=600)
    os.close(writes)
    return done.returncode, done.stderr


def test_a_message_is_never_longer_than_two_lines_of_a_terminal(monkeypatch):
    text = "kncompress: data.source=" + "x" * 500 + ": no such file; give another"
    assert message(text) == text  # a log
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    short = message(text)
    assert len(short) < 160 and short.startswith("kncompress: data.source=xxx") and short.endswith("; give another")
    assert message("two\nlines") == "two lines"


def test_no_message_is_endless_in_a_log():
    assert len(message("x" * 50_000)) <= 1000
