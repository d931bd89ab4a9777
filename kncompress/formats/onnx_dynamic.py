"""Weights of ONNX files as 8-bit integers, a scale for each output, and inputs rounded as they come, a scale for each
tensor: onnxruntime's dynamic quantisation.

onnxruntime's own tool for it takes a factor for a weight only where it meets the product as it is, gives a table one
scale, and writes a tied one twice.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kncompress.formats.onnx_integers import DOMAIN, initializer, weight_rows
from kncompress.formats.onnx_passes import quiet, save

_LEAST_SIZE = 256
"""Numbers of a matrix below which it stays float."""


class _Rounded(NamedTuple):
    """A matrix (rows, width) = integers * scales[:, None]."""

    integers: Any
    """(rows, width), int8."""
    scales: Any
    """(rows,)."""


def write_dynamic(source: Path, file: Path) -> int:
    """Write the ONNX file ``source`` to ``file`` with its matrices as 8-bit integers; the products are onnxruntime's
    MatMulIntegerToFloat. A tied table lies once; what is small stays as it is.

    Args:
        source: written by ``write_decoder`` or ``write_onnx``, in float32.
        file: is replaced.

    Returns:
        How many products and look-ups read integers.
    """
    import onnx_ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    model = onnx_ir.load(source)
    graph, made, count = model.graph, dict[tuple[str, ...], _Rounded](), 0
    for node in list(graph):
        found = weight_rows(node)
        if found is None or found[1].size < _LEAST_SIZE:
            continue
        base, rows = found
        key = base, str(rows.shape), rows[0].tobytes().hex()
        if key not in made:
            made[key] = _rounded(graph, rows, f"{base}.{len(made)}")
        new = _look_up(node, made[key]) if node.op_type == "Gather" else _product(node, made[key])
        old = node.outputs[0]
        new[-1].outputs[0].type, new[-1].outputs[0].shape = old.type, old.shape
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], new, [old], new[-1].outputs)
        count += 1
    with quiet():
        CommonSubexpressionEliminationPass()(model)  # maps that read one tensor round it once
        RemoveUnusedNodesPass()(model)
    model.opset_imports[DOMAIN] = 1
    save(model, file)
    return count


def _rounded(graph: Any, rows: Any, name: str) -> _Rounded:
    scales = np.abs(rows).max(1) / 127
    scales[scales == 0] = 1
    integers = np.rint(rows / scales[:, None]).astype(np.int8)
    return _Rounded(
        initializer(graph, f"{name}.integers", integers),
        initializer(graph, f"{name}.scales", scales.astype(np.float32)),
    )


def _product(node: Any, weight: _Rounded) -> list[Any]:
    import onnx_ir

    inputs = onnx_ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3)
    turned = onnx_ir.node("Transpose", [weight.integers], {"perm": [1, 0]})
    x, scale, zero = inputs.outputs
    values = [x, turned.outputs[0], scale, weight.scales, zero]
    product = onnx_ir.node("MatMulIntegerToFloat", values, domain=DOMAIN)
    if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return [inputs, turned, product]
    return [inputs, turned, product, onnx_ir.node("Add", [product.outputs[0], node.inputs[2]])]


def _look_up(node: Any, weight: _Rounded) -> list[Any]:
    import onnx_ir

    rows = onnx_ir.node("Gather", [weight.integers, node.inputs[1]], {"axis": 0})
    numbers = onnx_ir.node("Cast", rows.outputs, {"to": onnx_ir.DataType.FLOAT})
    scales = onnx_ir.node("Gather", [weight.scales, node.inputs[1]], {"axis": 0})
    last = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor([-1], onnx_ir.DataType.INT64)})
    column = onnx_ir.node("Unsqueeze", [scales.outputs[0], last.outputs[0]])
    return [rows, numbers, scales, last, column, onnx_ir.node("Mul", [numbers.outputs[0], column.outputs[0]])]
