"""Hashes of what a run reads: they change with a model, a tokenizer and a text, and with nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import config_of, random_model

from kncompress.config import DataConfig, ModelConfig
from kncompress.data.tokenizer import train_tokenizer
from kncompress.errors import UserError
from kncompress.glue.readers import FolderSource, PolaritySource, source_content
from kncompress.glue.tasks import TASKS
from kncompress.runs.run_folder import check_contents
from kncompress.training.contents import contents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(config_of("gpt2")).save_pretrained(tmp_path / "model")
    train_tokenizer(["one two three"] * 9, 258, context=32).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three")
    return tmp_path


def found(folder: Path) -> dict[str, str]:
    model = str(folder / "model")
    return contents(ModelConfig(path=model), DataConfig(source=str(folder / "text.txt")), {"student": model})


def spoil(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


def test_each_key_has_the_hash_of_its_content(folder: Path) -> None:
    before = found(folder)
    assert set(before) == {"model.path", "model.tokenizer", "student", "data.source"} and found(folder) == before
    (folder / "model" / "README.md").write_text("a card")

    def changed() -> set[str]:
        return {key for key, value in found(folder).items() if value != before[key]}

    assert changed() == set()
    (folder / "text.txt").write_text("one two four")
    assert changed() == {"data.source"}
    settings = json.loads((folder / "model/tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "model/tokenizer.json").write_text(json.dumps(settings))
    assert changed() == {"data.source", "model.tokenizer"}
    spoil(folder / "model/config.json", b'"resid_pdrop": 0.1', b'"resid_pdrop": 0.2')
    assert changed() == {"data.source", "model.tokenizer", "model.path", "student"}


def test_a_run_that_has_read_something_else_is_told(tmp_path: Path) -> None:
    record: dict[str, Any] = {"verb": "glue", "status": "running", "contents": {"baselines.half": "1", "gone": "2"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    config = {"baselines": {"half": "a/b"}}
    check_contents(tmp_path, config, {"baselines.half": "1", "more": "3"})
    with pytest.raises(UserError, match=rf"^resume={tmp_path}: baselines\.half=a/b: is not what the run began with"):
        check_contents(tmp_path, config, {"baselines.half": "2"})


def test_files_of_glue_are_hashed(tmp_path: Path) -> None:
    task = TASKS["sst2"]
    (tmp_path / task.folder).mkdir()
    (tmp_path / task.folder / "train.tsv").write_text("sentence\tlabel\na\t1\n")
    source = FolderSource("g", tmp_path)
    before = source_content(source, [task])
    (tmp_path / task.folder / "train.tsv").write_text("sentence\tlabel\na\t0\n")
    assert source_content(source, [task]) != before and source_content(PolaritySource(), []) == "sample"
