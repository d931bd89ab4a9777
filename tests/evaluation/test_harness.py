"""Benchmark tasks through lm-evaluation-harness: the verb, on a compressed folder and a task of one's own."""

import json
import sys

import pytest
import torch
from verbs.conftest import command, read, text, tiny  # noqa: F401

TASK = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ENDINGS = [" river runs", " old mill", " hills until the wind", " bridges, twice"]


@pytest.fixture
def task(tmp_path):
    """Eight questions with four endings each."""
    rows = [
        {"question": f"{start} the", "choices": ENDINGS, "answer": number % 4}
        for number, start in enumerate(["The", "Past", "Down to", "Snow on", "Nobody", "A letter", "Seven", "In"])
    ]
    (tmp_path / "endings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "endings.yaml").write_text(TASK.format(data=tmp_path / "endings.jsonl"))
    return tmp_path / "endings.yaml", rows


@pytest.mark.slow
def test_scores_are_those_of_the_models_likelihoods(command, tiny, task, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'kncompress[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    file, rows = task
    assert command("compress", f"model={tiny}", "factors=kngpt2", "run_dir=run")[0] == 0
    words = ["evaluate", "model=run/model", f"tasks=[{file}]"]
    code, out, err = command(*words, "batch_tokens=64", "run_dir=scores")
    assert code == 0, err
    metrics = read(tmp_path / "work" / "scores", "result.json")["metrics"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("run/model"), AutoTokenizer.from_pretrained("run/model")
    right = 0
    for row in rows:
        sums = []
        for ending in row["choices"]:
            start, whole = (tokenizer(part)["input_ids"] for part in (row["question"], row["question"] + ending))
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(scores[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right += max(range(4), key=sums.__getitem__) == row["answer"]
    assert metrics["endings/acc"] == right / 8 and metrics["endings/items"] == 8
    assert metrics["endings/acc_stderr"] >= 0
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert "endings" in out and f"{right / 8:.4f}" in out

    assert command(*words, "limit=3", "run_dir=fewer")[0] == 0
    assert read(tmp_path / "work" / "fewer", "result.json")["metrics"]["endings/items"] == 3
    for value, message in (
        ("[no_such_task_at_all]", "tasks=no_such_task_at_all: lm-evaluation-harness has no such task"),
        ("[nowhere.yaml]", "tasks=nowhere.yaml: no such file"),
        (f"[{tmp_path / 'broken.yaml'}]", "cannot be loaded"),
    ):
        (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: multiple_choice\n")
        code, _, err = command("evaluate", "model=run/model", f"tasks={value}", "run_dir=bad")
        assert code == 2 and message in err and err.splitlines()[-1].startswith("kncompress: "), err
    assert not (tmp_path / "work" / "bad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["limit=3"], "limit=3: is for tasks and lambada; give tasks=[...] or lambada=..."),
        (["shots=2"], "shots=2: is for tasks; give tasks=[...]"),
        (["tasks=[arc_easy]", "limit=0"], "limit=0: must be greater than 0"),
        (["tasks=[arc_easy]"], "tasks=['arc_easy']: needs lm-eval: pip install 'kncompress[eval]'"),
    ],
)
def test_bad_input_is_one_line(command, tiny, monkeypatch, words, message):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    code, _, err = command("evaluate", f"model={tiny}", *words)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_a_task_that_runs_code_is_refused(command, tiny, tmp_path):  # noqa: F811
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'kncompress[eval]'")
    (tmp_path / "owned.py").write_text("from pathlib import Path\nPath('owned').touch()\n")
    (tmp_path / "base.yaml").write_text("doc_to_text: !function owned.text\n")
    (tmp_path / "task.yaml").write_text("include: base.yaml\ntask: t\ndataset_path: json\n")
    (tmp_path / "other.yaml").write_text("task: t\ndoc_to_text: !function owned.text\n")
    for name, told in (("task.yaml", "base.yaml"), ("other.yaml", "other.yaml")):
        code, _, err = command("evaluate", f"model={tiny}", f"tasks=[{tmp_path / name}]", "run_dir=run")
        assert code == 2 and f"{told} has !function" in err and "allow_code=true" in err and err.count("\n") == 1, err
        assert not (tmp_path / "work" / "owned").exists() and not (tmp_path / "work" / "run").exists()
