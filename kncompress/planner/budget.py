"""A parameter budget spent where it does the least harm: a table of harms, a multiple-choice knapsack, a plan.

Harm is the KL of the logits when one map is replaced. It is measured for a reference shape of each map, and follows
for other shapes from their weighted error: KL_ref (error / error_ref)^p, with p about 2 for small errors. Harms of
several maps are added up. The KL of many maps replaced together is measured too, and the sum is corrected by a power
law.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval

from kncompress.errors import UserError
from kncompress.kron import PackedShape, Shape, parse_shape
from kncompress.planner.candidates import Harm, Option
from kncompress.planner.quiet_solver import c_output_dropped
from kncompress.reading import Count

FASTER, FASTER_PACKED, FASTER_SINGLE, FASTER_MIXING = 1.3, 1.6, 1.9, 24
"""How many times fewer multiply-adds than the dense map a shape needs under the constraint ``speed``.

Of outer products (low rank); of packed ones, which put inputs or outputs in order; of right factors with one row or
column, whose outputs take one more pass; of right factors with several of both, which turn the vectors around between
the products. Packed, measured in float32 on one CPU core with 512 vectors and the maps of SmolLM2-135M and GPT-2 small:
0.85 to 1.28 of the dense speed at 1.33 times fewer, 1.4 and more at 2 times fewer. In bfloat16 a dense map is so fast
that the passes cost half of its time or more (experiments/throughput, ``speed``: 4x4 at a quarter of the multiply-adds
was slower on GPT-2 small).
"""


@dataclass(frozen=True)
class Reference:
    """What one replaced map was measured to do."""

    error: Harm
    kl: Annotated[float, Interval(ge=-1, le=1e6)]
    """Of a harmless map rounding may leave it a little below 0."""


@dataclass(frozen=True)
class MapHarms:
    """Candidates of one map, and what was measured about it."""

    name: str
    parameters: Count
    """Of the dense map, without bias."""
    multiply_adds: Count
    """Of the dense map; of a tied embedding those of the head."""
    options: tuple[Option, ...]
    references: tuple[Reference, ...]

    def harm(self, error: float, exponent: float) -> float:
        """KL in nats per token of a shape with that error, alone: a power law through the references."""
        if error <= 0:
            return 0.0
        points = sorted((math.log(r.error), math.log(r.kl)) for r in self.references if r.error > 0 and r.kl > 0)
        if not points:
            return 0.0
        x = math.log(error)
        after = next((i for i, (known, _) in enumerate(points) if known >= x), len(points))
        if 0 < after < len(points):
            (x0, y0), (x1, y1) = points[after - 1 : after + 1]
            return _exp(y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12))
        known, kl = points[min(after, len(points) - 1)]
        return _exp(kl + exponent * (x - known))


@dataclass(frozen=True)
class HarmTable:
    """All that a plan for any budget needs to know about a model."""

    model: str
    text: str
    """What the model read, in words."""
    parameters: Count
    """Unique ones of the whole dense model."""
    multiply_adds: Count
    """Of all dense maps, per token."""
    maps: tuple[MapHarms, ...]
    together: tuple[tuple[Harm, Harm], ...] = ()
    """(sum of the harms of many maps, KL of all of them together), of a few uniform plans."""
    exponent: Annotated[float, Interval(ge=-100, le=100)] = 2.0
    """p of harms beyond the references of a map."""
    made_for: dict[str, Any] = field(default_factory=dict)
    """The fit and the text, as values of ``factors.made_for``."""
    format: Literal["kncompress harms 1"] = "kncompress harms 1"
    """Of the file."""

    def predicted(self, total: float) -> float:
        """KL of a plan whose harms add up to ``total``: a power law through ``together``."""
        points = sorted((math.log(a), math.log(b)) for a, b in self.together if a > 0 and b > 0)
        if total <= 0 or not points:
            return total
        slope = 1.0
        if len(points) > 1:
            (x0, y0), (x1, y1) = points[0], points[-1]
            slope = min(2.0, max(0.5, (y1 - y0) / max(x1 - x0, 1e-12)))
        x, y = points[0]
        return _exp(y + slope * (math.log(total) - x))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return asdict(self)

    def check(self) -> None:
        """Raises ValueError for an option that is not what its shape says, or a map that could not be left dense."""
        for number, row in enumerate(self.maps):
            for place, option in enumerate(row.options):
                shape = None if option.shape == "keep" else parse_shape(option.shape)
                known = row.parameters if shape is None else shape.parameters
                if known != option.parameters or (shape and shape.dense_parameters != row.parameters):
                    where = f"maps[{number}].options[{place}]"
                    told = f"{row.name} as {option.shape} has {known}"
                    raise ValueError(f"{where}.parameters={option.parameters}: {told}")
            if all(option.shape != "keep" for option in row.options):
                raise ValueError(f"maps[{number}].options: keep is none of them")


def _exp(value: float) -> float:
    """e to the ``value``, kept from overflowing."""
    return math.exp(min(value, 600.0))


@dataclass(frozen=True)
class BudgetPlan:
    """One option for every map of a table."""

    table: HarmTable
    budget: int
    """Unique parameters allowed."""
    chosen: dict[str, Option]
    harms: dict[str, float]
    """KL predicted of each map by itself."""
    parameters: int = field(init=False)
    multiply_adds: int = field(init=False)

    def __post_init__(self) -> None:
        saved = [(row.parameters - self.chosen[row.name].parameters) for row in self.table.maps]
        spared = [(row.multiply_adds - self.chosen[row.name].multiply_adds) for row in self.table.maps]
        object.__setattr__(self, "parameters", self.table.parameters - sum(saved))
        object.__setattr__(self, "multiply_adds", self.table.multiply_adds - sum(spared))

    @property
    def kl(self) -> float:
        """KL of the whole plan, as predicted."""
        return self.table.predicted(sum(self.harms.values()))

    @property
    def maps(self) -> dict[str, str]:
        """Explicit ``factors.maps``: {map: shape or keep}."""
        return {name: option.shape for name, option in self.chosen.items()}


def spend(table: HarmTable, budget: float, speed: bool = False) -> BudgetPlan:
    """The plan of least predicted harm within a budget.

    Args:
        table: of the model.
        budget: up to 1: share of its unique parameters; above: their number.
        speed: only shapes that are faster than the dense map (``advantage``), or that map.

    Raises:
        UserError: the budget cannot be reached, or is none.
    """
    allowed = [
        replace(row, options=tuple(o for o in row.options if o.shape == "keep" or not speed or _fast(row, o)))
        for row in table.maps
    ]
    least = table.parameters - sum(row.parameters - min(o.parameters for o in row.options) for row in allowed)
    count = budget_count(budget, table.parameters)
    if count < least:
        limit = f" with speed={str(speed).lower()}" if speed else ""
        raise UserError(
            f"budget={budget:g}: {count:,} parameters; the candidates{limit} reach {least:,} "
            f"({math.ceil(1000 * least / table.parameters) / 1000:g}) to {table.parameters:,} (1)"
        )
    rest = count - (table.parameters - sum(row.parameters for row in allowed))
    harms = [[row.harm(option.error, table.exponent) for option in row.options] for row in allowed]
    choice = knapsack([[option.parameters for option in row.options] for row in allowed], harms, rest)
    chosen = {row.name: row.options[i] for row, i in zip(allowed, choice, strict=True)}
    done = {row.name: harms[j][i] for j, (row, i) in enumerate(zip(allowed, choice, strict=True))}
    return BudgetPlan(table, count, chosen, done)


def _fast(row: MapHarms, option: Option) -> bool:
    return advantage(parse_shape(option.shape)) * option.multiply_adds <= row.multiply_adds


def advantage(shape: Shape) -> float:
    """How many times fewer multiply-adds than the dense map this kind of shape needs for its product to be surely no
    slower."""
    if isinstance(shape, PackedShape):
        return FASTER_PACKED
    if any(min(part.right) > 1 for part in shape.sums):
        return FASTER_MIXING
    return FASTER if all(part.left[1] == part.right[0] == 1 for part in shape.sums) else FASTER_SINGLE


def budget_count(budget: float, parameters: int) -> int:
    """Parameters that a budget allows, of a model that has ``parameters``.

    Raises:
        UserError: not above 0, or more than the model has.
    """
    if not (math.isfinite(budget) and budget > 0):
        raise UserError(f"budget={budget:g}: must be a share above 0 and up to 1, or a number of parameters")
    if budget <= 1:
        return int(budget * parameters)
    if budget > parameters:
        raise UserError(f"budget={budget:,.0f}: the model has {parameters:,}; give fewer, or a share up to 1")
    return int(budget)


def knapsack(sizes: Sequence[Sequence[int]], harms: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One option of every map, of least total harm among those whose sizes add up to ``budget`` at most.

    A multiple-choice knapsack as a mixed-integer program, solved exactly by HiGHS (scipy's ``milp``). It is quick:
    the relaxation has at most two fractional options, and dominated options are left out. A Lagrangian alone would
    leave part of the budget unspent, and dynamic programming over sizes of 10^8 is out of reach.

    Args:
        sizes: of each map's options.
        harms: 0 or more, of the same options.
        budget: 0 or more.

    Returns:
        The number of the option of each map.

    Raises:
        ValueError: the smallest options together are above the budget.
    """
    extra = [[size - min(row) for size in row] for row in sizes]
    spare = budget - sum(map(min, sizes))
    if spare < 0:
        raise ValueError(f"budget={budget}: below the smallest options")
    kept = [[i for i in undominated(e, h) if e[i] <= spare] for e, h in zip(extra, harms, strict=True)]
    if not kept:
        return []
    flat_sizes = np.array([extra[m][i] for m, options in enumerate(kept) for i in options], dtype=float)
    flat_harms = np.array([harms[m][i] for m, options in enumerate(kept) for i in options], dtype=float)
    owner = np.repeat(np.arange(len(kept)), [len(options) for options in kept])
    limit, step = float(spare), 1
    while True:
        picked = _solve(flat_sizes, flat_harms, owner, limit)
        over = int(flat_sizes[picked].sum()) - spare
        if over <= 0:
            break
        limit -= step * over  # the solver's tolerance, about a millionth of what is spare, let it through
        step *= 2
    starts = np.concatenate([[0], np.cumsum([len(options) for options in kept])[:-1]])
    return [options[int(i - start)] for options, i, start in zip(kept, picked, starts, strict=True)]


def undominated(sizes: Sequence[int], harms: Sequence[float]) -> list[int]:
    """Options that no other option dominates (no larger and no more harmful), smallest first."""
    kept: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], harms[i])):
        if not kept or harms[i] < harms[kept[-1]]:
            kept.append(i)
    return kept


def _solve(sizes: np.ndarray, harms: np.ndarray, owner: np.ndarray, budget: float) -> np.ndarray:
    """Number of the option picked for each owner, among all options in one row."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count, maps = len(sizes), int(owner[-1]) + 1
    one_each = csr_array((np.ones(count), (owner, np.arange(count))), shape=(maps, count))
    unit = max(1.0, float(sizes.max()))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(sizes[None] / unit), -np.inf, budget / unit),
    ]
    # HiGHS also stops at an absolute gap of 1e-6, so harms are scaled by the relaxation's total.
    with c_output_dropped():
        relaxed = milp(harms, constraints=constraints, bounds=Bounds(0, 1))
        scale = 1e3 / relaxed.fun if relaxed.fun is not None and relaxed.fun > 0 else 1 / max(harms.max(), 1e-300)
        found = milp(
            harms * scale,
            constraints=constraints,
            bounds=Bounds(0, 1),
            integrality=np.ones(count),
            options={"mip_rel_gap": 1e-9, "time_limit": 120.0},
        )
    if found.x is None:
        raise RuntimeError(f"knapsack: {found.message}")
    order = np.lexsort((-found.x, owner))  # the largest of each owner first
    return order[np.concatenate([[0], np.cumsum(np.bincount(owner))[:-1]])]
