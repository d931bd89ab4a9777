"""Memory, disk and time that ``plan`` will need, from a config alone, before anything is written.

It holds a layer of the model at a time. The terms are what its steps hold beside it; the constants of the fits are
those of ``compress`` (``compression.forecast``).
"""

from collections.abc import Iterable
from typing import Any

from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.compression.forecast import (
    CALIBRATED_ENDS,
    FELT,
    NEAREST,
    PROGRAM,
    SYMMETRIC,
    Forecast,
    whole_from_gguf,
)
from kncompress.compression.inspection import predict
from kncompress.compression.moments import inputs_of
from kncompress.compression.rows import ROOM
from kncompress.compression.work import moment_cost
from kncompress.config import PlanConfig
from kncompress.evaluation.scoring import LOGITS
from kncompress.planner.budget import HarmTable, budget_count
from kncompress.planner.costs import kl_cost, map_cost, screen_cost, screened_layers
from kncompress.planner.harm import NUMBERS
from kncompress.planner.sensitivity import TOGETHER, TOGETHER_ROOM

_DOUBLE = 1.15
"""Of the multiply-adds: some are of float64."""
_GGUF = 4000
"""Multiply-adds that take as long as reading one number of a GGUF file."""
_F = 4.0
"""Bytes of a float32."""
_EMBEDDING = CALIBRATED_ENDS + 7 * 4
"""The same of an embedding while it is fitted and the KL taken: beside the fit its copy, the factors and their product,
what it replaces, and the change of the head as it is multiplied."""
_SPECTRUM = 8 * 4
"""Bytes for each number of a map while its singular values between two metrics are taken: float64."""


def plan_forecast(config: PlanConfig, fields: Any, table: HarmTable | None) -> Forecast:
    """What ``plan`` with this configuration will need.

    Args:
        config: budget, text, and where harms come from.
        fields: transformers config of the dense model.
        table: the harms that are known already; None: they are measured.

    Raises:
        UserError: as ``predict``.
    """
    numbers, anatomy = predict(fields, Plan()).parameters_before, anatomy_of(fields)
    vocabulary = fields.vocab_size
    itemsize = 2 if "16" in str(getattr(fields, "dtype", None)) else 4
    reads = table is None or config.measures
    whole = _F * numbers if config.model.gguf_file is not None and reads else 0.0  # then laid down in files
    held: list[float] = [PROGRAM + (whole_from_gguf(anatomy, numbers) if whole else 0.0)]
    written: list[float] = [0.0]
    operations = 0.0
    if table is None:
        held.append(PROGRAM + _measuring(config, anatomy, vocabulary, itemsize))
        operations += _measuring_operations(config, anatomy)
        written.append(len(TOGETHER) * max(0.0, _F * _layers(anatomy) - TOGETHER_ROOM))
    if config.measures:
        held.append(PROGRAM + _scoring(config, anatomy, vocabulary, itemsize))
        operations += _scoring_operations(config, anatomy, numbers)
        written.append(_F * budget_count(config.budget, numbers))
    if whole:
        operations += _GGUF * numbers
    disk = 5e6 + whole + max(written)
    if reads:
        disk += sum(max(0.0, size - ROOM) for size in _walked(config, anatomy))
        disk += _moments(config, anatomy) if config.calibration.moments is None else 0.0
    return Forecast(max(held), disk, _DOUBLE * operations, numbers if reads else 0, "plan")


def _largest(anatomy: Anatomy, bytes_of: Any) -> float:
    return max((bytes_of(site) for site in anatomy.sites.values() if site.layer is not None), default=0.0)


def _layers(anatomy: Anatomy) -> float:
    """Numbers of all maps within layers."""
    return float(sum(s.out_features * s.in_features for s in anatomy.sites.values() if s.layer is not None))


def _ends(anatomy: Anatomy) -> float:
    """Numbers of the embedding, which are those of a head too."""
    site = anatomy.sites["embedding"]
    return float(site.out_features * site.in_features)


def _felt(config: PlanConfig) -> bool:
    return config.fit.sides == "both"


def _width(anatomy: Anatomy) -> int:
    return anatomy.sites["layers.0.attn.q"].in_features


def _walked(config: PlanConfig, anatomy: Anatomy) -> tuple[float, float]:
    """Bytes of the states at all layers, entering and coming back, and of the rows of one layer."""
    tokens = config.calibration.tokens
    rows = _F * tokens * sum(sites[0].in_features for sites in inputs_of(anatomy, 0).values())
    if not _felt(config):
        return 0.0, rows
    rows += _F * tokens * sum(site.out_features for site in anatomy.sites.values() if site.layer == 0)
    return 2 * _F * tokens * _width(anatomy) * anatomy.layers, rows


def _walk(config: PlanConfig, anatomy: Anatomy) -> float:
    """Bytes of the states and rows of a walk over the layers that are in memory."""
    states = _F * config.calibration.tokens * _width(anatomy) * (3 if _felt(config) else 1)
    return states + sum(min(size, ROOM) for size in _walked(config, anatomy))


def _raised(anatomy: Anatomy, itemsize: int) -> float:
    """Bytes of a layer in its own type and in float32."""
    return (itemsize + _F) * _layers(anatomy) / anatomy.layers


def _moment_bytes(config: PlanConfig, site: Site) -> float:
    felt = FELT * site.out_features**2 if _felt(config) else 0
    return SYMMETRIC * site.in_features**2 + felt


def _measuring(config: PlanConfig, anatomy: Anatomy, vocabulary: int, itemsize: int) -> float:
    """Bytes while harms are measured."""
    width, harm = _width(anatomy), config.harm_tokens
    meter = min(_F * harm * width * (anatomy.layers + 1), ROOM) + _F * (harm * (2 * width + vocabulary))
    meter += _F * vocabulary * width + _raised(anatomy, itemsize)
    logits = 3 * _F * min(harm * vocabulary, NUMBERS)
    one = _largest(
        anatomy,
        lambda site: _moment_bytes(config, site) + (NEAREST + _SPECTRUM) * site.out_features * site.in_features,
    )
    together = len(TOGETHER) * min(_F * _layers(anatomy), TOGETHER_ROOM)
    return meter + together + logits + max(_walk(config, anatomy) + one, _EMBEDDING * _ends(anatomy))


def _scoring(config: PlanConfig, anatomy: Anatomy, vocabulary: int, itemsize: int) -> float:
    """Bytes while the plan is fitted, and while both models are compared: embedding and head of both are in float32."""
    one = _largest(anatomy, lambda site: _moment_bytes(config, site) + NEAREST * site.out_features * site.in_features)
    logits = 2 * _F * min(min(config.validation_tokens, 8192) * vocabulary, LOGITS)
    layer, ends = _raised(anatomy, itemsize), _ends(anatomy)
    both = (2 * _F + itemsize) * ends * (1 if anatomy.tied else 2) + 2 * layer
    return max(CALIBRATED_ENDS * ends, _walk(config, anatomy) + layer + one, both) + logits  # what is freed is kept


def _moments(config: PlanConfig, anatomy: Anatomy) -> float:
    """Bytes of all moments in their folder."""
    width = anatomy.sites["embedding"].in_features
    total = _F * width**2 * (2 if _felt(config) else 1)
    total += sum(_F * sites[0].in_features ** 2 for sites in inputs_of(anatomy).values())
    if _felt(config):
        total += sum(_F * site.out_features**2 for site in anatomy.sites.values() if site.layer is not None)
    return total


def _walk_operations(config: PlanConfig, anatomy: Anatomy) -> float:
    tokens = config.calibration.tokens
    total = (6 if _felt(config) else 1) * tokens * _layers(anatomy)
    total += sum(moment_cost(sites, tokens) for sites in inputs_of(anatomy).values())
    if _felt(config):
        total += sum(s.out_features**2 * (tokens + 4.0 * s.out_features) for s in _maps(anatomy))
    return total


def _maps(anatomy: Anatomy) -> Iterable[Site]:
    return (site for site in anatomy.sites.values() if site.layer is not None)


def _measuring_operations(config: PlanConfig, anatomy: Anatomy) -> float:
    tokens = config.harm_tokens
    whole = tokens * (_layers(anatomy) + _ends(anatomy))
    total = _walk_operations(config, anatomy) + (1 + len(TOGETHER)) * whole
    measured = config.harms_by == "measured"
    for site in anatomy.sites.values():
        once = kl_cost(anatomy, site, tokens) if measured or site.group == "embedding" else 0.0
        total += map_cost(anatomy, site, once)
    if config.sums:
        total += sum(screen_cost(site) for site in _maps(anatomy) if site.layer in screened_layers(anatomy))
    return total


def _scoring_operations(config: PlanConfig, anatomy: Anatomy, numbers: int) -> float:
    """The fit of outer products to every map, whose moments are there already, and the comparison."""
    passes = 2.0 * config.validation_tokens * numbers
    states = (2 if config.start == "sequential" else 1) * config.calibration.tokens * _layers(anatomy)
    return passes + states + sum(map_cost(anatomy, site, 0.0) for site in anatomy.sites.values())
