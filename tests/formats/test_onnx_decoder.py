"""The ONNX graph that generates: what it computes against transformers, its cache, what it is made of."""

import numpy as np
import onnx
import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.compression.compress import compress_
from kncompress.formats.onnx_decoder import cache_sizes
from kncompress.formats.onnx_folder import GRAPH, accompany
from kncompress.formats.onnx_graph import write_decoder
from kncompress.formats.onnx_session import OnnxDecoder, largest_difference

HALVES = Plan({"layers.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))})
FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "opt")
FURTHER = ("mistral", "gemma2", "opt.narrow", "smollm3", "gemma3_text", "granite", "olmo2", "phi3", "stablelm", "qwen2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a kind: the factored model, and the file of its graph, written once."""
    made = {}

    def of(kind):
        if kind not in made:
            model, file = random_model(config_of(kind)), tmp_path_factory.mktemp(kind) / "model.onnx"
            compress_(model, HALVES)
            write_decoder(model, cache_sizes(model), file)
            made[kind] = model, file
        return made[kind]

    return of


@pytest.mark.parametrize("kind", [*FAMILIES, *(pytest.param(kind, marks=pytest.mark.slow) for kind in FURTHER)])
def test_prompt_and_steps_are_those_of_transformers(kind, exported):
    """Logits of a prompt whose rows differ in length, then of each step; all positions, or the last alone."""
    model, file = exported(kind)
    decoder = OnnxDecoder(file, model.config)
    assert largest_difference(model, decoder) < 1e-5
    ids = torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    found = decoder(input_ids=ids[:, :9], attention_mask=mask, logits_to_keep=1)
    assert found.logits.shape == (2, 1, 96)
    torch.testing.assert_close(found.logits[:, 0], expected[[0, 1], [4, 8]], atol=1e-4, rtol=1e-4)
    for step in range(8):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        token = ids[[0, 1], [5 + step, 9 + step]][:, None]
        found = decoder(input_ids=token, attention_mask=mask, past_key_values=found.past_key_values)
        torch.testing.assert_close(found.logits[:, 0], expected[[0, 1], [5 + step, 9 + step]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_a_hundred_tokens_are_those_of_transformers(kind, tmp_path):
    """Greedy, by the loop on onnxruntime and by onnxruntime-genai where it is installed."""
    config = config_of(kind)
    config.max_position_embeddings, config.tie_word_embeddings = 128, False  # tied, it writes two tokens in turns
    model = random_model(config)
    if kind == "gpt_neox":  # small weights write the same tokens again and again
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6 if weight.dim() == 2 else 1)
    compress_(model, Plan({"layers.*": RightFactor((2, 1))}))
    write_decoder(model, cache_sizes(model), tmp_path / GRAPH)
    accompany(model, None, tmp_path, cache_sizes(model))
    ids = torch.randint(2, 96, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=0)[0].tolist()
    assert len(expected) == 109 and len(set(expected[9:])) > 9  # no end of text, and no single token again and again
    decoder, found, new, cache = OnnxDecoder(tmp_path / GRAPH, model.config), ids[0].tolist(), ids, None
    while len(found) < 109:
        output = decoder(input_ids=new, past_key_values=cache, logits_to_keep=1)
        new, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        found.append(int(new))
    assert found == expected
    genai = pytest.importorskip("onnxruntime_genai")
    loaded = genai.Model(str(tmp_path))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=109)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(ids.int().numpy())
    while not generator.is_done():
        generator.generate_next_token()
    assert list(map(int, generator.get_sequence(0))) == expected


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_several_tokens_go_on_from_a_cache(kind, exported):
    model, file = exported(kind)
    decoder = OnnxDecoder(file, model.config)
    ids = torch.randint(2, 96, (1, 15), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    first = decoder(input_ids=ids[:, :6])
    second = decoder(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, atol=1e-4, rtol=1e-4)


def test_a_damaged_cache_is_noticed(exported):
    """The comparison before an export is kept reads tokens through the cache."""
    model, file = exported("llama")
    decoder = OnnxDecoder(file, model.config)
    assert largest_difference(model, decoder) < 1e-5
    run = decoder.session.run

    class Damaged:
        def run(self, names, feeds):
            logits, *present = run(names, feeds)
            return [logits, *(np.zeros_like(x) for x in present)]

    decoder.session = Damaged()
    assert largest_difference(model, decoder) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_lie_once_and_factored(kind, exported):
    """A tied table and its head are one tensor; the operator of attention stands once a layer, of positions twice."""
    model, file = exported(kind)
    graph = onnx.load(file).graph
    numbers = sum(int(np.prod(value.dims)) for value in graph.initializer)
    assert numbers < model.num_parameters() + 300  # a second table would be 1,152 more
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 3 and kinds.count("RotaryEmbedding") == (6 if kind == "llama" else 0)
    assert "Reciprocal" not in kinds  # a norm is left in the form that onnxruntime knows
    assert b"site-packages" not in file.read_bytes() and b"/kncompress/" not in file.read_bytes()
    logits = graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in logits] == ["batch", 1, 96]


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "bloom", "mpt", "falcon", "falcon.rw"])
def test_families_with_an_attention_of_their_own_have_no_such_graph(kind):
    model = random_model(config_of(kind))
    before = model.config._attn_implementation
    assert cache_sizes(model) == [] and model.config._attn_implementation == before


def test_a_model_is_left_as_it_was(tmp_path):
    model = random_model(config_of("llama")).train()
    before, expected = model.config._attn_implementation, model(input_ids=torch.arange(2, 9)[None]).logits
    write_decoder(model, cache_sizes(model), tmp_path / "model.onnx")
    assert model.training and model.config._attn_implementation == before
    assert torch.equal(model(input_ids=torch.arange(2, 9)[None]).logits, expected)
