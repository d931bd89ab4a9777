"""What a student keeps of its teacher: which layers (``factors.depth``), and the factors of the maps in them."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kncompress.anatomy.layerdrop import check_layers, config_of_layers
from kncompress.anatomy.plan import Plan, plan_from_config
from kncompress.anatomy.sites import family_of
from kncompress.config import FactorsConfig
from kncompress.distill import layer_mapping
from kncompress.errors import UserError


@dataclass(frozen=True)
class StudentPlan:
    """What is made of a teacher; checked against its transformers config, without its weights."""

    maps: Plan
    """Which map becomes which Kronecker sum, layers counted among those that are kept."""
    layers: tuple[int, ...] | None = None
    """The teacher layers that are kept, counted from 0; None: all."""

    @classmethod
    def of(cls, factors: FactorsConfig, teacher: Any) -> "StudentPlan":
        """What ``factors`` ask of the teacher with this transformers config.

        Raises:
            UserError: names the key of ``factors`` that does not fit.
        """
        layers = student_layers(factors, teacher)
        kept = teacher if layers is None else config_of_layers(teacher, layers)
        return cls(plan_from_config(factors, kept), layers)


def student_layers(factors: FactorsConfig, teacher: Any) -> tuple[int, ...] | None:
    """The teacher layers that the student keeps, counted from 0; None where it keeps all.

    Args:
        factors: ``depth`` tells a number, a share of the layers, or the layers themselves.
        teacher: transformers config of the teacher.

    Raises:
        UserError: a depth that the teacher has not, or a list that does not rise.
    """
    depth = factors.depth
    if depth is None:
        return None
    count = family_of(teacher).sizes(teacher)["layers"]
    if isinstance(depth, list | tuple):
        layers = check_layers(depth, count, "factors.depth")
    else:
        layers = layer_mapping(count, _number(depth, count))
    return None if len(layers) == count else layers


def _number(depth: Any, count: int) -> int:
    """How many of ``count`` layers ``depth`` asks for."""
    key = f"factors.depth={depth}"
    if type(depth) is float and 0 < depth < 1:
        # As it was written, not as it is stored: 0.29 of 50 layers are 14.5, and halves are rounded up.
        return max(1, math.floor(Fraction(str(depth)) * count + Fraction(1, 2)))
    if type(depth) is not int:
        raise UserError(f"{key}: must be a number of layers, a share between 0 and 1, or a list of layers")
    if not 1 <= depth <= count:
        raise UserError(f"{key}: must lie between 1 and the model's {count} layers")
    return depth
