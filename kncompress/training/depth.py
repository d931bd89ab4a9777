"""Which of the teacher's layers a student keeps (``factors.depth``)."""

import math
from fractions import Fraction
from typing import Any

from kncompress.anatomy.layerdrop import check_layers, config_of_layers
from kncompress.anatomy.sites import family_of
from kncompress.config import FactorsConfig
from kncompress.distill import layer_mapping
from kncompress.errors import UserError


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


def student_config(teacher: Any, factors: FactorsConfig) -> Any:
    """The transformers config of the student, with the layers that it keeps; ``teacher`` itself where it keeps all.

    What ``plan_from_config`` has to be checked against. Raises UserError as ``student_layers``.
    """
    layers = student_layers(factors, teacher)
    return teacher if layers is None else config_of_layers(teacher, layers)


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
