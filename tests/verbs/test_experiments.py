"""Every experiment runs for one batch, on a small local model and text."""

from pathlib import Path
from typing import Any

import pytest
from verbs.conftest import read

from kncompress.commands.presets import config_folder

EXPERIMENTS = sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml"))
SMALL_FROM_SCRATCH = [
    "model.architecture.n_embd=16",
    "model.architecture.n_layer=2",
    "model.architecture.n_head=2",
    "model.architecture.n_positions=32",
    "model.architecture.vocab_size=300",
]


def test_there_are_experiments() -> None:
    assert {"wikitext_ilkd", "mini_teacher"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_one_batch(command: Any, small: list[str], text: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KNCOMPRESS_DATA", str(text.parent))
    words = [*small, "trainer.steps=1", "run_dir=run"]
    if name == "mini_teacher":
        words = [word for word in words if not word.startswith("model=")] + SMALL_FROM_SCRATCH
        words += ["data.validation=null", "data.test=null"]
    code, _, err = command("train", f"+experiment={name}", *words)
    assert code == 0, err
    assert read(Path("run"), "result.json")["metrics"]["steps"] == 1


def test_experiments_are_short() -> None:
    for file in (config_folder() / "experiment").glob("*.yaml"):
        assert len(file.read_text().splitlines()) <= 18, file.name
