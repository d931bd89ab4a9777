"""GGUF: read once, then an ordinary float32 model and tokenizer that know nothing of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from kncompress.anatomy import mapped
from kncompress.anatomy.mark import factored_maps
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_
from kncompress.compression.parts import Parts
from kncompress.config import FitConfig, ModelConfig
from kncompress.errors import UserError
from kncompress.formats import gguf
from kncompress.formats.pretrained import load_config, load_model, save_model
from kncompress.training.student import load_to_compress

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra gguf")
NAME = "tiny.gguf"
WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, WORDS = 32, 64, 2, 4, 2, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers in a GGUF file, float32 but for one map, which is quantised (Q8_0)."""
    gguf_package = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf_package.GGUFWriter(folder / NAME, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyz") | {"Ġ"})
    words = ["<|endoftext|>", *alphabet, "th", "the", "Ġthe"]
    words += [f"<{number}>" for number in range(WORDS - len(words))]
    writer.add_token_list(words)
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, *shape: int, quantised: bool = False) -> None:
        values = torch.randn(*shape, generator=generator).mul(0.2).numpy()
        if quantised:
            kind = gguf_package.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf_package.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    tensor("token_embd.weight", WORDS, WIDTH)
    tensor("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for part, *shape in (
            ("attn_norm", WIDTH), ("ffn_norm", WIDTH), ("attn_q", WIDTH, WIDTH), ("attn_output", WIDTH, WIDTH),
            ("attn_k", WIDTH * GROUPS // HEADS, WIDTH), ("attn_v", WIDTH * GROUPS // HEADS, WIDTH),
            ("ffn_gate", HIDDEN, WIDTH), ("ffn_up", HIDDEN, WIDTH), ("ffn_down", WIDTH, HIDDEN),
        ):  # fmt: skip
            tensor(f"blk.{layer}.{part}.weight", *shape, quantised=part == "ffn_up")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@needs_gguf
def test_config_is_read_from_the_header_alone(folder, monkeypatch):
    import gguf as package

    monkeypatch.setattr(package, "dequantize", lambda *_: pytest.fail("weights were read"), raising=False)
    config = load_config(folder, NAME)
    assert (config.model_type, config.hidden_size, config.num_key_value_heads) == ("llama", WIDTH, GROUPS)
    assert config.max_position_embeddings == 64
    config.hidden_size = 1  # each caller has a config of its own
    assert load_config(folder, NAME).hidden_size == WIDTH


@needs_gguf
def test_a_loaded_model_is_ordinary_and_saves_without_a_trace(folder, tmp_path):
    model = load_model(folder, gguf_file=NAME, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training and not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(1, 9)[None]
    save_model(model, tmp_path / "dense")
    again = load_model(tmp_path / "dense")
    assert torch.equal(again(ids).logits, model(ids).logits)
    model.half()
    assert not [file for file in (tmp_path / "dense").iterdir() if b"gguf" in file.read_bytes().lower()]


@needs_gguf
def test_a_student_of_it_saves_and_loads(folder, tmp_path):
    model = load_model(folder, gguf_file=NAME, dtype=torch.float32)
    compress_(model, Plan({"layers.1.mlp.up": RightFactor((2, 1))}))
    ids = torch.arange(1, 9)[None]
    save_model(model, tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert factored_maps(again) == factored_maps(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    config = (tmp_path / "student" / "config.json").read_text()
    assert "gguf" not in config and json.loads(config)["quantization_config"]["quant_method"] == "kronecker"


def test_files_that_are_none_are_named(tmp_path):
    if importlib.util.find_spec("gguf") is None:
        with pytest.raises(UserError, match=r"model\.gguf_file=x\.gguf: the package gguf"):
            gguf.check_file(tmp_path, "x.gguf")
        return
    (tmp_path / "other.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.gguf_file=x\.gguf: no such file in .*; GGUF files there: other\.gguf"):
        load_config(tmp_path, "x.gguf")
    with pytest.raises(UserError, match=r"model\.gguf_file=other\.gguf: not a GGUF file"):
        load_model(tmp_path, gguf_file="other.gguf")
    with pytest.raises(UserError, match=r"no config\.json\); it has other\.gguf: name it by model\.gguf_file"):
        load_model_config_only(tmp_path)


def load_model_config_only(folder):
    return load_config(folder)


@needs_gguf
def test_a_file_that_is_cut_short_is_one_line(folder, tmp_path):
    for length in (100, 1500, -1000):
        (tmp_path / NAME).write_bytes((folder / NAME).read_bytes()[:length])
        with pytest.raises(UserError, match=rf"model\.gguf_file={NAME}: cannot be read") as caught:
            load_model(tmp_path, gguf_file=NAME)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, package, monkeypatch):
    (tmp_path / NAME).write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    real = importlib.util.find_spec
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == package else real("json"))
    with pytest.raises(UserError, match=rf"the package {package}, .*pip install 'kncompress\[gguf\]'"):
        load_config(tmp_path, NAME)


@needs_gguf
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is mapped")
@pytest.mark.parametrize("at_once", [1 << 27, 5000])
def test_what_is_to_be_compressed_lies_in_files_without_names(folder, tmp_path, monkeypatch, at_once):
    """The same numbers, and the same student."""
    monkeypatch.setattr(mapped, "_AT_ONCE", at_once)
    exact = load_model(folder, gguf_file=NAME, dtype=torch.float32)
    found = load_to_compress(ModelConfig(path=str(folder), gguf_file=NAME), tmp_path / "parts")
    files = mapped._mapped_files()
    assert all(mapped._end_of_file(files, p.data) is not None for p in found.parameters())
    assert not list((tmp_path / "parts").iterdir())
    plan = Plan({"layers.*.mlp.up": RightFactor((2, 1)), "embedding": RightFactor((1, 2))})
    wanted = compress_(exact, plan, settings=FitConfig(symmetries=["hidden", "residual"]))
    parts = Parts(tmp_path / "parts", torch.float32)
    made = compress_(found, plan, settings=FitConfig(symmetries=["hidden", "residual"]), parts=parts)
    assert made.rows == wanted.rows and made.arrangement == wanted.arrangement
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in exact.state_dict().items())
