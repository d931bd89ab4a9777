"""``compress``, and the keys of every verb that factors a model: shapes, start, calibration."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choices, check_not_negative, check_positive, choice
from kncompress.config.run import DataConfig, ModelRunConfig
from kncompress.errors import UserError


@dataclass
class FactorConfig:
    """Factors of one group of maps: ``terms`` products whose right factor is ``right`` = [rows, columns]."""

    right: list[int] = field(default_factory=lambda: [1, 2])
    """Shape of the right factor, out x in; for ``mlp`` [hidden side, model side]: mirrored in the map back."""
    terms: int = 1
    """Number of summed Kronecker products."""
    layers: Any = None
    """Layers of this group where they differ from ``factors.layers``."""


@dataclass
class FactorsConfig:
    """Which map becomes which Kronecker sum. A group that is null stays dense."""

    depth: Any = None
    """Layers that the student keeps: null (all), a number, a share such as 0.5 (halves rounded up), evenly spread as in
    DistilGPT2; or a list of the teacher's layers, counted from 0."""
    layers: Any = "all"
    """``all``, ``odd`` (1, 3, 5, ... counted from 0), ``even``, or a list of layer numbers; after ``depth``."""
    embedding: FactorConfig | None = None
    """Token embedding, and the head where it is tied to it; an untied head is the map ``head`` of ``maps``."""
    qkv: FactorConfig | None = None
    """Query, key and value maps, each by itself."""
    o: FactorConfig | None = None
    """Attention output map."""
    mlp: FactorConfig | None = None
    """Feed-forward maps; ``right`` is that of the maps into the hidden layer (up, and a Llama's gate), mirrored for
    the map out of it."""
    maps: dict[str, str] = field(default_factory=dict)
    """Explicit {pattern: shape or keep}, e.g. ``layers.3.mlp.up: 768x768(x)4x1*2``; later and these win."""
    made_for: dict[str, Any] = field(default_factory=dict)
    """The fit and the text of a plan, from ``plan``: values of ``start``, ``fit``, ``calibration`` and ``data``, which
    ``compress``, ``train`` and ``glue`` take where nothing else is said."""
    scalars: bool = False
    """Whether each term has a scalar to learn (Krony-PT), 1 at the start. For single maps: ``s*`` before the shape in
    ``maps``."""


@dataclass
class CalibrationConfig:
    """The text that factors are fitted to and repaired on: pieces from all over the training split of
    ``data.source``, of the sources of a list in turns, of WikiText as prose and as published.

    It is read where ``start`` is calibrated or sequential, or ``repair`` has passes.
    """

    tokens: int = 16384
    """Its tokens."""
    context: int | None = None
    """Tokens in a block of it; null: ``data.context``, or else the model's context length, at most 1024."""
    moments: str | None = None
    """Folder where the second moments of the dense model's inputs on this text, before any ``fit.symmetries``, are kept
    and found again; null: they are not kept."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context"):
            check_positive(f"calibration.{name}", getattr(self, name))


@dataclass
class FitConfig:
    """How factors are fitted: to the weights alone, or to what the maps see on the calibration text."""

    gauge: str = choice("equal", "equal", "unit_right", "equal_rms")
    """How the scale of a term is shared by its two factors, of every start but random: ``equal`` norms, ``unit_right``
    (right factors of norm 1) or ``equal_rms`` (entries of equal size)."""
    sides: str = choice("both", "inputs", "both")
    """What a calibrated or sequential fit weighs errors by: the ``inputs`` of each map, or ``both``: inputs and the
    gradients of the loss at its outputs, so that errors count as the logits feel them."""
    output_ridge: float = 0.1
    """Ridge of the moments of those gradients, as a share of their mean square; that of an embedding's follows from the
    data."""
    sweeps: int = 20
    """Most sweeps of alternating least squares over both factors of a map; fewer where one gains little."""
    bias: bool = True
    """Have the biases of factored maps take the mean of the error; a map without bias gets none."""
    symmetries: list[str] = choice([], "hidden", "heads", "residual")
    """Changes of the dense weights before the fit that do not change what the model computes, kept where the fit then
    loses less: ``hidden``: order of each layer's feed-forward units; ``heads``: basis of each head's values, and
    without rotary embeddings of its queries and keys; ``residual``: one order of the residual coordinates, from the
    weights alone. A start at random has none."""

    def __post_init__(self) -> None:
        check_positive("fit.sweeps", self.sweeps)
        check_positive("fit.output_ridge", self.output_ridge)
        check_choices(self, "fit.")


@dataclass
class RepairConfig:
    """After the fit, each block is trained against the dense block's outputs on the calibration text."""

    passes: int = 0
    """Passes over the text; 0: no repair. Follows any start but random."""
    lr: float = 1e-3
    """Peak rate, for a dense weight; factors take the rates that ``optimizer.factor_rates=scaled`` gives."""

    def __post_init__(self) -> None:
        check_not_negative("repair.passes", self.passes)
        check_positive("repair.lr", self.lr)


@dataclass
class FittingConfig(ModelRunConfig):
    """Keys of the verbs that fit factors to a model."""

    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)


@dataclass
class FactoringConfig(FittingConfig):
    """Keys of the verbs that factor a model by given shapes."""

    factors: FactorsConfig = field(default_factory=FactorsConfig)
    start: str = choice("nearest", "nearest", "random", "calibrated", "sequential")
    """Start of the factors: ``random``; ``nearest`` to the weights; ``calibrated``: the least error on the inputs of
    each map; ``sequential``: the same, on inputs from the layers factored before, against the dense outputs."""
    dtype: str = choice("float32", "float32", "float16", "bfloat16")
    """Type of the saved weights: float32, float16 or bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repair.passes and self.start == "random":
            raise UserError(f"repair.passes={self.repair.passes}: needs a start that is fitted, not random")

    @property
    def start_reads_text(self) -> bool:
        """Whether the factors are fitted to the calibration text."""
        return self.start in ("calibrated", "sequential")

    @property
    def needs_text(self) -> bool:
        """Whether the start, or the repair after it, reads text."""
        return self.start_reads_text or self.repair.passes > 0


@dataclass
class CompressConfig(FactoringConfig):
    """``compress``: factor a model and save it, without training."""

    dtype: str = choice("stored", "stored", "float32", "float16", "bfloat16")
    """Type of the saved weights: that of the model's files (``stored``; float32 where they have several, and for GGUF),
    float32, float16 or bfloat16. The fit is in float32 or better whatever it is."""
