"""Language models as ONNX files: from torch, with the factors as they are, and from there to 8-bit integers.

The graph maps ``input_ids`` and ``attention_mask``, both (batch, tokens) int64, to ``logits`` (batch, tokens, V), or
(batch, labels) of a classifier, for any batch and any number of tokens up to the model's positions. It has no cache.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import positions_of
from kncompress.errors import UserError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_EXTERNAL = 3 << 29
"""Bytes of weights above which they lie in a file of their own: a protocol buffer ends at 2 GiB."""


def check_packages(key: str) -> None:
    """Raises UserError, which names ``key``, where a package of the extra ``onnx`` is missing."""
    for package in PACKAGES:
        if find_spec(package) is None:
            raise UserError(f"{key}: needs the package {package}: pip install 'kncompress[onnx]'")


class _Logits(nn.Module):
    """The model as a function of two tensors that gives one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def write_onnx(model: Any, file: Path) -> None:
    """Write ``model``, in the type of its weights, to ``file``; weights above 1.5 GiB to ``<file>.data`` beside it.

    Maps stay factored: the file has as many numbers as the model has parameters, up to a copy of factors that two
    maps read in different orders.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass

    was_training = model.training
    wrapped = _Logits(model).eval()
    # Sizes of 1 would be taken for constants.
    ids = torch.zeros(2, min(8, positions_of(model.config)), dtype=torch.long)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                wrapped,
                (ids, torch.ones_like(ids)),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(sizes, sizes),
            )
    finally:
        model.train(was_training)
    assert program is not None
    with _quiet():
        DeduplicateInitializersPass(size_limit=1 << 40)(program.model)
        ClearMetadataAndDocStringPass()(program.model)  # stack traces, with the paths of this machine
        _name_sizes(program.model)
        _multiply_in_float32(program.model)
        program.save(str(file), external_data=_weight_bytes(program.model) > _EXTERNAL)


def write_int8(source: Path, file: Path) -> None:
    """Write the ONNX file ``source`` to ``file`` with the weights of its maps and tables as 8-bit integers.

    Each output of a map has a scale of its own; inputs are turned to integers as they come (dynamic quantisation).
    """
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript.optimizer import fold_constants

    model = onnx_ir.load(source)
    large = _weight_bytes(model) > _EXTERNAL
    with _quiet(), TemporaryDirectory(dir=file.parent) as folder:
        # The quantiser takes a factor for a weight only where it meets the product as it is, not reshaped on the way.
        fold_constants(model, input_size_limit=1 << 40, output_size_limit=1 << 40)
        RemoveUnusedNodesPass()(model)
        DeduplicateInitializersPass(size_limit=1 << 40)(model)
        folded = Path(folder) / "folded.onnx"
        onnx_ir.save(model, folded, external_data="folded.onnx.data" if large else None)
        quantize_dynamic(folded, file, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=large)


def _name_sizes(model: Any) -> None:
    """``batch`` and ``tokens`` in the place of the exporter's numbered sizes."""
    from onnx_ir import Shape

    names = ("batch", "tokens")
    for value in model.graph.inputs:
        value.shape = Shape(names)
    for value in model.graph.outputs:
        fixed = [size for size in value.shape if isinstance(size, int)]
        value.shape = Shape([*names[: len(value.shape) - len(fixed)], *fixed])


def _multiply_in_float32(model: Any) -> None:
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


def _weight_bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's talk of themselves: packages that they lack, their own old calls."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
