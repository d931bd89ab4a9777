"""Replace a model's dense maps by Kronecker sums, in place, and report what that saves and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kncompress.config import CalibrationConfig
from kncompress.errors import UserError
from kncompress.kron import HybridLinear, KroneckerShape, Shape
from kncompress.models.anatomy import Anatomy, Site, anatomy_of
from kncompress.models.arrangement import arrange_
from kncompress.models.blockwise import BlockRepair
from kncompress.models.calibration import input_of, moments, token_frequencies
from kncompress.models.fitting import (
    Fitted,
    InputMoment,
    Progress,
    Work,
    fit_calibrated,
    fit_cost,
    fit_embedding,
    fit_nearest,
)
from kncompress.models.layerdrop import config_of_layers, keep_layers_
from kncompress.models.layerwise import CalibrationText, evaluating
from kncompress.models.plan import Plan
from kncompress.models.plugin import KroneckerConfig
from kncompress.models.report import CompressionReport, MapReport
from kncompress.models.sequential import SequentialFit, sequential_cost
from kncompress.models.swap import FACTORED, dense_bias, dense_weight, empty_module, module_at, put_module, tie_head_

__all__ = ["CompressionReport", "MapReport", "Start", "compress_", "factored_maps", "unique_parameters"]

Start = Literal["nearest", "random", "calibrated", "sequential"]
STARTS: tuple[Start, ...] = ("nearest", "random", "calibrated", "sequential")
CALIBRATED = ("calibrated", "sequential")
"""Starts that need a text."""


def unique_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def compress_(
    model: Any,
    plan: Plan,
    start: Start = "nearest",
    progress: Progress | None = None,
    layers: Sequence[int] | None = None,
    text: CalibrationText | None = None,
    settings: CalibrationConfig | None = None,
) -> CompressionReport:
    """Replace the maps that ``plan`` names by Kronecker sums, in place.

    A tied head stays tied: it shares the embedding's factors. Biases are kept, and corrected where the fit knows the
    inputs' means. The plan is written into ``model.config``, so that plain ``save_pretrained`` makes a folder that
    loads again.

    Args:
        model: dense transformers model, with a language-model head, another head or none.
        plan: which map becomes which shape.
        start: ``nearest``: factors nearest to the weights in the Frobenius norm; ``random``: random factors
            whose formed weight has the standard deviation of the family's fresh weights; ``calibrated``: those with
            the least error on what the maps see when the dense model reads ``text``; ``sequential``: the same, but
            each layer on what the factored layers before it give it, against the dense model's outputs.
        progress: called with what is being fitted and the share of the work that is done.
        layers: layers to keep, counted from 0, rising; the others are dropped first, and ``plan`` counts those
            that are kept. None: all.
        text: for ``calibrated`` and ``sequential``.
        settings: gauge, and how to calibrate; None: by default.

    Raises:
        UserError: the plan does not fit the model, the model has no such layers, is factored already, or there is no
            text where one is needed; nothing is changed then. The model's activations are not finite: layers may be
            factored or dropped already.
    """
    if start not in STARTS:
        raise UserError(f"start={start}: not one of {', '.join(STARTS)}")
    whole = anatomy_of(model)
    anatomy = whole if layers is None else anatomy_of(model, config_of_layers(model.config, layers))
    shapes = plan.resolve(anatomy)
    if factored_maps(model):
        raise UserError("model: its maps are factored already; make it dense first (to_dense)")
    settings = settings or CalibrationConfig()
    if start in CALIBRATED and text is None:
        raise UserError(f"start={start}: needs a text to calibrate on")
    if settings.repair and (text is None or start == "random"):
        raise UserError(f"calibration.repair={settings.repair}: needs a text, and a start other than random")
    if settings.repair and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise UserError(f"calibration.repair={settings.repair}: needs a model in float32; its steps would be lost")
    before = unique_parameters(model)
    if layers is not None:
        keep_layers_(model, layers)
    work, repair = Work(progress), None
    arrangement = None
    if settings.symmetries and shapes and start != "random" and not next(model.parameters()).is_meta:
        arrangement = arrange_(model, shapes, settings, text if start in CALIBRATED else None, work)
        settings = replace(settings, moments=None)  # what is kept there is of the model as it was
    if settings.repair and shapes and text is not None and not next(model.parameters()).is_meta:
        repair = BlockRepair(model, shapes, text, settings, work)
    fits = _Factoring(model, anatomy, shapes, settings, work).run(start, text)
    if shapes:
        tie_head_(model, anatomy)
        model.config.quantization_config = KroneckerConfig({name: str(shapes[name]) for name in shapes})
    repaired = None if repair is None else repair.run()
    rows = _rows(anatomy, shapes, fits)
    saved = sum(row.dense_multiply_adds - row.multiply_adds for row in rows)
    return CompressionReport(
        rows,
        before,
        unique_parameters(model),
        _multiply_adds(whole),
        _multiply_adds(anatomy) - saved,
        None if layers is None else tuple(layers),
        work.seconds_moments,
        repaired,
        arrangement=arrangement,
    )


class _Factoring:
    """Fits the maps of ``shapes`` and puts them into ``model``."""

    def __init__(
        self, model: Any, anatomy: Anatomy, shapes: Mapping[str, Shape], settings: CalibrationConfig, work: Work
    ) -> None:
        self.model, self.anatomy, self.shapes, self.settings, self.work = model, anatomy, shapes, settings, work

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
        costs = {n: fit_cost(self.anatomy.sites[n], shape, False, 0) for n, shape in self.shapes.items()}
        self.work.expect(sum(costs.values()))
        for _, sites in self.anatomy.modules():
            for site in sites:
                if site.name in self.shapes:
                    self.work.begin(site.name)
                    old = module_at(self.model, site)
                    weight, bias = dense_weight(old, site), dense_bias(old, site)
                    fits[site.name] = fit_nearest(weight, bias, self.shapes[site.name], self.settings)
                    self.work.finish(costs[site.name])
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
        costs = {
            n: fit_cost(self.anatomy.sites[n], shape, True, self.settings.sweeps) for n, shape in self.shapes.items()
        }
        self.work.expect(sum(costs.values()))
        if "embedding" in self.shapes and not self._ties_head:
            self._embedding(text, None, fits)
        for name, found in moments(self.model, text, list(readers), self.settings.moments, self.work):
            moment = InputMoment(found)
            for site in readers[name]:
                if site.name == "embedding":
                    self._embedding(text, moment, fits)
                    continue
                self.work.begin(site.name)
                old = module_at(self.model, site)
                weight, bias = dense_weight(old, site), dense_bias(old, site)
                fits[site.name] = fit_calibrated(weight, bias, self.shapes[site.name], moment, self.settings)
                self.work.finish(costs[site.name])
        for _, sites in self.anatomy.modules():
            self._place(sites, fits)
        return fits

    @property
    def _ties_head(self) -> bool:
        return "embedding" in self.shapes and self.anatomy.tied and self.anatomy.has_head

    def _embedding(self, text: CalibrationText, moment: InputMoment | None, fits: dict[str, Fitted]) -> None:
        site, shape = self.anatomy.sites["embedding"], self.shapes["embedding"]
        assert isinstance(shape, KroneckerShape)
        self.work.begin("embedding")
        weight = dense_weight(module_at(self.model, site), site)
        fits["embedding"] = fit_embedding(weight, shape, token_frequencies(text, len(weight)), moment, self.settings)
        self.work.finish(fit_cost(site, shape, True, self.settings.sweeps))

    def _sequential(self, text: CalibrationText) -> dict[str, Fitted]:
        fits: dict[str, Fitted] = {}
        layers = list(self.model.base_model.get_submodule(self.anatomy.family.layers))
        self.work.expect(sequential_cost(self.anatomy, layers, self.shapes, len(text.tokens), self.settings.sweeps))
        if "embedding" in self.shapes:
            moment = None
            if self._ties_head:
                found = dict(moments(self.model, text, ["head"], self.settings.moments, self.work))
                moment = InputMoment(found["head"])
            self._embedding(text, moment, fits)

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


def factored_maps(model: Any) -> dict[str, str]:
    """{map name: shape text} of a compressed model; empty for a dense one."""
    config = getattr(model.config, "quantization_config", None)
    return dict(config.maps) if isinstance(config, KroneckerConfig) else {}


@torch.no_grad()
def _fill(part: nn.Module, weight: Tensor, bias: Tensor | None, site: Site, fitted: Fitted | None) -> None:
    """Give a new module its numbers: those fitted, random factors, or the weight of a map that stays dense."""
    if not isinstance(part, FACTORED):
        part.get_parameter("weight").copy_(weight)
    elif fitted is None:
        if not weight.is_meta:
            part.reset_parameters(site.std)
    else:
        modules = part.parts if isinstance(part, HybridLinear) else [part]
        for module, factors in zip(modules, fitted.parts, strict=True):
            module.get_parameter("left").copy_(factors.left)
            module.get_parameter("right").copy_(factors.right)
            if module.scale is not None:
                module.get_parameter("scale").fill_(1.0)
        bias = fitted.bias
    if bias is not None:
        part.get_parameter("bias").copy_(bias)


def _rows(anatomy: Anatomy, shapes: Mapping[str, Shape], fits: Mapping[str, Fitted]) -> tuple[MapReport, ...]:
    rows = []
    for name, shape in shapes.items():
        fitted = fits.get(name)
        if name == "embedding":
            assert isinstance(shape, KroneckerShape)
            rows.append(_map_row(name, shape, shape.parameters, fitted, (shape.terms * shape.in_features, 0)))
        else:
            rows.append(_map_row(name, shape, shape.parameters, fitted))
    if "embedding" in shapes and anatomy.tied and anatomy.has_head:
        rows.append(_map_row("head", shapes["embedding"], 0, fits.get("embedding")))
    return tuple(rows)


def _map_row(
    name: str, shape: Shape, parameters: int, fitted: Fitted | None, adds: tuple[int, int] | None = None
) -> MapReport:
    """``adds``: multiply-adds, factored and dense, of what is no product of a vector: a look-up."""
    return MapReport(
        name,
        str(shape),
        parameters,
        shape.dense_parameters if parameters else 0,
        *(adds or (shape.multiply_adds, shape.dense_multiply_adds)),
        None if fitted is None else fitted.error,
        None if fitted is None else fitted.weighted,
    )


def _multiply_adds(anatomy: Anatomy) -> int:
    """Of all dense maps, per token; a look-up costs none, a tied head as much as its own would."""
    total = sum(site.out_features * site.in_features for site in anatomy.sites.values() if site.group != "embedding")
    if anatomy.tied and anatomy.has_head:
        embedding = anatomy.sites["embedding"]
        total += embedding.out_features * embedding.in_features
    return total
