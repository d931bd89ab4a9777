"""What is done to an ONNX graph between torch's exporter and the file."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_EXTERNAL = 3 << 29
"""Bytes of weights above which they lie in a file of their own: a protocol buffer ends at 2 GiB."""
_ALL = 1 << 40
_SMALL = 1024
"""Numbers of a tensor that may lie twice."""


def tidy_(model: Any) -> None:
    """Fold what depends on weights alone, but for a table that two maps read: it would lie twice. Drop what is unused.

    Stack traces go too, with the paths of this machine. onnxscript's own optimiser does little more for our graphs, and
    takes minutes for thirty layers.
    """
    from onnx_ir.passes.common import (
        ClearMetadataAndDocStringPass,
        CommonSubexpressionEliminationPass,
        DeduplicateInitializersPass,
        RemoveUnusedNodesPass,
    )
    from onnxscript.optimizer import fold_constants

    def once(node: Any) -> bool | None:
        """No for one that reads a table which others read too; else as the folder likes."""
        shared = [v for v in node.inputs if v is not None and v.is_initializer() and len(v.uses()) > 1]
        return False if any(v.const_value.size > _SMALL for v in shared) else None

    DeduplicateInitializersPass(size_limit=_ALL)(model)
    fold_constants(model, input_size_limit=_ALL, output_size_limit=_ALL, should_fold=once)
    _divide(model)
    _cancel(model)
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass(size_limit=_ALL)(model)
    CommonSubexpressionEliminationPass()(model)
    ClearMetadataAndDocStringPass()(model)
    multiply_in_float32(model)


def _divide(model: Any) -> None:
    """x * (1 / y) as x / y: the form in which onnxruntime knows a norm of the root of the mean square."""
    import onnx_ir

    for node in [node for node in model.graph if node.op_type == "Mul"]:
        for place, value in enumerate(node.inputs):
            inverse = value.producer()
            if inverse is not None and inverse.op_type == "Reciprocal":
                made = onnx_ir.node("Div", [node.inputs[1 - place], inverse.inputs[0]])
                old, new = node.outputs[0], made.outputs[0]
                new.type, new.shape = old.type, old.shape
                onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], [made], [old], [new])
                break


def _cancel(model: Any) -> None:
    """Transposed and back is nothing; reshaped twice is reshaped once, and not at all where the shape is the same."""
    for node in [node for node in model.graph if node.op_type in ("Transpose", "Reshape")]:
        before = node.inputs[0].producer()
        if before is not None and before.op_type == node.op_type == "Transpose":
            first, second = (list(each.attributes.get_ints("perm", [])) for each in (before, node))
            if first and [first[place] for place in second] == sorted(first):
                _bypass(node, before.inputs[0])
        elif node.op_type == "Reshape":
            target = node.inputs[1].const_value
            if before is not None and before.op_type == "Reshape" and (target is None or (target.numpy() != 0).all()):
                node.replace_input_with(0, before.inputs[0])  # 0 would be a size of the tensor between
            if _same_shape(node.inputs[0], node.outputs[0]):
                _bypass(node, node.inputs[0])


def _bypass(node: Any, value: Any) -> None:
    """Whoever reads ``node`` reads ``value``; an output of the graph keeps its node."""
    if not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(value)


def _same_shape(first: Any, second: Any) -> bool:
    """Known to be: sizes that are open have names."""
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in pairs)


def multiply_in_float32(model: Any) -> None:
    """Falcon multiplies its position biases in bfloat16, for which onnxruntime has no product: widen, round after."""
    import onnx_ir

    wide, narrow = onnx_ir.DataType.FLOAT, onnx_ir.DataType.BFLOAT16
    for node in [node for node in model.graph if node.op_type == "Mul" and node.outputs[0].dtype == narrow]:
        casts = [onnx_ir.node("Cast", [value], {"to": wide}) for value in node.inputs]
        product = onnx_ir.node("Mul", [cast.outputs[0] for cast in casts])
        rounded = onnx_ir.node("Cast", product.outputs, {"to": narrow})
        old, new = node.outputs[0], rounded.outputs[0]
        new.type, new.shape = old.type, old.shape
        onnx_ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [*casts, product, rounded], [old], [new]
        )


def name_sizes(value: Any, names: Sequence[str]) -> None:
    """``names`` for the sizes of an input or output that are open, in the place of the exporter's numbers."""
    from onnx_ir import Shape

    left = iter(names)
    value.shape = Shape([size if isinstance(size, int) else next(left) for size in value.shape])


def weight_bytes(model: Any) -> int:
    """Bytes of its weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def save(model: Any, file: Path) -> None:
    """Write an ``onnx_ir.Model``; weights above 1.5 GiB to ``<file>.data`` beside it."""
    import onnx_ir

    onnx_ir.save(model, file, external_data=f"{file.name}.data" if weight_bytes(model) > _EXTERNAL else None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's talk of themselves: packages that they lack, their own old calls."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
