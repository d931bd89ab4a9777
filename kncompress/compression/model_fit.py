"""Fits the maps of a plan, each by itself or each layer after the other, and puts the factors into the model."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import Anatomy, Site
from kncompress.anatomy.swap import FACTORED, dense_bias, dense_weight, empty_module, module_at, put_module
from kncompress.compression.dense_walk import DenseWalk
from kncompress.compression.layerwise import CalibrationText, evaluating
from kncompress.compression.map_fit import Fitted, InputMoment, fit_calibrated, fit_embedding, fit_nearest
from kncompress.compression.moments import head_weights, input_of, token_frequencies
from kncompress.compression.parts import EMBEDDING, REST, MapErrors, Parts, stage_of
from kncompress.compression.sequential import SequentialFit, layers_to_run, sequential_cost
from kncompress.compression.work import Work, fit_cost
from kncompress.config import FitConfig
from kncompress.kron import HybridLinear, KroneckerShape, Moment, PackedLinear, RowWeights, Shape

Start = Literal["nearest", "random", "calibrated", "sequential"]
STARTS: tuple[Start, ...] = ("nearest", "random", "calibrated", "sequential")
CALIBRATED = ("calibrated", "sequential")
"""Starts that need a text."""


class ModelFit:
    """Fits the maps of ``shapes`` and puts them into ``model``, whose numbers may be in half precision: the fits are
    in float32 or better, and the factors get the model's type, or ``dtype``. ``parts``: where each layer is kept as it
    is done."""

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        shapes: Mapping[str, Shape],
        settings: FitConfig,
        work: Work,
        parts: Parts | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.anatomy, self.shapes, self.settings, self.work = model, anatomy, shapes, settings, work
        self.parts = parts
        self.dtype = dtype or (None if parts is None else parts.dtype) or next(model.parameters()).dtype

    def run(self, start: Start, text: CalibrationText | None) -> dict[str, Fitted]:
        """What was fitted, by map; nothing for random factors and for a model on the meta device."""
        if not self.shapes:
            return {}
        if start == "nearest" and not next(self.model.parameters()).is_meta:
            return self._nearest()
        if start == "random" or text is None:
            for _, sites in self._stages():
                with self._raised(sites):
                    self._place(sites, {})
                self._done(sites, {})
            return {}
        with evaluating(self.model):
            return self._sequential(text) if start == "sequential" else self._calibrated(text)

    def _nearest(self) -> dict[str, Fitted]:
        fits: dict[str, Fitted] = {}
        self.work.expect(sum(self._cost(name, False) for name in self.shapes))
        for stage, sites in self._stages():
            if self._taken(stage, sites, False, fits):
                continue
            with self._raised(sites):
                for _, group in groupby(sites, key=lambda site: site.module):
                    members = list(group)
                    fits |= {site.name: self._fit(site, None) for site in members if site.name in self.shapes}
                    self._place(members, fits)
                    fits |= {site.name: fits[site.name].told for site in members if site.name in self.shapes}
            self._done(sites, fits)
        return fits

    def _stages(self) -> list[tuple[str, list[Site]]]:
        """The parts of the model that hold maps, in forward order, with these."""
        return [(stage, list(sites)) for stage, sites in groupby(self.anatomy.sites.values(), key=stage_of)]

    def _modules(self, sites: Sequence[Site]) -> list[nn.Module]:
        """What holds the numbers of a part: its layer, or the embedding or the head."""
        layers = self.model.base_model.get_submodule(self.anatomy.family.layers)
        number = sites[0].layer
        return [layers[number]] if number is not None else [module_at(self.model, site) for site in sites]

    def _raised(self, sites: Sequence[Site]) -> AbstractContextManager[None]:
        return raised(*self._modules(sites)) if any(site.name in self.shapes for site in sites) else nullcontext()

    def _taken(self, stage: str, sites: Sequence[Site], calibrated: bool, fits: dict[str, Fitted]) -> bool:
        """Whether an earlier process has kept this part, which is then taken as it is."""
        kept = None if self.parts is None else self.parts.errors(stage)
        if self.parts is None or kept is None:
            return False
        self.parts.take(stage)
        fits |= {name: Fitted((), None, told.error, told.weighted) for name, told in kept.items()}
        self.work.finish(sum(self._cost(site.name, calibrated) for site in sites if site.name in self.shapes))
        return True

    def _done(self, sites: Sequence[Site], fits: Mapping[str, Fitted]) -> None:
        """A part has its factors: they get the model's type, and it is kept. The rest waits for the head to be tied."""
        if self.parts is None:
            for module in self._modules(sites):
                module.to(self.dtype)
        elif (stage := stage_of(sites[0])) != REST:
            self.parts.keep(stage, errors_of(sites, fits))

    def _walk(self, text: CalibrationText, rows: bool) -> DenseWalk:
        """The walk that tells of all inputs and outputs of the maps whose parts are not kept yet."""
        left = [site for name in self.shapes if not self._is_kept(site := self.anatomy.sites[name])]
        inputs = [input_of(site) for site in left if site.name != "embedding"]
        if self._ties_head and not self._is_kept(self.anatomy.sites["embedding"]):
            inputs.append("head")
        outputs = [site.name for site in left] if self.settings.sides == "both" else []
        return DenseWalk(self.model, text, list(dict.fromkeys(inputs)), outputs, self.work, rows)

    def _is_kept(self, site: Site) -> bool:
        return self.parts is not None and self.parts.errors(stage_of(site)) is not None

    def _calibrated(self, text: CalibrationText) -> dict[str, Fitted]:
        """A layer is fitted and replaced once the dense model's states have left it."""
        fits: dict[str, Fitted] = {}
        self.work.expect(sum(self._cost(name, True) for name in self.shapes))
        walk = self._walk(text, rows=False)
        if "embedding" in self.shapes and not self._ties_head:
            self._fit_embedding(text, None, fits, walk.embedding())
        for stage, sites in self._stages():
            if sites[0].layer is not None:
                self._calibrated_layer(walk, stage, sites, fits)
        if "head" in self.shapes and not self._taken(REST, [self.anatomy.sites["head"]], True, fits):
            self._calibrated_head(text, InputMoment(walk.head()), fits)
        if self._ties_head:
            self._fit_embedding(text, walk, fits, walk.embedding())
        return fits

    def _calibrated_layer(self, walk: DenseWalk, stage: str, sites: list[Site], fits: dict[str, Fitted]) -> None:
        assert sites[0].layer is not None
        record = walk.layer(sites[0].layer)
        if self._taken(stage, sites, True, fits):
            return
        with self._raised(sites):
            for name, group in groupby(sites, key=input_of):
                members = [site for site in group if site.name in self.shapes]
                if members:
                    moment = InputMoment(record.input(name, members[0].in_features))
                    fits |= {site.name: self._fit(site, moment, record.output(site)) for site in members}
            self._place(sites, fits)
        self._done(sites, fits)
        fits |= {site.name: fits[site.name].told for site in sites if site.name in fits}

    def _calibrated_head(self, text: CalibrationText, moment: InputMoment, fits: dict[str, Fitted]) -> None:
        site = self.anatomy.sites["head"]
        with self._raised([site]):
            fits[site.name] = self._fit(site, moment, head_weights(text, site, self.settings))
            self._place([site], fits)
        self._done([site], fits)

    def _fit_embedding(
        self, text: CalibrationText, walk: DenseWalk | None, fits: dict[str, Fitted], felt: Moment | None
    ) -> None:
        """Fit and replace the embedding; ``walk``, at its end, tells what a head that is tied to it reads; ``felt``: of
        ``DenseWalk.embedding``."""
        site, shape = self.anatomy.sites["embedding"], self.shapes["embedding"]
        if self._taken(EMBEDDING, [site], True, fits):
            return
        assert isinstance(shape, KroneckerShape)
        moment = None if walk is None else InputMoment(walk.head())
        self.work.begin("embedding")
        with self._raised([site]):
            weight = dense_weight(module_at(self.model, site), site)
            fits["embedding"] = fit_embedding(
                weight, shape, token_frequencies(text, len(weight)), moment, self.settings, felt
            )
            self._place([site], fits)
        self._done([site], fits)
        fits["embedding"] = fits["embedding"].told
        self.work.finish(self._cost("embedding", True))

    def _cost(self, name: str, calibrated: bool) -> float:
        felt = calibrated and self.settings.sides == "both"
        return fit_cost(self.anatomy.sites[name], self.shapes[name], calibrated, self.settings.sweeps, felt)

    def _fit(self, site: Site, moment: InputMoment | None, outputs: Moment | RowWeights | None = None) -> Fitted:
        """Factors nearest to the weight, or with the least error on the inputs of this moment."""
        self.work.begin(site.name)
        old, shape = module_at(self.model, site), self.shapes[site.name]
        weight, bias = dense_weight(old, site), dense_bias(old, site)
        if moment is None:
            fitted = fit_nearest(weight, bias, shape, self.settings)
        else:
            fitted = fit_calibrated(weight, bias, shape, moment, self.settings, outputs)
        self.work.finish(self._cost(site.name, moment is not None))
        return fitted

    @property
    def _ties_head(self) -> bool:
        return "embedding" in self.shapes and self.anatomy.tied and self.anatomy.has_head

    def _sequential(self, text: CalibrationText) -> dict[str, Fitted]:
        fits: dict[str, Fitted] = {}
        layers = list(self.model.base_model.get_submodule(self.anatomy.family.layers))
        self.work.expect(sequential_cost(self.anatomy, layers, self.shapes, len(text.tokens), self.settings))
        if self._ties_head and not self._is_kept(self.anatomy.sites["embedding"]):
            head = DenseWalk(self.model, text, ["head"], work=self.work)
            for number in range(self.anatomy.layers):
                head.layer(number)
        else:
            head = None
        walk = self._walk(text, rows=True)
        fit = SequentialFit(self.model, self.shapes, walk, self.settings, self._place, self.work)
        if "embedding" in self.shapes:
            self._fit_embedding(text, head, fits, walk.embedding())
            fit.embedded(text)
        for stage, sites in self._stages():
            if sites[0].layer is None:
                continue
            layer: int = sites[0].layer
            if self._is_kept(sites[0]):
                fit.pass_by(layer, partial(self._taken, stage, sites, True, fits))
            elif layer < layers_to_run(self.anatomy, self.shapes):
                with self._raised(sites):
                    fit.layer(layer)
                fits |= fit.fits
                self._done(sites, fits)
                fit.leave(layer)
            else:
                self._done(sites, fits)
        if "head" in self.shapes and not self._taken(REST, [self.anatomy.sites["head"]], True, fits):
            site = self.anatomy.sites["head"]
            with self._raised([site]):
                fit.head(site)
            self._done([site], fits)
        fits |= fit.fits
        return {name: fitted.told for name, fitted in fits.items()}

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
            _round_(new, self.dtype)
            put_module(self.model, members[0], new)


def _round_(module: nn.Module, dtype: torch.dtype) -> None:
    """Numbers as they will be saved, in the type of the fit: what is fitted later sees these."""
    for parameter in module.parameters():
        if parameter.dtype != dtype and parameter.is_floating_point() and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def errors_of(sites: Iterable[Site], fits: Mapping[str, Fitted]) -> dict[str, MapErrors]:
    """What is told of those of the maps that have been fitted."""
    found = {site.name: fits[site.name] for site in sites if site.name in fits}
    return {name: MapErrors(fitted.error, fitted.weighted) for name, fitted in found.items()}


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
