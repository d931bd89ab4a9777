"""``train student=``: a model that exists goes on learning from the teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from verbs.conftest import interrupted_when, read

Command = Callable[..., tuple[int, str, str]]
FACTORS = ["factors=kngpt2", "factors.layers=all", "start=calibrated", "calibration.tokens=600"]


@pytest.mark.parametrize(
    "more",
    [["fit.symmetries=[residual,hidden]"], ["factors.depth=1", "fit.symmetries=[]"]],
    ids=["another order of the residual coordinates", "fewer layers"],
)
def test_a_compressed_model_learns_as_one_that_the_run_makes(
    command: Command, small: list[str], more: list[str]
) -> None:
    factors = [*FACTORS, *more]
    code, _, err = command("compress", *small[:3], *factors, "run_dir=compressed")
    assert code == 0, err
    for name, words in (
        ("whole", factors),
        ("later", ["student=compressed/model", "factors=dense", "samples.count=0"]),
    ):
        code, _, err = command("train", *small, *words, "objective=ilkd", f"run_dir={name}")
        assert code == 0, err
    table = read(Path("compressed"), "compression.json")
    assert table["layers"] == ([1] if "factors.depth=1" in more else None)
    assert (table["arrangement"] is None) == ("factors.depth=1" in more)
    whole, later = (read(Path(name), "result.json")["metrics"] for name in ("whole", "later"))
    for key in ("perplexity/start", "perplexity/student", "kl/student", "parameters/student", "error/mean"):
        assert later[key] == pytest.approx(whole[key], rel=1e-6), key
    made, given = (load_file(f"{name}/model/model.safetensors") for name in ("whole", "later"))
    assert made.keys() == given.keys()
    assert all(made[key].allclose(given[key], rtol=1e-4, atol=1e-6) for key in made)


@pytest.mark.usefixtures("interruptible")
def test_a_trained_model_goes_on_and_a_stopped_run_too(command: Command, small: list[str]) -> None:
    code, _, err = command("train", *small, *FACTORS, "run_dir=first")
    assert code == 0, err
    words = [*small, "student=first/model", "objective=logits", "trainer.steps=100", "trainer.checkpoint_every=1"]
    last = Path("second/checkpoints/last.ckpt").absolute()
    with interrupted_when(last.exists):
        assert command("train", *words, "run_dir=second")[0] == 130
    weights = Path("first/model/model.safetensors")
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + bytes(4))
    code, _, err = command("train", "resume=second")
    assert code == 2 and "first/model: is not what the run began with" in err
    weights.write_bytes(kept)
    code, _, err = command("train", "resume=second")
    assert code == 0, err
    first, second = (read(Path(name), "result.json")["metrics"] for name in ("first", "second"))
    assert second["perplexity/start"] == pytest.approx(first["perplexity/student"], rel=1e-6)
    assert second["kl/student"] < first["kl/student"]


def test_anybodys_dense_model_can_be_the_student(command: Command, small: list[str], tiny: Path) -> None:
    fields = json.loads((tiny / "config.json").read_text()) | {"n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**fields)).save_pretrained("other")
    code, _, err = command("train", *small, "student=other", "objective=logits", "run_dir=run", "samples.count=0")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["kl/student"] < metrics["kl/start"] and not Path("run/compression.json").exists()


def test_what_cannot_learn_from_the_teacher_is_refused_before_anything_is_written(
    command: Command, small: list[str], tiny: Path
) -> None:
    other = shutil.copytree(tiny, Path("other"))
    fields = json.loads((tiny / "config.json").read_text())
    for change, words, told in (
        ({"vocab_size": 301}, ["objective=logits"], "student=other: has 301 token ids and the teacher 300"),
        ({"n_layer": 3}, ["objective=ilkd"], "student=other: has 3 layers, more than the teacher's 2"),
        ({"n_positions": 16}, [], "student=other: has 16 positions; give data.context of at most as many"),
        ({}, ["budget=0.9"], "student=other: exists; budget=0.9 would plan another"),
        ({}, ["model.path=null", "model.architecture={model_type:gpt2}"], "student=other: learns from a teacher"),
        ({}, ["student=gone"], "student=gone: "),
    ):
        (other / "config.json").write_text(json.dumps(fields | change))
        code, _, err = command("train", *small, "student=other", *words, "run_dir=run")
        assert code == 2 and told in err and err.strip().count("\n") == 0, err
        assert not Path("run").exists()
