"""The harm that replaced maps do to a model's next-token distributions: KL(teacher || model), measured cheaply.

The dense model's hidden states at the input of every layer are kept, so a replaced map only costs the layers from its
own on. Only the change d of the logits is computed: with p the dense distribution and E the mean under p, KL = log
E[exp d] - E[d], exactly. The rounding of bfloat16 products is relative to d, which is as small as the harm. In a KL
of two sets of logits it would be relative to the logits and drown the harm.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.anatomy.swap import module_at, set_weight_
from kncompress.compression.layerwise import CalibrationText, HiddenStates, before_head, evaluating
from kncompress.compression.rows import ROOM, Rows
from kncompress.planner.costs import kl_cost

NUMBERS = 1 << 25
"""Numbers in one temporary of (tokens x vocabulary)."""


class _Layers(HiddenStates):
    """Hidden states that are moved on under autocast; the residual stream stays float32."""

    def move(self, layer: nn.Module, at: int, number: int, states: Tensor, bf16: bool) -> Tensor:
        """The output of ``layer``, the ``at``-th, for ``states`` (B, T, D) in the place of batch ``number``."""
        args, options = self.options(number, at)
        # The weights change, so their cast copies must not be cached.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            output = layer(states.to(self.device), *args, **options)
        return output[0] if isinstance(output, tuple) else output


class HarmMeter:
    """KL(teacher || model) in nats per token, of a dense model with some of its weights replaced.

    Holds n V float32 numbers for n tokens, one layer of the model, and n (layers + 1) D more where they find no room in
    memory in a file.

    Args:
        model: dense transformers model with a language-model head, in evaluation mode; its numbers may be in half
            precision. Its weights are replaced while a KL is taken and put back after it.
        text: what it reads.
        bf16: multiply in bfloat16: for hardware that does so natively.
    """

    @torch.no_grad()
    def __init__(self, model: Any, text: CalibrationText, bf16: bool = False) -> None:
        self.model, self.text, self.bf16 = model, text, bf16
        self.anatomy: Anatomy = anatomy_of(model)
        family = self.anatomy.family
        self.layers = model.base_model.get_submodule(family.layers)
        self.norm = before_head(model)
        self.head = model.get_submodule(family.head)
        # What some families do to the logits of their head: Granite divides them, Gemma 2 caps them.
        self.scale = 1 / getattr(model.config, "logits_scaling", 1.0)
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.type = torch.bfloat16 if bf16 else torch.float32
        with evaluating(model):
            self.states = _Layers(model, text)
            room = ROOM // (len(self.layers) + 1)
            self.inputs = [Rows(self.states.chunks, text.scratch, room)]
            """Per layer, and after the last one: the states of each batch, (B, T, D)."""
            for at, layer in enumerate(self.layers):
                with raised(layer):
                    moved = (self.states.move(layer, at, i, x, bf16) for i, x in enumerate(self.inputs[-1]))
                    self.inputs.append(Rows(moved, text.scratch, room))
            self.dense_head = self.head.weight.data
            """(V, D), in its own type."""
            with raised(self.norm, self.head):
                self.normed = [self.norm(x.to(self.states.device)).flatten(0, -2) for x in self.inputs[-1]]
                """(tokens, D) of each batch: what the dense head reads."""
                self.dense = [[self._softmax(rows) for rows in self._split(x)] for x in self.normed]

    @property
    def tokens(self) -> int:
        """Tokens that the KL is a mean over."""
        return self.states.tokens

    @torch.no_grad()
    def kl(self, weights: Mapping[str, Tensor]) -> float:
        """KL(teacher || model) with the maps of these names replaced; weights are (out, in), those of a layer asked for
        when it runs."""
        sites = [self.anatomy.sites[name] for name in weights]

        def of(layer: int | None) -> dict[Site, Tensor]:
            return {site: weights[site.name] for site in sites if site.layer == layer}

        with evaluating(self.model), replaced(self.model, of(None)):
            first = min((self.anatomy.layers if site.layer is None else site.layer for site in sites), default=0)
            states = list(self.inputs[first])
            if "embedding" in weights:
                first, states = 0, _Layers(self.model, self.text).chunks
            for at, layer in enumerate(self.layers[first:], first):
                with raised(layer), replaced(self.model, of(at)):
                    states = [self.states.move(layer, at, i, x, self.bf16) for i, x in enumerate(states)]
            with raised(self.norm, self.head):
                total = sum(self._batch(number, x) for number, x in enumerate(states))
        return total / self.tokens

    def cost(self, site: Site) -> float:
        """About the multiply-adds of one KL, of which hardware that multiplies bfloat16 does two at a time."""
        return kl_cost(self.anatomy, site, self.tokens) / (2 if self.bf16 else 1)

    def _batch(self, number: int, states: Tensor) -> float:
        """Sum of the KL over the tokens of a batch, from what the last layer gives."""
        dense = self.normed[number]
        moves = self.norm(states.to(self.states.device)).flatten(0, -2) - dense
        head, before = self.head.weight.detach(), self.dense_head.float()
        moved = None if torch.equal(head, before) else (head - before).to(self.type)
        del before
        head = head.to(self.type)
        total = 0.0
        for p, x, d in zip(self.dense[number], self._split(dense), self._split(moves), strict=True):
            change = F.linear(d.to(self.type), head).float()
            if moved is not None:
                change += F.linear(x.to(self.type), moved)
            total += divergence(p, self._changed(x, change))
        return total

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, NUMBERS // self.head.weight.shape[0]))

    def _softmax(self, rows: Tensor) -> Tensor:
        logits = self._logits(rows)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.softmax(-1)

    def _logits(self, rows: Tensor) -> Tensor:
        """Of the dense head, before any cap."""
        logits = F.linear(rows.to(self.type), self.dense_head.to(self.type)).float()
        return (logits if self.head.bias is None else logits + self.head.bias) * self.scale

    def _changed(self, rows: Tensor, change: Tensor) -> Tensor:
        """Change of the model's logits at ``rows`` where the outputs of its head change by ``change``."""
        if self.scale != 1:
            change = change * self.scale
        if self.softcap is None:
            return change
        before = self._logits(rows)
        capped = [self.softcap * torch.tanh(logits / self.softcap) for logits in (before + change, before)]
        return capped[0] - capped[1]


def divergence(p: Tensor, change: Tensor) -> float:
    """Sum over rows of KL(p || q), q being softmax(log p + change): log E[exp change] - E[change] under p.

    Args:
        p: (n, V), rows of positive numbers that add up to 1.
        change: (n, V), of the logits; overwritten.
    """
    change -= torch.linalg.vecdot(p, change)[:, None]
    return float(torch.log1p(torch.linalg.vecdot(p, change.clamp_(max=80.0).expm1_())).double().sum())


@contextmanager
def replaced(model: Any, weights: Mapping[Site, Tensor]) -> Iterator[None]:
    """Temporarily replace these weights (out, in) by others in float32; what was there is not touched."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for site, weight in weights.items():
            module = module_at(model, site)
            parameter = module.get_parameter("weight")
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.to(torch.float32, copy=True)
            set_weight_(module, site, weight)
        yield
    finally:
        for parameter, stored in reversed(kept):
            parameter.data = stored
