"""``train`` with a budget, minutes, a second text, exports and a page: the whole way in one command."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from verbs.conftest import interrupted_when, read

from kncompress.config import TrainConfig
from kncompress.errors import UserError
from kncompress.runs.metrics_file import complete_rows
from kncompress.training.checkpoints import read_checkpoint

SHRINK = ["+experiment=shrink", "budget=0.9", "calibration.tokens=256", "trainer.checkpoint_every=1", "samples.count=0"]


@pytest.fixture
def words(small: list[str]) -> list[str]:
    """Overrides that make it a matter of seconds."""
    return [*SHRINK, *(word for word in small if "steps" not in word and "validate_every" not in word)]


def test_plans_trains_by_the_clock_compares_exports_and_reports(command: Any, words: list[str], text: Path) -> None:
    Path("other.txt").write_text(text.read_text()[::-1])
    more = ["unseen=other.txt", "export=[dense,merged]", "trainer.minutes=0.05", "run_dir=run"]
    code, out, err = command("train", *words, *more)
    assert code == 0, err
    run = Path("run")
    metrics, plan = read(run, "result.json")["metrics"], read(run / "plan", "result.json")["metrics"]
    assert metrics["parameters/student"] == plan["parameters/student"] <= 0.9 * metrics["parameters/teacher"]
    assert metrics["steps"] >= 1 and metrics["tokens"] == 128 * metrics["steps"]
    assert metrics["unseen/perplexity/student"] > 0 and metrics["unseen/compare/kl_mean"] > 0
    for line in ("shrink: ", "  plan     ", "  distil   0.05 minutes; ", "also on ", "export-dense/"):
        assert line in out
    assert "student, unseen text" in (run / "summary.txt").read_text()
    rows = list(complete_rows(run / "metrics.csv"))
    curve = [float(row["unseen/perplexity"]) for row in rows if row.get("unseen/perplexity")]
    assert curve and "unseen ppl" in err and "Perplexity, unseen text" in (run / "report.html").read_text()
    assert curve[-1] != [float(row["validation/perplexity"]) for row in rows if row.get("validation/perplexity")][-1]
    assert (run / "export-merged" / "merged.safetensors").is_file() and (run / "report.html").is_file()
    assert AutoModelForCausalLM.from_pretrained(run / "export-dense" / "model").num_parameters() > 0
    assert read(run, "run.json")["warnings"] == []


@pytest.mark.usefixtures("interruptible")
def test_a_stopped_one_keeps_its_plan_and_its_time(command: Any, words: list[str]) -> None:
    run = Path("run").absolute()
    last = run / "checkpoints" / "last.ckpt"
    with interrupted_when(last.exists):
        code, _, err = command("train", *words, "trainer.minutes=60", "run_dir=run")
    assert code == 130, err
    plan = {file: file.stat().st_mtime_ns for file in (run / "plan").rglob("*") if file.is_file()}
    before = last.stat().st_mtime_ns
    with interrupted_when(lambda: last.stat().st_mtime_ns != before):
        code, _, err = command("train", "resume=run")
    assert code == 130, err
    assert plan == {file: file.stat().st_mtime_ns for file in plan}
    seconds = read_checkpoint(last)["callbacks"]["TrainingClock"]["seconds"]
    assert read_checkpoint(last)["global_step"] > 1 and 0 < seconds < 3600 and not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["budget=0.001"], "budget=0.001: "),
        (["budget=-1"], "budget=-1.0: must be greater than 0"),
        (["factors=kngpt2"], "budget=0.9: plans the factors of all maps by itself; give factors=dense"),
        (["unseen=gone.txt"], "unseen=gone.txt: no such file or folder"),
        (["export=[onx]"], "export=onx: not one of dense, merged, onnx, int8"),
        (["trainer.steps=3"], "trainer.minutes=120: the time decides how far it comes; not with trainer.steps=3"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    command: Any, words: list[str], more: list[str], told: str
) -> None:
    code, _, err = command("train", *words, *more, "run_dir=run")
    assert code == 2 and told in err and err.strip().count("\n") == 0, err
    assert not Path("run").exists()


def test_speed_needs_a_budget() -> None:
    with pytest.raises(UserError, match="speed=true: chooses among the shapes of budget="):
        TrainConfig(speed=True)
