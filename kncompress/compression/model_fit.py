"""Fits the maps of a plan, each by itself or each layer after the other, and puts the factors into the model."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import Anatomy, Site
from kncompress.anatomy.swap import FACTORED, dense_bias, dense_weight, empty_module, module_at, put_module
from kncompress.compression.gradients import output_moments
from kncompress.compression.layerwise import CalibrationText, evaluating
from kncompress.compression.map_fit import Fitted, InputMoment, fit_calibrated, fit_embedding, fit_nearest
from kncompress.compression.moments import input_of, moments, token_frequencies
from kncompress.compression.sequential import SequentialFit, sequential_cost
from kncompress.compression.work import Work, fit_cost
from kncompress.config import FitConfig
from kncompress.kron import HybridLinear, KroneckerShape, Moment, PackedLinear, Shape

Start = Literal["nearest", "random", "calibrated", "sequential"]
STARTS: tuple[Start, ...] = ("nearest", "random", "calibrated", "sequential")
CALIBRATED = ("calibrated", "sequential")
"""Starts that need a text."""


class ModelFit:
    """Fits the maps of ``shapes`` and puts them into ``model``."""

    def __init__(
        self, model: Any, anatomy: Anatomy, shapes: Mapping[str, Shape], settings: FitConfig, work: Work
    ) -> None:
        self.model, self.anatomy, self.shapes, self.settings, self.work = model, anatomy, shapes, settings, work
        self.outputs: dict[str, Moment] = {}

    def run(self, start: Start, text: CalibrationText | None) -> dict[str, Fitted]:
        """What was fitted, by map; nothing for random factors and for a model on the meta device."""
        if not self.shapes:
            return {}
        if start == "nearest" and not next(self.model.parameters()).is_meta:
            return self._nearest()
        if start == "random" or text is None:
            for _, sites in self.anatomy.modules():
                self._place(sites, {})
            return {}
        with evaluating(self.model):
            return self._sequential(text) if start == "sequential" else self._calibrated(text)

    def _nearest(self) -> dict[str, Fitted]:
        fits: dict[str, Fitted] = {}
        self.work.expect(sum(self._cost(name, False) for name in self.shapes))
        for _, sites in self.anatomy.modules():
            fits |= {site.name: self._fit(site, None) for site in sites if site.name in self.shapes}
            self._place(sites, fits)
        return fits

    def _calibrated(self, text: CalibrationText) -> dict[str, Fitted]:
        """All maps are fitted before the first one is replaced: the moments are those of the dense model."""
        readers: dict[str, list[Site]] = {}
        for name in self.shapes:
            if name != "embedding":
                readers.setdefault(input_of(self.anatomy.sites[name]), []).append(self.anatomy.sites[name])
        if self._ties_head:
            readers.setdefault("head", []).append(self.anatomy.sites["embedding"])
        fits: dict[str, Fitted] = {}
        self.work.expect(sum(self._cost(name, True) for name in self.shapes))
        self.outputs = self._gradients(text)
        if "embedding" in self.shapes and not self._ties_head:
            fits["embedding"] = self._embedding(text, None)
        for name, found in moments(self.model, text, list(readers), self.work):
            moment = InputMoment(found)
            for site in readers[name]:
                tied = site.name == "embedding"
                fits[site.name] = self._embedding(text, moment) if tied else self._fit(site, moment)
        for _, sites in self.anatomy.modules():
            self._place(sites, fits)
        return fits

    def _cost(self, name: str, calibrated: bool) -> float:
        return fit_cost(self.anatomy.sites[name], self.shapes[name], calibrated, self.settings.sweeps)

    def _fit(self, site: Site, moment: InputMoment | None) -> Fitted:
        """Factors nearest to the weight, or with the least error on the inputs of this moment."""
        self.work.begin(site.name)
        old, shape = module_at(self.model, site), self.shapes[site.name]
        weight, bias = dense_weight(old, site), dense_bias(old, site)
        if moment is None:
            fitted = fit_nearest(weight, bias, shape, self.settings)
        else:
            outputs = self.outputs.pop(site.name, None)
            fitted = fit_calibrated(weight, bias, shape, moment, self.settings, outputs)
        self.work.finish(self._cost(site.name, moment is not None))
        return fitted

    def _gradients(self, text: CalibrationText) -> dict[str, Moment]:
        """Moments of the gradients at the maps' outputs, where the fit asks for them."""
        if self.settings.sides == "inputs":
            return {}
        return output_moments(self.model, text, list(self.shapes), self.work)

    @property
    def _ties_head(self) -> bool:
        return "embedding" in self.shapes and self.anatomy.tied and self.anatomy.has_head

    def _embedding(self, text: CalibrationText, moment: InputMoment | None) -> Fitted:
        site, shape = self.anatomy.sites["embedding"], self.shapes["embedding"]
        assert isinstance(shape, KroneckerShape)
        self.work.begin("embedding")
        weight = dense_weight(module_at(self.model, site), site)
        fitted = fit_embedding(weight, shape, token_frequencies(text, len(weight)), moment, self.settings)
        self.work.finish(self._cost("embedding", True))
        return fitted

    def _sequential(self, text: CalibrationText) -> dict[str, Fitted]:
        fits: dict[str, Fitted] = {}
        layers = list(self.model.base_model.get_submodule(self.anatomy.family.layers))
        self.work.expect(sequential_cost(self.anatomy, layers, self.shapes, len(text.tokens), self.settings.sweeps))
        self.outputs = self._gradients(text)
        if "embedding" in self.shapes:
            moment = None
            if self._ties_head:
                found = dict(moments(self.model, text, ["head"], self.work))
                moment = InputMoment(found["head"])
            fits["embedding"] = self._embedding(text, moment)

        def embed() -> None:
            self._place([self.anatomy.sites["embedding"]], fits)

        fit = SequentialFit(
            self.model,
            self.shapes,
            text,
            self.settings,
            self._place,
            self.work,
            embed if "embedding" in self.shapes else None,
            self.outputs,
        )
        return fits | fit.run()

    def _place(self, sites: Sequence[Site], fits: Mapping[str, Fitted]) -> None:
        """Put factored modules in the place of those that hold ``sites``; without a fit their factors are random."""
        for _, group in groupby(sites, key=lambda site: site.module):
            members = list(group)
            if not any(site.name in self.shapes for site in members):
                continue
            old = module_at(self.model, members[0])
            new = empty_module(old, members, self.shapes).to_empty(device=old.get_parameter("weight").device)
            for site in members:
                part = new if site.part is None else new.get_submodule(site.part)
                _fill(part, dense_weight(old, site), dense_bias(old, site), site, fits.get(site.name))
            put_module(self.model, members[0], new)


@torch.no_grad()
def _fill(part: nn.Module, weight: Tensor, bias: Tensor | None, site: Site, fitted: Fitted | None) -> None:
    """Give a new module its numbers: those fitted, random factors, or the weight of a map that stays dense."""
    if not isinstance(part, FACTORED):
        part.get_parameter("weight").copy_(weight)
    elif fitted is None:
        if not weight.is_meta:
            part.reset_parameters(site.std)
    else:
        if isinstance(part, PackedLinear):
            part.set_factors(*fitted.parts[0])
        else:
            _copy_factors(list(part.parts) if isinstance(part, HybridLinear) else [part], fitted)
        bias = fitted.bias
    if bias is not None:
        part.get_parameter("bias").copy_(bias)


def _copy_factors(modules: list[Any], fitted: Fitted) -> None:
    for module, factors in zip(modules, fitted.parts, strict=True):
        module.left.copy_(factors.left)
        module.right.copy_(factors.right)
        if module.scale is not None:
            module.scale.fill_(1.0)
