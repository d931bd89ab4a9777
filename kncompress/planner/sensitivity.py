"""Measures a ``HarmTable``: the error of every candidate of every map, and the KL of reference shapes.

It makes one pass over the calibration text and holds the moments of one layer at a time. Reference shapes are outer
products (low rank), because the eigendecomposition that gives all their errors gives their weights too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kncompress.anatomy.mapped import let_go
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at
from kncompress.compression.dense_walk import DenseWalk, moments
from kncompress.compression.layerwise import CalibrationText, evaluating
from kncompress.compression.map_fit import InputMoment
from kncompress.compression.moments import inputs_of, token_frequencies
from kncompress.compression.rows import NamedRows
from kncompress.compression.work import Progress, Work
from kncompress.config import FitConfig
from kncompress.errors import UserError
from kncompress.kron import (
    KroneckerShape,
    Moment,
    OutputMoment,
    Shape,
    calibrated_embedding,
    kronecker_weight,
    prepare_outputs,
)
from kncompress.planner.budget import HarmTable, MapHarms, Reference
from kncompress.planner.candidates import Option, Spectrum, error_of, packed, packed_rank, ranks, screened
from kncompress.planner.costs import FAR_EVERY, map_cost, screen_cost, screened_layers
from kncompress.planner.harm import HarmMeter
from kncompress.planner.kept_harms import KeptHarms
from kncompress.planner.ladder import dense_adds, keep, sizes

REFERENCE_SHARE = 0.5
"""Share of the parameters of the packed outer products whose KL is measured for every map."""
FAR_SHARE = 0.2
"""Share of a second reference, for the maps of every third layer; the two together give the exponent."""
TOGETHER = (0.75, 0.5)
"""Shares at which the KL of all maps of the layers together is compared with the sum."""
TOGETHER_ROOM = 1 << 26
"""Bytes of the weights at one of these shares that are kept in memory: each is read once."""
EMBEDDING_SWEEPS = 2
SWEEPS = 4
_LEAST_KL = 1e-9


@dataclass
class _Found:
    """What is known so far."""

    together: dict[float, NamedRows]
    """Weights of all maps at each of the shares."""
    maps: dict[str, MapHarms] = field(default_factory=dict)
    errors: dict[tuple[float, str], float] = field(default_factory=dict)
    """Their errors, by share and map."""


@torch.no_grad()
def measure_harms(
    model: Any,
    text: CalibrationText,
    harm_text: CalibrationText,
    settings: FitConfig,
    bf16: bool = False,
    facts: tuple[str, str] = ("", ""),
    harms: str = "measured",
    sums: bool = True,
    progress: Progress | None = None,
    kept: KeptHarms | None = None,
) -> HarmTable:
    """The harms of a dense model, which is as it was afterwards; one layer of it is in float32 at a time.

    Args:
        model: with a language-model head, in evaluation mode.
        text: what moments are taken over; its folder of moments is worth having: the screening reads the same ones.
        harm_text: what the KL is measured on.
        settings: of the fits.
        bf16: of ``HarmMeter``.
        facts: what model and text are called in the table.
        harms: ``measured``: the KL of a reference shape in the place of each map; ``gradients``: half of tr(G D C D^T),
            for which ``settings`` must weigh both sides. The embedding's are measured either way.
        sums: try Kronecker sums beside low rank.
        progress: called with what is worked on, and the share that is done.
        kept: where what is found is kept at once, and read again after a kill.

    Raises:
        UserError: the model has no language-model head, or gives values that are not finite.
    """
    anatomy = anatomy_of(model)
    if not anatomy.has_head:
        raise UserError("model: has no language-model head; plan measures the KL of its next-token distributions")
    work = Work(progress)
    work.begin("teacher")
    meter = HarmMeter(model, harm_text, bf16)
    costs = {site.name: map_cost(anatomy, site, meter.cost(site)) for site in anatomy.sites.values()}
    screening = sums * sum(screen_cost(s) for s in anatomy.sites.values() if s.layer in screened_layers(anatomy))
    work.expect(sum(costs.values()) + screening)
    kept = kept or KeptHarms(None)
    kinds = kept.kinds(lambda: _screen(model, anatomy, text, settings, work) if sums else {})
    found = _Found({share: NamedRows(harm_text.scratch, TOGETHER_ROOM) for share in TOGETHER})
    inputs = list(dict.fromkeys([*inputs_of(anatomy), "head"]))
    outputs = [name for name in anatomy.sites if name != "head"] if settings.sides == "both" else []

    def map_(site: Site, shared: InputMoment, gradient: Moment | None) -> None:
        work.begin(site.name)
        felt = None
        if gradient is not None:
            felt = prepare_outputs(gradient.second, gradient.count, settings.output_ridge)
        _map(model, site, shared, settings, meter, kinds.get(site.name, []), found, felt, harms, kept)
        work.finish(costs[site.name])

    with evaluating(model):
        walk = DenseWalk(model, text, inputs, outputs, work)
        look_ups = walk.embedding()
        for number in range(anatomy.layers):
            record = walk.layer(number)
            for name, sites in inputs_of(anatomy, number).items():
                shared = InputMoment(record.input(name, sites[0].in_features))
                for site in sites:
                    map_(site, shared, record.output(site))
        head = InputMoment(walk.head())
        work.begin("embedding")
        measured = partial(_embedding, model, anatomy, text, head if anatomy.tied else None, look_ups, meter)
        found.maps["embedding"] = kept.harms("embedding", measured)
        work.finish(costs["embedding"])
        if not anatomy.tied:
            map_(anatomy.sites["head"], head, None)
    slopes = exponents(tuple(found.maps.values()))
    exponent = median(slopes) if slopes and harms == "measured" else 2.0
    return HarmTable(
        *facts,
        sum(parameter.numel() for parameter in model.parameters()),
        dense_adds(anatomy),
        tuple(found.maps[name] for name in anatomy.sites),
        _together(meter, found, exponent, work),
        exponent,
    )


def exponents(maps: Sequence[MapHarms]) -> list[float]:
    """Slopes of log KL against log error between the two references of the maps that have two."""
    found = []
    for row in maps:
        if len(row.references) == 2 and row.name != "embedding":
            near, far = (torch.tensor([r.error, max(r.kl, _LEAST_KL)]).log() for r in row.references)
            if float((far - near)[0]) > 0.05:
                found.append(float((far - near)[1] / (far - near)[0]))
    return found


def _screen(
    model: Any, anatomy: Anatomy, text: CalibrationText, settings: FitConfig, work: Work
) -> dict[str, list[list[Shape]]]:
    """{map: kinds of shapes that beat outer products in the screened layer nearest to it}.

    By the inputs alone: fits of Kronecker sums to both sides take many times as long, and are for what is left.
    """
    chosen = screened_layers(anatomy)
    readers = {name: sites for layer in chosen for name, sites in inputs_of(anatomy, layer).items()}
    winners: dict[tuple[int, str], list[list[Shape]]] = {}
    for name, moment in moments(model, text, list(readers)):
        shared = InputMoment(moment)
        for site in readers[name]:
            work.begin(f"kinds of shapes for {site.name}")
            weight, bias = _weight(model, site)
            prepared = shared.prepared(bias and settings.bias)
            assert site.layer is not None
            winners[site.layer, site.kind] = screened(weight, prepared)
            work.finish(screen_cost(site))
    return {
        site.name: winners[min((abs(layer - site.layer), layer) for layer in chosen)[1], site.kind]
        for site in anatomy.sites.values()
        if site.layer is not None
    }


def _weight(model: Any, site: Site) -> tuple[Tensor, bool]:
    """The weight of a map, float32, and whether it has a bias."""
    module = module_at(model, site)
    weight = dense_weight(module, site).to(torch.float32, copy=True)
    let_go([module.get_parameter("weight").data])
    return weight, dense_bias(module, site) is not None


def _map(
    model: Any,
    site: Site,
    moment: InputMoment,
    settings: FitConfig,
    meter: HarmMeter,
    kinds: Sequence[Sequence[Shape]],
    found: _Found,
    outputs: OutputMoment | None,
    harms: str,
    kept: KeptHarms,
) -> None:
    """Errors of all candidates of one map, and the KL of its references."""
    weight, bias = _weight(model, site)
    prepared = moment.prepared(bias and settings.bias)
    spectrum = Spectrum(weight, prepared, outputs)

    def measured() -> MapHarms:
        options = [keep(site)]
        for rank in ranks(*spectrum.size):
            options.append(Option.of(packed(*spectrum.size, rank), spectrum.error(rank)))
        for shapes in kinds:
            options += [Option.of(shape, error_of(weight, shape, prepared, SWEEPS, outputs)) for shape in shapes]
        if harms == "gradients" and outputs is not None:
            references = [Reference(1.0, max(float(spectrum.values.sum()) / 2, _LEAST_KL))]
        else:
            references = _measured(site, weight, spectrum, meter)
        return MapHarms(site.name, weight.numel(), weight.numel(), tuple(options), _rising(references))

    found.maps[site.name] = kept.harms(site.name, measured)
    if site.layer is not None:
        for share, weights in found.together.items():
            rank = _rank(weight, share)
            weights.put(site.name, spectrum.best(rank).to(meter.type))
            found.errors[share, site.name] = spectrum.error(rank)


def _measured(site: Site, weight: Tensor, spectrum: Spectrum, meter: HarmMeter) -> list[Reference]:
    """KL that a low-rank map of half of the parameters does, and in every third layer one of a fifth."""
    shares = [REFERENCE_SHARE]
    if site.layer is not None and site.layer % FAR_EVERY == 0:
        shares.append(FAR_SHARE)
    references = []
    for share in shares:
        rank = _rank(weight, share)
        kl = meter.kl({site.name: spectrum.best(rank)})
        references.append(Reference(spectrum.error(rank), max(kl, _LEAST_KL)))
    return references


def _rank(weight: Tensor, share: float) -> int:
    outputs, inputs = weight.shape
    return max(1, round(packed_rank(outputs, inputs, share * outputs * inputs)))


def _rising(references: Sequence[Reference]) -> tuple[Reference, ...]:
    """Sorted by error. A KL below that of a smaller error is rounding, and is raised to that one."""
    made: list[Reference] = []
    for reference in sorted(references, key=lambda r: r.error):
        made.append(Reference(reference.error, max(reference.kl, made[-1].kl if made else 0.0)))
    return tuple(made)


def _embedding(
    model: Any, anatomy: Anatomy, text: CalibrationText, head: InputMoment | None, felt: Moment | None, meter: HarmMeter
) -> MapHarms:
    """The embedding, and the head tied to it: every candidate is fitted, and its KL measured."""
    site = anatomy.sites["embedding"]
    weight, _ = _weight(model, site)
    frequencies = token_frequencies(text, len(weight))
    prepared = None if head is None else head.prepared(False)
    row = sizes(anatomy, site)
    options, references = [row.options[0]], []
    for option in row.options[1:]:
        shape = KroneckerShape.parse(option.shape)
        history: list[float] = []
        factors = calibrated_embedding(
            weight, shape, frequencies, prepared, felt, sweeps=EMBEDDING_SWEEPS, history=history
        )
        made = kronecker_weight(*factors)
        references.append(Reference(min(history, default=0.0), max(meter.kl({site.name: made}), _LEAST_KL)))
        options.append(replace(option, error=min(history, default=0.0)))
    return MapHarms(site.name, row.parameters, row.multiply_adds, tuple(options), _rising(references))


def _together(meter: HarmMeter, found: _Found, exponent: float, work: Work) -> tuple[tuple[float, float], ...]:
    """(sum of single harms, KL of all together) with all maps of the layers at one share."""
    points = []
    for share, weights in found.together.items():
        if weights:
            work.begin(f"all maps at {share:g}")
            total = 0.0
            for name in weights:
                total += found.maps[name].harm(found.errors[share, name], exponent)
            points.append((total, max(meter.kl(weights), _LEAST_KL)))
    return tuple(points)
