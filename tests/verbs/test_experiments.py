"""Every experiment runs for one batch, on a small local model and text."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from verbs.conftest import read

from kncompress.cli.presets import config_folder

EXPERIMENTS = sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml"))
GLUE = [name for name in EXPERIMENTS if name.startswith("glue")]
SMALL_FROM_SCRATCH = [
    "model.architecture.n_embd=16",
    "model.architecture.n_layer=2",
    "model.architecture.n_head=2",
    "model.architecture.n_positions=32",
    "model.architecture.vocab_size=300",
]
FROM_THE_HUB = {
    "gpt2_wikitext_ilkd": "hub:Salesforce/wikitext:wikitext-103-raw-v1",
    "openwebtext_ilkd": "hub:Skylion007/openwebtext",
}


def test_there_are_experiments() -> None:
    assert {"wikitext_ilkd", "mini_teacher", "glue_ilkd", *FROM_THE_HUB} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in GLUE])
def test_one_batch(command: Any, small: list[str], text: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KNCOMPRESS_DATA", str(text.parent))
    words = [*small, "trainer.steps=1", "run_dir=run"]
    if name == "shrink":
        words += ["trainer.minutes=null", "budget=0.9"]
    if name == "mini_teacher":
        words = [word for word in words if not word.startswith("model=")] + SMALL_FROM_SCRATCH
        words += ["data.validation=null", "data.test=null"]
    code, _, err = command("train", f"+experiment={name}", *words)
    assert code == 0, err
    assert read(Path("run"), "result.json")["metrics"]["steps"] == 1


@pytest.mark.parametrize("name", GLUE)
def test_one_batch_of_glue(command: Any, tiny: Path, tmp_path: Path, name: str) -> None:
    words = [f"teacher={tiny}", "fine_tuning.epochs=1", "data.train_examples=8", "data.max_length=32"]
    code, _, err = command("glue", f"+experiment={name}", *words, f"data.cache_dir={tmp_path}", "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["glue/polarity/train_examples"] == 8 and metrics["glue/polarity/dev_examples"] == 50
    assert 0 < metrics["glue/average/student_ilkd"] <= 1


@pytest.mark.parametrize("name", FROM_THE_HUB)
def test_experiments_of_the_hub_compose_without_it(command: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("the hub was asked for")

    for function in ("local_folder", "require", "check_model"):
        monkeypatch.setattr(f"kncompress.hub.{function}", forbidden)
    code, out, err = command("train", f"+experiment={name}", "--show")
    assert code == 0, err
    config = yaml.safe_load(out)
    assert config["model"]["path"] == "openai-community/gpt2"
    assert config["data"]["source"] == FROM_THE_HUB[name]
    assert config["data"]["fraction"] == (0.1 if name == "openwebtext_ilkd" else 1.0)
    assert config["factors"]["embedding"] and config["objective"]["feed_forward"] > 0
    # Whole blocks of GPT-2's context of 1,024.
    assert config["trainer"]["batch_tokens"] % 1024 == config["trainer"]["micro_batch_tokens"] % 1024 == 0


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_wikitext_ilkd"])
def test_one_step_of_the_real_thing(command: Any, name: str) -> None:
    words = ["trainer.steps=1", "trainer.batch_tokens=1024", "data=wikitext2", "logger=csv", "run_dir=run"]
    code, _, err = command("train", f"+experiment={name}", *words)
    assert code == 0, err
    assert read(Path("run"), "result.json")["metrics"]["parameters/student"] == 83_907_530


def test_experiments_are_short() -> None:
    for file in (config_folder() / "experiment").glob("*.yaml"):
        assert len(file.read_text().splitlines()) <= 18, file.name
