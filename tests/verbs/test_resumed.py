"""A run that is resumed reads what it began with, undamaged, and tidies up after the process that was killed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verbs.conftest import read

from kncompress.__main__ import main
from kncompress.runs.metrics_file import complete_rows

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``teacher``, ``text.txt``, ``cache`` and a finished ``run``."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny, folder / "teacher")
    shutil.copy(text, folder / "text.txt")
    words = [f"model={folder / 'teacher'}", f"data.source={folder / 'text.txt'}", f"data.cache_dir={folder / 'cache'}"]
    words += ["trainer.batch_tokens=128", "trainer.steps=4", "trainer.validate_every=2", "trainer.precision=fp32"]
    assert main(["train", *words, "logger=csv", f"run_dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def killed(finished: Path, tmp_path: Path) -> Path:
    """The same, in a folder of its own, as if it had been killed after its last step."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    for name in ("run.json", "config.yaml"):
        file = folder / "run" / name
        file.write_text(file.read_text().replace(str(finished), str(folder)))
    file = folder / "run" / "run.json"
    file.write_text(json.dumps(read(folder / "run", "run.json") | {"status": "running"}))
    return folder


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rows(run: Path) -> list[dict[str, str]]:
    """Of ``metrics.csv``, without the epoch, which Lightning counts up at its end alone."""
    return [{k: v for k, v in row.items() if k != "epoch"} for row in complete_rows(run / "metrics.csv")]


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoint": (
        lambda f: flip(f / "run/checkpoints/last.ckpt", 9_000),
        "resume={run}: checkpoints/last.ckpt is damaged (",
    ),
    "checkpoint's end": (lambda f: flip(f / "run/checkpoints/last.ckpt", -30), "checkpoints/last.ckpt is damaged ("),
    "start": (lambda f: edit(f / "run/start.json", kl="x"), 'resume={run}: start.json: kl="x": must be a valid number'),
    "fit": (
        lambda f: edit(f / "run/compression.json", arrangement={"residual": [0, 0]}),
        "resume={run}: compression.json: arrangement.residual: is no order of 2 coordinates",
    ),
    "repair": (lambda f: (f / "run/repair.json").write_text("[]"), "resume={run}: repair.json: []: must be"),
    "record": (lambda f: edit(f / "run/run.json", wall_seconds=-1), "resume={run}: run.json: wall_seconds=-1: must be"),
    "metrics": (lambda f: (f / "run/metrics.csv").write_text("a,b\n1,2\n"), "resume={run}: metrics.csv: line 1: "),
    "teacher": (
        lambda f: flip(f / "teacher/model.safetensors", -3),
        "model.path={folder}/teacher: is not what the run",
    ),
    "teacher's settings": (lambda f: edit(f / "teacher/config.json", resid_pdrop=0.5), "model.path="),
    "tokenizer": (
        lambda f: edit(f / "teacher/tokenizer.json", normalizer={"type": "Lowercase"}),
        "resume={run}: model.tokenizer=None: is not what the run began with",
    ),
    "text": (
        lambda f: (f / "text.txt").write_text("Another text. " * 900),
        "data.source={folder}/text.txt: is not what",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_or_another_is_named_and_nothing_is_written(killed: Path, what: str, command: Command) -> None:
    spoil, words = DAMAGE[what]
    spoil(killed)
    before = files(killed)
    code, _, err = command("train", f"resume={killed / 'run'}")
    assert code == 2 and words.format(folder=killed, run=killed / "run") in err and err.count("\n") == 1, err
    assert files(killed) == before


def test_a_resume_at_the_end_tidies_up_and_adds_no_row(killed: Path, command: Command) -> None:
    run = killed / "run"
    left = [".run.json.123.tmp", "checkpoints/.last.ckpt.77.tmp", ".model.part-ab12cd_9/model/config.json"]
    kept = [".notes.tmp", ".model.backup/config.json", "checkpoints/mine.ckpt"]
    for name in left + kept:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    metrics, weights = rows(run), (run / "model/model.safetensors").read_bytes()
    code, _, err = command("train", f"resume={run}")
    assert code == 0, err
    assert read(run, "run.json")["status"] == "finished"
    assert rows(run) == metrics
    assert (run / "model/model.safetensors").read_bytes() == weights
    assert not any((run / name).exists() for name in left) and all((run / name).exists() for name in kept)
