"""One measured figure: ours, its rivals, what was promised, and what the machine allows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "ours"


@dataclass(frozen=True)
class Measurement:
    """A figure and those it is compared with. Values are seconds, or bytes where ``unit`` says so: less is better."""

    name: str
    """Prefix of its metrics, e.g. ``product/kngpt2/mlp.up/forward``."""
    what: str
    """Sizes, for a reader."""
    values: Mapping[str, float]
    """Medians: ``ours``, and each rival that could be measured."""
    speedups: Mapping[str, float] = field(default_factory=dict)
    """How many times as long each rival takes, by rounds."""
    baseline: str | None = None
    """The rival that ``speedup`` and ``promise`` count against."""
    promised: float | None = None
    """Speed-up over the baseline that multiply-adds or bytes promise."""
    bound: float | None = None
    """What operations and bytes need at least on this machine, in the same unit."""
    unit: str = "seconds"
    missing: Mapping[str, str] = field(default_factory=dict)
    """Rivals that could not be measured, and why."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Further metrics by their whole names."""
    operators: Mapping[str, float] = field(default_factory=dict)
    """Shares of our time by operator, where that was asked for."""

    @property
    def ours(self) -> float:
        """Our seconds or bytes."""
        return self.values[OURS]

    @property
    def speedup(self) -> float | None:
        """Over the baseline."""
        return None if self.baseline is None else self.speedups.get(self.baseline)

    @property
    def promise(self) -> float | None:
        """Share of the promised speed-up that is reached."""
        return None if self.speedup is None or self.promised is None else self.speedup / self.promised

    @property
    def share(self) -> float | None:
        """Share of the bound that is reached: 1 is as fast, or as small, as this machine allows."""
        return None if self.bound is None else self.bound / self.ours

    @property
    def metrics(self) -> dict[str, float]:
        """Flat names and numbers for ``result.json``."""
        found = {f"{self.name}/{self.unit}": self.ours}
        ratio = "speedup" if self.unit == "seconds" else "saving"
        named = {ratio: self.speedup, "promise": self.promise, "share_of_bound": self.share}
        found |= {f"{self.name}/{key}": value for key, value in named.items() if value is not None}
        others = {name: value for name, value in self.speedups.items() if name != self.baseline}
        found |= {f"{self.name}/{ratio}_over_{name}": value for name, value in others.items()}
        return found | dict(self.more)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        derived = {"speedup": self.speedup, "promise": self.promise, "share_of_bound": self.share}
        return asdict(self) | derived
