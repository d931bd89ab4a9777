"""``evaluate`` and ``generate`` with weights that are read from disk when they are needed; bad values."""

from pathlib import Path
from typing import Any

import pytest
from verbs.conftest import read

PLACED = ["model.device_map=auto", "model.max_memory=20KB"]


@pytest.fixture(scope="module")
def student(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tied embedding, and maps that are packed, sums and hybrids."""
    from transformers import AutoTokenizer

    from kncompress.anatomy.plan import Plan
    from kncompress.compression.compress import compress_
    from kncompress.formats.pretrained import load_model, save_model
    from kncompress.kron import parse_shape

    model = load_model(tiny)
    plan = {
        "embedding": "300x8(x)1x2",
        "layers.0.mlp.up": "p*64x1(x)1x16*9",
        "layers.0.mlp.down": "16x1(x)1x64*3 + 8x64(x)2x1",
        "layers.1.attn.*": "8x8(x)2x2*2",
    }
    compress_(model, Plan({name: parse_shape(shape) for name, shape in plan.items()}))
    return save_model(model, tmp_path_factory.mktemp("student") / "model", AutoTokenizer.from_pretrained(tiny))


def test_evaluate(command: Any, student: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    words = ["evaluate", f"model={student}", f"data.source={text}", f"data.cache_dir={tmp_path}", f"compare={tiny}"]
    for run, more in (("plain", []), ("placed", PLACED)):
        code, _, err = command(*words, *more, f"run_dir={run}")
        assert code == 0, err
        assert ("read from disk when needed" in err) == (run == "placed")
    plain, placed = (read(Path(run), "result.json")["metrics"] for run in ("plain", "placed"))
    assert placed == plain
    assert plain["compare/kl_mean"] > 0.01


def test_evaluate_of_last_words(command: Any, student: Path, tmp_path: Path) -> None:
    passages = tmp_path / "passages.txt"
    passages.write_text("Snow lay on the hills until the wind\nThe river runs past the old mill\n")
    words = ["evaluate", f"model={student}", f"lambada={passages}"]
    for run, more in (("plain", []), ("placed", PLACED)):
        code, _, err = command(*words, *more, f"run_dir={run}")
        assert code == 0, err
    plain, placed = (read(Path(run), "result.json")["metrics"] for run in ("plain", "placed"))
    assert placed == plain and plain["lambada/items"] == 2


def test_generate(command: Any, student: Path) -> None:
    words = ["generate", f"model={student}", "prompt=The river", "tokens=10"]
    for run, more in (("plain", []), ("placed", PLACED)):
        code, _, err = command(*words, *more, f"run_dir={run}")
        assert code == 0, err
    plain, placed = (read(Path(run), "result.json") for run in ("plain", "placed"))
    assert placed["texts"] == plain["texts"]
    assert placed["metrics"]["parameters/model"] == plain["metrics"]["parameters/model"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.device_map=disk"], "model.device_map=disk: not one of auto, balanced, balanced_low_0, sequential"),
        (["model.max_memory=4GB"], "model.max_memory=4GB: needs model.device_map=auto"),
        (["model.offload_folder=x"], "model.offload_folder=x: needs model.device_map=auto"),
        (
            ["model.device_map=auto", "model.max_memory=4 apples"],
            "model.max_memory=4 apples: must be a size, such as 4GB, 500MB or 2GiB",
        ),
        (
            ["model.device_map=auto", "model.max_memory={cpu: -1}"],
            "model.max_memory.cpu=-1: must be a size, such as 4GB, 500MB or 2GiB",
        ),
        (
            ["model.device_map=auto", "model.max_memory={disk: 4GB}"],
            "model.max_memory: disk: not cpu or the number of a GPU",
        ),
        (["model.device_map=auto", "model.max_memory={97: 4GB}"], "model.max_memory.97: no such GPU; there are "),
        (["model.device_map=auto", "model.gguf_file=x.gguf"], "model.device_map=auto: a GGUF file is read whole; "),
        (["model.device_map=auto", "bits=4"], "model.device_map=auto: is for weights as they are; leave out bits=4"),
    ],
)
def test_a_bad_value_is_one_line(command: Any, tiny: Path, text: Path, words: list[str], line: str) -> None:
    code, _, err = command("evaluate", f"model={tiny}", f"data.source={text}", *words, "run_dir=run")
    assert code == 2
    assert err.startswith(f"kncompress: {line}") and err.count("\n") == 1
    assert not Path("run").exists()


def test_a_file_for_a_folder_and_an_accelerator_are_refused(command: Any, tiny: Path, text: Path) -> None:
    words = ["generate", f"model={tiny}", "prompt=The", "model.device_map=auto", "run_dir=run"]
    code, _, err = command(*words, f"model.offload_folder={text}")
    assert (code, err) == (2, f"kncompress: model.offload_folder={text}: is a file; give a folder\n")
    code, _, err = command(*words, "accelerator=cpu")
    assert code == 2 and err.endswith("model.device_map=auto: chooses the devices; leave out accelerator=cpu\n")
    assert not Path("run").exists()


def test_without_accelerate_the_extra_is_named(
    command: Any, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kncompress.formats.placed.find_spec", lambda _: None)
    code, _, err = command("evaluate", f"model={tiny}", f"data.source={text}", *PLACED, "run_dir=run")
    assert code == 2 and "pip install 'kncompress[offload]'" in err
    assert not Path("run").exists()


def test_other_verbs_have_no_such_key(command: Any, tiny: Path) -> None:
    code, _, err = command("compress", f"model={tiny}", "model.device_map=auto", "run_dir=run")
    assert code == 2 and "model.device_map: unknown key" in err
