"""Replace a model's dense maps by Kronecker sums, in place, and count what that saves and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kncompress.anatomy.layerdrop import config_of_layers, keep_layers_
from kncompress.anatomy.mapped import HALVES, own_
from kncompress.anatomy.mark import KroneckerConfig, factored_maps
from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import Anatomy, anatomy_of
from kncompress.anatomy.swap import tie_head_
from kncompress.compression.arrangement import arrange_
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.map_fit import Fitted
from kncompress.compression.model_fit import CALIBRATED, STARTS, ModelFit, Start, errors_of
from kncompress.compression.parts import Parts, stage_of, stages_of
from kncompress.compression.repair import BlockRepair
from kncompress.compression.table import CompressionTable, MapRow
from kncompress.compression.work import Progress, Work
from kncompress.config import FitConfig, RepairConfig
from kncompress.errors import UserError
from kncompress.kron import KroneckerShape, Shape

__all__ = ["CompressionTable", "MapRow", "Start", "compress_", "unique_parameters"]


def unique_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    # Of a shared weight that is away (on disk, say) each name has a stand-in of its own.
    shared = getattr(model, "all_tied_weights_keys", None) or {}
    return sum(p.numel() for name, p in model.named_parameters() if not (p.is_meta and name in shared))


def compress_(
    model: Any,
    plan: Plan,
    start: Start = "nearest",
    progress: Progress | None = None,
    layers: Sequence[int] | None = None,
    text: CalibrationText | None = None,
    settings: FitConfig | None = None,
    repair: RepairConfig | None = None,
    parts: Parts | None = None,
) -> CompressionTable:
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
        text: for ``calibrated`` and ``sequential``, and for the repair.
        settings: of the fit; None: by default.
        repair: of the blocks, after the fit; None: none.
        parts: where the student is kept part by part, in the type of its files, and those of a run that was stopped
            are found; the model reads its weights from there afterwards. None: they stay in memory.

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
    settings, repair = settings or FitConfig(), repair or RepairConfig()
    if start in CALIBRATED and text is None:
        raise UserError(f"start={start}: needs a text to calibrate on")
    if repair.passes and (text is None or start == "random"):
        raise UserError(f"repair.passes={repair.passes}: needs a text, and a start other than random")
    if repair.passes and parts is None and any(p.dtype in HALVES for p in model.parameters()):
        raise UserError(f"repair.passes={repair.passes}: needs a model in float32; its steps would be lost")
    before = unique_parameters(model)
    if settings.symmetries and parts is None:
        own_(model)
    if layers is not None:
        keep_layers_(model, layers)
    work, blocks, arrangement = Work(progress), None, None
    if parts is not None:
        parts.of(model, anatomy, shapes)
    if settings.symmetries and shapes and start != "random" and not next(model.parameters()).is_meta:
        read = text if start in CALIBRATED else None
        arrangement = arrange_(model, shapes, settings, read, work, parts)
        text = None if text is None else replace(text, moments=None)  # what is kept there is of the model as it was
    if repair.passes and shapes and text is not None and not next(model.parameters()).is_meta:
        blocks = BlockRepair(model, shapes, text, repair, work)
    in_order = start != "random" and not repair.passes  # drawn numbers depend on those before; a repair comes later
    dtype = None if blocks is None else torch.float32  # each step of a repair is small
    fits = ModelFit(model, anatomy, shapes, settings, work, parts if in_order else None, dtype).run(start, text)
    if shapes:
        tie_head_(model, anatomy)
        model.config.quantization_config = KroneckerConfig({name: str(shapes[name]) for name in shapes})
    repaired = None if blocks is None else blocks.run()
    if parts is not None:
        _keep_rest(parts, anatomy, fits)
    rows = _rows(anatomy, shapes, fits)
    saved = sum(row.dense_multiply_adds - row.multiply_adds for row in rows)
    return CompressionTable(
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


def _keep_rest(parts: Parts, anatomy: Anatomy, fits: Mapping[str, Fitted]) -> None:
    """Keep what the fit has not kept."""
    for stage in stages_of(anatomy):
        if parts.errors(stage) is None:
            sites = [site for site in anatomy.sites.values() if stage_of(site) == stage]
            parts.keep(stage, errors_of(sites, fits))


def _rows(anatomy: Anatomy, shapes: Mapping[str, Shape], fits: Mapping[str, Fitted]) -> tuple[MapRow, ...]:
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
) -> MapRow:
    """``adds``: multiply-adds, factored and dense, of what is no product of a vector: a look-up."""
    return MapRow(
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
