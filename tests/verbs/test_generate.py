"""``generate``: what is shown and written is what the models say."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verbs.conftest import read

from kncompress.__main__ import VERBS, main
from kncompress.runs.config_file import read_config

PROMPT = "The river, in spring,"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled teacher with all feed-forward maps halved."""
    from kncompress.anatomy.plan import Plan, RightFactor
    from kncompress.compression.compress import compress_
    from kncompress.formats.pretrained import load_model, save_model
    from kncompress.training.student import locate

    teacher = locate("asset:mini")
    model = load_model(teacher, dtype=torch.float32)
    compress_(model, Plan({"layers.*.mlp.*": RightFactor((2, 1))}))
    return save_model(model, tmp_path_factory.mktemp("student") / "model", AutoTokenizer.from_pretrained(teacher))


def test_the_likeliest_text_is_that_of_transformers(command: Any, student: Path) -> None:
    words = ["generate", f"model={student}", f"prompt={PROMPT}", "tokens=12", "temperature=0", "run_dir=run"]
    code, out, err = command(*words)
    assert code == 0, err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    (text,) = read(Path("run"), "result.json")["texts"]
    assert text["prompt"] + text["text"] == tokenizer.decode(made)
    assert (text["tokens"], text["stopped"], text["model"]) == (12, "tokens", str(student))
    assert out.endswith(f"{PROMPT}{text['text']}\n\n")
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["parameters/model"] == sum(p.numel() for p in model.parameters())
    assert metrics["tokens/model"] == 12 and metrics["tokens_per_second/model"] > 0


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a graph that generates."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    assert main(["export", f"model={student}", "format=onnx", f"run_dir={folder}"]) == 0
    return folder / "model"


def test_an_exported_folder_writes_what_transformers_does(command: Any, student: Path, exported: Path) -> None:
    """100 likeliest tokens; and with the same random numbers the same other ones, beside the model in transformers."""
    words = ["generate", f"model={exported}", "backend=onnx", f"prompt={PROMPT}"]
    code, _, err = command(*words, "tokens=100", "temperature=0", "run_dir=run")
    assert code == 0, err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=100, do_sample=False)[0]
    (text,) = read(Path("run"), "result.json")["texts"]
    assert text["prompt"] + text["text"] == tokenizer.decode(made, skip_special_tokens=True) and text["tokens"] >= 90
    assert read(Path("run"), "result.json")["metrics"]["bytes/model"] == (exported / "model.onnx").stat().st_size
    code, _, err = command(*words, f"compare={student}", "tokens=20", "seed=3", "run_dir=drawn")
    assert code == 0, err
    first, second = read(Path("drawn"), "result.json")["texts"]
    assert first["text"] == second["text"] and (first["model"], second["model"]) == (str(exported), str(student))


def test_an_exported_folder_has_the_perplexity_of_its_model(command: Any, student: Path, exported: Path) -> None:
    text = Path("text.txt")
    text.write_text("The river, in spring, carries snow from the hills to the sea. " * 20, encoding="utf-8")
    words = [f"data.source={text}", "data.split=all", "context=64", "tokens=200"]
    found = {}
    for backend, model in (("onnx", exported), ("transformers", student)):
        code, _, err = command("evaluate", f"model={model}", f"backend={backend}", *words, f"run_dir={backend}")
        assert code == 0, err
        found[backend] = read(Path(backend), "result.json")["metrics"]
    assert found["onnx"]["perplexity"] == pytest.approx(found["transformers"]["perplexity"], rel=1e-4)
    assert found["onnx"]["bytes"] == (exported / "model.onnx").stat().st_size and "parameters" not in found["onnx"]
    code, _, err = command("evaluate", f"model={exported}", *words, "run_dir=wrong")
    assert code == 2 and "is a graph of ONNX; give backend=onnx" in err and err.count("\n") == 1
    code, _, err = command("evaluate", f"model={exported}", "backend=onnx", "bits=4", *words, "run_dir=wrong")
    assert code == 2 and "backend=onnx: scores a text; leave bits, tasks and lambada out" in err


def test_an_exported_folder_for_the_wrong_reader(
    command: Any, student: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", f"prompt={PROMPT}", "backend=onnx"]
    long = f"prompt={'river ' * 600}"
    told = {
        (f"model={student}", *words): "has no genai_config.json; give the folder",
        (f"model={exported}", *words[:1], long, words[2]): "tokens; model=",
        (f"model={exported}", *words, "accelerator=gpu"): "accelerator=gpu: ",
        (f"model={exported}", *words[:2]): "is a graph of ONNX; give backend=onnx",
    }
    for (model, *rest), message in told.items():
        code, out, err = command(rest[0], model, *rest[1:], "run_dir=run")
        assert code == 2 and message in err and err.count("\n") == 1 and out == "", err
    for damage, message in ((b"", "is not as it was written"), (b"no graph", "is not as it was written")):
        shutil.copytree(exported, "damaged", dirs_exist_ok=True)
        Path("damaged/model.onnx").write_bytes(damage)
        code, _, err = command(words[0], "model=./damaged", *words[1:], "run_dir=run")
        assert code == 2 and message in err and err.count("\n") == 1, err
        Path("damaged/kncompress-checksums.json").unlink()
        code, _, err = command(words[0], "model=./damaged", *words[1:], "run_dir=run")
        assert code == 2 and "damaged: cannot be read: " in err and err.count("\n") == 1, err
    shutil.rmtree("damaged")
    shutil.rmtree("run", ignore_errors=True)
    monkeypatch.setattr("kncompress.formats.onnx_graph.find_spec", lambda name: None)
    code, _, err = command(words[0], f"model={exported}", *words[1:], "run_dir=run")
    assert code == 2 and "needs the package onnxruntime: pip install 'kncompress[onnx]'" in err and err.count("\n") == 1
    assert not Path("run").exists()


def test_two_models_side_by_side(command: Any, student: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("A letter came\n\n  \nSnow lay on\n", encoding="utf-8")
    words = [f"model={student}", f"prompts={tmp_path / 'prompts.txt'}", "tokens=6", "samples=2"]
    code, out, err = command("generate", *words, "compare=asset:mini", "run_dir=run")
    assert code == 0, err
    result = read(Path("run"), "result.json")
    kinds = [(text["prompt"], text["sample"], text["model"]) for text in result["texts"]]
    models = (str(student), "asset:mini")
    assert kinds == [(p, s, m) for p in ("A letter came", "Snow lay on") for s in (0, 1) for m in models]
    assert "asset:mini" in out and "6,967,296 parameters" in out
    assert result["metrics"]["tokens/model"] == sum(text["tokens"] for text in result["texts"][::2])
    assert result["metrics"]["parameters/model"] < result["metrics"]["parameters/compare"] == 6967296
    # Each model alone writes the same.
    assert command("generate", *words, "run_dir=alone")[0] == 0
    assert read(Path("alone"), "result.json")["texts"] == result["texts"][::2]
    first = [text["text"] for text in result["texts"][::2]]
    assert first[0] != first[1]
    assert command("generate", *words, "seed=1", "run_dir=other")[0] == 0
    other = [text["text"] for text in read(Path("other"), "result.json")["texts"]]
    assert other[0] == first[1] and other[1] != first[0]


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        ("It's [odd], a=b {c", "It's [odd], a=b {c"),
        ("'in quotes, too'", "in quotes, too"),
        ('["a, b", c]', ["a, b", "c"]),
        ("7", "7"),
        ("'", "'"),
        ("two\nlines \\ ", "two\nlines \\ "),
        ("", ""),
    ],
)
def test_a_prompt_is_prose(command: Any, value: str, read_as: Any) -> None:
    import yaml

    code, out, err = command("generate", "--show", f"prompt={value}")
    assert code == 0, err
    assert yaml.safe_load(out)["prompt"] == read_as


def test_an_empty_prompt_begins_a_text_and_the_context_ends_it(command: Any, tiny: Path) -> None:
    words = ["generate", f"model={tiny}", "prompt=", "tokens=100", "top_k=1", "run_dir=run"]
    code, _, err = command(*words)
    assert code == 0, err
    (text,) = read(Path("run"), "result.json")["texts"]
    assert text["prompt"] == "" and text["stopped"] in ("end", "context")
    assert text["tokens"] == 32 if text["stopped"] == "context" else text["tokens"] < 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prompt=null: give prompt=... or prompts=<text file>, one of the two"),
        (["prompt=a", "prompts=b.txt"], "prompt=a: give prompt=... or prompts=<text file>"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt: cannot be read (No such file"),
        (["prompt=a", "tokens=0"], "tokens=0: must be greater than 0"),
        (["prompt=a", "top_p=2"], "top_p=2.0: must lie between 0 and 1"),
        (["prompt=a", "temperature=-1"], "temperature=-1.0: must be 0 or more"),
        (["prompt=a", "compare=nowhere"], "kncompress: compare=nowhere: no such folder"),
        (["prompt=a", "compare=empty"], "kncompress: compare=empty: no model there"),
        (["prompt=a", "model=nowhere/at/all"], "model=nowhere/at/all: no such"),
        (["prompt=" + "word " * 40], "prompt=word word word word ...: 200 tokens; model="),
        (["prompt=a", "accelerator=tpu"], "accelerator=tpu: not one of auto, cpu, gpu"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command: Any, tiny: Path, words: list[str], message: str) -> None:
    Path("empty").mkdir()
    code, _, err = command("generate", f"model={tiny}", *words, "run_dir=run")
    assert code == 2 and err.count("\n") == 1
    assert message in err
    assert not Path("run").exists()


@pytest.mark.parametrize("given", ["prompt=echo ${PATH} ${x", "prompts=p.txt"])
def test_code_in_a_prompt_is_text(command: Any, tiny: Path, given: str) -> None:
    Path("p.txt").write_bytes(b"\xef\xbb\xbfecho ${PATH} ${x\n")
    code, out, err = command("generate", f"model={tiny}", given, "tokens=2", "run_dir=run")
    assert code == 0, err
    assert [text["prompt"] for text in read(Path("run"), "result.json")["texts"]] == ["echo ${PATH} ${x"]
    saved = read_config(Path("run") / "config.yaml")
    assert saved["prompt"] in (None, "echo ${PATH} ${x") and "echo ${PATH} ${x" in out


def test_the_help_names_the_verb(command: Any) -> None:
    assert "generate" in command("--help")[1]
    text = command("generate", "--help")[1]
    assert VERBS["generate"].summary in text and "compare: str | null = null" in text
