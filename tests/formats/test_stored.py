"""Folders as people have them: what is stored decides, and what cannot be used is told in one line."""

import json
import time
from importlib.resources import files

import pytest
import torch
from formats.test_pretrained import edit_weights
from safetensors.torch import load_file, save_file
from tiny_models import config_of, random_model
from transformers import AutoConfig, AutoModelForCausalLM, XLNetConfig

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.inspection import predict
from kncompress.config import GenerateConfig
from kncompress.data.tokenizer import load_tokenizer
from kncompress.errors import CheckFailed, UserError
from kncompress.evaluation import perplexity
from kncompress.evaluation.continuation import Writer, continuation, prompt_ids
from kncompress.formats import stored
from kncompress.formats.onnx_session import largest_difference
from kncompress.formats.pretrained import load_config, load_model, save_model, to_dense
from kncompress.training.student import require_causal


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(autouse=True)
def _tells_again():
    stored.tell.cache_clear()


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_stored_head_is_kept_whatever_the_config_says(kind, ids, tmp_path, capsys):
    folder = tmp_path / "m"
    random_model(config_of(kind)).save_pretrained(folder)
    head = torch.randn(96, 24)
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": head}))
    config, model = load_config(folder), load_model(folder)
    assert not config.tie_word_embeddings and not model.config.tie_word_embeddings
    told = capsys.readouterr().err
    assert told.count("tie_word_embeddings=true, and the folder has a head of its own; kept") == 1
    assert torch.equal(model.lm_head.weight, head)
    assert "head" in anatomy_of(model).sites
    # The count that plans go by is that of the weights.
    assert predict(config, Plan()).parameters_before == unique_parameters(model)
    compress_(model, Plan({"*": RightFactor((1, 2))}))
    loaded = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path / "student"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    similar = torch.corrcoef(torch.stack([loaded.lm_head.weight.flatten(), head.flatten()]))[0, 1]
    assert similar > 0.6


def test_a_stored_head_that_equals_the_embedding_stays_tied(folder, tiny, capsys):
    same = tiny.transformer.wte.weight.detach().clone()
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": same}))
    assert load_config(folder).tie_word_embeddings
    model = load_model(folder)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(folder, number):
    def spoil(weights):
        weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = number

    edit_weights(folder, spoil)
    with pytest.raises(UserError, match=r"a weight of layers\.1\.mlp\.up \(transformer\.h\.1\.mlp.* is not"):
        load_model(folder)


def test_a_cast_that_overflows_is_refused(tiny, tmp_path):
    with torch.no_grad():
        tiny.transformer.h[2].attn.c_attn.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"dtype=float16: a weight of layers\.2\.attn\.q, .* is too large for it"):
        save_model(tiny, tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    save_model(tiny, tmp_path / "half", dtype="bfloat16")


def test_constants_of_older_versions_are_no_weights(folder, tiny, ids):
    def add(weights):
        for layer in range(3):
            weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
            weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_weights(folder, add)
    assert torch.equal(load_model(folder)(ids).logits, tiny(ids).logits)
    edit_weights(folder, lambda weights: weights.update({"transformer.h.0.attn.c_attn.scale": torch.ones(3)}))
    with pytest.raises(UserError, match="has unknown weights"):
        load_model(folder)


def test_integers_in_the_place_of_weights_are_refused(folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.ones_like(weights[name], dtype=torch.int8)}))
    with pytest.raises(UserError, match=rf"model.safetensors: {name} is of type I8; weights must be floats of 16 bits"):
        load_model(folder)


@pytest.mark.parametrize("placed", [{}, {"device_map": "auto", "max_memory": {"cpu": 0}}], ids=["whole", "placed"])
def test_an_index_that_tells_of_other_files_is_refused(tiny, tmp_path, placed):
    """Both weights are there, each in the other's file."""
    tiny.save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places = index["weight_map"]
    first = next(iter(places))
    last = next(name for name in places if places[name] != places[first])
    places[first], places[last] = places[last], places[first]
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks weights: transformer\..*, which model.safetensors.index.json has in m"):
        load_model(tmp_path, **placed)


def test_adapters_are_told_from_models(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for load in (load_config, load_model):
        with pytest.raises(UserError, match="holds an adapter beside the model; merge it"):
            load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"a LoRA adapter of org/base, not a model; merge it into that model"):
        load_config(folder)


def test_quantised_weights_are_told(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"its weights are quantised \(gptq\); give the model that they were made of"):
        load_model(folder)


def test_attention_that_is_not_installed_falls_back(folder, tiny, ids, capsys):
    edit_config(folder, attn_implementation="flash_attention_2")
    model = load_model(folder)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, tiny(ids).logits)
    assert "attn_implementation=flash_attention_2 is not installed; sdpa is used" in capsys.readouterr().err


def test_reasons_of_a_refused_config_are_kept(folder):
    edit_config(folder, n_head=5)
    with pytest.raises(UserError, match=r"n_head|divisible|num_heads"):
        load_model(folder)
    edit_config(folder, n_head="two")
    with pytest.raises(UserError, match="n_head"):
        load_config(folder)


def test_a_folder_that_does_not_give_its_model_back_is_not_kept(tiny, tmp_path, monkeypatch):
    """A model that was changed in a way that its folder cannot hold."""
    tiny.transformer.h[1].mlp.act = torch.nn.Identity()
    with pytest.raises(CheckFailed, match=r"was written and is not kept: loaded again its logits differ by"):
        save_model(tiny, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


WITHOUT_TABLE = {
    "cohere": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    "mamba": {"hidden_size": 24, "num_hidden_layers": 1, "state_size": 4},  # no attention, no cache of keys
}


@pytest.mark.parametrize("kind", WITHOUT_TABLE)
def test_a_family_without_a_table_is_scored_and_written_with(kind, tmp_path):
    tokenizer = load_tokenizer(files("kncompress") / "assets" / "mini")
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=0, **WITHOUT_TABLE[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    loaded = load_model(save_model(model, tmp_path / "m", tokenizer))
    require_causal(load_config(tmp_path / "m"), "evaluate")
    tokens = torch.arange(33)
    with torch.no_grad():
        logits, targets = model(tokens[None, :-1]).logits[0], tokens[1:]
        expected = torch.nn.functional.cross_entropy(logits[:32], targets[:32])
        found = perplexity(loaded, tokens, 33).nll
        assert found == pytest.approx(float(expected), rel=1e-5)
        ids = prompt_ids(tokenizer, "The river")
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
    settings = GenerateConfig(prompt="The river", tokens=4, temperature=0.0)
    *_, written = continuation(Writer(kind, loaded, tokenizer), "The river", settings, 0)
    assert tokenizer.decode(greedy).startswith("The river" + written.text)
    assert largest_difference(loaded, to_dense(loaded)) < 1e-5
    with pytest.raises(UserError, match=f"model_type={kind}: no table of its maps"):
        anatomy_of(loaded)


def test_files_that_the_index_does_not_name_are_no_part_of_the_model(folder, tiny, ids, capsys):
    """A shard of an earlier save, with a head in it."""
    (folder / "model.safetensors").unlink()
    tiny.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    save_file({"lm_head.weight": torch.randn(96, 24)}, folder / "model-00009-of-00009.safetensors")
    model = load_model(folder)
    assert model.config.tie_word_embeddings and capsys.readouterr().err == ""
    assert torch.equal(model(ids).logits, tiny(ids).logits)


def test_an_index_that_promises_a_weight_which_no_file_has(folder, tiny):
    (folder / "model.safetensors").unlink()
    tiny.save_pretrained(folder, max_shard_size="20KB")
    for file in folder.glob("model-*.safetensors"):
        weights = load_file(file)
        if weights.pop("transformer.h.1.mlp.c_fc.bias", None) is not None:
            save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_model(folder)


def test_a_head_that_was_put_into_a_model_is_factored_and_saved(tiny, tmp_path, ids):
    """``set_output_embeddings`` on a model whose config ties them."""
    head = torch.nn.Linear(24, 96, bias=False)
    tiny.set_output_embeddings(head)
    expected = tiny(ids).logits
    loaded = load_model(save_model(tiny, tmp_path / "dense"))
    assert torch.equal(loaded(ids).logits, expected)
    compress_(tiny, Plan({"head": RightFactor((1, 2), terms=2), "embedding": RightFactor((1, 2), terms=2)}))
    torch.testing.assert_close(tiny(ids).logits, expected, atol=1e-3, rtol=1e-3)
    again = load_model(save_model(tiny, tmp_path / "student"))
    assert torch.equal(again(ids).logits, tiny(ids).logits)


def test_a_config_that_takes_no_number_of_positions(tmp_path):
    XLNetConfig(n_layer=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model_type=xlnet: .*no sequence length limit"):
        load_config(tmp_path)


def test_a_sliding_window_of_nothing_is_none(tmp_path):
    config = config_of("mistral")
    config.sliding_window = None
    model = random_model(config)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=0)
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)


def plan_of(maps):
    return {"quantization_config": {"quant_method": "kronecker", "maps": maps}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_layer": 10**6}, r"config\.json: layers=1000000: must be a whole number from 1 to 2,000"),
        ({"n_layer": 0}, r"config\.json: layers=0: must be a whole number"),
        ({"n_head": 0}, r"config\.json: its sizes make no model"),
        ({"vocab_size": 10**12}, r"config\.json: vocabulary=1000000000000: must be a whole number"),
        (plan_of([1]), r"quantization_config\.maps=\[1\]: must be"),
        (plan_of({"a": 1}), r"maps={\"a\": 1}: must be names"),
        (plan_of(dict.fromkeys(map(str, range(10**6)), "1x1(x)1x1")), r"config\.json has more than 4,194,304 bytes"),
        (plan_of(dict.fromkeys(map("*{}*".format, range(60_000)), "keep")), r"quantization_config of .*"),
    ],
    ids=range(8),
)
def test_numbers_that_make_no_model_are_refused_at_once(folder, fields, words):
    edit_config(folder, **fields)
    since = time.process_time()
    with pytest.raises(UserError, match=words):
        load_model(folder)
    assert time.process_time() - since < 3


def test_an_index_names_files_of_the_folder_alone(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    for value, words in (("../part.safetensors", "not the name of a file"), (3, "must be a valid string")):
        index.write_text(json.dumps({"weight_map": {"wte": value}}))
        with pytest.raises(UserError, match=words):
            load_model(folder)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json: is damaged, not JSON"):
        load_model(folder)
