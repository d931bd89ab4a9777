"""Optimisers and their schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kncompress.config import OptimizerConfig
from kncompress.kron import KroneckerEmbedding


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over what ``model`` trains, or Muon over its dense layer matrices and AdamW over the rest."""
    if config.name == "adamw":
        return _adamw(model.named_parameters(), _embeddings(model), config)
    matrices = _layer_matrices(model)
    chosen = {id(p) for p in matrices}
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return OptimizerPair(muon, _adamw(rest, _embeddings(model), config))


def warmup_cosine(steps: int, config: OptimizerConfig) -> Callable[[int], float]:
    """Factor on the peak rate at each step: linear rise, then a cosine down to ``final``."""
    rising = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def build_schedule(optimizer: Optimizer, steps: int, config: OptimizerConfig) -> LambdaLR:
    """The schedule of ``warmup_cosine``, stepped once an optimiser step."""
    return LambdaLR(optimizer, warmup_cosine(steps, config))


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


def _adamw(parameters: Iterable[tuple[str, nn.Parameter]], embeddings: set[int], config: OptimizerConfig) -> AdamW:
    """Weight decay on matrices and factors only; norms, biases and embeddings are exempt."""
    trained = [p for _, p in parameters if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in kept], "weight_decay": 0.0},
    ]
    # Not fused: Lightning refuses to clip gradients for a fused optimiser under mixed precision, bf16 included.
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2))


def _embeddings(model: nn.Module) -> set[int]:
    """Parameters of every embedding table, factored ones among them."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding | KroneckerEmbedding))
    return {id(p) for table in tables for p in table.parameters()}


def _layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Dense matrices that are neither an embedding nor a head tied to one."""
    embeddings = _embeddings(model)
    return [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and id(p) not in embeddings and p.requires_grad and not name.startswith(("lm_head", "score"))
    ]
