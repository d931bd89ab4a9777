"""Graphs whose weights are integers: what they hold, what stays float, what they compute."""

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan
from kncompress.compression.compress import compress_
from kncompress.formats.onnx_decoder import cache_sizes
from kncompress.formats.onnx_dynamic import write_dynamic
from kncompress.formats.onnx_graph import write_decoder, write_onnx
from kncompress.formats.onnx_integers import write_integers
from kncompress.formats.onnx_session import OnnxDecoder, OnnxModel, largest_difference, open_session
from kncompress.kron import parse_shape

MAPS = {
    "layers.*.mlp.gate": "128x1(x)1x64*40",  # outer products: rows of 64 and of 40 numbers
    "layers.*.mlp.up": "64x64(x)2x1",  # a right factor of two numbers
    "layers.*.mlp.down": "p*64x1(x)1x128*20",
}


@pytest.fixture(scope="module", params=["llama", "gpt_neox.untied"])
def floats(request, tmp_path_factory):
    """A model of 64 numbers a token, factored, and its graph."""
    config = config_of(request.param)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    model = random_model(config)
    maps = MAPS if request.param == "llama" else {"layers.*.mlp.up": "128x1(x)1x64*40"}
    compress_(model, Plan({name: parse_shape(text) for name, text in maps.items()}))
    file = tmp_path_factory.mktemp("floats") / "model.onnx"
    write_decoder(model, cache_sizes(model), file)
    return model, file


@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (4, 0.8)])
def test_integers_are_near_and_small(floats, bits, most, tmp_path):
    """The random weights are ten times the usual ones: little moves these logits much."""
    model, source = floats
    count = write_integers(source, tmp_path / "model.onnx", bits)
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert count == kinds.count("MatMulNBits") + kinds.count("GatherBlockQuantized")
    assert kinds.count("GatherBlockQuantized") == 1 and kinds.count("MatMulNBits") > 10
    assert (tmp_path / "model.onnx").stat().st_size < (0.45 if bits == 8 else 0.33) * source.stat().st_size
    difference = largest_difference(model, OnnxDecoder(tmp_path / "model.onnx", model.config))
    assert 1e-4 < difference < most


def test_a_tied_table_lies_once(floats, tmp_path):
    model, source = floats
    write_integers(source, tmp_path / "model.onnx", 8)
    sizes = [list(value.dims) for value in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert sizes.count([96, 1, 64]) == (1 if model.config.tie_word_embeddings else 2)


def test_a_factor_of_two_numbers_stays_float(floats, tmp_path):
    model, source = floats
    write_integers(source, tmp_path / "model.onnx", 4)
    before, after = (
        sorted(value.name for value in onnx.load(file).graph.initializer if list(value.dims) == [2, 1])
        for file in (source, tmp_path / "model.onnx")
    )
    assert before == after and len(before) == (3 if model.config.model_type == "llama" else 0)


@pytest.mark.parametrize("rows", [20, 40, 64, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_one_product_is_that_of_the_rounded_weight(rows, bits, tmp_path):
    """Also of rows that no group divides: y = x W to within half a step of each group, and 8 bits of the inputs."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(rows, 160)).astype(np.float32)
    x = generator.normal(size=(3, rows)).astype(np.float32)
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", numbers, ["b", rows])],
        [helper.make_tensor_value_info("y", numbers, ["b", 160])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "floats.onnx")
    assert write_integers(tmp_path / "floats.onnx", tmp_path / "integers.onnx", bits) == 1
    session = onnxruntime.InferenceSession(tmp_path / "integers.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    error = np.abs(found - x @ weight).max() / np.abs(x @ weight).max()
    assert error < (0.02 if bits == 8 else 0.15)


def test_dynamic_integers_are_near_and_small(floats, tmp_path):
    model, source = floats
    count = write_dynamic(source, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    products = kinds.count("MatMulIntegerToFloat")
    assert count == products + 1 and products > 10  # the look-up
    if model.config.model_type == "llama":  # maps that read one tensor round it once
        assert kinds.count("DynamicQuantizeLinear") <= products - 2 * model.config.num_hidden_layers
    assert (tmp_path / "model.onnx").stat().st_size < 0.4 * source.stat().st_size
    assert 1e-4 < largest_difference(model, OnnxDecoder(tmp_path / "model.onnx", model.config)) < 0.3
    tables = [list(value.dims) for value in graph.initializer].count([96, 64])
    assert tables == (1 if model.config.tie_word_embeddings else 2)


SHAPES = {
    "layers.0.mlp.up": "16x64(x)8x1",
    "layers.0.mlp.down": "8x16(x)8x8*3",
    "layers.1.attn.o": "8x8(x)8x8*4",
    "layers.1.mlp.up": "64x8(x)2x8*5",
    "layers.1.mlp.down": "1x128(x)64x1*9 + 8x16(x)8x8*2",
    "layers.2.mlp.up": "p*128x1(x)1x64*20",
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dynamic_graphs_of_every_shape_of_factor_load(kind, tmp_path):
    """The graph that generates and the one that scores: each scale has the size of its product's outputs."""
    config = config_of(kind)
    if kind == "llama":
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    else:
        config.n_embd, config.n_inner = 64, 128
    model = random_model(config)
    compress_(model, Plan({name: parse_shape(shape) for name, shape in SHAPES.items()}))
    write_decoder(model, cache_sizes(model), tmp_path / "floats.onnx")
    write_dynamic(tmp_path / "floats.onnx", tmp_path / "decoder.onnx")
    assert largest_difference(model, OnnxDecoder(tmp_path / "decoder.onnx", model.config)) < 0.3
    write_onnx(model, tmp_path / "floats.onnx")
    write_dynamic(tmp_path / "floats.onnx", tmp_path / "scores.onnx")
    assert largest_difference(model, OnnxModel(tmp_path / "scores.onnx", model.config)) < 0.3


@pytest.mark.parametrize("turned", [False, True])
def test_one_dynamic_product_is_that_of_the_rounded_weight(turned, tmp_path):
    """y = x W + b, also where the weight lies the other way round: to within half a step of each."""
    generator = np.random.default_rng(0)
    weight, bias = (generator.normal(size=size).astype(np.float32) for size in ((40, 160), (160,)))
    weight *= np.exp(generator.normal(size=160)).astype(np.float32)  # outputs of unlike sizes: each has its own scale
    x = generator.normal(size=(3, 40)).astype(np.float32)
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int(turned))],
        "product",
        [helper.make_tensor_value_info("x", numbers, ["b", 40])],
        [helper.make_tensor_value_info("y", numbers, ["b", 160])],
        [
            onnx.numpy_helper.from_array(weight.T.copy() if turned else weight, "w"),
            onnx.numpy_helper.from_array(bias, "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "floats.onnx")
    assert write_dynamic(tmp_path / "floats.onnx", tmp_path / "integers.onnx") == 1
    (found,) = open_session(tmp_path / "integers.onnx").run(None, {"x": x})
    error = np.abs(found - x @ weight - bias).max(0) / np.linalg.norm(weight, axis=0) / np.linalg.norm(x, axis=1).min()
    assert 1e-4 < error.max() < 0.02
