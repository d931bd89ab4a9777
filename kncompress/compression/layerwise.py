"""A text's hidden states, moved through a model one layer at a time: one pass of one layer a step."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.rows import ROOM
from kncompress.errors import UserError
from kncompress.kron.dense_product import without_autocast

Options = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer, without the states."""
Inputs = dict[str, Tensor]
"""{path of a module within its layer: what it was called with, (..., N)}"""


@dataclass(frozen=True)
class CalibrationText:
    """Text that moments are taken over, in blocks of ``context`` tokens; the last one may be shorter."""

    tokens: np.ndarray
    """(n,) integers"""
    context: int
    batch_tokens: int = 4096
    """Most tokens in one forward pass; a block at least."""
    moments: str | Path | None = None
    """Folder that keeps the moments of the dense model's inputs on this text; None: they are not kept."""
    first: int | None = None
    """Token that a block begins with, in the place of its own (``first_token``); None: its own."""
    scratch: str | Path | None = None
    """Folder for files of states and of rows that find no room in memory; None: the system's."""
    room: int = ROOM
    """Bytes of rows that are kept in memory."""

    def batches(self) -> Iterator[Tensor]:
        """(B, T) int64, in order.

        Raises:
            UserError: no tokens.
        """
        tokens = torch.from_numpy(np.asarray(self.tokens, dtype=np.int64))
        if not len(tokens):
            raise UserError("calibration.tokens: the calibration text has no tokens")
        if self.first is not None:
            tokens = tokens.clone()
            tokens[:: self.context] = self.first
        whole = len(tokens) // self.context * self.context
        if whole:
            yield from tokens[:whole].view(-1, self.context).split(max(1, self.batch_tokens // self.context))
        if whole < len(tokens):
            yield tokens[None, whole:]


class _Caught(Exception):
    """Ends a forward pass that has shown what was asked for."""


class HiddenStates:
    """What enters a layer, for every batch of a text: on the CPU, whatever device the model is on.

    Args:
        model: transformers model of a family with an anatomy, in evaluation mode; run up to its first layer.
        text: what it reads.

    Raises:
        UserError: the text has no tokens.
    """

    @torch.no_grad()
    def __init__(self, model: Any, text: CalibrationText) -> None:
        family = anatomy_of(model).family
        self.layer = 0
        """Number of the layer that the states enter."""
        self.device = next(model.parameters()).device
        self.chunks: list[Tensor] = []
        """(B, T, D) each"""
        self._shapes: list[torch.Size] = []
        # Masks and positions depend only on the batch's shape, and on the layer where some layers have a window.
        self._options: dict[tuple[torch.Size, int], Options] = {}
        layers = model.base_model.get_submodule(family.layers)
        differ = len(set(getattr(model.config, "layer_types", None) or ())) > 1
        self._kinds = len(layers) if differ else 1

        def catch(args: tuple[Any, ...], options: dict[str, Any]) -> None:
            options = dict(options)
            hidden = args[0] if args else options.pop("hidden_states")
            self.chunks.append(hidden.cpu())
            self._shapes.append(hidden.shape)
            if self._kinds == 1 or (hidden.shape, 0) in self._options:
                self._options[hidden.shape, 0] = args[1:], options
                raise _Caught

        def note(number: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            options = dict(options)
            hidden = args[0] if args else options.pop("hidden_states")
            self._options[hidden.shape, number] = args[1:], options

        handles = [layers[0].register_forward_pre_hook(lambda _, *given: catch(*given), with_kwargs=True)]
        if differ:  # one pass through all layers for each shape
            handles += [
                layer.register_forward_pre_hook(lambda _, *given, n=number: note(n, *given), with_kwargs=True)
                for number, layer in enumerate(layers)
            ]
        lifted = ExitStack()
        if differ:
            for layer in layers:
                handles.append(layer.register_forward_pre_hook(lambda part, _: lifted.enter_context(raised(part))))
                handles.append(layer.register_forward_hook(lambda *_: lifted.close()))
        inner = {id(parameter) for parameter in layers.parameters()}
        before = [m for m in model.base_model.modules() if not any(id(p) in inner for p in m.parameters())]
        try:
            with without_autocast(self.device), raised(*before):
                for ids in text.batches():
                    with suppress(_Caught):
                        model.base_model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            lifted.close()
            for handle in handles:
                handle.remove()

    def copy(self) -> "HiddenStates":
        """The same states, to be moved on independently."""
        twin = copy.copy(self)
        twin.chunks = list(self.chunks)
        return twin

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(shape[0] * shape[1] for shape in self._shapes)

    @torch.no_grad()
    def call(self, layer: nn.Module, number: int) -> Tensor:
        """The output of ``layer`` for batch ``number``, on its device, without a graph."""
        return self.output(layer, number)

    def output(self, layer: nn.Module, number: int, states: Tensor | None = None) -> Tensor:
        """The output of ``layer``, or of one in its place, for batch ``number``, (B, T, D), on its device; ``states``:
        what it reads, None: what is kept."""
        args, options = self.options(number, self.layer)
        states = self.chunks[number] if states is None else states
        with without_autocast(self.device):
            output = layer(states.to(self.device), *args, **options)
        return output[0] if isinstance(output, tuple) else output

    def options(self, number: int, layer: int) -> "Options":
        """What a layer is called with for batch ``number``, beside the states."""
        return self._options[self._shapes[number], min(layer, self._kinds - 1)]

    def advance(self, layer: nn.Module, watch: Callable[[int], None] | None = None) -> None:
        """Replace the states by the layer's outputs. ``watch`` is called with each batch's number after it."""
        for number in range(len(self.chunks)):
            self.chunks[number] = self.call(layer, number).cpu()
            if watch is not None:
                watch(number)
        self.layer += 1

    def apply(self, module: nn.Module, number: int) -> Tensor:
        """A module that takes hidden states alone, such as the final norm, on batch ``number``."""
        with torch.no_grad(), without_autocast(self.device):
            return module(self.chunks[number].to(self.device))

    def inputs(self, layer: nn.Module, paths: Sequence[str], number: int) -> Inputs:
        """What enters the modules at ``paths`` for batch ``number``; the layer is run no further than to the last."""
        with recorded(layer, paths, stop=True) as found, suppress(_Caught):
            self.call(layer, number)
        return dict(found)


def before_head(model: Any) -> nn.Module:
    """What turns the last layer's output, (..., D), into what the head reads; the model has a head."""
    modules: list[nn.Module] = []
    for path in anatomy_of(model).family.before_head:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name)
        if module is not None:
            modules.append(module)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def after_head(config: Any, logits: Tensor) -> Tensor:
    """The logits of a model from those of its head, (..., V): Granite divides them, Gemma 2 caps them."""
    scaling, cap = getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)
    if scaling != 1:
        logits = logits / scaling
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextmanager
def recorded(layer: nn.Module, paths: Sequence[str], stop: bool = False) -> Iterator[Inputs]:
    """Record the inputs of the modules at ``paths`` at each call of ``layer`` within the block. ``stop``: end the
    call by an exception once all of them were seen.
    """
    found: Inputs = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[path] = args[0].detach()
            if stop and len(found) == len(paths):
                raise _Caught

        return hook

    handles = [layer.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within the block; on exit every module gets its own mode back. Modules that were
    added within the block get the model's mode.
    """
    training, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for module, mode in modes:
            module.training = mode
