"""Record what happens inside a model while it runs: the tensors that distillation compares.

Attention is tapped after any rotation of queries and keys, through transformers' attention interface, so the
forward pass keeps its fused kernel and no attention map is formed (``output_attentions`` returns an empty
tuple under sdpa without a word).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Size, Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kncompress.anatomy.own_attention import own_implementation, tap_own
from kncompress.anatomy.sites import anatomy_of

NAMES = ("embedding", "attention", "hidden", "feed_forward")
"""What can be tapped."""

_SDPA, _EAGER = "kncompress_tapped_sdpa", "kncompress_tapped_eager"


class AttentionTap(NamedTuple):
    """Queries and keys of one layer; its scores are scaling * query key^T."""

    query: Tensor
    """(B, H, T, head size)"""
    key: Tensor
    """(B, key heads, S, head size); S exceeds T where a cache holds earlier tokens."""
    scaling: float
    causal: bool = True
    """A query sees no later key."""
    window: int | None = None
    """Keys that it sees at most, its own position's among them; None: all that are not later."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    bias: Tensor | None = None
    """(1 or B, H, 1 or T, S), added to the scores: how far a key is away (ALiBi)."""


@dataclass
class Records:
    """What one forward pass left, with gradients; layers by number."""

    embedding: Tensor | None = None
    attention: dict[int, AttentionTap] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    feed_forward: dict[int, Tensor] = field(default_factory=dict)


class Taps:
    """Taps on one model: hooks from construction to ``close()``, or as a context manager.

    Each forward pass starts new ``records``; those of earlier passes stay valid for who holds them. While the
    taps are open the model computes attention by sdpa, or by its own code where sdpa cannot.

    Args:
        model: transformers model, dense or compressed, of a family with an anatomy.
        names: which of ``NAMES`` to record.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the model's attention is tapped already; or, at the end of a forward pass, a layer that
            was not recorded.
    """

    def __init__(self, model: Any, names: Iterable[str] = NAMES) -> None:
        self.names = frozenset(names)
        if unknown := self.names - set(NAMES):
            raise ValueError(f"names={', '.join(sorted(unknown))}: not among {', '.join(NAMES)}")
        self.records = Records()
        self.recording = False
        """From the beginning of a forward pass until ``forget``: a layer that is computed again in the backward pass is
        not recorded."""
        self._model = model
        self._implementation: str | None = None
        self._batch = Size()
        """(B, T) of the forward pass"""
        family = anatomy_of(model).family
        layers = list(model.base_model.get_submodule(family.layers))
        self.layers = len(layers)
        self._adds_in_place = family.adds_in_place
        self._handles: list[Any] = []
        if "attention" in self.names:
            self._tap_attention([layer.get_submodule(family.attention) for layer in layers])
        self._handles.append(model.base_model.register_forward_hook(self._check))
        self._handles.append(layers[0].register_forward_pre_hook(self._enter, with_kwargs=True))
        if "hidden" in self.names:
            self._tap_outputs(layers, "hidden")
        if "feed_forward" in self.names:
            self._tap_outputs([layer.get_submodule(family.feed_forward) for layer in layers], "feed_forward")

    @property
    def embedding(self) -> Tensor:
        """What enters the first layer, (B, T, D): token and position, after dropout."""
        if self.records.embedding is None:
            raise self._lacking("embedding", 0, 1)
        return self.records.embedding

    @property
    def attention(self) -> list[AttentionTap]:
        """Queries and keys of every layer."""
        return self._all("attention")

    @property
    def hidden(self) -> list[Tensor]:
        """Output of every layer, (B, T, D)."""
        return self._all("hidden")

    @property
    def feed_forward(self) -> list[Tensor]:
        """Output of every feed-forward block before it joins the residual stream, (B, T, D)."""
        return self._all("feed_forward")

    def forget(self) -> None:
        """Let go of the records of the last forward pass."""
        self.records, self.recording = Records(), False

    def close(self) -> None:
        """Take all hooks off and give the model its own attention back; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._implementation is not None:
            for module in self._attention_modules:
                _TAPPED.pop(module, None)
            self._attend_by(self._implementation)
            self._implementation = None

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(self, name: str) -> list[Any]:
        found = getattr(self.records, name)
        if len(found) != self.layers:
            raise self._lacking(name, len(found), self.layers)
        return [found[layer] for layer in range(self.layers)]

    def _lacking(self, name: str, found: int, wanted: int) -> RuntimeError:
        why = "" if name in self.names else f"; it is not among the tapped names: {', '.join(sorted(self.names))}"
        return RuntimeError(f"taps: {name} recorded {found} times in a forward pass, not {wanted}{why}")

    def _check(self, *_: Any) -> None:
        for name in self.names:
            getattr(self, name)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.records, self.recording = Records(), True  # not by a hook on the base model, which OPT does not call
        entering = args[0] if args else kwargs["hidden_states"]
        self._batch = entering.shape[:2]
        if "embedding" in self.names:
            self.records.embedding = entering

    def _tap_outputs(self, modules: list[nn.Module], name: str) -> None:
        for number, module in enumerate(modules):

            def record(_: nn.Module, __: Any, output: Any, number: int = number) -> None:
                if not self.recording:
                    return
                tensor = output[0] if isinstance(output, tuple) else output
                if tensor.ndim == 2:  # OPT's feed-forward part works on a list of tokens
                    tensor = tensor.unflatten(0, self._batch)
                if self._adds_in_place and name == "feed_forward":
                    tensor = tensor.clone()
                getattr(self.records, name)[number] = tensor

            self._handles.append(module.register_forward_hook(record))

    def _tap_attention(self, modules: list[nn.Module]) -> None:
        if any(module in _TAPPED for module in modules):
            raise RuntimeError("taps: this model's attention is tapped already; close those taps first")
        self._attention_modules = modules
        self._implementation = self._model.config._attn_implementation
        own = own_implementation(modules[0])
        self._has_own = own is not None
        self._attend_by(own or (_SDPA if self._model._supports_sdpa else _EAGER))
        for number, module in enumerate(modules):
            _TAPPED[module] = (self, number)
            if own is not None:
                self._handles.append(tap_own(module, partial(self._note_attention, number)))

    def _attend_by(self, implementation: str) -> None:
        if self._has_own:  # set_attn_implementation knows only those that go through the interface
            self._model.config._attn_implementation = implementation
        else:
            self._model.set_attn_implementation(implementation)

    def _note_attention(self, number: int, *found: Any) -> None:
        if self.recording:
            self.records.attention[number] = AttentionTap(*found)


_TAPPED: "WeakKeyDictionary[nn.Module, tuple[Taps, int]]" = WeakKeyDictionary()
"""Attention modules with open taps, and their layer numbers."""


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa attention that first records queries and keys."""
    _note(module, query, key, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _tapped_eager(module: nn.Module, query: Tensor, key: Tensor, *others: Any, **kwargs: Any) -> Any:
    """The attention of the model's own file, for those that sdpa cannot do (Gemma 2 caps its scores)."""
    _note(module, query, key, kwargs)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, *others, **kwargs)


def _note(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    if module in _TAPPED:
        taps, number = _TAPPED[module]
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        causal, window = getattr(module, "is_causal", True), kwargs.get("sliding_window")
        taps._note_attention(number, query, key, scaling, causal, window, kwargs.get("softcap"))


ALL_ATTENTION_FUNCTIONS.register(_SDPA, _tapped_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
ALL_ATTENTION_FUNCTIONS.register(_EAGER, _tapped_eager)
ALL_MASK_ATTENTION_FUNCTIONS.register(_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
