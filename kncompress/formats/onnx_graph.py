"""Language models as ONNX files: from torch, with the factors as they are.

``write_decoder`` makes the graph that generates (its inputs and outputs: ``onnx_decoder.py``). ``write_onnx`` makes
one that scores: ``input_ids`` and ``attention_mask``, both (batch, tokens) int64, to ``logits`` (batch, tokens, V), or
(batch, labels) of a classifier, without a cache. Both take any batch and any number of tokens up to the model's
positions.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import positions_of
from kncompress.errors import UserError
from kncompress.formats.onnx_decoder import FROM_END, CacheSizes, Decoder
from kncompress.formats.onnx_passes import name_sizes, quiet, save, tidy_
from kncompress.formats.onnx_rotary import turning

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_OPEN = torch.export.Dim.DYNAMIC
Tell = Callable[[str], None]


def _silent(stage: str) -> None:
    """Nobody asks."""


def check_packages(key: str, packages: Sequence[str] | None = None) -> None:
    """Raises UserError, which names ``key``, where a package of the extra ``onnx`` is missing."""
    for package in PACKAGES if packages is None else packages:
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


def write_onnx(model: Any, file: Path, tell: Tell = _silent) -> None:
    """Write the graph of ``model`` that scores, in the type of its weights; above 1.5 GiB they go to ``<file>.data``.

    Maps stay factored: the file has as many numbers as the model has parameters, up to a copy of factors that two
    maps read in different orders.
    """
    # Sizes of 1 would be taken for constants.
    ids = torch.zeros(2, min(8, positions_of(model.config)), dtype=torch.long)
    sizes = {0: _OPEN, 1: _OPEN}
    with quiet():
        graph = _recorded(
            _Logits(model),
            (ids, torch.ones_like(ids)),
            (sizes, sizes),
            ["input_ids", "attention_mask"],
            ["logits"],
            tell,
        )
        for value in (*graph.graph.inputs, *graph.graph.outputs):
            name_sizes(value, ("batch", "tokens"))
        save(graph, file)


def write_decoder(model: Any, sizes: list[CacheSizes], file: Path, tell: Tell = _silent) -> None:
    """Write the graph of ``model`` that generates; everything else as ``write_onnx``.

    Args:
        model: a causal language model in evaluation mode.
        sizes: of its cache, as ``cache_sizes`` found them.
        file: is replaced.
        tell: is called with the name of each stage that begins.
    """
    import onnx_ir

    past = [torch.zeros(2, size.key_heads, 3, size.head, dtype=model.dtype) for size in sizes for _ in "kv"]
    # No tensor twice: torch would take both for one input.
    ids, positions = (torch.zeros(2, 2, dtype=torch.long) for _ in range(2))
    inputs = ids, torch.ones(2, 5, dtype=torch.long), positions, torch.zeros(2, dtype=torch.long), past
    rows = {0: _OPEN, 1: _OPEN}
    open_sizes = rows, rows, rows, {0: _OPEN}, [{0: _OPEN, 2: _OPEN}] * len(past)
    kept = [f"{layer}.{kind}" for layer in range(len(sizes)) for kind in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", FROM_END, *(f"past_key_values.{name}" for name in kept)]
    with quiet():
        outputs = ["logits", *(f"present.{name}" for name in kept)]
        with turning(model):
            graph = _recorded(Decoder(model), inputs, open_sizes, names, outputs, tell)
        known = {"attention_mask": ("batch", "total"), FROM_END: ("chosen",)}
        for value in graph.graph.inputs:
            name_sizes(value, known.get(value.name, ("batch", "past" if "past" in value.name else "tokens")))
        for value in graph.graph.outputs[1:]:
            name_sizes(value, ("batch", "total"))
        # What it is unless ``from_end`` is fed. onnxruntime-genai reads here that it gets the last logits alone.
        graph.graph.outputs[0].shape = onnx_ir.Shape(["batch", 1, graph.graph.outputs[0].shape[2]])
        last = next(value for value in graph.graph.inputs if value.name == FROM_END)
        last.const_value = onnx_ir.tensor([0], onnx_ir.DataType.INT64, name=FROM_END)
        graph.graph.initializers[FROM_END] = last
        save(graph, file)


def _recorded(
    function: nn.Module, inputs: tuple[Any, ...], sizes: Any, names: list[str], outputs: list[str], tell: Tell
) -> Any:
    """``function`` as an ``onnx_ir.Model``."""
    was_training = function.model.training  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            tell("recording the model")
            program = torch.export.export(function.eval(), inputs, dynamic_shapes=sizes)
            tell("writing it as ONNX")
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, optimize=False, input_names=names, output_names=outputs
            )
    finally:
        function.train(was_training)
    assert made is not None
    tell("tidying the graph")
    tidy_(made.model)
    return made.model


def bytes_read(file: Path) -> int:
    """Bytes of a graph's weights that a new token reads: all but tables that are only looked up."""
    import onnx_ir

    weights: Any = onnx_ir.load(file).graph.initializers.values()
    return sum(int(value.const_value.nbytes) for value in weights if not _looked_up(value))


def _looked_up(value: Any) -> bool:
    """Whether nothing reads all of it, reshaped on the way or not."""
    return all(
        (node.op_type == "Gather" and place == 0)
        or node.op_type == "GatherBlockQuantized"
        or (node.op_type == "Reshape" and place == 0 and _looked_up(node.outputs[0]))
        for node, place in value.uses()
    )
