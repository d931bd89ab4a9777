"""``export``: what is written, read by those it is written for: transformers alone, safetensors, onnxruntime."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from tiny_models import config_of, random_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)
from verbs.conftest import read

from kncompress.__main__ import main
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_
from kncompress.formats.onnx_session import largest_difference
from kncompress.formats.pretrained import save_model
from kncompress.kron import PackedShape, parse_shape

IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(3))
FACTORS = """
embedding: {right: [1, 2]}
qkv: {right: [2, 1]}
o: {right: [1, 2]}
mlp: {right: [2, 1]}
maps:
  layers.0.mlp.down: 16x1(x)1x64*4
  layers.1.mlp.up: 16x4(x)4x4*3
  layers.0.attn.q: 4x4(x)4x4*2
  layers.1.attn.o: 8x8(x)2x2*2 + 16x1(x)1x16*2
"""

PLAN = Plan(
    {"layers.*": RightFactor((2, 2), 3), "layers.*.attn.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))}
)


@pytest.fixture(scope="module")
def compressed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every kind of shape: one and several terms, outer products, a factored tied embedding."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "factors.yaml").write_text(FACTORS)
    words = ["compress", f"model={tiny}", f"factors={folder / 'factors.yaml'}", "factors.scalars=true"]
    assert main([*words, f"run_dir={folder / 'run'}"]) == 0
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def graph(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of its ONNX export."""
    folder = tmp_path_factory.mktemp("onnx") / "run"
    assert main(["export", f"model={compressed}", "format=onnx", "cache=false", f"run_dir={folder}"]) == 0
    return folder


def logits_of(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kncompress":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2], weights_only=True)
torch.save(model(input_ids=ids).logits.detach(), sys.argv[3])
print(type(model).__name__, model.lm_head.weight is model.transformer.wte.weight, len(tokenizer))
try:
    import kncompress
except ImportError:
    print("absent")
"""


def test_dense_loads_where_the_package_cannot_be_imported(command: Any, compressed: Path, tmp_path: Path) -> None:
    code, out, err = command("export", f"model={compressed}", "format=dense", "run_dir=run")
    assert code == 0, err
    folder = Path("run/model").absolute()
    torch.save(IDS, tmp_path / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KNCOMPRESS"))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")],
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GPT2LMHeadModel", "True", "300", "absent"]
    expected = logits_of(AutoModelForCausalLM.from_pretrained(compressed))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=1e-4, atol=1e-3)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    result = read(Path("run"), "result.json")
    assert result["model"] == "model" and result["metrics"]["parameters/dense"] == 300 * 16 + 32 * 16 + 2 * 3280 + 32
    assert f"{result['metrics']['bytes']:,} bytes" in out


def test_merged_is_the_state_dict_of_the_dense_class(command: Any, compressed: Path, tiny: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        words = [f"model={compressed}", "format=merged", f"dtype={dtype}", f"run_dir={dtype}"]
        assert command("export", *words)[0] == 0
        assert {t.dtype for t in load_file(f"{dtype}/merged.safetensors").values()} == {getattr(torch, dtype)}
    with safe_open("float32/merged.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["tied"]) == {"lm_head.weight": "transformer.wte.weight"}
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(tiny)).eval()
    missing = model.load_state_dict(load_file("float32/merged.safetensors"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and missing.unexpected_keys == []
    expected = logits_of(AutoModelForCausalLM.from_pretrained(compressed))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-3)
    assert sorted(f.name for f in Path("float32").iterdir() if not f.name.startswith(".")) == [
        "config.yaml", "export.log", "merged.safetensors", "result.json", "run.json",
    ]  # fmt: skip


def test_onnxruntime_gives_equal_logits_for_any_batch_and_length(graph: Path, compressed: Path) -> None:
    session = onnxruntime.InferenceSession(str(graph / "model" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("input_ids", ["batch", "tokens"]),
        ("attention_mask", ["batch", "tokens"]),
    ]
    assert session.get_outputs()[0].shape == ["batch", "tokens", 300]
    model = AutoModelForCausalLM.from_pretrained(compressed)
    for rows, tokens in ((1, 1), (1, 2), (2, 9), (7, 32)):
        ids = torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        mask = torch.ones_like(ids)
        mask[-1, max(1, tokens - 3) :] = 0
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = logits_of(model, ids, mask)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-3)
    assert read(graph, "result.json")["metrics"]["logits/difference"] < 1e-4


def test_the_graph_holds_the_factors_and_nothing_of_this_machine(graph: Path, compressed: Path) -> None:
    file = graph / "model" / "model.onnx"
    sizes = [int(np.prod(value.dims)) for value in onnx.load(file).graph.initializer]
    numbers = sum(sizes)
    parameters = AutoModelForCausalLM.from_pretrained(compressed).num_parameters()
    assert 0.9 * parameters < numbers < 1.02 * parameters  # null biases of one size are one
    assert numbers < 0.6 * GPT2LMHeadModel(GPT2Config.from_pretrained(graph / "model")).num_parameters()
    assert 3 * 16 * 4 in sizes and 300 * 8 in sizes and not {64 * 16, 300 * 16} & set(sizes)
    assert b"site-packages" not in file.read_bytes() and b"/kncompress/" not in file.read_bytes()
    assert (graph / "model" / "tokenizer.json").is_file()


def test_int8_holds_integers_and_keeps_the_perplexity(command: Any, compressed: Path, text: Path) -> None:
    words = [f"model={compressed}", "format=int8", f"data.source={text}", "tokens=600", "int8_tolerance=0.05"]
    code, out, err = command("export", *words, "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["perplexity/int8"] == pytest.approx(metrics["perplexity/onnx"], rel=0.05)
    assert metrics["perplexity/int8"] != metrics["perplexity/onnx"] and metrics["tokens"] > 500
    assert [f.name for f in Path("run").rglob("*.onnx")] == ["model_int8.onnx"]
    model = onnx.load("run/model/model_int8.onnx")
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph.node) >= 4
    integers = [math.prod(v.dims) for v in model.graph.initializer if v.data_type == onnx.TensorProto.INT8]
    assert sorted(integers)[-1] == 300 * 8 and integers.count(300 * 8) == 1  # the tied table, once
    floats = [list(v.dims) for v in model.graph.initializer if v.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(shape)) for shape in floats) <= 300, floats
    assert "perplexity" in out and "INFO" not in out + err and "WARNING" not in out + err


def test_int8_that_loses_too_much_is_not_kept(command: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny).train()
    blocks = tokenizer(text.read_text(), return_tensors="pt").input_ids[0, : 32 * 64].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = model(input_ids=blocks, labels=blocks, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # the same function, whose maps see one coordinate a million times the size of the others
        for layer in model.transformer.h:
            for norm, linear in ((layer.ln_1, layer.attn.c_attn), (layer.ln_2, layer.mlp.c_fc)):
                norm.weight[0] *= 1e6
                norm.bias[0] *= 1e6
                linear.weight[0] /= 1e6
    save_model(model, spoilt, tokenizer)
    words = [f"model={spoilt}", "format=int8", f"data.source={text}", "tokens=600", "run_dir=run"]
    code, _, err = command("export", *words)
    assert code == 1 and err.count("\n") == 1, err
    assert "int8_tolerance=0.02: int8 raises the perplexity by" in err and "was not kept" in err
    assert not (Path("run") / "model").exists() and list(Path("run").rglob("*.onnx")) == []
    result = read(Path("run"), "result.json")
    assert result["status"] == "failed" and result["metrics"]["perplexity/int8"] > result["metrics"]["perplexity/onnx"]


def test_a_classifier_is_exported_with_its_head(command: Any, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config.from_pretrained(tiny, num_labels=3, pad_token_id=0)).eval()
    compress_(model, Plan({"layers.1.mlp.*": "keep", "layers.0.attn.q": parse_shape("8x16(x)2x1")}), "nearest")
    save_model(model, tmp_path / "classifier")
    assert command("export", f"model={tmp_path / 'classifier'}", "run_dir=run")[0] == 0
    dense = GPT2ForSequenceClassification.from_pretrained("run/model")
    torch.testing.assert_close(logits_of(dense), logits_of(model))
    code, _, err = command("export", f"model={tmp_path / 'classifier'}", "format=int8", "run_dir=other")
    assert code == 2 and "format=int8" in err and "classifier" in err


def test_a_model_without_next_tokens_has_no_int8(command: Any, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    save_model(BertForMaskedLM(config), tmp_path / "bert")
    code, _, err = command("export", f"model={tmp_path / 'bert'}", "format=int8", "run_dir=run")
    assert code == 2 and "export format=int8 needs one that predicts the next token" in err and err.count("\n") == 1
    assert command("export", f"model={tmp_path / 'bert'}", "run_dir=run")[0] == 0
    ids = IDS % 96
    torch.testing.assert_close(
        logits_of(BertForMaskedLM.from_pretrained("run/model"), ids),
        logits_of(BertForMaskedLM.from_pretrained(tmp_path / "bert"), ids),
    )


@pytest.mark.parametrize("damaged", [0, 1])
def test_logits_that_are_no_numbers_differ(damaged: int) -> None:
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=16, bos_token_id=0, eos_token_id=0)
    models = [GPT2LMHeadModel(config).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert largest_difference(*models) == 0
    with torch.no_grad():
        models[damaged].transformer.wpe.weight[3] = torch.nan  # as an overflow in float16 would leave
    assert math.isnan(largest_difference(*models))


def test_logits_of_padding_do_not_count() -> None:
    """In layers with a window some see nothing at all, and each program fills that with what it likes."""
    model = random_model(config_of("opt"))

    class Filled(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            found = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
            found.logits[attention_mask == 0] = torch.nan
            return found

    assert largest_difference(model, Filled()) == 0


@pytest.mark.parametrize("form", ["dense", "merged"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_compared_with_the_model_in_16_bits(command: Any, compressed: Path, form: str, dtype: str) -> None:
    words = ["export", f"model={compressed}", f"format={form}", f"dtype={dtype}"]
    code, out, err = command(*words, "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    found, alone = metrics["logits/difference"], metrics["logits/rounding"]
    assert 0.3 * found < alone < 3 * found and f"{dtype} alone changes them by {alone:.2g}" in out
    assert 1e-4 < found < {"float16": 4e-3, "bfloat16": 3e-2}[dtype]
    if form == "dense":
        made, model = (AutoModelForCausalLM.from_pretrained(f, dtype=dtype) for f in ("run/model", compressed))
        assert found == pytest.approx(largest_difference(model, made), rel=0.5)
    code, _, err = command(*words, f"tolerance={found / 2}", "run_dir=strict")
    assert code == 1 and err.count("\n") == 1 and f"of the largest in {dtype}" in err
    assert not Path("strict/model").exists() and not list(Path("strict").rglob("*.safetensors*"))


@pytest.mark.parametrize("large", [False, True], ids=["one file", "shards"])
def test_the_stored_type_is_kept_and_large_models_get_shards(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr("kncompress.formats.pretrained.ONE_FILE", 1)
    model = random_model(config_of("llama"))
    compress_(model, PLAN)
    save_model(model, tmp_path / "factored", dtype="bfloat16")
    code, out, err = command("export", f"model={tmp_path / 'factored'}", "dtype=stored", "run_dir=run")
    assert code == 0, err
    assert "bfloat16 alone changes them by" in out
    files = sorted(Path("run/model").glob("*.safetensors"))
    assert len(files) == (5 if large else 1)  # embedding, three layers, the rest
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    dense = AutoModelForCausalLM.from_pretrained("run/model", dtype=torch.float32)
    assert dense.state_dict().keys() == random_model(config_of("llama")).state_dict().keys()
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "factored", dtype=torch.float32), IDS % 96)
    gap = (logits_of(dense, IDS % 96) - expected).abs().max()
    assert 0 < gap < 0.03 * expected.abs().max()
    assert sorted(path.name for path in Path("run").glob(".parts*")) == []


def test_a_model_in_which_16_bits_change_much_is_allowed_as_much(command: Any, tmp_path: Path) -> None:
    """Its queries and keys are so large that attention jumps from one token to another at the last bit of a score."""
    model = random_model(config_of("qwen3"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight *= 20
    compress_(model, PLAN)
    save_model(model, tmp_path / "sharp")
    words = ["export", f"model={tmp_path / 'sharp'}", "dtype=bfloat16"]
    code, _, err = command(*words, "run_dir=run")
    assert code == 0, err
    metrics = read(Path("run"), "result.json")["metrics"]
    assert 8e-2 < metrics["logits/difference"] <= 3 * metrics["logits/rounding"]
    assert command(*words, "tolerance=8e-2", "run_dir=strict")[0] == 1


@pytest.mark.parametrize("form", ["dense", "merged"])
def test_a_weight_beyond_float16_is_found_in_what_was_written(
    command: Any, tiny: Path, tmp_path: Path, form: str
) -> None:
    """The factors, and all that the model computes with them, are finite in float16; their product is not.

    A folder refuses the number before it is written, a merged file is found out when it is read again.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny)
    compress_(model, Plan({"layers.0.attn.v": parse_shape("8x8(x)2x2")}))
    with torch.no_grad():
        value = model.get_submodule("transformer.h.0.attn.c_attn.v")
        for factor in (value.left, value.right):
            factor.zero_()[0, 0, 0] = 300
        model.transformer.h[0].ln_1.weight[0] = 1e-4
    save_model(model, tmp_path / "wide")
    words = ["export", f"model={tmp_path / 'wide'}", f"format={form}"]
    code, _, err = command(*words, "dtype=float16", "run_dir=run")
    told = {"dense": (2, "dtype=float16: "), "merged": (1, "differ by nan of the largest in float16")}[form]
    assert code == told[0] and err.count("\n") == 1 and told[1] in err, err
    assert not Path("run/model").exists() and not list(Path("run").rglob("*.safetensors*"))
    assert command(*words, "dtype=bfloat16", "run_dir=other")[0] == 0


def test_packed_maps_are_exported(command: Any, tmp_path: Path) -> None:
    """As an ONNX graph with the numbers that the model has, and as the plain dense model."""
    model = random_model(config_of("llama"))
    maps = {"attn.q": "p*32x1(x)1x24*6", "mlp.[gu]*": "p*48x1(x)1x24*9", "mlp.down": "p*24x1(x)1x48*9"}
    compress_(model, Plan({f"layers.*.{name}": parse_shape(text) for name, text in maps.items()}))
    save_model(model, tmp_path / "packed")
    assert command("export", f"model={tmp_path / 'packed'}", "format=onnx", "cache=false", "run_dir=run")[0] == 0
    session = onnxruntime.InferenceSession("run/model/model.onnx", providers=["CPUExecutionProvider"])
    for ids in (IDS % 96, IDS[:1, :1] % 96, IDS.repeat(3, 3) % 96):
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        (found,) = session.run(["logits"], feed)
        torch.testing.assert_close(torch.from_numpy(found), logits_of(model, ids), rtol=1e-4, atol=2e-3)
    sizes = {math.prod(tensor.dims) for tensor in onnx.load("run/model/model.onnx").graph.initializer}
    assert sizes >= {32 * 6, 6 * 18, 48 * 9, 9 * 15} and 48 * 24 not in sizes
    assert command("export", f"model={tmp_path / 'packed'}", "format=dense", "run_dir=dense")[0] == 0
    dense = AutoModelForCausalLM.from_pretrained("dense/model")
    torch.testing.assert_close(logits_of(dense, IDS % 96), logits_of(model, IDS % 96), rtol=1e-4, atol=2e-3)


def test_packed_maps_are_rounded_as_outer_products(command: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    compress_(model, Plan({"layers.*.mlp.up": PackedShape.of_rank(64, 16, 8)}))
    save_model(model, tmp_path / "packed", AutoTokenizer.from_pretrained(tiny))
    words = [f"model={tmp_path / 'packed'}", "format=int8", f"data.source={text}", "tokens=300", "int8_tolerance=9"]
    looked_up = {}
    for packed in ("true", "false"):
        assert command("export", *words, f"packed={packed}", f"run_dir=run-{packed}")[0] == 0
        nodes = onnx.load(f"run-{packed}/model/model_int8.onnx").graph.node
        looked_up[packed] = sum(node.op_type == "Gather" for node in nodes)
    assert looked_up["true"] == looked_up["false"] + 2  # the order of the inputs of a packed map, one in each layer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen2.untied.window", "qwen3", "opt", "opt.narrow", "gpt_neox"])
def test_onnx_of_every_family(command: Any, tmp_path: Path, kind: str) -> None:
    """Rotations, grouped queries, masks of a window: against transformers, with padding on either side."""
    config = config_of(kind)
    if "window" in kind:
        config.use_sliding_window, config.sliding_window = True, 5
        config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    model = random_model(config)
    compress_(model, PLAN)
    save_model(model, tmp_path / "compressed")
    code, _, err = command("export", f"model={tmp_path / 'compressed'}", "format=onnx", "cache=false", "run_dir=run")
    assert code == 0, err
    session = onnxruntime.InferenceSession("run/model/model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(2, 96, (3, 32), generator=torch.Generator().manual_seed(0))
    for mask in (torch.ones_like(ids), torch.ones_like(ids).tril(20), torch.ones_like(ids).tril(20).flip(1)):
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        real = mask.bool()
        expected = logits_of(model, ids, mask)[real]
        torch.testing.assert_close(torch.from_numpy(found)[real], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_float16_graph_turns_by_float32_angles(command: Any, tmp_path: Path) -> None:
    """At position 2,048 an angle from a frequency of 11 bits is off by half a radian."""
    model = random_model(config_of("llama"))
    save_model(model, tmp_path / "rotary")
    assert (
        command("export", f"model={tmp_path / 'rotary'}", "format=onnx", "dtype=float16", "cache=false", "run_dir=run")[
            0
        ]
        == 0
    )
    frequencies = model.model.rotary_emb.inv_freq.numpy().ravel()
    tables = [
        onnx.numpy_helper.to_array(value).ravel() for value in onnx.load("run/model/model.onnx").graph.initializer
    ]
    assert any(t.dtype == np.float32 and np.array_equal(t, frequencies) for t in tables)


def test_a_difference_beyond_tolerance_leaves_nothing(command: Any, compressed: Path) -> None:
    code, _, err = command("export", f"model={compressed}", "tolerance=1e-12", "run_dir=run")
    assert code == 1 and err.count("\n") == 1 and "tolerance=1e-12: the logits of the export differ by" in err
    assert not Path("run/model").exists() and read(Path("run"), "result.json")["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=gguf"], "format=gguf: not one of dense, merged, onnx, int8"),
        (["format=int8", "dtype=float16"], "dtype=float16: not one of float32"),
        (["format=onnx", "dtype=bfloat16"], "dtype=bfloat16: not one of float32, float16"),
        (["format=merged", "dtype=stored"], "dtype=stored: not one of float32, float16, bfloat16"),
        (["int8_tolerance=0"], "int8_tolerance=0"),
        (["bits=5", "format=onnx"], "bits=5: not one of 8, 4"),
        (["bits=8"], "bits=8: needs format=onnx with a cache and dtype=float32"),
        (["bits=4", "format=onnx", "cache=false"], "bits=4: needs format=onnx with a cache"),
        (["group=48", "bits=4", "format=onnx"], "group=48: must be 16, 32, 64 or 128"),
        (["bits=4", "format=onnx", "data.source=nowhere"], "data.source=nowhere: no such file or folder"),
        (["format=onnx", "dynamic=true"], "dynamic=true: is for bits=8 without a group, and this is bits=None"),
        (["format=onnx", "dynamic=true", "bits=8", "group=32"], "dynamic=true: is for bits=8 without a group"),
        (["format=onnx", "packed=true"], "packed=true: is for bits=8, bits=4 or format=int8"),
        (["cache=true"], "cache=true: is for format=onnx, and this is format=dense"),
        (["format=int8", "data.source=nowhere"], "data.source=nowhere: no such file or folder"),
        (["model=./nowhere"], "model=./nowhere: no such"),
        (["model.path=null", "model.architecture={model_type: gpt2}"], "model.path=null: export needs"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command: Any, words: list[str], message: str) -> None:
    code, out, err = command("export", *words)
    assert code == 2 and message in err and err.count("\n") == 1 and out == "", err
    assert list(Path().iterdir()) == []


def test_a_damaged_file_writes_nothing(command: Any, tiny: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file({"transformer.wte.weight": torch.zeros(300, 16)}, bad / "model.safetensors", {"format": "pt"})
    code, _, err = command("export", f"model={bad}", "format=merged", "run_dir=run")
    assert code == 2 and "lacks weights" in err and err.count("\n") == 1
    assert not Path("run/merged.safetensors").exists()


def test_a_missing_package_is_named(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kncompress.formats.onnx_graph.PACKAGES", ("onnx", "no_such_package"))
    code, _, err = command("export", "format=onnx")
    assert code == 2 and "format=onnx: needs the package no_such_package: pip install 'kncompress[onnx]'" in err
    assert list(Path().iterdir()) == []


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kncompress", "transformers", "torch"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
exec(open(sys.argv[1]).read())
"""


def test_a_graph_that_generates_runs_by_the_lines_of_its_card(command: Any, compressed: Path, tmp_path: Path) -> None:
    """Without this package, transformers and torch: in onnxruntime-genai, and in a loop on onnxruntime alone."""
    code, out, err = command("export", f"model={compressed}", "format=onnx", "run_dir=run")
    assert code == 0 and "it generates, with a cache" in out, err
    folder = Path("run/model").absolute()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(compressed), AutoTokenizer.from_pretrained(compressed)
    ids = tokenizer("The river, in spring,", return_tensors="pt").input_ids
    ids_alone = {
        "onnxruntime_genai": model.generate(ids, max_new_tokens=20, do_sample=False)[0],
        "numpy": model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0],
    }
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KNCOMPRESS"))}
    for (name, expected), block in zip(ids_alone.items(), blocks, strict=True):
        assert f"import {name}" in block and "print(tokenizer.decode(" in block
        (tmp_path / "lines.py").write_text(block.replace("print(tokenizer.decode(", "print(*map(int, "))
        done = subprocess.run(
            [sys.executable, "-c", BARE, str(tmp_path / "lines.py")],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert list(map(int, done.stdout.split())) == expected.tolist(), name
    assert read(Path("run"), "result.json")["metrics"]["cache"] == 1


def test_weights_in_few_bits_keep_their_perplexity(command: Any, text: Path) -> None:
    words = ["export", "model=mini", "format=onnx", f"data.source={text}", "tokens=300"]
    code, out, err = command(*words, "bits=8", "run_dir=run")
    assert code == 0 and "INFO" not in out + err, err
    metrics = read(Path("run"), "result.json")["metrics"]
    assert metrics["perplexity/bits8"] == pytest.approx(metrics["perplexity/onnx"], rel=0.02)
    assert metrics["perplexity/bits8"] != metrics["perplexity/onnx"] and metrics["tokens"] > 200
    assert metrics["bytes"] < 0.45 * 4 * metrics["parameters"] and f"{metrics['perplexity/bits8']:,.2f}" in out
    assert [file.name for file in Path("run").rglob("*.onnx")] == ["model.onnx"]
    code, out, err = command(*words, "bits=8", "dynamic=true", "int8_tolerance=0.05", "run_dir=dynamic")
    assert code == 0 and "INFO" not in out + err, err
    dynamic = read(Path("dynamic"), "result.json")["metrics"]
    assert dynamic["perplexity/dynamic"] == pytest.approx(metrics["perplexity/onnx"], rel=0.05)
    assert dynamic["cache"] == 1 and dynamic["bytes"] < 0.27 * 4 * metrics["parameters"] + 3e6  # the tokenizer
    code, _, err = command(*words, "bits=4", "int8_tolerance=1e-9", "run_dir=strict")
    assert code == 1 and "int8_tolerance=1e-09: bits4 raises the perplexity by" in err.splitlines()[-1], err
    assert not Path("strict/model").exists() and list(Path("strict").rglob("*.onnx")) == []


def test_a_family_without_the_operator_gets_a_graph_that_scores(command: Any, tmp_path: Path) -> None:
    save_model(random_model(config_of("gptj")), tmp_path / "gptj")
    code, out, err = command("export", f"model={tmp_path / 'gptj'}", "format=onnx", "cache=true", "run_dir=run")
    assert code == 2 and "cache=true: a gptj has an attention of its own" in err and err.count("\n") == 1, err
    assert not Path("run/model").exists()
    code, out, err = command("export", f"model={tmp_path / 'gptj'}", "format=onnx", "run_dir=other")
    assert code == 0 and "it scores: no cache between calls" in out, err
    assert not Path("other/model/genai_config.json").exists()
    assert "onnxruntime.InferenceSession" in Path("other/model/README.md").read_text()
