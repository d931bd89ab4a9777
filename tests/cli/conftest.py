"""The command line in this process (``command``) and in one of its own (``probe``)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import PATIENCE

import kncompress
from kncompress.__main__ import main

PROBE = Path(__file__).with_name("probe_verb.py")
PACKAGE_PARENT = Path(kncompress.__file__).parents[1]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``command(*words) -> (exit code, stdout, stderr)`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def shown(command: Callable[..., Any]) -> Callable[..., Any]:
    """``shown(*words)``: the composed configurations, one for each job."""

    def run(*words: str) -> list[Any]:
        code, out, err = command(*words, "--show")
        assert code == 0, err
        return list(yaml.safe_load_all(out))

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment of a child process that finds the package."""
    dropped = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_PROCID", "KNCOMPRESS_RUN_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": os.pathsep.join([str(PACKAGE_PARENT), str(PROBE.parent)])}


@pytest.fixture
def probe(tmp_path: Path, environment: dict[str, str]) -> Callable[..., Any]:
    """``probe(*words)``: the probe verb under the name ``train``, in a process of its own."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(PROBE), "train", *words],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run
