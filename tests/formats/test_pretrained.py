"""Folders: written whole, read by plain transformers, equal to what was saved, or refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config_of, random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from kncompress.anatomy.mark import factored_maps
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.inspection import predict
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_config, load_model, save_model, to_dense
from kncompress.hub import CHECKSUMS
from kncompress.kron import parse_shape

ROOT = Path(__file__).parents[2]
PLAN = Plan(
    {
        "embedding": RightFactor((1, 2)),
        "layers.1.*": RightFactor((2, 1)),
        "layers.2.attn.k": RightFactor((2, 2), terms=2),
    }
)


@pytest.fixture
def student(tiny):
    compress_(tiny, PLAN)
    return tiny


@pytest.fixture
def folder(student, tmp_path):
    return save_model(student, tmp_path / "model")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / CHECKSUMS).unlink(missing_ok=True)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("place", [9, 200, -1])
def test_a_flipped_bit_of_our_weights_is_told_and_other_files_may_be_edited(folder, place):
    before = load_model(folder)
    for name in ("config.json", "README.md"):
        with (folder / name).open("a") as file:
            file.write("\n")
    assert torch.equal(load_model(folder).lm_head.weight, before.lm_head.weight)
    flip(folder / "model.safetensors", place)
    with pytest.raises(UserError, match=r"model\.path=.*model: model\.safetensors is (not as it was written|damaged)"):
        load_model(folder)


def run_python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_folder_holds_factors_once(folder):
    weights = load_file(folder / "model.safetensors")
    assert "transformer.h.1.attn.c_attn.q.left" in weights
    assert "transformer.wte.left" in weights
    assert not [key for key in weights if key.startswith("lm_head")]
    assert "transformer.wte.weight" not in weights
    maps = json.loads((folder / "config.json").read_text())["quantization_config"]["maps"]
    assert maps["embedding"] == "96x12(x)1x2"
    assert maps["layers.2.attn.k"] == "12x12(x)2x2*2"
    assert len(maps) == 8


def test_plain_from_pretrained_gives_the_same_model(folder, student, ids):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert loaded.lm_head.left is loaded.transformer.wte.left
    assert unique_parameters(loaded) == unique_parameters(student)
    assert factored_maps(loaded) == factored_maps(student)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    prompt = ids[:, :4]
    expected = student.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_every_kind_of_model_comes_back(model_of_kind, tmp_path, ids):
    """Folders of both families, tied and untied, with biases: equal logits, continuation and dense twin."""
    entries = {
        "embedding": RightFactor((1, 2)),
        "layers.1.*": RightFactor((2, 1)),
        "layers.2.attn.k": RightFactor((2, 2)),
    }
    if not model_of_kind.config.tie_word_embeddings:
        entries["head"] = RightFactor((2, 1))
    compress_(model_of_kind, Plan(entries))
    head, embedding = model_of_kind.lm_head, model_of_kind.get_input_embeddings()
    assert (head.left is embedding.left) == model_of_kind.config.tie_word_embeddings
    expected = model_of_kind(ids).logits
    continued = model_of_kind.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    save_model(model_of_kind, tmp_path / "model")
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        loaded = load(tmp_path / "model")
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(loaded.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False), continued)
        assert unique_parameters(loaded) == unique_parameters(model_of_kind)
        assert factored_maps(loaded) == factored_maps(model_of_kind)
    dense = to_dense(loaded)
    torch.testing.assert_close(dense(ids).logits, expected, atol=1e-3, rtol=1e-4)
    assert {name: p.shape for name, p in dense.named_parameters()} == {
        name: p.shape for name, p in type(dense)(dense.config).named_parameters()
    }


def hybrids(model):
    """Every map of layer 1, and an untied head, as outer products beside a sum; the embedding by 2."""
    entries = {"embedding": RightFactor((1, 2))}
    for site in anatomy_of(model).sites.values():
        if site.layer == 1 or site.name == "head":
            sum_of = f"{site.out_features // 2}x{site.in_features // 2}(x)2x2*2"
            entries[site.name] = parse_shape(f"{site.out_features}x1(x)1x{site.in_features}*2 + {sum_of}")
    return Plan(entries)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2.untied", "llama", "llama.untied", "llama.bias"])
def test_hybrids_come_back_in_another_process(model_of_kind, tmp_path, ids):
    """Both families, tied and untied, with biases: logits to the bit, a continuation, the dense export."""
    compress_(model_of_kind, hybrids(model_of_kind))
    continued = model_of_kind.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    save_model(model_of_kind, tmp_path / "model")
    torch.save({"ids": ids, "logits": model_of_kind(ids).logits, "continued": continued}, tmp_path / "expected.pt")
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(".parts.1.right" in name for name in names) == sum(
        "+" in t for t in factored_maps(model_of_kind).values()
    )
    code = """
import sys, kncompress, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
told = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(model(told["ids"]).logits, told["logits"])
again = model.generate(told["ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
assert torch.equal(again, told["continued"])
from kncompress.formats.pretrained import to_dense
dense = to_dense(model)
torch.testing.assert_close(dense(told["ids"]).logits, told["logits"], atol=1e-3, rtol=1e-4)
assert not any("parts" in name for name in dense.state_dict())
print(sum(p.numel() for p in model.parameters()))
"""
    assert int(run_python(code, tmp_path / "model", tmp_path / "expected.pt")) == unique_parameters(model_of_kind)


@pytest.mark.parametrize("order", ["import kncompress, transformers", "import transformers.quantizers, kncompress"])
def test_another_process_after_import_alone(folder, student, ids, tmp_path, order):
    """Either import order; logits equal to the bit, and a generated continuation."""
    code = f"""
{order}
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor({ids.tolist()})
torch.save([model(ids).logits.detach(), model.generate(ids, max_new_tokens=3, do_sample=False)], sys.argv[2])
"""
    run_python(code, folder, tmp_path / "out.pt")
    logits, continued = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(logits, student(ids).logits.detach(), atol=1e-6, rtol=1e-6)
    assert torch.equal(continued, student.generate(ids, max_new_tokens=3, do_sample=False))


def test_save_load_save_again(folder, student, tmp_path, ids):
    """Through save_model and through plain save_pretrained, fresh and loaded."""
    student.save_pretrained(tmp_path / "fresh")
    once = AutoModelForCausalLM.from_pretrained(folder)
    once.save_pretrained(tmp_path / "plain")
    save_model(load_model(tmp_path / "plain"), tmp_path / "again")
    first = load_file(folder / "model.safetensors")
    for name in ("fresh", "plain", "again"):
        weights = load_file(tmp_path / name / "model.safetensors")
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[key], first[key]) for key in first)
        assert torch.equal(load_model(tmp_path / name)(ids).logits, student(ids).logits)


def test_classifier_from_a_language_model_folder(folder, student, tmp_path, ids):
    """A new head, everything else loaded; and back again from the classifier's own folder."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    states = classifier.transformer(ids).last_hidden_state
    assert torch.equal(states, student.transformer(ids).last_hidden_state)
    save_model(classifier, tmp_path / "classifier")
    again = load_model(tmp_path / "classifier", "sequence-classification")
    assert torch.equal(again(ids).logits, classifier(ids).logits)
    model = load_model(tmp_path / "classifier")
    assert torch.equal(model(ids).logits, student(ids).logits)


def test_untied_factored_head(tiny_config, tmp_path, ids):
    tiny_config.tie_word_embeddings = False
    model = GPT2LMHeadModel(tiny_config).eval()
    compress_(model, Plan({"head": RightFactor((1, 2)), "embedding": RightFactor((1, 2))}))
    save_model(model, tmp_path / "untied")
    assert torch.equal(load_model(tmp_path / "untied")(ids).logits, model(ids).logits)
    assert load_model(tmp_path / "untied", "sequence-classification")(ids).logits.shape == (2, 2)
    torch.testing.assert_close(to_dense(model)(ids).logits, model(ids).logits)


def test_base_model_class_loads(folder, student, ids):
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base(ids).last_hidden_state, student.transformer(ids).last_hidden_state)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_model, AutoModel.from_pretrained])
def test_a_missing_factor_is_an_error(folder, load):
    edit_weights(folder, lambda weights: weights.pop("transformer.h.1.attn.c_attn.q.left"))
    with pytest.raises(UserError, match=r"lacks weights: .*h\.1\.attn\.c_attn\.q\.left"):
        load(folder)


def test_a_dense_checkpoint_under_a_factored_config_is_an_error(folder, tmp_path, tiny_config):
    GPT2LMHeadModel(tiny_config).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks weights"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_model])
def test_an_unknown_weight_is_an_error(folder, load):
    edit_weights(folder, lambda weights: weights.update({"transformer.h.0.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"has unknown weights: transformer\.h\.0\.extra"):
        load(folder)


def test_load_model_checks_dense_folders_too(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "dense")
    edit_weights(tmp_path / "dense", lambda weights: weights.pop("transformer.h.2.mlp.c_fc.weight"))
    with pytest.raises(UserError, match=r"lacks weights: transformer\.h\.2\.mlp\.c_fc\.weight"):
        load_model(tmp_path / "dense")


def test_wrong_map_names_and_missing_folders_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["maps"]["layers.9.mlp.up"] = "48x24(x)2x1"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantization_config of .*layers\.9\.mlp\.up"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.path=.*nowhere"):
        load_model(folder / "nowhere")
    with pytest.raises(UserError, match="task=chess: not one of causal-lm"):
        load_model(folder, "chess")


def test_dtype_of_the_file_and_of_the_model(student, tmp_path, ids):
    """float32 unless asked otherwise, whatever the model's own type; the model in hand is not touched."""
    save_model(student, tmp_path / "half", dtype="float16")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not [key for key in weights if key.startswith("lm_head")]
    half = load_model(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    save_model(half, tmp_path / "full")
    full = load_model(tmp_path / "full")
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    torch.testing.assert_close(full(ids).logits, student(ids).logits, atol=0.05, rtol=0.05)


def test_half_and_float_work_on_a_loaded_model(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(ids).logits
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}
    assert model.lm_head.left is model.transformer.wte.left
    torch.testing.assert_close(model.float()(ids).logits, expected, atol=0.05, rtol=0.05)
    assert model.to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16


def test_tokenizer_travels_with_the_model(student, tmp_path):
    tokens = Tokenizer(WordLevel({"<unk>": 0, "kron": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")
    save_model(student, tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("kron")["input_ids"] == [1]


def test_a_failed_save_leaves_the_old_folder_whole(folder, student, monkeypatch, ids):
    def fail(*_):
        raise RuntimeError("disk full")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        student.transformer.ln_f.weight.mul_(2)

    class BrokenTokenizer:
        save_pretrained = fail

    with pytest.raises(RuntimeError, match="disk full"):
        save_model(student, folder, BrokenTokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    save_model(student, folder)
    assert torch.equal(load_model(folder)(ids).logits, student(ids).logits)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_peoples_folders_are_not_replaced(student, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="no model folder"):
        save_model(student, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_to_dense_is_plain_gpt2(student, tmp_path, ids):
    dense = to_dense(student)
    assert type(dense) is GPT2LMHeadModel
    torch.testing.assert_close(dense(ids).logits, student(ids).logits, atol=1e-5, rtol=1e-5)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    assert factored_maps(student)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    expected = set(GPT2LMHeadModel(dense.config).state_dict()) - {"lm_head.weight"}
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == expected
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "kncompress" not in sys.modules
torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits.detach(), sys.argv[2])
"""
    torch.save(ids, tmp_path / "tensor.pt")
    run_python(code, tmp_path / "dense", tmp_path / "tensor.pt")
    logits = torch.load(tmp_path / "tensor.pt", weights_only=True)
    torch.testing.assert_close(logits, student(ids).logits.detach(), atol=1e-5, rtol=1e-5)


def test_to_dense_of_a_loaded_model_can_be_factored_again(folder, ids):
    dense = to_dense(load_model(folder))
    expected = dense(ids).logits
    compress_(dense, PLAN)
    torch.testing.assert_close(dense(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_trainer_takes_a_step_on_a_loaded_folder(folder, tmp_path, ids):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().global_step == 1
    for name in (
        "transformer.wte.left",
        "transformer.h.1.attn.c_attn.q.right",
        "transformer.h.2.attn.c_attn.q.weight",
    ):
        assert not torch.equal(model.get_parameter(name), before[name])
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(load_model(tmp_path / "saved")(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: cut(f / "model.safetensors", 100), r"model\.safetensors is damaged"),
        (lambda f: cut(f / "model.safetensors", -10), r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 5000), r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), r"lacks its weights: model\.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "must be unpickled, which is never done"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: is damaged, not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: \[1\]: must be an object"),
        (lambda f: (f / "config.json").unlink(), r"no model there \(no config\.json\)"),
        (lambda f: change_config(f, model_type="nonsense"), "nonsense"),
        (lambda f: change_config(f, n_embd=48), r"is \[\d+.*\] in the weights and \[\d+.*\] in config\.json"),
    ],
)
def test_a_damaged_folder_is_one_line(tiny, tmp_path, damage, reason):
    folder = save_model(tiny, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=rf"model\.path=.*model: .*{reason}") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


def change_config(folder, **values):
    fields = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(fields))


def test_weights_in_several_files_are_all_needed(tiny, tmp_path, ids):
    tiny.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(load_model(tmp_path / "model")(ids).logits, tiny(ids).logits)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks its weights: {shards[1].name}"):
        load_model(tmp_path / "model")


def test_code_in_a_folder_is_not_run(tiny, tmp_path):
    folder = save_model(tiny, tmp_path / "model")
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('code of a model folder was run')")
    for load in (load_model, load_config):
        with pytest.raises(UserError, match=r"model\.path=.*model: "):
            load(folder)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scalars_of_terms_survive_the_folder(tiny, ids, tmp_path, dtype):
    """In layers, a hybrid and a tied embedding; also in the dense export."""
    before = unique_parameters(tiny)
    shapes = {"embedding": "s*96x12(x)1x2*2", "layers.1.mlp.up": "s*48x24(x)2x1", "layers.2.attn.k": "s*12x12(x)2x2*3"}
    shapes["layers.2.mlp.down"] = "s*24x1(x)1x96*4 + 12x96(x)2x1"
    shapes = {name: parse_shape(text) for name, text in shapes.items()}
    predicted = predict(tiny.config, Plan(shapes))
    table = compress_(tiny, Plan(shapes))
    assert predicted.parameters_after == table.parameters_after
    saved = sum(shape.dense_parameters - shape.parameters for shape in shapes.values())
    assert table.parameters_after == unique_parameters(tiny) == before - saved
    scales = {name: p for name, p in tiny.named_parameters() if name.endswith(".scale")}
    assert sorted(p.numel() for p in scales.values()) == [1, 2, 3, 4]
    with torch.no_grad():
        for scale in scales.values():
            assert scale.eq(1).all()
            scale.uniform_(0.5, 2)
        tiny.to(dtype or torch.float32)
        logits = tiny(ids).logits
    assert tiny.lm_head.scale is tiny.transformer.wte.scale
    folder = save_model(tiny, tmp_path / "model", dtype=dtype)
    assert "s*12x12(x)2x2*3" in (folder / "config.json").read_text()
    assert sum(name.endswith("scale") for name in load_file(folder / "model.safetensors")) == 4  # the tied one once
    loaded = load_model(folder, dtype=dtype or torch.float32)
    assert torch.equal(loaded(ids).logits, logits)
    assert loaded.lm_head.scale is loaded.transformer.wte.scale
    if dtype is None:
        torch.testing.assert_close(to_dense(loaded)(ids).logits, logits)
    edit_weights(folder, lambda weights: weights.pop("transformer.h.2.attn.c_attn.k.scale"))
    with pytest.raises(UserError, match=r"lacks weights: transformer.h.2.attn.c_attn.k.scale"):
        load_model(folder)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn"])
def test_attention_kernels_of_another_machine_are_not_asked_for(folder, ids, kernel):
    wanted = load_model(folder)(input_ids=ids).logits
    _edit_config(folder, _attn_implementation=kernel)
    model = load_model(folder)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", None])
def test_weights_quantised_by_others_are_refused_in_one_line(folder, method):
    _edit_config(folder, quantization_config={"quant_method": method, "bits": 4} if method else {"bits": 4})
    told = rf"its weights are quantised \({method or 'bitsandbytes'}\); give the model that they were made of"
    for load in (load_model, load_config):
        with pytest.raises(UserError, match=told):
            load(folder)


def _edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied", "gemma"])
def test_tokens_are_added_to_a_factored_embedding(kind, tmp_path, ids):
    """The same size is no change; another one multiplies embedding and head out, and the rest stays factored."""
    model = random_model(config_of(kind))
    compress_(model, Plan({"*": RightFactor((1, 2))}))
    folder = save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    before = unique_parameters(loaded)
    for same in ({"new_num_tokens": 96}, {"pad_to_multiple_of": 8}, {}):
        assert loaded.resize_token_embeddings(**same) is loaded.get_input_embeddings()
    assert unique_parameters(loaded) == before
    loaded.resize_token_embeddings(104, mean_resizing=False)
    assert "embedding" not in factored_maps(loaded) and "layers.1.attn.o" in factored_maps(loaded)
    again = load_model(save_model(loaded, tmp_path / "larger"))
    for larger in (loaded, again):
        logits = larger(ids).logits
        assert logits.shape == (2, 7, 104)
        torch.testing.assert_close(logits[..., :96], model(ids).logits, atol=1e-3, rtol=1e-3)
    again.resize_token_embeddings(112)
    assert model.resize_token_embeddings(90).num_embeddings == 90
    assert copy.deepcopy(model)(ids.clamp(max=80)).logits.shape == (2, 7, 90)
