"""``evaluate compare=``: a compressed model beside the one that it was made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation import test_harness
from transformers import AutoModelForCausalLM
from verbs.conftest import read

from kncompress.evaluation import compare
from kncompress.evaluation.harness import flips

task = test_harness.task


@pytest.fixture
def factored(command: Any, tiny: Path) -> Path:
    assert command("compress", f"model={tiny}", "run_dir=factored")[0] == 0
    return Path("factored/model")


def test_figures_are_those_of_the_two_models(
    command: Any, tiny: Path, text: Path, factored: Path, tmp_path: Path
) -> None:
    words = ["evaluate", f"model={factored}", f"compare={tiny}", f"data.source={text}", "tokens=500"]
    code, out, err = command(*words, f"data.cache_dir={tmp_path / 'cache'}", "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    from kncompress.data.tokenizer import load_tokenizer

    ids = torch.tensor(load_tokenizer(tiny)(text.read_text())["input_ids"])[:500]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, factored)]
    expected = compare(*models, ids, 32)
    names = ("kl_mean", "kl_median", "kl_99", "kl_999", "same_top", "log_ppl_ratio")
    values = [getattr(expected, name) for name in ("kl", "kl_median", "kl_99", "kl_999", "same_top", "log_ratio")]
    assert [metrics[f"compare/{name}"] for name in names] == pytest.approx(values, rel=1e-5)
    assert metrics["compare/perplexity"] == pytest.approx(expected.teacher.perplexity, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(expected.student.perplexity, rel=1e-5)
    assert metrics["parameters"] < metrics["compare/parameters"]
    assert f"{metrics['compare/same_top']:.2f}%" in out and "8B models in 5 bits" in out


def test_what_cannot_be_compared(command: Any, tiny: Path, text: Path, factored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    first, second = sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get)[-2:]
    vocabulary = tokens["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    for words, message in (
        (
            ["compare=asset:mini"],
            "compare=asset:mini: has a vocabulary of 8,192 tokens, model=",
        ),
        ([f"compare={other}"], f"compare={other}: its tokenizer differs from that of model="),
        (["compare=nowhere/at all"], "compare=nowhere/at all: no such folder"),
        ([f"compare={tiny}", "stride=8"], "compares windows that do not overlap"),
        ([f"compare={tiny}", "lambada=x"], "is for a text or tasks, not for lambada"),
        ([f"compare={tiny}", "context=33"], "context=33"),
    ):
        code, _, err = command("evaluate", f"model={factored}", f"data.source={text}", *words, "run_dir=bad")
        assert code == 2 and message in err and err.strip().count("\n") == 0, err
        assert not Path("bad").exists()


def test_flips_count_items_that_change_sides() -> None:
    first = {"a": {(0, "none"): True, (1, "none"): False, (2, "none"): True, (3, "none"): True}, "b": {}}
    second = {"a": {(0, "none"): False, (1, "none"): True, (2, "none"): True}}
    assert flips(first, second) == {"compare/a/flips": pytest.approx(200 / 3)}


@pytest.mark.slow
def test_answers_that_flip(
    command: Any, tiny: Path, factored: Path, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'kncompress[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    found = []
    for model, other in ((factored, tiny), (tiny, tiny)):
        words = ["evaluate", f"model={model}", f"compare={other}", f"tasks=[{task[0]}]", f"run_dir=run{len(found)}"]
        code, out, err = command(*words)
        assert code == 0, err
        found.append(read(Path(f"run{len(found)}"), "result.json")["metrics"])
    assert "flips" in out
    assert found[1]["compare/endings/flips"] == 0 and found[1]["compare/endings/acc"] == found[1]["endings/acc"]
    lost = abs(found[0]["endings/acc"] - found[0]["compare/endings/acc"])
    assert found[0]["compare/endings/flips"] >= 100 * lost
