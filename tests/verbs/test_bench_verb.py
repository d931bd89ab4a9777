"""``bench`` at ``size=small``: the metrics that others read, the table, and what cannot be measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, OPTConfig
from verbs.conftest import read

from kncompress.bench.setting import random_model, setting_of
from kncompress.config import BenchConfig, ModelConfig


def test_product_and_fit(command: Any) -> None:
    words = ["size=small", "parts=[product,fit]", "presets=[kngpt2,outer,packed]", "precision=fp32", "accelerator=cpu"]
    code, _, err = command("bench", *words, "profile=true", "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    for preset, maps in (("kngpt2", ("head", "attn.qkv", "attn.o", "mlp.up", "mlp.down")), ("outer", ("mlp.up",))):
        for name in maps:
            for kind in ("forward", "step"):
                prefix = f"product/{preset}/{name}/{kind}"
                assert metrics[f"{prefix}/speedup"] > 0 and metrics[f"{prefix}/share_of_bound"] > 0
                assert metrics[f"{prefix}/speedup_over_torch_kron"] > 0
    assert metrics["product/packed/mlp.down/step/speedup"] > 0
    values = {row["name"]: row for row in read(Path("run"), "bench.json")["measurements"]}
    # By half the multiply-adds, and a few on the smaller factor: 24 of the 48 outputs, from 48 inputs.
    up = values["product/kngpt2/mlp.up/forward"]
    assert up["promised"] == pytest.approx(48 * 192 / (48 * 96 + 96 * 2))
    assert up["promise"] == pytest.approx(up["speedup"] / up["promised"])
    assert sum(up["operators"].values()) == pytest.approx(1)
    assert up["operators"]["mm 32x48 48x96"] > 0  # the large product: half of the 192 outputs from 48 inputs
    assert {"fit/seconds", "fit/speedup", "machine/flops", "machine/bandwidth"} <= metrics.keys()
    assert "product/kngpt2/attn.qkv/step" in Path("run/table.md").read_text()


def test_what_was_measured_is_kept_where_a_later_part_fails(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setting: Any) -> Iterator[Any]:
        raise RuntimeError("no process can be started")

    monkeypatch.setattr("kncompress.commands.bench.measure_startup", fail)
    words = ["size=small", "parts=[fit,startup]", "precision=fp32", "accelerator=cpu", "run_dir=run"]
    code, _, err = command("bench", *words)
    assert code == 1 and err.endswith("kncompress: RuntimeError: no process can be started\n")
    names = [row["name"] for row in read(Path("run"), "bench.json")["measurements"]]
    assert names[0] == "fit" and all(name.startswith("fit") for name in names)
    assert "| fit" in Path("run/table.md").read_text() and read(Path("run"), "run.json")["status"] == "failed"


def test_generation(command: Any) -> None:
    """Prompt and decoding apart, with what is promised; files and memory of a process of its own."""
    words = ["size=small", "parts=[generate]", "runtimes=[onnxruntime]", "bits=[32,dynamic]", "threads=1", "repeats=1"]
    code, _, err = command("bench", *words, "precision=fp32", "accelerator=cpu", "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    rows = {row["name"]: row for row in read(Path("run"), "bench.json")["measurements"]}
    kinds = ("prompt", "decoding", "prompt/batch_2", "decoding/batch_2", "memory", "bytes")
    assert list(rows) == [
        f"generate/onnxruntime/{weights}/{kind}" for weights in ("bits_32", "dynamic") for kind in kinds
    ]
    for weights in ("bits_32", "dynamic"):
        for kind in kinds[:4]:
            name = f"generate/onnxruntime/{weights}/{kind}"
            assert metrics[f"{name}/tokens_per_second"] > 0 and metrics[f"{name}/speedup_in_processor_seconds"] > 0
    # kngpt2 halves the maps of one of two layers; of a prompt the head counts once, as only its last token has logits.
    layer, head, tokens = 12 * 48 * 48, 48 * 2048, 63
    factored = layer / 2 + 48 * 48 // 2 * 2 * 3 // 48 + 192  # roughly: the factors of two numbers
    prompt = rows["generate/onnxruntime/bits_32/prompt"]
    assert prompt["promised"] == pytest.approx(
        (2 * layer * tokens + head) / ((layer + factored) * tokens + head / 2), rel=0.03
    )
    assert rows["generate/onnxruntime/bits_32/prompt/batch_2"]["promised"] == prompt["promised"]
    assert 1.3 < rows["generate/onnxruntime/bits_32/decoding"]["promised"] < 2
    for weights, most in (("bits_32", 1.0), ("dynamic", 0.25)):
        sizes = rows[f"generate/onnxruntime/{weights}/bytes"]["values"]
        dense = 4 * (2 * layer + head + 64 * 48 + 2 * 13 * 48 + 2 * 48)
        assert sizes["dense"] < most * dense + 60_000 and sizes["ours"] < sizes["dense"]  # the graph itself
    peaks = [metrics[f"generate/onnxruntime/dynamic/memory/peak/{name}"] for name in ("ours", "dense")]
    above = rows["generate/onnxruntime/dynamic/memory"]["values"]
    assert all(size > 2**26 for size in peaks) and 0 < above["ours"] < peaks[0]


@pytest.mark.slow
def test_all_parts(command: Any, text: Path) -> None:
    code, _, err = command("bench", "size=small", f"data.source={text}", "presets=[kngpt2]", "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    wanted = {
        "step/speedup", "step/memory_ratio", "step/data_wait", "fit/seconds", "fit/speedup",
        "generate/transformers/decoding/promise", "generate/onnxruntime/bits_32/prompt/batch_2/speedup",
        "tokens/speedup", "startup/seconds", "memory/forward/saving", "memory/losses/saving",
    }  # fmt: skip
    assert wanted <= metrics.keys()  # step/speedup only where both sides had the same first loss
    assert all(value > 0 for name, value in metrics.items() if name != "step/data_wait")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parts=[products]"], "parts=products: not one of all, product, step"),
        (["parts=3"], "parts=3: not one of all, product, step"),
        (["size=large"], "size=large: not one of full, small"),
        (["presets=[kngpt3]"], "presets=kngpt3: no such factors; nearest: kngpt2"),
        (["factors=layerdrop"], "factors.depth=0.5: bench compares models of one depth"),
        (["runtimes=[transformers,vllm]"], "runtimes=vllm: not one of installed, transformers, onnxruntime"),
        (["bits=[5]"], "bits=5: not one of 32, 8, dynamic, 4"),
        (["bits=[8]", "runtimes=[transformers]"], "bits=[8]: are those of onnxruntime"),
        (["tokens=0"], "tokens=0: must be greater than 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command: Any, words: list[str], message: str) -> None:
    code, out, err = command("bench", *words)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert list(Path().iterdir()) == []


def test_a_model_that_predicts_no_next_token_is_named(command: Any) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).save_pretrained("bert")
    code, out, err = command("bench", "model=./bert", "parts=[fit]")
    assert code == 2 and "a bert fills in masked tokens, and bench needs" in err and out == ""
    assert err.count("\n") == 1 and [path.name for path in Path().iterdir()] == ["bert"]


def test_models_have_no_dropout(tmp_path: Path) -> None:
    """Whatever a family calls its own: the plain script would train with it, and ours without."""
    OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, layerdrop=0.5, vocab_size=64,
              word_embed_proj_dim=16).save_pretrained(tmp_path)  # fmt: skip
    config = BenchConfig(model=ModelConfig(path=str(tmp_path)), accelerator="cpu", precision="fp32")
    model = random_model(setting_of(config).fields, 0, torch.device("cpu"), torch.float32)
    values = [(name, getattr(module, name, None)) for module in model.modules() for name in ("dropout", "layerdrop")]
    rates = [(name, value) for name, value in values if isinstance(value, float | int)]
    assert {name for name, _ in rates} == {"dropout", "layerdrop"} and not any(value for _, value in rates)
