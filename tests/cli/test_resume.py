"""``resume=``: which folder is taken, which command goes with it, and that nothing else is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe_verb
import pytest
from filelock import FileLock

from kncompress.__main__ import VERBS, main
from kncompress.cli.resume import unfinished_run
from kncompress.errors import UserError
from kncompress.runs.config_file import read_config, write_config


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose run has failed half-way."""
    folder = tmp_path_factory.mktemp("failed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VERBS, "train", probe_verb.VERB)
        assert main(["train", "logger.project=flaky", "trainer.steps=7", f"run_dir={folder}"]) == 1
    return folder


@pytest.fixture
def run(failed: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, ``run`` in the working folder."""
    monkeypatch.setitem(VERBS, "train", probe_verb.VERB)
    shutil.copytree(failed, "run")
    return Path("run")


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def change(folder: Path, **values: str) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | values))


@pytest.mark.parametrize(
    ("spoil", "word", "message"),
    [
        (lambda run: None, "rum", "no such run folder; nearest: run"),
        (lambda run: None, "run/config.yaml", "no such run folder"),
        (lambda run: None, "gone/away/run", "no such run folder"),
        (lambda run: (run / "run.json").unlink(), "run", "not a run folder (no run.json in it)"),
        (lambda run: (run / "config.yaml").unlink(), "run", "not a run folder (no config.yaml in it)"),
        (lambda run: (run / "run.json").write_text('{"verb": "train"}'), "run", "run.json: has no status"),
        (lambda run: change(run, verb="compress"), "run", "a run of compress, not of train"),
        (lambda run: change(run, status="finished"), "run", "this run is finished"),
    ],
)
def test_what_is_no_unfinished_run_is_told(spoil: Callable[[Path], Any], word: str, message: str, run: Path) -> None:
    spoil(run)
    with pytest.raises(UserError) as caught:
        unfinished_run(probe_verb.VERB, word)
    assert str(caught.value).startswith("resume=") and f"{word}: {message}" in str(caught.value)


def test_a_configuration_that_cannot_be_read_is_told(run: Path, command: Callable[..., Any]) -> None:
    (run / "config.yaml").write_text("a: [${b")
    code, _, err = command("train", "resume=run")
    assert code == 2 and "/run: config.yaml: not valid YAML" in err and err.count("\n") == 1
    assert status(run) == "failed"


def test_a_cut_configuration_is_told_wherever_it_ends(run: Path, command: Callable[..., Any]) -> None:
    lines = (run / "config.yaml").read_bytes().splitlines(keepends=True)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "config.yaml"}
    assert lines[-1] == b"...\n"
    for kept in [*range(0, len(lines), 9), len(lines) - 1]:
        (run / "config.yaml").write_bytes(b"".join(lines[:kept]))
        code, _, err = command("train", "resume=run")
        assert code == 2 and "/run: config.yaml: its last line is not ..." in err and err.count("\n") == 1
        assert {file: file.read_bytes() for file in before} == before
    (run / "config.yaml").write_bytes(b"".join([*lines[:-1], b"... "]).rstrip())  # whole, without the last line break
    assert command("train", "resume=run")[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.steps=8"], "trainer.steps=8: the run in run has trainer.steps=7;"),
        (["+trainer.steps=8", "seed=3"], "trainer.steps=8, seed=3: the run in run has trainer.steps=7, seed=0;"),
        (["trainer.steps=7", "factors=dense"], "factors.embedding=None"),
        (["experiment=wikitext_ilkd"], ""),
    ],
)
def test_other_values_are_refused(words: list[str], told: str, command: Callable[..., Any], run: Path) -> None:
    code, _, err = command("train", "resume=run", *words)
    assert code == 2 and err.startswith(f"kncompress: {told}") and ": the run in run has " in err
    assert err.count("\n") == 1 and err.endswith("; leave it out, or start a new run\n") and status(run) == "failed"


@pytest.mark.parametrize("words", [[], ["trainer.steps=7", "++seed=0", "factors=kngpt2", "fail_fast=true"]])
def test_equal_values_go_on_as_they_were_saved(words: list[str], command: Callable[..., Any], run: Path) -> None:
    saved = read_config(run / "config.yaml")
    saved["logger"]["group"] = "of the saved run"  # not what the command line's defaults would give
    write_config(run / "config.yaml", saved)
    code, _, err = command("train", "resume=run", *words)
    assert code == 0, err
    here = {"run_dir": str(run.absolute()), "resume": str(run.absolute())}
    assert status(run) == "finished" and read_config(run / "config.yaml") == saved | here


def test_auto_with_a_folder_goes_on_or_refuses(command: Callable[..., Any], run: Path) -> None:
    words = ["logger.project=flaky", "trainer.steps=7", "run_dir=run", "resume=auto"]
    code, _, err = command("train", *words[:1], *words[2:], "seed=3", "trainer.steps=6")
    assert code == 2 and "seed=3" in err and "trainer.steps=6" in err and status(run) == "failed"
    assert " has " in err and "seed=0" in err and "trainer.steps=7" in err and "run_dir" not in err
    assert command("train", *words)[0] == 0 and status(run) == "finished"


def test_auto_passes_over_runs_that_are_finished_or_of_another_configuration(
    run: Path, command: Callable[..., Any]
) -> None:
    names = [f"runs/train-mini-kngpt2-2026010{day}-000000" for day in (1, 2, 3)]
    for name in names:
        shutil.copytree(run, name)
    other = read_config(Path(names[1], "config.yaml")) | {"seed": 2}
    write_config(Path(names[1], "config.yaml"), other)
    change(Path(names[2]), status="finished")
    assert command("train", "logger.project=flaky", "trainer.steps=7", "resume=auto")[0] == 0
    assert [status(Path(name)) for name in names] == ["finished", "failed", "finished"]
    assert json.loads(Path(names[0], "run.json").read_text())["resumes"] and len(list(Path("runs").iterdir())) == 3


def test_the_further_processes_of_a_run_find_the_first_at_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileLock(run / ".lock"):
        monkeypatch.setenv("KNCOMPRESS_RUN_DIR", "run")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert unfinished_run(probe_verb.VERB, str(run)) == run.absolute()
