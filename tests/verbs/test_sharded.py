"""``trainer.strategy=fsdp`` on two CPU processes: the training of one process, gone on with by any number of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from verbs.conftest import read, rows_by_step

from kncompress.runs.metrics_file import complete_rows

TWO = ["trainer.strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"]
MORE = ["trainer.steps=6", "trainer.validate_every=3", "trainer.checkpoint_every=1", "trainer.validation_tokens=416"]


def same(one: Path, two: Path, rel: float, atol: float = 1e-5) -> None:
    """Metrics and losses of every step to ``rel``, weights to ``atol``, of two runs; to the bit where ``rel`` is 0."""
    ours, theirs = read(one, "result.json")["metrics"], read(two, "result.json")["metrics"]
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"tokens_per_second"}:
        assert theirs[name] == pytest.approx(ours[name], rel=rel), name
    rows = [complete_rows(run / "metrics.csv") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) >= 6 and any(row["validation/loss"] for row in rows[0])
    for first, second in zip(*rows, strict=True):
        for name in first.keys() - {"train/tokens_per_second"}:
            assert (first[name] == "") == (second[name] == "")
            if first[name]:
                assert float(second[name]) == pytest.approx(float(first[name]), rel=rel), name
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    # The bias of the keys has no gradient but rounding, which Adam turns into steps of the learning rate.
    keyless = [key for key in ours if not key.endswith("c_attn.bias") and ".k." not in key]
    for key in keyless:
        torch.testing.assert_close(theirs[key], ours[key], atol=atol if rel else 0.0, rtol=0.0, msg=key)


def files(run: Path) -> dict[str, str]:
    """Of the model's folder, with what says the same in every run of it."""
    folder = run / "model"
    return {file.name: file.read_text() if file.name == "config.json" else "" for file in sorted(folder.iterdir())}


@pytest.fixture
def whole(watched: Any, small: list[str], tmp_path: Path) -> list[str]:
    """The words of a run in ``whole``, by two processes with shards; its log is ``log-whole``."""
    words = [*small, *MORE, *TWO]
    done = watched(*words, "run_dir=whole", log=tmp_path / "log-whole")
    assert done.returncode == 0, done.stderr
    return words


def test_shards_train_as_one_process_and_as_copies(process: Any, whole: list[str], tmp_path: Path) -> None:
    for name, word in (("one", "trainer.strategy=auto"), ("copies", "trainer.strategy=ddp")):
        more = ["trainer.devices=1"] if name == "one" else []
        done = process("train", *whole, word, *more, f"run_dir={name}")
        assert done.returncode == 0, done.stderr
        same(tmp_path / name, tmp_path / "whole", 1e-5)
        assert files(tmp_path / name) == files(tmp_path / "whole")
        checkpoints = [
            torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in (name, "whole")
        ]
        assert checkpoints[0]["state_dict"].keys() == checkpoints[1]["state_dict"].keys()
        states = [each["optimizer_states"][0] for each in checkpoints]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for number, entry in states[0]["state"].items():
            assert states[1]["state"][number]["exp_avg"].shape == entry["exp_avg"].shape


@pytest.mark.slow
def test_any_number_of_processes_goes_on(watched: Any, process: Any, whole: list[str], tmp_path: Path) -> None:
    failed = watched(*whole, "run_dir=part", log=tmp_path / "log-part", FAIL="0 1")
    assert failed.returncode == 1 and read(tmp_path / "part", "result.json")["status"] == "failed"
    copies = ("same", "one", "four", "ddp")
    for name in copies:
        shutil.copytree(tmp_path / "part", tmp_path / name)
    for name, words, rel in (
        ("same", [], 0.0),
        ("one", ["trainer.strategy=auto", "trainer.devices=1"], 1e-5),
        ("four", ["trainer.devices=4"], 1e-5),
        ("ddp", ["trainer.strategy=ddp"], 1e-5),
    ):
        done = watched(f"resume={name}", *words, log=tmp_path / f"log-{name}")
        assert done.returncode == 0, done.stderr
        same(tmp_path / "whole", tmp_path / name, rel)
        assert rows_by_step(tmp_path / "log-part", tmp_path / f"log-{name}") == rows_by_step(tmp_path / "log-whole")
    fewer = [word for word in whole if "devices" not in word]
    shutil.rmtree(tmp_path / "one")
    shutil.copytree(tmp_path / "part", tmp_path / "one")
    done = process("train", *fewer, "trainer.devices=1", "resume=auto", "run_dir=one")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "whole", tmp_path / "one", 1e-5)
    changed = read(tmp_path / "one", "run.json")["resumes"][-1]
    assert "trainer.devices" in json.dumps(changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "cache", "last"])
def test_other_settings_train_as_one_process(watched: Any, small: list[str], tmp_path: Path, kind: str) -> None:
    words = {
        "muon": ["optimizer=muon", "factors=dense"],
        "cache": ["objective=logits", "objective.cache=draws"],
        "last": ["trainer.keep=last", "objective=cross_entropy", "samples.count=0"],
    }[kind]
    for name, more in (("one", ["trainer.accelerator=cpu"]), ("two", TWO)):
        given = [word.replace("draws", f"draws-{name}") for word in words]
        done = watched(*small, *MORE, *given, *more, f"run_dir={name}", log=tmp_path / f"log-{name}", MUON="float32")
        assert done.returncode == 0, done.stderr
    # The student begins as its teacher here: divergences are small numbers, and have fewer digits.
    same(tmp_path / "one", tmp_path / "two", 1e-3 if kind == "muon" else 1e-5)


def test_a_damaged_checkpoint_is_one_line(command: Any, small: list[str]) -> None:
    """Before any other process starts."""
    words = [*small, "trainer.accelerator=cpu", "trainer.strategy=fsdp", "run_dir=run"]
    assert command("train", *words)[0] == 0
    run = json.loads(Path("run/run.json").read_text()) | {"status": "running"}
    Path("run/run.json").write_text(json.dumps(run))
    last = Path("run/checkpoints/last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    code, _, err = command("train", "resume=run", "trainer.devices=2")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "checkpoints/last.ckpt is damaged" in err and "is not as it was written" in err
    assert before == {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}


def test_a_loss_that_leaves_the_last_layer_out_is_refused(command: Any, small: list[str]) -> None:
    words = ["objective.cross_entropy=0", "objective.logits=0", "objective.hidden=0", "objective.attention=1"]
    code, _, err = command("train", *small, *TWO, *words, "run_dir=run")
    assert code == 2 and "trainer.strategy=fsdp: needs a loss behind the last layer" in err
    assert len(err.strip().splitlines()) == 1 and not Path("run").exists()
