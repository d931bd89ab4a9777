"""Block-wise reconstruction: after the fit, each block is trained for a few steps against the dense block's outputs.

Hidden states of both models are cached and moved one block at a time. A block reads the outputs of the repaired
blocks before it and is trained towards the dense model's hidden states after it, so it also corrects some of the
error in its input. There are no logits, and no backward pass through more than one block: one pass over the text
costs about three passes of the blocks.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.mapped import own_, raised, twin
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.layerwise import CalibrationText, HiddenStates, evaluating
from kncompress.compression.table import RepairErrors
from kncompress.compression.work import Work, layer_cost
from kncompress.config import RepairConfig
from kncompress.kron import Shape
from kncompress.kron.gauge import factor_rates

STEP_TOKENS = 512
"""Tokens of one step; a block of the text at least."""
HELD_SHARE = 8
"""One in so many blocks of the text is held out, where there are as many; else steps and choice share all of it."""


def relative_error(states: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |states - target|^2 / |target|^2, each (..., D); a scalar.

    The mean is over tokens, because GPT-2 and Llama give the first token states a hundred times as large as the
    others.
    """
    gap = (states - target).float().square().sum(-1)
    return (gap / target.float().square().sum(-1).clamp_min(1e-12)).mean()


class BlockRepair:
    """Made of a dense model before the fit, run on the same model after it.

    Args:
        model: dense transformers model; its numbers may be in half precision, those of the fit are in float32.
        shapes: {map name: shape} of what will be factored.
        text: what both models read.
        settings: passes over the text, and the rate.
        work: is told what is being done.
    """

    def __init__(
        self, model: Any, shapes: Mapping[str, Shape], text: CalibrationText, settings: RepairConfig, work: Work
    ) -> None:
        self.model, self.settings, self.work = model, settings, work
        anatomy = anatomy_of(model)
        self.path = anatomy.family.layers
        self.embedding = "embedding" in shapes
        numbers = [anatomy.sites[name].layer for name in shapes]
        self.first = 0 if self.embedding else min((n for n in numbers if n is not None), default=anatomy.layers)
        self.text, self.held = split(text)
        layers = model.base_model.get_submodule(self.path)
        with evaluating(model):
            self.dense, self.dense_held = HiddenStates(model, self.text), HiddenStates(model, self.held)
        self.layers = [twin(layer).eval() for layer in layers[self.first :]]
        """As they are before the fit; those that lie in files stay there."""
        self.costs = [layer_cost(layer, len(text.tokens)) for layer in layers]
        self.work.expect(sum(self.costs[: self.first]) + sum(map(self._cost, range(self.first, len(layers)))))

    def _cost(self, number: int) -> float:
        return self.costs[number] * (3 * self.settings.passes + 2)

    def run(self) -> RepairErrors:
        """Repair the model, which is factored by now, in place."""
        began = time.perf_counter()
        layers = self.model.base_model.get_submodule(self.path)
        wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        before, after = [], []
        try:
            self.model.requires_grad_(False)
            with evaluating(self.model):
                for number, layer in enumerate(layers[: self.first]):
                    with raised(layer):
                        self.dense.advance(layer)
                        self.dense_held.advance(layer)
                    self.work.finish(self.costs[number])
                if self.embedding:
                    states, held = HiddenStates(self.model, self.text), HiddenStates(self.model, self.held)
                else:
                    states, held = self.dense.copy(), self.dense_held.copy()
                plain = held.copy()
                for number, layer in enumerate(layers[self.first :], self.first):
                    self.work.begin(f"layers.{number} repair")
                    dense = self.layers[number - self.first]
                    with raised(dense):
                        self.dense.advance(dense)
                        self.dense_held.advance(dense)
                    plain.advance(layer)
                    before.append(self._error(plain))
                    self._repair(layer, number, states, held)
                    states.advance(layer)
                    held.advance(layer)
                    after.append(self._error(held))
                    self.work.finish(self._cost(number))
        finally:
            for parameter, grad in wanted:
                parameter.requires_grad_(grad)
        return RepairErrors(tuple(before), tuple(after), time.perf_counter() - began)

    def _error(self, states: HiddenStates) -> float:
        """Of states after a block, against the dense model's."""
        pairs = zip(states.chunks, self.dense_held.chunks, strict=True)
        return weighted_mean([(float(relative_error(own, dense)), dense.shape[:2].numel()) for own, dense in pairs])

    def _error_of(self, layer: nn.Module, held: HiddenStates) -> float:
        """Of what ``layer`` makes of the held-out states."""
        found = []
        for number, dense in enumerate(self.dense_held.chunks):
            own = held.call(layer, number)
            found.append((float(relative_error(own, dense.to(own.device))), dense.shape[:2].numel()))
        return weighted_mean(found)

    def _repair(self, layer: nn.Module, number: int, states: HiddenStates, held: HiddenStates) -> None:
        """Train one block; the weights with the least error on the held-out states are kept, the start included."""
        own_(layer)  # and not the file's, which the dense layer reads too
        trained = list(layer.parameters())
        for parameter in trained:
            parameter.requires_grad_(True)
        best, kept = self._error_of(layer, held), [p.detach().clone() for p in trained]
        steps = self.settings.passes * len(states.chunks)
        optimizer = torch.optim.Adam(groups(layer, self.settings.lr), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
        order = torch.Generator().manual_seed(number)
        for _ in range(self.settings.passes):
            for batch in torch.randperm(len(states.chunks), generator=order).tolist():
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    output = states.output(layer, batch)
                    loss = relative_error(output, self.dense.chunks[batch].to(output.device))
                    loss.backward()
                optimizer.step()
                schedule.step()
            optimizer.zero_grad(set_to_none=True)
            error = self._error_of(layer, held)
            if error < best:
                best, kept = error, [p.detach().clone() for p in trained]
            elif not math.isfinite(error):
                break
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)


def split(text: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
    """The text of the steps, in batches of one step each, and the text held out: its end."""
    blocks = len(text.tokens) // text.context
    cut = (blocks - blocks // HELD_SHARE) * text.context if blocks >= HELD_SHARE else 0
    steps = replace(text, tokens=text.tokens[:cut] if cut else text.tokens, batch_tokens=STEP_TOKENS)
    return steps, replace(text, tokens=text.tokens[cut:])


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: a rise over a tenth of the steps, then a cosine to 0."""
    rising = max(1, steps // 10)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))


def groups(layer: nn.Module, lr: float) -> list[dict[str, Any]]:
    """A group for each parameter: each factor takes the rate at which a step moves its map's weight as ``lr`` would
    move a dense one."""
    rates = factor_rates(layer)
    return [{"params": [p], "lr": lr * rates.get(name, 1.0)} for name, p in layer.named_parameters()]


def weighted_mean(pairs: list[tuple[float, int]]) -> float:
    """Mean of the first values, counted as often as the second say."""
    return sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
