"""``plan`` and ``inspect``: what a model would be after factoring."""

from dataclasses import dataclass, field

from kncompress.config.checks import check_positive, choice
from kncompress.config.factoring import FactorsConfig, FittingConfig
from kncompress.config.run import ModelRunConfig
from kncompress.errors import UserError


@dataclass
class PlanConfig(FittingConfig):
    """``plan``: choose a shape for every map, so that the model keeps to a budget with the least harm.

    Moments come from the first ``calibration.tokens`` of the training split of ``data.source``, harms from the
    ``harm_tokens`` after them; the finished plan is measured on the validation split.
    """

    budget: float = 0.667
    """Up to 1: share of all unique parameters, embedding and head included, tied ones once; above 1: their number."""
    speed: bool = False
    """Only shapes whose product is faster than the dense one: at most 1 / 1.6 of its multiply-adds for packed outer
    products, 1 / 1.3 for an embedding's, which are not packed, 1 / 1.9 where right factors have one row or column,
    1 / 24 where they have several. The other maps stay dense."""
    harm: str | None = None
    """Folder of an earlier ``plan`` of the same model, whose table of harms is used again."""
    harms: str = choice("auto", "auto", "gradients", "measured")
    """Where the harm of a candidate comes from. ``gradients``: half of its two-sided error, without a forward pass for
    each map (needs ``fit.sides=both``). ``measured``: the KL of the logits with one low-rank reference in the place of
    each map. ``auto``: by gradients where ``fit.sides`` takes them."""
    sums: bool = True
    """Try Kronecker sums beside low rank."""
    harm_tokens: int = 1024
    """Tokens on which the harm of each map is measured."""
    measure: bool | None = None
    """Fit the plan and measure its KL and perplexity; null: unless ``harm`` is given."""
    validation_tokens: int = 8192
    """Tokens of the validation split that this is measured on."""
    precision: str = choice("auto", "auto", "fp32", "bf16")
    """Of the harms: ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it natively."""
    start: str = choice("calibrated", "calibrated", "sequential")
    """Fit with which the plan is measured: ``calibrated`` or ``sequential``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("budget", self.budget)
        for name in ("harm_tokens", "validation_tokens"):
            check_positive(name, getattr(self, name))
        if self.harms == "gradients" and self.fit.sides != "both":
            raise UserError("harms=gradients: needs fit.sides=both, which takes the gradients")

    @property
    def harms_by(self) -> str:
        """``gradients`` or ``measured``."""
        if self.harms != "auto":
            return self.harms
        return "gradients" if self.fit.sides == "both" else "measured"

    @property
    def measures(self) -> bool:
        """Whether the finished plan is fitted and measured."""
        return self.harm is None if self.measure is None else self.measure


@dataclass
class InspectConfig(ModelRunConfig):
    """``inspect``: what a model would be after factoring, from its configuration alone; no weights are read."""

    factors: FactorsConfig = field(default_factory=FactorsConfig)
    every_map: bool = False
    """One line for each map; otherwise equal maps of several layers share one."""
