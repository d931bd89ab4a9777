"""Weights of ONNX files as integers of 8 or 4 bits, by groups of neighbours that share a scale."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kncompress.formats.onnx_passes import quiet, save

GROUPS = {8: 64, 4: 32}
"""Bits -> neighbours in a row that share a scale; measured: smaller groups are slower, larger ones lose more."""
_LEAST_GROUP = 16
_LEAST_SIZE = 2048
"""Numbers of a matrix below which it stays float: a factor of two numbers gains nothing."""
_INTEGER_INPUTS = 4
"""onnxruntime's accuracy level at which inputs are rounded to 8 bits too, by groups: two to thirty times as fast."""
DOMAIN = "com.microsoft"
"""Of onnxruntime's own operators."""


class _Rounded(NamedTuple):
    """A matrix (rows, width) as integers: initialisers, and what the operators want to know."""

    packed: Any
    """(rows, groups, bytes of a group), uint8."""
    scales: Any
    """(rows, groups)."""
    zeros: Any
    """(rows, bytes), uint8, packed as the integers."""
    group: int


def write_integers(source: Path, file: Path, bits: int, group: int | None = None) -> int:
    """Write the ONNX file ``source`` to ``file`` with its matrices as integers, a scale and a zero a group; the
    products are onnxruntime's MatMulNBits. What is small stays as it is.

    Args:
        source: written by ``write_decoder`` or ``write_onnx``.
        file: is replaced.
        bits: 8 or 4.
        group: neighbours in a row, a power of 2 from 16; rows that are shorter have a smaller one. None: ``GROUPS``.

    Returns:
        How many products and look-ups read integers.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx_ir.load(source)
    graph, made = model.graph, dict[tuple[str, ...], _Rounded]()
    count = 0
    for node in list(graph):
        found = weight_rows(node)
        if found is None:
            continue
        base, rows = found
        size = group or GROUPS[bits]
        while size > _LEAST_GROUP and size // 2 >= rows.shape[1]:
            size //= 2
        if (
            rows.size < _LEAST_SIZE
            or rows.shape[1] < _LEAST_GROUP
            or (node.op_type == "Gather" and rows.shape[1] % size)
        ):
            continue
        key = base, str(rows.shape), rows[0].tobytes().hex()
        if key not in made:
            made[key] = _rounded(graph, rows, bits, size, f"{base}.{len(made)}")
        new = _look_up(node, made[key], bits) if node.op_type == "Gather" else _product(node, made[key], rows, bits)
        old = node.outputs[0]
        new[-1].outputs[0].type, new[-1].outputs[0].shape = old.type, old.shape
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], new, [old], new[-1].outputs)
        count += 1
    with quiet():
        RemoveUnusedNodesPass()(model)
    model.opset_imports[DOMAIN] = 1
    save(model, file)
    return count


def weight_rows(node: Any) -> tuple[str, Any] | None:
    """Of a product or look-up: the name of its weight, and the weight with a row for each output or for each entry."""
    if node.op_type == "Gather":
        found = _constant(node.inputs[0]) if node.attributes.get_int("axis", 0) == 0 else None
        return found if found is not None and found[1].ndim == 2 else None
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    found = _constant(node.inputs[1])
    if found is None or found[1].ndim != 2:
        return None
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if node.op_type == "Gemm" and (node.attributes.get_int("transA", 0) or not plain):
        return None
    return found[0], found[1] if turned else found[1].T


def _constant(value: Any) -> tuple[str, Any] | None:
    """Name and numbers of a floating-point weight, also of one that is turned or reshaped on the way."""
    if value.is_initializer():
        array = value.const_value.numpy()
        return (value.name, array) if array.dtype in (np.float32, np.float16) else None
    maker = value.producer()
    if maker is None or maker.op_type not in ("Transpose", "Reshape"):
        return None
    found = _constant(maker.inputs[0])
    if found is None:
        return None
    if maker.op_type == "Transpose":
        return found[0], found[1].transpose(maker.attributes.get_ints("perm", range(found[1].ndim)[::-1]))
    shape = maker.inputs[1].const_value
    return None if shape is None else (found[0], found[1].reshape(shape.numpy()))


def _rounded(graph: Any, rows: Any, bits: int, group: int, name: str) -> _Rounded:
    """By onnxruntime's own kernel, which wants the matrix the other way round."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=False, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(rows.T))
    scales = scales.reshape(len(rows), -1)
    return _Rounded(
        initializer(graph, f"{name}.integers", packed),
        initializer(graph, f"{name}.scales", scales),
        initializer(graph, f"{name}.zeros", zeros.reshape(len(rows), -1)),
        group,
    )


def initializer(graph: Any, name: str, array: Any) -> Any:
    """``array`` as a new weight of ``graph``, under that name."""
    import onnx_ir

    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
    value.shape, value.dtype = onnx_ir.Shape(array.shape), onnx_ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _product(node: Any, weight: _Rounded, rows: Any, bits: int) -> list[Any]:
    """``MatMul`` or ``Gemm`` as ``MatMulNBits``; what is added follows by itself."""
    import onnx_ir

    attributes = {
        "K": rows.shape[1],
        "N": rows.shape[0],
        "bits": bits,
        "block_size": weight.group,
        "accuracy_level": _INTEGER_INPUTS,
    }
    inputs = [node.inputs[0], weight.packed, weight.scales, weight.zeros]
    product = onnx_ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN)
    if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return [product]
    return [product, onnx_ir.node("Add", [product.outputs[0], node.inputs[2]])]


def _look_up(node: Any, weight: _Rounded, bits: int) -> list[Any]:
    import onnx_ir

    shape = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor([0, -1], onnx_ir.DataType.INT64)})
    table = onnx_ir.node("Reshape", [weight.packed, shape.outputs[0]])
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": weight.group, "bits": bits}
    inputs = [table.outputs[0], node.inputs[1], weight.scales, weight.zeros]
    return [shape, table, onnx_ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN)]
