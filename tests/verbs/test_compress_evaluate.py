"""``compress`` and ``evaluate`` on real folders."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, GPT2LMHeadModel
from verbs.conftest import read

from kncompress.formats.pretrained import to_dense


def test_compress_needs_no_text_and_no_tokenizer(command: Any, tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(bare)
    code, out, err = command("compress", f"model={bare}", "factors=kngpt2", "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert metrics["parameters/student"] == sum(p.numel() for p in model.parameters())
    assert metrics["parameters/teacher"] == GPT2LMHeadModel.from_pretrained(tiny).num_parameters()
    assert 0 < metrics["error/mean"] < 1 and metrics["seconds/fit"] > 0
    assert "layers.1.mlp.up" in out and "layers.0.mlp.up" not in out
    card = Path("run/model/README.md").read_text()
    assert f"{metrics['parameters/student']:,} parameters" in card
    assert "- made from: bare" in card and "text:" not in card


def test_the_written_type_is_the_one_asked_for(command: Any, tiny: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert command("compress", f"model={tiny}", f"dtype={dtype}", f"run_dir={dtype}")[0] == 0
        model = AutoModelForCausalLM.from_pretrained(f"{dtype}/model")
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_random_and_nearest_starts_differ_as_they_should(command: Any, tiny: Path) -> None:
    for start in ("random", "nearest"):
        assert command("compress", f"model={tiny}", f"start={start}", f"run_dir={start}")[0] == 0
    assert "error/mean" not in read(Path("random"), "result.json")["metrics"]
    dense = GPT2LMHeadModel.from_pretrained(tiny).transformer.h[1].mlp.c_fc.weight
    errors = {
        start: (
            to_dense(AutoModelForCausalLM.from_pretrained(f"{start}/model")).transformer.h[1].mlp.c_fc.weight - dense
        ).norm()
        for start in ("random", "nearest")
    }
    assert errors["nearest"] < dense.norm() < errors["random"]


@pytest.mark.parametrize("start", ["calibrated", "sequential"])
def test_a_calibrated_start_reads_text_and_tells_its_error(
    command: Any, tiny: Path, text: Path, tmp_path: Path, start: str
) -> None:
    kept = tmp_path / "moments"
    words = ["compress", f"model={tiny}", f"start={start}", f"data.source={text}", "calibration.tokens=500"]
    words += [f"calibration.moments={kept}"]
    code, out, err = command(*words, "run_dir=run")
    assert code == 0, err
    metrics, table = read(Path("run"), "result.json")["metrics"], read(Path("run"), "compression.json")
    assert 0 < metrics["error/weighted"] < 1 and metrics["error/weighted"] == table["weighted_error"]
    assert metrics["calibration/tokens"] == 500
    assert 0 < metrics["seconds/moments"] < metrics["seconds/fit"]
    assert "on inputs" in out
    assert AutoModelForCausalLM.from_pretrained("run/model").config.quantization_config.maps
    assert (kept / "head.safetensors").exists()
    # What is kept is found again, and is not taken for that of another text.
    assert command(*words, "run_dir=again")[0] == 0
    assert read(Path("again"), "compression.json")["rows"] == table["rows"]
    code, _, err = command(*words, "calibration.tokens=400", "run_dir=other")
    assert code == 2 and "of another text or model" in err and err.count("\n") == 1


def test_starts_without_calibration_need_no_text(command: Any, tiny: Path) -> None:
    assert command("compress", f"model={tiny}", "data.source=nowhere", "run_dir=run")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.source=nowhere"], "data.source=nowhere: no such file or folder"),
        (["calibration.context=64"], "calibration.context=64: the model has 32 positions"),
        (["calibration.tokens=0"], "calibration.tokens=0: must be greater than 0"),
        (["fit.gauge=left"], "fit.gauge=left: not one of equal, unit_right, equal_rms"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(
    command: Any, tiny: Path, text: Path, words: list[str], message: str
) -> None:
    for verb in ("compress", "train"):
        start = ["start=calibrated", f"data.source={text}"]
        code, _, err = command(verb, f"model={tiny}", *start, *words, "run_dir=run")
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
        assert not Path("run").exists()


def test_a_calibrated_start_needs_a_tokenizer(command: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(bare)
    code, _, err = command("compress", f"model={bare}", "start=calibrated", f"data.source={text}", "run_dir=run")
    assert code == 2 and "tokenizer" in err and len(err.strip().splitlines()) == 1, err


def test_the_dense_preset_changes_nothing(command: Any, tiny: Path) -> None:
    assert command("compress", f"model={tiny}", "factors=dense", "run_dir=run")[0] == 0
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tiny, "run/model"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_layerdrop_is_a_plain_shallower_model(command: Any, tiny: Path) -> None:
    code, out, err = command("compress", f"model={tiny}", "factors=layerdrop", "run_dir=run")
    assert code == 0 and "layers kept: 1" in out, err
    teacher, student = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny, "run/model"))
    assert "quantization_config" not in read(Path("run"), "model/config.json")
    assert type(student) is GPT2LMHeadModel and len(student.transformer.h) == student.config.n_layer == 1
    assert torch.equal(student.transformer.h[0].mlp.c_fc.weight, teacher.transformer.h[1].mlp.c_fc.weight)
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["parameters/teacher"] == teacher.num_parameters()
    assert metrics["parameters/student"] == student.num_parameters()
    assert read(Path("run"), "compression.json")["layers"] == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["factors.depth=3"], "factors.depth=3: must lie between 1 and the model's 2 layers"),
        (["factors.depth=[1,0]"], "factors.depth=[1, 0]: must rise"),
        (["factors.depth=1", "factors.layers=[1]"], "factors.layers=[1]: with factors.depth=1 the student has "),
    ],
)
def test_an_impossible_depth_is_refused(command: Any, tiny: Path, words: list[str], message: str) -> None:
    for verb in ("compress", "inspect"):
        code, _, err = command(verb, f"model={tiny}", "run_dir=run", *words)
        assert code == 2 and err.startswith(f"kncompress: {message}") and err.count("\n") == 1
        assert not Path("run").exists()


def test_a_factored_model_is_not_factored_again(command: Any, tiny: Path) -> None:
    assert command("compress", f"model={tiny}", "run_dir=once")[0] == 0
    code, _, err = command("compress", "model=once/model", "run_dir=twice")
    assert code == 2 and "factored already" in err


def test_evaluate_scores_by_both_protocols(command: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    words = ["evaluate", f"model={tiny}", f"data.source={text}", f"data.cache_dir={tmp_path / 'cache'}"]
    code, out, err = command(*words, "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    from kncompress.data.tokenizer import load_tokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), load_tokenizer(tiny)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"] + [0])
    windows = [ids[i : i + 32] for i in range(0, len(ids), 32)]
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows if len(w) > 1]
    sizes = [len(w) - 1 for w in windows if len(w) > 1]
    assert metrics["tokens"] == sum(sizes)
    weighted = sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / sum(sizes)
    assert metrics["perplexity"] == pytest.approx(math.exp(weighted), rel=1e-5)
    assert metrics["perplexity_window_mean"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(
        float(weighted) * len(ids) / math.log(2) / len(text.read_text().encode()), rel=1e-5
    )
    assert "window mean" in out

    assert command(*words, "stride=8", "tokens=500", "run_dir=strided")[0] == 0
    strided = read(Path("strided"), "result.json")["metrics"]
    assert strided["tokens"] == 499 and "perplexity_window_mean" not in strided


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["context=64"], "context=64: the model has 32 positions"),
        (["stride=33"], "stride=33: larger than the window"),
        (["data.source=nowhere"], "data.source=nowhere: no such file or folder"),
        (["data.split=dev"], "data.split=dev: not one of"),
    ],
)
def test_evaluate_refuses(command: Any, tiny: Path, text: Path, words: list[str], message: str) -> None:
    given = [] if any(word.startswith("data.source") for word in words) else [f"data.source={text}"]
    code, _, err = command("evaluate", f"model={tiny}", *given, *words, "run_dir=run")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not Path("run").exists()


def test_block_wise_repair_tells_what_it_did(command: Any, tiny: Path, text: Path) -> None:
    words = ["compress", f"model={tiny}", f"data.source={text}", "calibration.tokens=2000"]
    code, _, err = command(*words, "repair.passes=3", "factors.scalars=true", "run_dir=run")
    assert code == 0, err
    metrics, table = read(Path("run"), "result.json")["metrics"], read(Path("run"), "compression.json")
    assert 0 < metrics["blocks/after"] < 0.9 * metrics["blocks/before"] and metrics["seconds/repair"] > 0
    assert metrics["blocks/after"] == pytest.approx(sum(table["repair"]["after"]) / 2)
    model = AutoModelForCausalLM.from_pretrained("run/model")
    scales = torch.cat([p for name, p in model.named_parameters() if name.endswith("scale")])
    assert len(scales) == 7 and not scales.eq(1).all()  # those of layer 1 were trained
    code, _, err = command(*words[:2], "start=random", "repair.passes=3", "run_dir=other")
    assert code == 2 and "repair.passes=3: needs a start that is fitted, not random" in err
    assert len(err.strip().splitlines()) == 1 and not Path("other").exists()


def test_symmetries_lower_the_error_of_a_model_that_loads(command: Any, tiny: Path, text: Path) -> None:
    errors = []
    for symmetries in ("", "hidden,heads,residual"):
        words = ["compress", f"model={tiny}", f"fit.symmetries=[{symmetries}]", f"run_dir=run{symmetries[:1]}"]
        code, _, err = command(*words)
        assert code == 0, err
        errors.append(read(Path(f"run{symmetries[:1]}"), "result.json")["metrics"]["error/mean"])
    assert errors[1] < errors[0]
    assert read(Path("runh"), "compression.json")["arrangement"]["values"] == [1]
    model = AutoModelForCausalLM.from_pretrained("runh/model")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    code, _, err = command("compress", f"model={tiny}", "fit.symmetries=[hidden,head]", "run_dir=bad")
    assert code == 2 and "fit.symmetries=head: not one of hidden, heads, residual" in err
    assert err.count("\n") == 1 and not Path("bad").exists()


def test_a_masked_language_model_is_compressed_but_not_scored(command: Any, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    code, out, err = command("compress", f"model={tmp_path / 'bert'}", "factors=kngpt2", "run_dir=run")
    assert code == 0, err
    assert "layers.1.mlp.up" in out
    assert isinstance(AutoModelForMaskedLM.from_pretrained("run/model"), BertForMaskedLM)
    for verb in ("evaluate", "train", "plan", "glue"):
        code, _, err = command(verb, "model=run/model", "run_dir=other")
        assert code == 2 and err.count("\n") == 1 and f"{verb} needs one that predicts the next token" in err
    assert not Path("other").exists()


def test_last_words_of_passages_in_a_file(command: Any, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the river gave the city its name\nborn in London and died in London\n\n")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "test.jsonl").write_text(
        '{"text": "the river gave the city its name"}\n{"text": "born in London and died in London"}\n'
    )
    found = []
    for source in ("words.txt", "words"):
        code, out, err = command("evaluate", f"lambada={tmp_path / source}", f"run_dir={source}.run")
        assert code == 0 and "accuracy" in out, err
        found.append(read(Path(f"{source}.run"), "result.json")["metrics"])
    assert found[0] == found[1] and found[0]["lambada/items"] == 2 and found[0]["parameters"] == 6_967_296
    assert found[0]["lambada/accuracy"] in (0, 0.5, 1) and found[0]["lambada/perplexity"] > 1
    assert command("evaluate", f"lambada={tmp_path}/words.txt", "limit=1", "run_dir=one")[0] == 0
    assert read(Path("one"), "result.json")["metrics"]["lambada/items"] == 1
    (tmp_path / "single.txt").write_text("word\n")
    for words, said in (
        ([f"lambada={tmp_path}/single.txt"], "single.txt: the passage 'word' has one word"),
        (["lambada=nowhere"], "lambada=nowhere"),
        (["limit=1"], "limit=1: is for tasks and lambada"),
        ([f"lambada={tmp_path}/words.txt", "tasks=[arc_easy]"], "words.txt: give lambada=... or tasks=[...]"),
    ):
        code, _, err = command("evaluate", *words, "run_dir=bad")
        assert code == 2 and said in err and err.count("\n") == 1 and not Path("bad").exists()
