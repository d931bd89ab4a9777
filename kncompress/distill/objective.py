"""The weighted training loss: intermediate-layer distillation, logits and text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kncompress.config import ObjectiveConfig
from kncompress.distill.attention import QueryKey, attention_kl, attention_score_mse
from kncompress.distill.losses import cross_entropy, logits_kl, logits_kl_and_cross_entropy, mse
from kncompress.distill.sampled import Draws, sampled_kl

_Value = TypeVar("_Value")
TAPS = ("embedding", "attention", "hidden", "feed_forward")
"""Terms that need more of a model than its logits."""


@dataclass(frozen=True)
class Outputs:
    """What one forward pass left: logits and, where tapped, the insides of the model."""

    logits: Tensor | None
    """(B, T, V)."""
    embedding: Tensor | None = None
    """(B, T, D): output of the embeddings."""
    attention: Sequence[QueryKey] | None = None
    """Per layer: query (B, H, T, hd), key (B, Hkv, T, hd) and scaling."""
    hidden: Sequence[Tensor] | None = None
    """Per layer: (B, T, D) after the layer."""
    feed_forward: Sequence[Tensor] | None = None
    """Per layer: (B, T, D), output of the feed-forward part."""
    draws: Draws | None = None
    """Of a teacher: tokens drawn from its distributions, in the place of its logits."""


class Loss(NamedTuple):
    """Total loss (scalar, with a graph) and its unweighted terms by name (scalars, detached)."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Weighted sum of the terms whose weight is above 0 (KnGPT2, arXiv 2110.08152, and its relatives).

    Every term is a mean over layers, heads, queries and tokens, so weights keep their meaning when the depth
    or the batch changes.

    Args:
        config: weights, attention form and temperature.
        layers: teacher layer for each student layer (``layer_mapping``); null: both have the same depth.
        overwrites: the teacher's logits may be lost: their place is taken by the student's gradient.
    """

    walks_once = True
    """Whether the two terms on next-token logits are computed together where both have a weight."""

    def __init__(self, config: ObjectiveConfig, layers: Sequence[int] | None = None, overwrites: bool = False) -> None:
        self.config = config
        self.overwrites = overwrites
        self.layers = layers
        self.weights = {name: getattr(config, name) for name in config.TERMS if getattr(config, name) > 0}

    @property
    def taps(self) -> set[str]:
        """What has to be captured from both models: some of embedding, attention, hidden, feed_forward."""
        return {name for name in TAPS if name in self.weights}

    def __call__(
        self, student: Outputs, teacher: Outputs | None = None, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Loss:
        """The loss of one batch.

        Args:
            student: outputs with a graph.
            teacher: outputs on the same tokens; constants. Null where no term needs it.
            labels: (B, T) the input tokens, -100 where not scored; shifted inside.
            mask: (B, T), true at real tokens, for the terms that compare with the teacher; null: all real.

        Raises:
            ValueError: a term with weight above 0 finds nothing to compare, or shapes that do not fit. The
                message names the term.
        """
        drawn = teacher is not None and teacher.draws is not None
        together = self.walks_once and mask is None and not drawn and {"logits", "cross_entropy"} <= self.weights.keys()
        alone = [name for name in self.weights if not together or name not in ("logits", "cross_entropy")]
        terms = {name: self._term(name, student, teacher, labels, mask) for name in alone}
        parts = [self.weights[name] * term for name, term in terms.items()]
        if together:
            both, terms["logits"], terms["cross_entropy"] = self._over_vocabulary(student, teacher, labels)
            parts.append(both)
        return Loss(torch.stack(parts).sum(), {name: terms[name].detach() for name in self.weights})

    def _over_vocabulary(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of the terms on the logits, and both terms."""
        theirs = _given("logits", "teacher.logits", getattr(teacher, "logits", None))
        ours = _given("cross_entropy", "student.logits", student.logits)
        labels = _given("cross_entropy", "labels", labels)
        weights = (self.weights["logits"], self.weights["cross_entropy"])
        loss = partial(logits_kl_and_cross_entropy, temperature=self.config.temperature, overwrite=self.overwrites)
        return _named("logits", loss, ours, theirs, labels, weights)

    def _term(
        self, name: str, student: Outputs, teacher: Outputs | None, labels: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        if name == "cross_entropy":
            logits = _given(name, "student.logits", student.logits)
            return _named(name, self._on_labels, logits, _given(name, "labels", labels))
        ours = _given(name, f"student.{name}", getattr(student, name))
        if name == "logits" and teacher is not None and teacher.draws is not None:
            return _named(name, sampled_kl, ours, teacher.draws, self.config.temperature)
        theirs = _given(name, f"teacher.{name}", getattr(teacher, name, None))
        if name == "logits":
            return _named(name, self._on_logits, ours, theirs, mask)
        if name == "embedding":
            return _named(name, mse, ours, theirs, mask)
        loss: Callable[..., Tensor] = mse
        if name == "attention":
            loss = attention_kl if self.config.attention_form == "kl" else attention_score_mse
        pairs = zip(ours, self._paired(name, ours, theirs), strict=True)
        layers = [_named(f"{name}, layer {i}", loss, *pair, mask) for i, pair in enumerate(pairs)]
        return torch.stack(layers).mean()

    def _on_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The term ``cross_entropy``."""
        return cross_entropy(logits, labels)

    def _on_logits(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """The term ``logits``."""
        return logits_kl(student, teacher, self.config.temperature, mask)

    def _paired(self, name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
        """The teacher's entry for each student layer."""
        layers = range(len(theirs)) if self.layers is None else self.layers
        if len(layers) != len(ours):
            source = "the teacher" if self.layers is None else "the layer mapping"
            raise ValueError(f"objective.{name}: {len(ours)} layers in the student, {len(layers)} in {source}")
        if not all(0 <= layer < len(theirs) for layer in layers):
            raise ValueError(f"objective.{name}: mapping {list(layers)} exceeds the teacher's {len(theirs)} layers")
        return [theirs[layer] for layer in layers]


def _given(name: str, source: str, value: Any) -> Any:
    """``value``; refused where it is missing or empty, because a loss over nothing would look like a perfect one."""
    layers = [value] if value is None or isinstance(value, Tensor) else value
    if not len(layers) or any(layer is None for layer in layers):
        raise ValueError(f"objective.{name}: its weight is above 0, but {source} is missing or empty")
    return value


def _named(name: str, loss: Callable[..., _Value], *arguments: Any) -> _Value:
    try:
        return loss(*arguments)
    except ValueError as error:
        raise ValueError(f"objective.{name}: {error}") from error
