"""``train``: what it leaves, what it refuses, how it is stopped and resumed, and sweeps."""

import csv
import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from verbs.conftest import interrupted_when, read
from waiting import PATIENCE, wait_for
from wandb_log import offline_log


def test_a_run_leaves_its_record_metrics_and_a_model(command: Any, small: list[str], tiny: Path) -> None:
    code, out, err = command("train", *small, "run_dir=run", "logger=wandb", "factors.qkv.right=[1,2]")
    assert code == 0, err
    assert Path("run/train.log").exists()
    assert not [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    result = read(Path("run"), "result.json")
    assert result["verb"] == "train" and result["status"] == "finished" and result["model"] == "model"
    metrics = result["metrics"]
    for name in ("perplexity/teacher", "perplexity/start", "perplexity/student", "kl/start", "kl/student",
                 "parameters/teacher", "parameters/student", "tokens_per_second", "error/mean"):  # fmt: skip
        assert metrics[name] > 0, name
    assert metrics["tokens"] == 4 * 128 and metrics["steps"] == 4

    run = read(Path("run"), "run.json")
    assert run["status"] == "finished" and run["wandb_id"] and run["wall_seconds"] > 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["factors"]["qkv"]["right"] == [1, 2] and config["model"]["path"] == str(tiny)
    with Path("run/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert any(row["train/loss"] for row in rows) and any(row["validation/loss"] for row in rows)
    (log,) = Path("run/wandb").rglob("*.wandb")
    assert run["wandb_id"] in log.name

    card = Path("run/model/README.md").read_text()
    assert f"| perplexity/student | {metrics['perplexity/student']:,.6g} |" in card and "- text: story.txt" in card

    student = AutoModelForCausalLM.from_pretrained("run/model")
    assert sum(p.numel() for p in student.parameters()) == metrics["parameters/student"]
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    samples = read(Path("run"), "samples.json")
    assert len(samples) == 3 and all(set(row) == {"prompt", "text", "teacher", "student"} for row in samples)
    ids = tokenizer(samples[0]["prompt"], return_tensors="pt")["input_ids"]
    written = student.generate(ids, max_length=32, do_sample=False, eos_token_id=0, pad_token_id=0)[0, ids.shape[1] :]
    assert samples[0]["student"] == tokenizer.decode(written, skip_special_tokens=True)
    table = read(Path("run"), "compression.json")
    assert table["parameters_after"] == metrics["parameters/student"] and table["rows"]
    for word in ("teacher", "student at the start", "student, trained", "gap"):
        assert word in out
    assert "step 4/4" in err


def test_training_starts_from_a_calibrated_fit(command: Any, small: list[str]) -> None:
    found = {}
    for start in ("nearest", "sequential"):
        words = [*small, "trainer.steps=1", "calibration.tokens=1500", f"start={start}", f"run_dir={start}"]
        code, _, err = command("train", *words)
        assert code == 0, err
        found[start] = read(Path(start), "result.json")["metrics"]
    assert "error/weighted" not in found["nearest"] and 0 < found["sequential"]["error/weighted"] < 1
    assert found["sequential"]["kl/start"] < found["nearest"]["kl/start"]


def test_distillation_in_bf16_brings_the_student_closer(command: Any, small: list[str]) -> None:
    words = [word for word in small if not word.startswith("trainer.precision")]
    words += ["trainer.precision=bf16", "trainer.steps=60", "optimizer.lr=1e-2", "objective.cross_entropy=0"]
    code, _, err = command("train", *words, "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["kl/student"] < 0.9 * metrics["kl/start"]


def test_a_model_from_scratch_learns_and_gets_its_own_tokenizer(command: Any, small: list[str]) -> None:
    words = [word for word in small if not word.startswith("model=")]
    architecture = "{model_type: gpt2, vocab_size: 300, n_embd: 16, n_layer: 2, n_head: 2, n_positions: 32}"
    code, _, err = command(
        "train", *words, "model.path=null", f"model.architecture={architecture}", "factors=dense",
        "objective=cross_entropy", "optimizer=muon", "optimizer.lr=1e-2", "trainer.steps=40", "run_dir=run",
    )  # fmt: skip
    assert code == 0, err
    assert read(Path("run"), "result.json")["metrics"]["perplexity/student"] < 200
    assert len(AutoTokenizer.from_pretrained("run/model")) == 300


def test_best_weights_are_kept_where_asked(command: Any, small: list[str]) -> None:
    # A rate that is far too high: the first validation is the best.
    words = [*small, "optimizer.lr=1", "optimizer.warmup=0.9", "trainer.validate_every=1", "trainer.steps=6"]
    perplexities = {}
    for keep in ("best", "last"):
        code, _, err = command("train", *words, f"run_dir={keep}", f"trainer.keep={keep}")
        assert code == 0, err
        perplexities[keep] = read(Path(keep), "result.json")["metrics"]["perplexity/student"]
    assert perplexities["best"] < perplexities["last"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["factors.mlp.right=[7,1]"], "factors.mlp.right=[7, 1]: 7 does not divide 64"),
        (["factors.layers=[5]"], "factors.layers=[5]: the model has layers 0 to 1"),
        (["data.source=nowhere.txt"], "data.source=nowhere.txt: no such file or folder"),
        (["model=nowhere/at/all"], "nowhere/at/all"),
        (["data.context=64"], "data.context=64: the model has 32 positions"),
        (["trainer.stepss=3"], "steps"),
        (["++trainer.stepss=3"], "steps"),
        (["objective.logits=0", "objective.cross_entropy=0", "objective.embedding=0", "objective.attention=0",
          "objective.feed_forward=0"], "every weight is 0"),
        (["trainer.steps=-1"], "trainer.steps=-1: must be greater than 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Any, small: list[str], words: list[str], message: str
) -> None:
    replaced = {word.partition("=")[0] for word in words}
    kept = [word for word in small if word.partition("=")[0] not in replaced]
    code, _, err = command("train", *kept, *words, "run_dir=run")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not Path("run").exists()


def test_a_plan_that_matches_nothing(command: Any, small: list[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("maps:\n  layers.9.*: keep\n")
    code, _, err = command("train", *small, f"factors={plan}", "run_dir=run")
    assert code == 2 and "factors.maps.layers.9.*: matches no map of the model" in err
    assert len(err.strip().splitlines()) == 1 and not Path("run").exists()


def test_empty_text_and_a_misfit_tokenizer(command: Any, small: list[str], tmp_path: Path, text: Path) -> None:
    from kncompress.data.tokenizer import train_tokenizer

    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    kept = [word for word in small if not word.startswith("data.source")]
    code, _, err = command("train", *kept, f"data.source={blank}", "run_dir=blank")
    assert code == 2 and "no text in the" in err and len(err.strip().splitlines()) == 1
    train_tokenizer([text.read_text()], 310, context=32).save_pretrained(tmp_path / "tokenizer")
    code, _, err = command("train", *small, f"model.tokenizer={tmp_path / 'tokenizer'}", "run_dir=misfit")
    assert code == 2 and "has 310 tokens and the model's embedding only 300 rows" in err


def test_a_folder_with_another_run_is_left_alone(command: Any, small: list[str]) -> None:
    assert command("train", *small, "run_dir=run")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    code, _, err = command("train", *small, "run_dir=run")
    assert code == 2 and "holds another run" in err
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    code, _, err = command("train", "resume=run")
    assert code == 2 and "this run is finished" in err


def test_nan_stops_with_exit_1_and_keeps_the_last_good_checkpoint(command: Any, small: list[str]) -> None:
    words = [*small, "optimizer.lr=1e30", "optimizer.warmup=0", "trainer.gradient_clip=0", "trainer.steps=20"]
    code, _, err = command("train", *words, "trainer.checkpoint_every=1", "run_dir=run")
    assert code == 1
    assert "diverged" in err
    assert read(Path("run"), "result.json")["status"] == "failed"
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_sweep_over_shapes_has_a_run_and_a_result_for_each_job(command: Any, small: list[str]) -> None:
    words = [*small, "trainer.steps=2", "logger=wandb"]
    code, _, err = command(
        "train", "-m", *words, "factors.mlp.right=[1,2],[2,1]", "factors.mlp.terms=1,2", "run_dir=sweep"
    )
    assert code == 0, err
    results = sorted(Path("sweep").glob("*/result.json"))
    assert [path.parent.name for path in results] == ["0", "1", "2", "3"]
    assert all(json.loads(path.read_text())["status"] == "finished" for path in results)
    ids = {read(path.parent, "run.json")["wandb_id"] for path in results}
    logs = {path.name for path in Path("sweep").rglob("*.wandb")}
    assert len(ids) == len(logs) == 4
    students = [json.loads(path.read_text())["metrics"]["parameters/student"] for path in results]
    assert students[0] == students[2] < students[1] == students[3]
    with Path("sweep/sweep.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4


def test_an_impossible_job_is_told_before_the_first_starts(command: Any, small: list[str]) -> None:
    code, _, err = command("train", "-m", *small, "factors.mlp.right=[1,2],[7,1],[1,5]", "run_dir=sweep")
    assert code == 2
    assert "job 1: factors.mlp.right=[7, 1]" in err and "job 2: factors.mlp.right=[1, 5]" in err
    assert not Path("sweep").exists()


def _stop(process: Callable[..., Any], words: list[str], folder: Path, number: signal.Signals) -> int:
    """Start a run, send it a signal after its first checkpoint, return its exit code."""
    stopped = process("train", *words, f"run_dir={folder}", start=True)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, stopped)
    stopped.send_signal(number)
    stopped.communicate(timeout=PATIENCE)
    return int(stopped.returncode)


def test_ctrl_c_is_130(process: Callable[..., Any], small: list[str], tmp_path: Path) -> None:
    words = [*small, "trainer.steps=5000", "trainer.checkpoint_every=5"]
    assert _stop(process, words, tmp_path / "run", signal.SIGINT) == 130
    assert read(tmp_path / "run", "result.json")["status"] == "interrupted"


def test_the_saved_model_gives_equal_logits_in_another_process(command: Any, small: list[str], tmp_path: Path) -> None:
    assert command("train", *small, "run_dir=run")[0] == 0
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained("run/model")(input_ids=ids).logits
    torch.save(here, tmp_path / "logits.pt")
    program = (
        "import sys, torch, kncompress\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): logits = model(input_ids=torch.arange(1, 20)[None]).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[2], weights_only=True))\n"
    )
    line = [sys.executable, "-c", program, str(Path("run/model").absolute()), str(tmp_path / "logits.pt")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_is_not_repaired_again(
    command: Any, small: list[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small, "start=nearest", "repair.passes=2", "calibration.tokens=2000", "factors.scalars=true"]
    words += ["optimizer.factor_rates=scaled", "trainer.keep=last"]
    code, _, err = command("train", *words, "run_dir=run")
    assert code == 0, err
    metrics, kept = read(Path("run"), "result.json")["metrics"], read(Path("run"), "repair.json")
    assert 0 < metrics["blocks/after"] < metrics["blocks/before"] == kept["blocks/before"]
    weights = Path("run/model/model.safetensors").read_bytes()
    (run := Path("run/run.json")).write_text(json.dumps(read(Path("run"), "run.json") | {"status": "interrupted"}))

    def refuse(*_: Any) -> None:
        raise AssertionError("repaired again")

    monkeypatch.setattr("kncompress.compression.compress.BlockRepair", refuse)
    code, _, err = command("train", "resume=run")
    assert code == 0, err
    again = read(Path("run"), "result.json")["metrics"]
    assert {key: again[key] for key in kept} == kept and json.loads(run.read_text())["status"] == "finished"
    assert again["perplexity/start"] == metrics["perplexity/start"]
    assert Path("run/model/model.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("interruptible")
def test_a_resumed_run_is_not_fitted_again(command: Any, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*small, "start=calibrated", "calibration.tokens=512", "fit.symmetries=[residual,hidden]", "objective=ilkd"]
    words += ["trainer.steps=40", "trainer.validate_every=40", "trainer.checkpoint_every=1", "samples.count=0"]
    assert command("train", *words, "run_dir=straight")[0] == 0
    last = Path("stopped/checkpoints/last.ckpt").absolute()
    with interrupted_when(last.exists):
        assert command("train", *words, "run_dir=stopped")[0] == 130

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("kncompress.training.preparation.calibration_text", refuse)
    code, _, err = command("train", "resume=stopped")
    assert code == 0, err
    runs = [read(Path(name), "result.json")["metrics"] for name in ("straight", "stopped")]
    assert {k: v for k, v in runs[0].items() if "second" not in k} == {
        k: v for k, v in runs[1].items() if "second" not in k
    }
    models = [Path(name, "model/model.safetensors").read_bytes() for name in ("straight", "stopped")]
    assert models[0] == models[1] and read(Path("stopped"), "compression.json")["arrangement"]["residual"]


def test_a_model_that_cannot_write_samples_is_saved_all_the_same(
    command: Any, small: list[str], tiny: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny, tmp_path / "teacher")
    settings = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps(settings | {"bad_words_ids": [[9999]]}))  # of 300
    words = [word for word in small if not word.startswith("model=")]
    code, _, err = command("train", *words, f"model={teacher}", "run_dir=run", "logger=wandb", "trainer.steps=2")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert line.startswith("kncompress: warning: samples: ValueError: ")
    assert read(Path("run"), "result.json")["model"] == "model" and Path("run/summary.txt").exists()
    assert Path("run/model/model.safetensors").exists() and not Path("run/samples.json").exists()
    run = read(Path("run"), "run.json")
    assert run["status"] == "finished" and run["warnings"] == [line.removeprefix("kncompress: warning: ")]
    assert [entry.exit.exit_code for entry in offline_log(Path("run")) if entry.HasField("exit")] == [0]


def test_a_run_that_logs_to_a_file_alone_needs_no_wandb(
    command: Any, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it is an error
    code, _, err = command("train", *small, "trainer.steps=1", "trainer.validate_every=1", "run_dir=run")
    assert code == 0, err
    assert read(Path("run"), "run.json")["warnings"] == [] and read(Path("run"), "samples.json")
