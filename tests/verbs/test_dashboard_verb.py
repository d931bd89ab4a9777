"""``dashboard``: files without a key, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from kncompress.diagnosis.network import wandb_key

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed (extra dashboard)")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_without_a_key_both_are_files(command: Any) -> None:
    code, out, err = command("dashboard", "project=shapes", "entity=team", "title=Mine", "run_dir=board")
    assert code == 0, err
    assert "not saved to the server" in out
    view = json.loads(Path("board/workspace.json").read_text())
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "shapes", "Mine")
    assert json.loads(Path("board/wandb_report.json").read_text())["project"]["name"] == "shapes"
    assert json.loads(Path("board/result.json").read_text())["metrics"] == {"saved": 0.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["save=always"], "save=always: no W&B key"),
        (["save=perhaps"], "save=perhaps: not one of auto, always, never"),
        (["project="], "project=: give the name"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command: Any, words: list[str], message: str) -> None:
    code, _, err = command("dashboard", *words)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_a_key_is_found_where_wandb_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_key() is None
    hosts = ("api.wandb.ai", "wandb.example.org:8080")
    entries = [f"machine {host}\n  login user\n  password of-a-test\n" for host in hosts]
    (tmp_path / "netrc").write_text("".join(entries))
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_key() == str(tmp_path / "netrc")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_key() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    assert wandb_key() == str(tmp_path / "netrc")
    monkeypatch.setenv("WANDB_API_KEY", "of-a-test")
    assert wandb_key() == "WANDB_API_KEY"


def test_always_is_not_held_against_a_mode_that_forbids_it(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "of-a-test")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, _, err = command("dashboard", "save=always")
    assert code == 2 and "save=always: WANDB_MODE=offline keeps off the network" in err and err.count("\n") == 1
    assert not Path("runs").exists()
