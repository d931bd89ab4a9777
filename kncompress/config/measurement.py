"""``evaluate`` and ``bench``: how good a model is, and how fast."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choice, check_not_negative, check_positive, check_window, choice
from kncompress.config.factoring import FactorsConfig
from kncompress.config.placement import PlacedRunConfig
from kncompress.config.run import DataConfig, ModelRunConfig
from kncompress.errors import UserError

PARTS = ("product", "step", "fit", "generate", "tokens", "startup", "memory")
"""Of ``bench``."""
RUNTIMES = ("transformers", "onnxruntime", "onnxruntime-genai")
"""Of its part ``generate``."""
WEIGHTS = (32, 8, "dynamic", 4)
"""Bits of the weights of ONNX graphs there."""


@dataclass
class EvaluateConfig(PlacedRunConfig):
    """``evaluate``: perplexity of a model on a text, by both protocols; or its scores on ``tasks`` or ``lambada``."""

    data: DataConfig = field(default_factory=DataConfig)
    context: int | None = None
    """Window in tokens; null: the model's context length, of perplexity at most 2,048."""
    stride: int | None = None
    """Tokens between windows of the token-weighted protocol; null: the window (no overlap)."""
    tokens: int | None = None
    """Score only the first tokens of the text; null: all."""
    batch_tokens: int = 8192
    """Tokens in one forward pass."""
    tasks: list[str] = field(default_factory=list)
    """In the place of perplexity: tasks of lm-evaluation-harness, or YAML files in its format (extra ``eval``)."""
    allow_code: bool = False
    """Let the YAML file of a task run the Python functions beside it that it names by ``!function``."""
    lambada: str | None = None
    """In the place of perplexity: passages whose last word is to be predicted: hub:EleutherAI/lambada_openai, a
    folder of jsonl or parquet files with a column ``text``, or a .txt file with a passage on each line."""
    limit: int | None = None
    """Only the first items of each task, or passages; null: all."""
    compare: str | None = None
    """The model that this one was made from, as ``model.path``: tells how far apart both are on the text (KL per token,
    share of equal likeliest tokens, ratio of the perplexities), or how many items of ``tasks`` flip from right to wrong
    or back."""
    bits: int | None = None
    """Round the weights to integers of 2 to 8 bits before anything is scored (to the nearest, weights alone), and tell
    the bytes. ``compare`` is not rounded: the same model there tells what rounding costs. null: no rounding."""
    group: int | None = 64
    """Neighbouring weights that share a scale; null: whole rows."""
    shots: int | None = None
    """Worked examples before each item of a task; null: as the task says."""
    backend: str = choice("transformers", "transformers", "onnx")
    """What runs ``model``: ``transformers``, or ``onnx`` (onnxruntime, on the CPU) a folder that ``export format=onnx``
    wrote; for a text. ``compare`` is read by transformers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window("context", self.context)
        for name in ("stride", "tokens", "batch_tokens", "limit"):
            check_positive(name, getattr(self, name))
        check_not_negative("shots", self.shots)
        check_positive("group", self.group)
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise UserError(f"bits={self.bits}: must be between 2 and 8, or null")
        if self.backend == "onnx" and (self.bits or self.tasks or self.lambada is not None):
            raise UserError("backend=onnx: scores a text; leave bits, tasks and lambada out")
        if self.model.device_map is not None and (self.backend == "onnx" or self.bits):
            other = "backend=onnx" if self.backend == "onnx" else f"bits={self.bits}"
            raise UserError(f"model.device_map={self.model.device_map}: is for weights as they are; leave out {other}")
        if self.tasks and self.lambada is not None:
            raise UserError(f"lambada={self.lambada}: give lambada=... or tasks=[...], one of the two")
        if self.compare is not None and self.lambada is not None:
            raise UserError(f"compare={self.compare}: is for a text or tasks, not for lambada")
        if self.compare is not None and self.stride is not None:
            raise UserError(f"compare={self.compare}: compares windows that do not overlap; give no stride")
        if self.shots is not None and not self.tasks:
            raise UserError(f"shots={self.shots}: is for tasks; give tasks=[...]")
        if self.limit is not None and not self.tasks and self.lambada is None:
            raise UserError(f"limit={self.limit}: is for tasks and lambada; give tasks=[...] or lambada=...")


@dataclass
class BenchConfig(ModelRunConfig):
    """``bench``: speed and memory of this package beside its rivals, and beside what this machine can do at best.

    Weights are random, of the sizes of ``model``. Ours and the rivals take turns in one process, or in pairs of fresh
    ones (``step``, ``startup``, ``memory``); figures are medians.
    """

    parts: Any = choice("all", "all", *PARTS)
    """``all``, or some of ``product``, ``step``, ``fit``, ``generate``, ``tokens``, ``startup``, ``memory``."""
    size: str = choice("full", "full", "small")
    """``full``: the maps of ``model``, 2,048 tokens; ``small``: a GPT-2 of two layers 48 wide, for a look at the verb;
    its figures mean nothing."""
    presets: list[str] = field(default_factory=lambda: ["kngpt2", "kronypt_81m", "kronypt_80m", "outer", "packed"])
    """Of ``product``: presets of factors; ``outer``: outer products of half the parameters; ``packed``: the same,
    packed, of more rank; ``speed``: shapes that ``plan speed=true`` may choose."""
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    """Of the student in the other parts."""
    precision: str = choice("auto", "auto", "fp32", "bf16")
    """``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it natively."""
    accelerator: str = choice("auto", "auto", "cpu", "gpu")
    """``cpu``, ``gpu`` or ``auto``."""
    threads: int | None = None
    """CPU threads; null: as torch has it."""
    tokens: int | None = None
    """Tokens of a product and of a training step; null: by ``size``."""
    repeats: int | None = None
    """Rounds; null: by ``size``."""
    runtimes: Any = choice("installed", "installed", *RUNTIMES)
    """Of ``generate``, what runs dense and factored models: ``transformers``, ``onnxruntime`` by our own loop,
    ``onnxruntime-genai``, or a list of them; ``installed``: all that are. The last two run on the CPU, in float32 or
    in ``bits``."""
    bits: list[Any] = field(default_factory=lambda: [32])
    """Of ``generate``, weights of onnxruntime's graphs: ``32``, ``8``, ``4`` and ``dynamic``, the 8 bits of ``export
    dynamic=true``."""
    profile: bool = False
    """Of ``product`` and ``generate``, tell which operators ours spends its time in, in ``table.md``."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text of ``tokens``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threads", "tokens", "repeats"):
            check_positive(name, getattr(self, name))
        if not self.bits:
            raise UserError(f"bits=[]: give some of {', '.join(map(str, WEIGHTS))}")
        for bits in self.bits:
            check_choice("bits", bits, WEIGHTS)
        if self.bits != [32] and self.named_runtimes == ["transformers"]:
            raise UserError(f"bits={self.bits}: are those of onnxruntime; give it in runtimes, or leave bits out")
        if self.factors.depth is not None:
            raise UserError(f"factors.depth={self.factors.depth}: bench compares models of one depth; give null")

    @property
    def chosen(self) -> list[str]:
        """Parts to measure, in order."""
        named = list(self.parts) if isinstance(self.parts, list | tuple) else [self.parts]
        return list(PARTS) if "all" in named else [str(name) for name in named]

    @property
    def named_runtimes(self) -> list[str]:
        """Runtimes asked for by name, in order; none: those that are installed."""
        named = list(self.runtimes) if isinstance(self.runtimes, list | tuple) else [self.runtimes]
        return [] if "installed" in named else [str(name) for name in named]
