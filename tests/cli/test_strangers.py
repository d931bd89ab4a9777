"""Folders that somebody else made: nothing in them runs code, looks up the environment, or costs the user a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe_verb
import pytest

from kncompress.__main__ import VERBS
from kncompress.cli.sweep_folder import read_sweep
from kncompress.errors import UserError

Command = Callable[..., tuple[int, str, str]]
SECRET = "key-that-nobody-may-see"


@pytest.fixture
def train(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``train(*words)``: the probe verb under that name; the environment holds a key."""
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    return lambda *words: command("train", *words)


def found_with_secret() -> list[Path]:
    return [path for path in Path().rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


CALLBACK = "+hydra.callbacks.e={_target_: builtins.open, file: owned, mode: w}"
WORDS = [
    CALLBACK,
    "++hydra.callbacks.e._target_=builtins.open",
    "hydra.run.dir=elsewhere",
    "~hydra.job_logging",
    "hydra/launcher=${oc.env:HOME}",
    "hydra.sweeper._target_=builtins.open",
    "+experiment@hydra.callbacks=wikitext_ilkd",
    "logger.project=${oc.env:WANDB_API_KEY}",
]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", ["words", "jobs"])
def test_words_of_a_strangers_sweep_are_data(train: Command, word: str, place: str) -> None:
    assert train("-m", "seed=1,2", "run_dir=s")[0] == 0
    file = Path("s/sweep.json")
    values = json.loads(file.read_text())
    if place == "words":
        values["words"].append(word)
    else:
        values["jobs"][1].append(word)
    file.write_text(json.dumps(values))
    for path in Path("s/1").rglob("*"):
        if path.is_file():
            path.unlink()
    code, out, err = train("resume=s")
    assert code == 2 and err.startswith("kncompress: resume=") and word in err and err.count("\n") == 1, (out, err)
    assert not Path("owned").exists() and not Path("s/1/result.json").exists() and not found_with_secret()


def test_numbers_of_a_search_and_names_of_launchers_are_taken(train: Command) -> None:
    assert (
        train("-m", "logger.project=flaky,fine", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "run_dir=s")[0]
        == 1
    )
    code, _, err = train("resume=s")
    assert code == 0, err


def test_a_damaged_sweep_file_is_told(tmp_path: Path) -> None:
    jobs = [["seed=1"], ["seed=2"]]
    whole = {"verb": "train", "words": ["seed=1,2"], "overrides": [], "metrics": [], "jobs": jobs, "job_words": jobs}
    (tmp_path / "sweep.json").write_text(json.dumps(whole))
    assert read_sweep(tmp_path) is not None
    damaged: list[Any] = [[], "train", None]
    damaged += [{name: value for name, value in whole.items() if name != left_out} for left_out in whole]
    damaged += [whole | {name: value} for name in whole for value in (1, None, [1], [["seed=1"], 2], {"a": "b"})]
    for values in damaged:
        (tmp_path / "sweep.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"^run_dir=.*: sweep.json: "):
            read_sweep(tmp_path)


def test_nothing_is_looked_up_for_a_saved_value(train: Command) -> None:
    assert train("logger.project=flaky", "run_dir=r")[0] == 1
    file = Path("r/config.yaml")
    whole = file.read_text()
    assert "project: flaky" in whole
    for text in ("${oc.env:WANDB_API_KEY}", "\\\\${oc.env:WANDB_API_KEY}", "x-${logger.name}"):
        file.write_text(whole.replace("project: flaky", f"project: {text}"))
        code, _, err = train("resume=r")
        assert code == 2 and f"logger.project={text}; nothing is looked up" in err and err.count("\n") == 1, err
        assert not found_with_secret()
    file.write_text(whole.replace("project: flaky", "project: \\${oc.env:WANDB_API_KEY}"))  # text, as it is written
    assert train("resume=r")[0] == 0 and not found_with_secret()


def test_the_users_own_words_are_looked_up(train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT", "of-this-week")
    assert train("logger.project=${oc.env:PROJECT}", "run_dir=r")[0] == 0
    assert "project: of-this-week" in Path("r/config.yaml").read_text()


def test_files_of_the_user_are_left_alone(train: Command) -> None:
    own = {"notes.log": "mine", "train.log": "mine too", ".hydra/mine.yaml": "a: 1", ".hydra/hydra.yaml": "b: 2"}
    for name, text in own.items():
        file = Path("folder", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    code, _, err = train("resume=auto", "run_dir=folder")
    assert code == 2 and "holds files" in err
    assert {name: Path("folder", name).read_text() for name in own} == own


def test_a_run_killed_before_its_record_begins_again(train: Command) -> None:
    assert train("run_dir=r", "seed=4")[0] == 0
    for name in ("run.json", "result.json", ".lock"):
        Path("r", name).unlink(missing_ok=True)
    assert {path.name for path in Path("r").iterdir()} == {".hydra", "config.yaml", "train.log"}
    code, _, err = train("resume=auto", "run_dir=r", "seed=4")
    assert code == 0, err
    assert json.loads(Path("r/result.json").read_text())["metrics"]["perplexity"] == 14.0
