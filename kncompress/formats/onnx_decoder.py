"""A causal language model as one function for the prompt and for decoding, its attention one operator a layer.

Inputs: ``input_ids`` and ``position_ids`` (batch, tokens), ``attention_mask`` (batch, past + tokens), all int64, and
for layer i ``past_key_values.<i>.key`` and ``.value`` (batch, key heads, past, head size). Outputs: ``logits``, and
``present.<i>.key`` and ``.value`` (batch, key heads, past + tokens, head size). Rows of a batch are padded at their
end: of the mask only the sums of its rows are read.

``logits`` are those of each row's last token, (batch, 1, V). Whoever wants others feeds the optional input ``from_end``
(k,), int64, how many tokens each lies before the last one: ``logits`` are then (batch, k, V).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FROM_END = "from_end"
_ATTENTION = "kncompress_onnx"
_MULTIPLE = 8
"""Of which the operator wants the head size to be one; narrower heads are filled up with zeros."""


class CacheSizes(NamedTuple):
    """What the cache of a layer holds for each token."""

    key_heads: int
    head: int
    """Numbers of a head, filled up."""


class _Passing:
    """In the place of a cache: a layer gets its new keys and values, which the operator appends to the past ones."""

    is_compileable = False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Decoder(nn.Module):
    """A model of transformers as that function: tensors in, tensors out.

    Args:
        model: a causal language model in evaluation mode for which ``cache_sizes`` found every layer.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, from_end: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """``past``: key and value of layer 0, of layer 1, and so on; returns the logits and as many present ones."""
        lengths = attention_mask.sum(1)
        batch, tokens = input_ids.shape
        last = torch.minimum(tokens - 1 - from_end, (lengths - 1)[:, None])  # (batch, k)
        places = last + tokens * torch.arange(batch)[:, None]

        def chosen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states = args[0].flatten(0, 1).index_select(0, places.flatten())
            return (states.unflatten(0, (batch, from_end.shape[0])), *args[1:])

        operator = _Operator(past, lengths, attention_mask)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(chosen)
        try:
            with _attending(self.model, operator):
                logits: Tensor = self.model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=_Passing(),
                    use_cache=True,
                ).logits
        finally:
            hook.remove()
        return (logits, *(tensor for layer in sorted(operator.present) for tensor in operator.present[layer]))


def cache_sizes(model: Any) -> list[CacheSizes]:
    """Of each layer; empty where the model does not ask transformers for its attention, which then cannot be replaced.

    Families with biases by distance of their own (Bloom, MPT, older Falcons) and GPT-J and GPT-Neo do not.
    """
    found: dict[int, CacheSizes] = {}

    def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        found[module.layer_idx] = CacheSizes(key.shape[1], _width(key, value))
        return query.transpose(1, 2)[..., : value.shape[-1]], None

    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        with torch.no_grad(), _attending(model, noted):
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except Exception:  # a family's own code, given an attention that it does not know
        return []
    layers = model.config.num_hidden_layers
    return [found[layer] for layer in range(layers)] if len(found) == layers else []


def _width(key: Tensor, value: Tensor) -> int:
    """Numbers of a head in the cache: of both alike."""
    size = max(key.shape[-1], value.shape[-1])
    return size + -size % _MULTIPLE


class _Operator:
    """transformers' attention function as onnxruntime's GroupQueryAttention, which also appends to the cache."""

    def __init__(self, past: list[Tensor], lengths: Tensor, mask: Tensor) -> None:
        self.past = past
        self.last = (lengths - 1).int()
        self.total = torch.full((1,), mask.shape[1], dtype=torch.int32)
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """query (B, heads, T, size), key and value (B, key heads, T, size) -> (B, T, heads, size).

        Sizes of a value and of a key may differ.
        """
        batch, heads, tokens, size = query.shape
        layer, key_heads, wide = module.layer_idx, key.shape[1], _width(key, value)
        past_key, past_value = self.past[2 * layer : 2 * layer + 2]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key_heads}
        attributes |= {"do_rotary": 0, "rotary_interleaved": 0}  # said for OpenVINO
        attributes["scale"] = float(size**-0.5 if scaling is None else scaling)
        if sliding_window:
            attributes["local_window_size"] = int(sliding_window)
        if softcap:
            attributes["softcap"] = float(softcap)
        full = (batch, key_heads, past_key.shape[2] + tokens, wide)
        rows = (F.pad(x, (0, wide - x.shape[-1])) if wide > x.shape[-1] else x for x in (query, key, value))
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*(x.transpose(1, 2).flatten(2) for x in rows), past_key, past_value, self.last, self.total),
            attributes,
            dtypes=[query.dtype] * 3,
            shapes=[(batch, tokens, heads * wide), full, full],
            version=1,
        )
        self.present[layer] = (present[0], present[1])
        out = out.unflatten(-1, (heads, wide))
        return (out[..., : value.shape[-1]] if wide > value.shape[-1] else out), None


@contextmanager
def _attending(model: Any, operator: Callable[..., Any]) -> Iterator[None]:
    """``model`` with ``operator`` as its attention; transformers makes no mask for a name that it does not know."""
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    AttentionInterface.register(_ATTENTION, operator)
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_ATTENTION)
