"""``inspect``: the numbers of ``compress``, from a config alone."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig
from verbs.conftest import read

import kncompress

LLAMA_7B = "model.architecture={model_type: llama, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("factors", ["kngpt2", "kronypt_80m", "layerdrop"])
def test_agrees_with_compress(command: Any, llama: Path, tmp_path: Path, factors: str) -> None:
    """A folder that holds nothing but config.json is enough."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama / "config.json").read_bytes())
    words = [f"factors={factors}", "factors.qkv={right: [2, 1]}", "factors.depth=3"]
    code, out, err = command("inspect", f"model={bare}", *words, "run_dir=told")
    assert code == 0, err
    assert command("compress", f"model={llama}", *words, "run_dir=made")[0] == 0
    told, made = (read(Path(folder), "result.json") for folder in ("told", "made"))
    assert (told["verb"], told["status"], told["model"]) == ("inspect", "finished", None)
    assert len(told["metrics"]) == 4
    assert told["metrics"] == {name: made["metrics"][name] for name in told["metrics"]}
    assert told["metrics"]["parameters/student"] == AutoModelForCausalLM.from_pretrained("made/model").num_parameters()
    values = read(Path("told"), "inspect.json")
    assert values["totals"] == told["metrics"]
    assert values["layers"] == {"teacher": 4, "kept": [0, 2, 3]}
    assert Path("told/inspect.txt").read_text() in out
    assert {path.name for path in bare.iterdir()} == {"config.json"}


def test_presets_and_every_map(command: Any, tiny: Path) -> None:
    code, out, _ = command("inspect", f"model={tiny}", "factors=dense", "every_map=true", "run_dir=run")
    assert code == 0
    presets = read(Path("run"), "inspect.json")["presets"]
    assert presets["kronypt_80m"] == {"error": "factors.mlp.right=[3, 3]: 3 does not divide 64"}
    assert "kronypt_80m     does not fit: factors.mlp.right=[3, 3]: 3 does not divide 64" in out
    for name in ("kngpt2", "kronypt_81m", "layerdrop"):
        assert command("compress", f"model={tiny}", f"factors={name}", f"run_dir={name}")[0] == 0
        metrics = read(Path(name), "result.json")["metrics"]
        assert presets[name] == {key: metrics[key] for key in presets[name]}
        assert f"{metrics['parameters/student']:,}" in out
    assert "layers.0.mlp.up" in out and "layers.1.mlp.up" in out
    assert "layers.{0,1}.mlp.up" in command("inspect", f"model={tiny}", "factors=dense")[1]


def test_a_sweep_has_both_counts(command: Any, tiny: Path) -> None:
    code, _, err = command("inspect", "-m", f"model={tiny}", "factors=kngpt2,kronypt_81m", "run_dir=sweep")
    assert code == 0, err
    with Path("sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["factors"] for row in rows] == ["kngpt2", "kronypt_81m"]
    counts = [(int(row["parameters/teacher"]), int(row["parameters/student"])) for row in rows]
    assert counts[0][0] == counts[1][0] > max(counts[0][1], counts[1][1])
    assert counts[0][1] != counts[1][1]


def test_seven_billion_parameters_in_seconds(tmp_path: Path) -> None:
    """In a process of its own, imports included; Lightning is not among them."""
    code = "import sys, time, kncompress.__main__ as m; code = m.main(sys.argv[1:])\n"
    code += "print(*sys.modules); print(time.process_time()); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "model.path=null", LLAMA_7B, "run_dir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(kncompress.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, modules, seconds = done.stdout.splitlines()
    assert float(seconds) < 60  # of computing, however busy the machine is: about 7, nearly all of it imports
    assert "5,053,878,498 of 6,738,415,616 (75.0%)" in done.stdout and len(lines) < 60
    assert not {"lightning", "datasets", "wandb"} & set(modules.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["factors.mlp.right=[7,1]"], "factors.mlp.right=[7, 1]: 7 does not divide 64"),
        (["factors.layers=[2]"], "factors.layers=[2]: the model has layers 0 to 1"),
        (["model.architecture={model_type: gpt2}"], "model.path="),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command: Any, tiny: Path, words: list[str], message: str) -> None:
    code, out, err = command("inspect", f"model={tiny}", *words)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert list(Path().iterdir()) == []


def test_a_family_without_a_table_is_told_its_modules(command: Any) -> None:
    code, _, err = command("inspect", "model.path=null", "model.architecture={model_type: codegen, n_layer: 1}")
    assert code == 2 and "model_type=codegen: no table of its maps; it has 1 Embedding, 5 Linear" in err


def test_help_shows_the_verb(command: Any) -> None:
    assert "inspect" in command("--help")[1]
    out = command("inspect", "--help")[1]
    assert "every_map: bool = False" in out and "layerdrop" in out and "-m factors=kngpt2,kronypt_81m" in out
    assert "trainer" not in out and "start:" not in out
