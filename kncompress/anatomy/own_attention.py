"""Taps on attention that does not go through transformers' interface, as that of the older families.

Each entry finds queries and keys where the module's own code has them, after any rotation, with the factor of the
scores and what is added to them. Nothing of the module's arithmetic changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Record = Callable[..., None]
"""record(query, key, scaling, causal, window, softcap, bias), as ``AttentionTap`` has them."""


class _Undo:
    """Like the handle of a hook."""

    def __init__(self, *steps: Callable[[], Any]) -> None:
        self.steps = steps

    def remove(self) -> None:
        for step in self.steps:
            step()


def _wrapped(module: Any, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Puts ``change(method)`` in the place of a method of one module; returns what takes it away."""
    setattr(module, name, change(getattr(module, name)))
    return lambda: delattr(module, name)


def _scored_in_method(module: Any, record: Record) -> _Undo:
    """GPT-J and GPT-Neo: ``_attn(query, key, value, mask)``; local layers of GPT-Neo see the last few keys."""
    scaling = 1 / float(getattr(module, "scale_attn", 1.0))
    window = int(module.bias[0, 0, -1].sum()) if getattr(module, "attention_type", None) == "local" else None

    def change(method: Callable[..., Any]) -> Callable[..., Any]:
        def attend(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Any:
            record(query, key, scaling, True, window)
            return method(query, key, *others, **options)

        return attend

    return _Undo(_wrapped(module, "_attn", change))


def _bloom(module: Any, record: Record) -> _Undo:
    alibi: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, __, options: alibi.append(options["alibi"]), with_kwargs=True)

    def change(method: Callable[..., Any]) -> Callable[..., Any]:
        def split(fused: Tensor) -> Any:
            query, key, value = method(fused)
            bias = alibi.pop().view(query.shape[0], module.num_heads, 1, -1)
            record(query, key, module.inv_norm_factor, True, None, None, bias)
            return query, key, value

        return split

    return _Undo(handle.remove, _wrapped(module, "_reshape", change))


def _mpt(module: Any, record: Record) -> _Undo:
    biases: list[Tensor] = []
    note = lambda _, __, options: biases.append(options["position_bias"])  # noqa: E731
    before = module.register_forward_pre_hook(note, with_kwargs=True)

    def split(_: nn.Module, __: Any, fused: Tensor) -> None:
        if module.clip_qkv:
            fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, _value = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in fused.chunk(3, dim=-1))
        record(query, key, module.softmax_scale, True, None, None, biases.pop()[None, :, :, -key.shape[2] :])

    after = module.Wqkv.register_forward_hook(split)
    return _Undo(before.remove, after.remove)


class _WatchSdpa(TorchFunctionMode):
    """Within it every call of torch's fused attention is recorded."""

    def __init__(self, record: Record, alibi: bool) -> None:
        super().__init__()
        self.record, self.alibi = record, alibi

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, mask = args[0], args[1], kwargs.get("attn_mask")
            # Minus infinity for what is hidden would make a difference of two scores that is no number.
            bias = mask.clamp(min=torch.finfo(mask.dtype).min / 4) if self.alibi and mask is not None else None
            self.record(query, key, query.shape[-1] ** -0.5, True, None, None, bias)
        return function(*args, **kwargs)


def _falcon(module: Any, record: Record) -> _Undo:
    watch = _WatchSdpa(record, module.config.alibi)

    def change(method: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **options: Any) -> Any:
            with watch:
                return method(*args, **options)

        return forward

    return _Undo(_wrapped(module, "forward", change))


_OWN: dict[str, tuple[str, Callable[[Any, Record], _Undo]]] = {
    "GPTJAttention": ("eager", _scored_in_method),
    "GPTNeoSelfAttention": ("eager", _scored_in_method),
    "BloomAttention": ("eager", _bloom),
    "MptAttention": ("eager", _mpt),
    "FalconAttention": ("sdpa", _falcon),
}
"""Class -> the implementation that it must run by, and its tap."""


def own_implementation(module: nn.Module) -> str | None:
    """By what this attention is computed while it is tapped; None where it goes through the interface."""
    found = _OWN.get(type(module).__name__)
    return None if found is None else found[0]


def tap_own(module: nn.Module, record: Record) -> _Undo:
    """Have ``record`` called with each forward pass of this attention; ``remove()`` of the result ends it."""
    return _OWN[type(module).__name__][1](module, record)
