"""What a model is and what a plan would make of it, from its config alone: built on the meta device, without weights.

The counts are those of ``compress_`` on that model, so they are what factoring the real one gives.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kncompress.anatomy.families import LANGUAGE_MODELS
from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import anatomy_of, family_of
from kncompress.compression.compress import CompressionTable, MapRow, compress_
from kncompress.errors import UserError
from kncompress.kron.shape import divisors
from kncompress.terminal import first_line

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number in each type of saved weights."""


@dataclass(frozen=True)
class InspectedMap:
    """One map of the student. Multiply-adds are per token; a tied head has no parameters of its own."""

    name: str
    out_features: int
    in_features: int
    shape: str
    """Kronecker shape, or ``dense``."""
    parameters: int
    """Without bias."""
    dense_parameters: int
    multiply_adds: int
    dense_multiply_adds: int


@dataclass(frozen=True)
class Inspection:
    """Every map of a student in the model's order, and totals of teacher and student."""

    model_type: str
    maps: tuple[InspectedMap, ...]
    other_parameters: int
    """Of the student: biases, norms, learned positions."""
    compression: CompressionTable
    teacher_layers: int

    @property
    def sides(self) -> dict[int, list[int]]:
        """{outputs or inputs of a map: what divides them}, smallest first: the sides that a right factor may have."""
        sizes = {size for row in self.maps for size in (row.out_features, row.in_features)}
        return {size: divisors(size) for size in sorted(sizes)}

    @property
    def totals(self) -> dict[str, int]:
        """Unique parameters and multiply-adds of teacher and student, under their names in ``result.json``."""
        return totals(self.compression)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        kept = self.compression.layers
        return {
            "model_type": self.model_type,
            "layers": {"teacher": self.teacher_layers, "kept": None if kept is None else list(kept)},
            "totals": self.totals,
            "bytes": {
                who: {name: size * self.totals[f"parameters/{who}"] for name, size in BYTES.items()}
                for who in ("teacher", "student")
            },
            "other_parameters": self.other_parameters,
            "divisors": {str(size): found for size, found in self.sides.items()},
            "maps": [asdict(row) for row in self.maps],
        }


def totals(table: CompressionTable) -> dict[str, int]:
    """The counts of a table under their names in ``result.json``."""
    return {
        "parameters/teacher": table.parameters_before,
        "parameters/student": table.parameters_after,
        "multiply_adds/teacher": table.multiply_adds_before,
        "multiply_adds/student": table.multiply_adds_after,
    }


def predict(config: Any, plan: Plan, layers: Sequence[int] | None = None) -> CompressionTable:
    """The table that ``compress_`` would give on a model of this config; its errors are None.

    Args:
        config: transformers config of a causal language model; nothing is read beside it.
        plan: which map becomes which shape.
        layers: layers to keep, as in ``compress_``.

    Raises:
        UserError: the plan does not fit, the family has no table, the model is factored already, or transformers
            builds no model of this config.
    """
    return compress_(_meta_model(config), plan, layers=layers)


def inspect_config(config: Any, plan: Plan, layers: Sequence[int] | None = None) -> Inspection:
    """Every map of the student that ``plan`` and ``layers`` make of a config; arguments and errors as ``predict``."""
    model = _meta_model(config)
    count = anatomy_of(model).layers
    table = compress_(model, plan, layers=layers)
    anatomy = anatomy_of(model)
    factored = {row.name: row for row in table.rows}
    maps = []
    for site in anatomy.sites.values():
        sizes = (site.out_features, site.in_features)
        maps.append(_row(site.name, *sizes, factored.get(site.name), looked_up=site.group == "embedding"))
    if anatomy.tied:
        embedding = anatomy.sites["embedding"]
        maps.append(_row("head", embedding.out_features, embedding.in_features, factored.get("head"), tied=True))
    others = table.parameters_after - sum(row.parameters for row in maps)
    return Inspection(anatomy.family.model_type, tuple(maps), others, table, count)


def _meta_model(config: Any) -> Any:
    """A dense language model without weights."""
    import transformers

    auto = getattr(transformers, LANGUAGE_MODELS[family_of(config).task])
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("model: its maps are factored already, or quantised; give the dense model")
    try:
        with torch.device("meta"):
            return auto.from_config(copy.deepcopy(config))  # the model's config will change
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"model: transformers builds no model of this configuration: {first_line(error)}") from error


def _row(
    name: str, outputs: int, inputs: int, made: MapRow | None, tied: bool = False, looked_up: bool = False
) -> InspectedMap:
    own, adds = 0 if tied else outputs * inputs, 0 if looked_up else outputs * inputs
    if made is None:
        return InspectedMap(name, outputs, inputs, "dense", own, own, adds, adds)
    return InspectedMap(name, outputs, inputs, made.shape, made.parameters, own, made.multiply_adds, adds)
