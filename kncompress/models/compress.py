"""Replace a model's dense maps by Kronecker sums, in place, and report what that saves and costs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kncompress.errors import UserError
from kncompress.kron import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerShape,
    nearest_factors,
    relative_error,
)
from kncompress.models.anatomy import Anatomy, Site, anatomy_of
from kncompress.models.layerdrop import config_of_layers, keep_layers_
from kncompress.models.plan import Plan
from kncompress.models.plugin import KroneckerConfig
from kncompress.models.swap import dense_bias, dense_weight, empty_module, module_at, put_module, tie_head_

Start = Literal["nearest", "random"]


@dataclass(frozen=True)
class MapReport:
    """One factored map. Multiply-adds are per token."""

    name: str
    shape: str
    parameters: int
    """Numbers in the factors, without bias; 0 for a head that shares the embedding's."""
    dense_parameters: int
    multiply_adds: int
    dense_multiply_adds: int
    error: float | None
    """||W - W_hat|| / ||W||, Frobenius; None for a random start."""


@dataclass(frozen=True)
class CompressionReport:
    """What ``compress_`` did: a row for each factored map, and totals of the whole model.

    Before is the model that ``compress_`` was given, with all its layers.
    """

    rows: tuple[MapReport, ...]
    parameters_before: int
    """Unique parameters of the whole model, biases and norms included, tied ones once."""
    parameters_after: int
    multiply_adds_before: int
    """Multiply-adds of all maps, dense ones included, per token; without attention itself."""
    multiply_adds_after: int
    layers: tuple[int, ...] | None = None
    """Layers of the given model that were kept, counted from 0; None: all of them."""

    @property
    def mean_error(self) -> float | None:
        """Mean relative error over the factored weights, a tied head not counted again; None without any."""
        errors = [row.error for row in self.rows if row.error is not None and row.parameters]
        return sum(errors) / len(errors) if errors else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        totals = {key: value for key, value in asdict(self).items() if key != "rows"}
        return {**totals, "mean_error": self.mean_error, "rows": [asdict(row) for row in self.rows]}

    def as_json(self) -> str:
        """``as_dict`` as text."""
        return json.dumps(self.as_dict(), indent=2) + "\n"

    def table(self) -> str:
        """A text table, one line a map, and the totals; after it the layers kept, where some were dropped."""
        head = ("map", "shape", "parameters", "of", "multiply-adds", "of", "error")
        lines = [head, *(_cells(row) for row in self.rows)]
        lines.append(
            ("model", "", f"{self.parameters_after:,}", f"{self.parameters_before:,}",
             f"{self.multiply_adds_after:,}", f"{self.multiply_adds_before:,}", _number(self.mean_error))
        )  # fmt: skip
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [_line(line, widths) for line in lines]
        if self.layers is not None:
            text.append(f"layers kept: {', '.join(map(str, self.layers))}")
        return "\n".join(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cells(row: MapReport) -> tuple[str, ...]:
    counts = (row.parameters, row.dense_parameters, row.multiply_adds, row.dense_multiply_adds)
    return (row.name, row.shape, *(f"{count:,}" for count in counts), _number(row.error))


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    aligned = zip("<<>>>>>", widths, cells, strict=True)
    return "  ".join(f"{cell:{side}{width}}" for side, width, cell in aligned).rstrip()


def unique_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def compress_(
    model: Any,
    plan: Plan,
    start: Start = "nearest",
    progress: Callable[[str], None] | None = None,
    layers: Sequence[int] | None = None,
) -> CompressionReport:
    """Replace the maps that ``plan`` names by Kronecker sums, in place.

    A tied head stays tied: it shares the embedding's factors. Biases are kept. The plan is written into
    ``model.config``, so that plain ``save_pretrained`` makes a folder that loads again.

    Args:
        model: dense transformers model, with a language-model head, another head or none.
        plan: which map becomes which shape.
        start: ``nearest``: factors nearest to the weights in the Frobenius norm; ``random``: random factors
            whose formed weight has the standard deviation of the family's fresh weights.
        progress: called with the name of each map before its factors are made.
        layers: layers to keep, counted from 0, rising; the others are dropped first, and ``plan`` counts those
            that are kept. None: all.

    Raises:
        UserError: the plan does not fit the model, the model has no such layers, or it is factored already;
            nothing is changed then.
    """
    if start not in ("nearest", "random"):
        raise UserError(f"start={start}: not one of nearest, random")
    whole = anatomy_of(model)
    anatomy = whole if layers is None else anatomy_of(model, config_of_layers(model.config, layers))
    shapes = plan.resolve(anatomy)
    if factored_maps(model):
        raise UserError("model: its maps are factored already; make it dense first (to_dense)")
    before = unique_parameters(model)
    if layers is not None:
        keep_layers_(model, layers)
    errors: dict[str, float | None] = {}
    for _, sites in anatomy.modules():
        if any(site.name in shapes for site in sites):
            old = module_at(model, sites[0])
            new = empty_module(old, sites, shapes).to_empty(device=old.get_parameter("weight").device)
            for site in sites:
                if progress is not None and site.name in shapes:
                    progress(site.name)
                part = new if site.part is None else new.get_submodule(site.part)
                errors[site.name] = _fill(part, dense_weight(old, site), dense_bias(old, site), site, start)
            put_module(model, sites[0], new)
    if shapes:
        tie_head_(model, anatomy)
        model.config.quantization_config = KroneckerConfig({name: str(shapes[name]) for name in shapes})
    rows = _rows(anatomy, shapes, errors)
    saved = sum(row.dense_multiply_adds - row.multiply_adds for row in rows)
    return CompressionReport(
        rows,
        before,
        unique_parameters(model),
        _multiply_adds(whole),
        _multiply_adds(anatomy) - saved,
        None if layers is None else tuple(layers),
    )


def factored_maps(model: Any) -> dict[str, str]:
    """{map name: shape text} of a compressed model; empty for a dense one."""
    config = getattr(model.config, "quantization_config", None)
    return dict(config.maps) if isinstance(config, KroneckerConfig) else {}


@torch.no_grad()
def _fill(part: nn.Module, weight: Tensor, bias: Tensor | None, site: Site, start: Start) -> float | None:
    """Give a new module its numbers; the relative error of its weight, None for random or dense ones."""
    error = None
    if not isinstance(part, (KroneckerLinear, KroneckerEmbedding)):
        part.get_parameter("weight").copy_(weight)
    elif start == "random":
        part.reset_parameters(site.std)
    elif not weight.is_meta:
        left, right = nearest_factors(weight, part.shape)
        part.left.copy_(left)
        part.right.copy_(right)
        error = relative_error(weight, part.left, part.right)
    if bias is not None:
        part.get_parameter("bias").copy_(bias)
    return error


def _rows(
    anatomy: Anatomy, shapes: Mapping[str, KroneckerShape], errors: Mapping[str, float | None]
) -> tuple[MapReport, ...]:
    rows = []
    for name, shape in shapes.items():
        if name == "embedding":
            adds = shape.terms * shape.in_features
            rows.append(MapReport(name, str(shape), shape.parameters, shape.dense_parameters, adds, 0, errors[name]))
        else:
            rows.append(_map_row(name, shape, shape.parameters, errors[name]))
    if "embedding" in shapes and anatomy.tied and anatomy.has_head:
        rows.append(_map_row("head", shapes["embedding"], 0, errors["embedding"]))
    return tuple(rows)


def _map_row(name: str, shape: KroneckerShape, parameters: int, error: float | None) -> MapReport:
    dense = shape.dense_parameters if parameters else 0
    return MapReport(name, str(shape), parameters, dense, shape.multiply_adds, shape.dense_multiply_adds, error)


def _multiply_adds(anatomy: Anatomy) -> int:
    """Of all dense maps, per token; a look-up costs none, a tied head as much as its own would."""
    total = sum(site.out_features * site.in_features for site in anatomy.sites.values() if site.group != "embedding")
    if anatomy.tied and anatomy.has_head:
        embedding = anatomy.sites["embedding"]
        total += embedding.out_features * embedding.in_features
    return total
