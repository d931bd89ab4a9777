"""Optimisers and their schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kncompress.config import OptimizerConfig
from kncompress.kron import KroneckerEmbedding, PackedLinear
from kncompress.kron.gauge import factor_rates

_LEAST_RISING = 20


@dataclass(frozen=True)
class ParameterGroups:
    """Names of a model's parameters by how they are trained; the rest is trained without weight decay."""

    layer_matrices: frozenset[str]
    """Dense matrices that are neither an embedding nor a head tied to one."""
    decayed: frozenset[str]
    """Matrices and factors, but no embedding."""
    rates: Mapping[str, float]
    """Learning rate of each factor, relative to that of a dense weight, under ``factor_rates=scaled``."""


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Groups of a whole model; of one in shards the root mean squares behind ``rates`` cannot be taken."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding | KroneckerEmbedding))
    embeddings = {id(p) for table in tables for p in table.parameters()}
    free = {name: p for name, p in model.named_parameters() if id(p) not in embeddings and p.ndim >= 2}
    packed = {id(p) for m in model.modules() if isinstance(m, PackedLinear) for p in m.parameters()}
    matrices = (
        n for n, p in free.items() if p.ndim == 2 and id(p) not in packed and not n.startswith(("lm_head", "score"))
    )
    return ParameterGroups(frozenset(matrices), frozenset(free), factor_rates(model))


def build_optimizer(model: nn.Module, config: OptimizerConfig, groups: ParameterGroups | None = None) -> Optimizer:
    """AdamW over what ``model`` trains, or Muon over its dense layer matrices and AdamW over the rest.

    ``groups`` are those of the model before it was cut into shards; None: read from ``model``.
    """
    groups = groups or parameter_groups(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.name == "adamw":
        return _adamw(trained, groups, config)
    matrices = [p for name, p in trained.items() if name in groups.layer_matrices]
    rest = {name: p for name, p in trained.items() if name not in groups.layer_matrices}
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return OptimizerPair(muon, _adamw(rest, groups, config))


def warmup_cosine(steps: int, config: OptimizerConfig) -> Callable[[int], float]:
    """Factor on the peak rate at each step: linear rise, then a cosine down to ``final``."""
    rising = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def build_schedule(
    optimizer: Optimizer, steps: int, config: OptimizerConfig, place: Callable[[], int] | None = None
) -> LambdaLR:
    """The schedule of ``warmup_cosine``, stepped once an optimiser step.

    ``place`` tells at which of the ``steps`` the next one is; None: as many as were made. A clock may give a slow
    machine few steps: its rate rises over ``_LEAST_RISING`` of them at least, or the first would undo the start.
    """
    factor = warmup_cosine(steps, config)
    if place is None:
        return LambdaLR(optimizer, factor)
    return LambdaLR(optimizer, lambda step: min(factor(place()), (step + 1) / _LEAST_RISING))


class OptimizerPair(Optimizer):
    """Two optimisers over disjoint parameters that step as one and share one schedule.

    Lightning's automatic optimisation takes a single optimiser; parameter groups are shared with the two parts, so
    that a schedule set here reaches them.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.parts = (first, second)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _adamw(parameters: Mapping[str, nn.Parameter], groups: ParameterGroups, config: OptimizerConfig) -> AdamW:
    """One parameter group for what decays, one for what does not, and one for each factor that has its own rate.

    Their order follows from names alone: a resumed run may find factors of another size, and so other rates, before it
    has read its checkpoint.
    """
    scaled = groups.rates if config.factor_rates == "scaled" else {}
    parts: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts.setdefault((name not in groups.decayed, name if name in scaled else ""), []).append(parameter)
    options = [
        {
            "params": part,
            "lr": config.lr * scaled.get(name, 1.0),
            "weight_decay": 0.0 if exempt else config.weight_decay,
        }
        for (exempt, name), part in sorted(parts.items(), key=lambda entry: entry[0])
    ]
    return AdamW(options, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
