"""The typed schema of every configuration value.

YAML under ``conf/`` holds the values; these dataclasses hold types, meaning and checks. This module imports
neither torch nor Hydra, so that a config error is answered at once. Field comments are the reference that the
README points to.
"""

from dataclasses import dataclass, field
from typing import Any

from kncompress.errors import UserError


def _choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: not one of {', '.join(allowed)}")


def _positive(key: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise UserError(f"{key}={value}: must be greater than 0")


def _not_negative(key: str, value: float | None) -> None:
    if value is not None and value < 0:
        raise UserError(f"{key}={value}: must be 0 or more")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{key}={value}: must lie between 0 and 1")


@dataclass
class ModelConfig:
    """A causal language model: one that exists, or one to be trained from random weights."""

    path: str | None = None
    """Folder, hub id, ``asset:mini`` for the teacher inside the package, or ``package:NAME`` for the folder of an
    installed Python package, which is not imported. Weights are read from safetensors, never unpickled."""
    gguf_file: str | None = None
    """GGUF file in that folder, with the model's weights, configuration and tokenizer; taken as float32."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; the model's own where absent."""
    architecture: dict[str, Any] | None = None
    """Fields of the transformers config (``model_type`` among them) of a model to inspect or to train from scratch."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise UserError(f"model.path={self.path}: give model.path or model.architecture, one of the two")
        if self.gguf_file is not None and self.path is None:
            raise UserError(f"model.gguf_file={self.gguf_file}: needs model.path, the folder that the file lies in")


@dataclass
class DataConfig:
    """Text, and how it becomes token blocks."""

    source: Any = "sample"
    """``sample``; a text file, or a folder of text, parquet, jsonl or arrow files; ``hub:ID``, ``hub:ID:CONFIGURATION``
    for a data set of the Hugging Face hub (its column ``text``, its own splits); or a list of these."""
    validation: Any = None
    """Source of the validation split; null: part of ``source``, split by document."""
    test: Any = None
    """Source of the test split; null: part of ``source``, split by document."""
    context: int | None = None
    """Tokens in a block; null: the model's own context length."""
    text_format: str = "auto"
    """``plain``; ``wikitext``: headings split articles, ``@-@`` marks and spacing are undone; ``lines``: as published,
    rows joined by a blank line, no end-of-text added; ``auto``: wikitext for ``*.tokens``, ``*.raw`` and data sets of
    that name, else plain. A row of a data set is a document, except of WikiText, whose rows are lines."""
    split: str = "auto"
    """``evaluate``: what is scored: ``train``, ``validation``, ``test``, ``all``; ``auto``: the test split where the
    source names one (the sample, a folder with a test file), the whole text otherwise."""
    fraction: float = 1.0
    """Share of the training documents that is used, chosen by a hash of their text and ``seed``."""
    seed: int = 0
    """Seeds the split by document, the choice of ``fraction`` and the order of the blocks."""
    cache_dir: str | None = None
    """Token caches; null: ``$KNCOMPRESS_CACHE`` or ``~/.cache/kncompress``."""

    def __post_init__(self) -> None:
        _positive("data.context", self.context)
        _positive("data.fraction", self.fraction)
        _share("data.fraction", self.fraction)
        _choice("data.text_format", self.text_format, ("auto", "plain", "wikitext", "lines"))
        _choice("data.split", self.split, ("auto", "train", "validation", "test", "all"))


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
    scalars: bool = False
    """A number to learn for each term (Krony-PT), 1 at the start, of all factored maps; of single ones by ``s*`` before
    the shape in ``maps``."""


@dataclass
class ObjectiveConfig:
    """Weights of the training loss; 0 leaves a term out. All terms are means, logits in nats per token."""

    embedding: float = 0.0
    """MSE of the embedding outputs."""
    attention: float = 0.0
    """Attention of every layer: KL(teacher || student) of the maps, or MSE of the scores."""
    attention_form: str = "kl"
    """``kl`` (KnGPT2) or ``mse`` (KroneckerBERT: pre-softmax scores)."""
    hidden: float = 0.0
    """MSE of the hidden states after every layer."""
    feed_forward: float = 0.0
    """MSE of the feed-forward outputs of every layer."""
    logits: float = 0.0
    """KL(teacher || student) of the next-token distributions, times temperature squared."""
    temperature: float = 1.0
    """Softmax temperature of the logits term."""
    cross_entropy: float = 1.0
    """Next-token cross-entropy on the text."""

    TERMS = ("embedding", "attention", "hidden", "feed_forward", "logits", "cross_entropy")

    def __post_init__(self) -> None:
        for name in self.TERMS:
            _not_negative(f"objective.{name}", getattr(self, name))
        if not any(getattr(self, name) for name in self.TERMS):
            raise UserError(f"objective: every weight is 0; give at least one of {', '.join(self.TERMS)}")
        _choice("objective.attention_form", self.attention_form, ("kl", "mse"))
        _positive("objective.temperature", self.temperature)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(getattr(self, name) for name in self.TERMS if name != "cross_entropy")


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule: linear warm-up, then cosine."""

    name: str = "adamw"
    """``adamw``, or ``muon``: Muon (its step scaled to the size of AdamW's) for the dense matrices inside the
    layers, AdamW for everything else."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    """On matrices; norms, biases and embeddings are exempt."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    final: float = 0.1
    """Rate at the end as a share of the peak."""
    factor_rates: str = "one"
    """``one``: every factor takes ``lr``; ``scaled``: each takes the rate at which a step moves its map's weight as
    ``lr`` would move a dense one (``kron.gauge.step_scales``)."""

    def __post_init__(self) -> None:
        _choice("optimizer.name", self.name, ("adamw", "muon"))
        _choice("optimizer.factor_rates", self.factor_rates, ("one", "scaled"))
        _positive("optimizer.lr", self.lr)
        _not_negative("optimizer.weight_decay", self.weight_decay)
        for name in ("beta1", "beta2", "warmup", "final"):
            _share(f"optimizer.{name}", getattr(self, name))


@dataclass
class TrainerConfig:
    """How long, on what, in which precision. Batches are counted in tokens."""

    tokens: int | None = None
    """Training tokens in all; null: one epoch. Rounded up to whole steps."""
    steps: int | None = None
    """Optimiser steps in all; overrides ``tokens``."""
    batch_tokens: int = 8192
    """Tokens of one optimiser step, over all devices: more of them share the same batch."""
    micro_batch_tokens: int = 4096
    """Most tokens in one forward pass of one device; the rest of the batch is accumulated."""
    accelerator: str = "auto"
    """``cpu``, ``gpu`` or ``auto``."""
    strategy: str = "auto"
    """``ddp``: a copy of the model in each process; ``fsdp``: one model in shards over GPUs; ``auto``: one process, or
    ddp where there are several."""
    devices: Any = 1
    """Processes on each node, one a GPU or, on CPUs, one a share of the cores; ``auto``: every GPU of the node, or what
    torchrun or SLURM has started."""
    nodes: int = 1
    """Machines."""
    precision: str = "auto"
    """``fp32``, ``bf16`` (autocast), or ``auto``: bf16 where the hardware multiplies it natively."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 leaves it alone."""
    dropout: bool = False
    """Keep the model's dropout while training."""
    validate_every: int | None = None
    """Steps between validations; null: ten in a run."""
    validation_tokens: int | None = 65536
    """Most tokens of one validation during training; null: all."""
    test_tokens: int | None = None
    """Most tokens of the test split that are scored before and after training; null: all."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; null: with every validation."""
    keep: str = "best"
    """Which weights become ``model/``: ``best`` (lowest validation loss) or ``last``."""

    def __post_init__(self) -> None:
        for name in (
            "tokens",
            "steps",
            "batch_tokens",
            "micro_batch_tokens",
            "nodes",
            "validate_every",
            "validation_tokens",
            "test_tokens",
            "checkpoint_every",
        ):
            _positive(f"trainer.{name}", getattr(self, name))
        if self.devices != "auto" and (type(self.devices) is not int or self.devices < 1):
            raise UserError(f"trainer.devices={self.devices}: must be auto or a whole number from 1")
        _choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        _choice("trainer.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        if self.strategy == "fsdp" and self.accelerator == "cpu":
            raise UserError("trainer.strategy=fsdp: shards over GPUs; trainer.strategy=ddp also runs on CPUs")
        _choice("trainer.precision", self.precision, ("auto", "fp32", "bf16"))
        _choice("trainer.keep", self.keep, ("best", "last"))
        _not_negative("trainer.gradient_clip", self.gradient_clip)


@dataclass
class LoggerConfig:
    """Where metrics go besides ``metrics.csv``."""

    name: str = "wandb"
    """``wandb``, ``csv`` (the file alone) or ``none``."""
    mode: str = "offline"
    """W&B: ``offline``, ``online`` or ``disabled``; ``WANDB_MODE`` overrides it."""
    project: str = "kncompress"
    entity: str | None = None
    group: str | None = None
    """W&B group; null: the sweep's folder name in a sweep."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of at most 64 characters, besides the names of the experiment and of the preset of factors."""
    artifact: bool = True
    """W&B: the model folder as an artifact, with its plan; of an offline run, ``wandb sync`` uploads it."""

    def __post_init__(self) -> None:
        _choice("logger.name", self.name, ("wandb", "csv", "none"))
        _choice("logger.mode", self.mode, ("offline", "online", "disabled"))
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise UserError(f"logger.tags: {tag!r} has {len(tag)} characters; W&B takes 1 to 64")


@dataclass
class RunConfig:
    """Keys that every verb has."""

    run_dir: str | None = None
    """Folder of this run; null: ``runs/<verb>-<experiment>-<time>``."""
    seed: int = 0
    fail_fast: bool = False
    """In a sweep (``-m``): start no further job once one has failed."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path="asset:mini"))


@dataclass
class CalibrationConfig:
    """Factors fitted to what the maps see on the training split of ``data.source``: ``start`` calibrated, sequential.

    Both need the second moments of the inputs of the maps that are factored.
    """

    tokens: int = 16384
    """Tokens of the calibration text: the first ones of the training split."""
    context: int | None = None
    """Tokens in a block of it; null: ``data.context``, or else the model's context length, at most 1024."""
    gauge: str = "equal"
    """How the scale of a term is shared by its two factors, of every start but random: ``equal`` norms, ``unit_right``
    (right factors of norm 1) or ``equal_rms`` (entries of equal size)."""
    sweeps: int = 20
    """Most sweeps of alternating least squares over both factors of a map; fewer where one gains little."""
    bias: bool = True
    """Have the biases of factored maps take the mean of the error; a map without bias gets none."""
    moments: str | None = None
    """Folder where the moments of the dense model's inputs, before any ``symmetries``, are kept and found again; null:
    they are not kept."""
    symmetries: list[str] = field(default_factory=list)
    """Exact changes of the dense weights, made before the fit where it then loses less: ``hidden``: order of each
    layer's feed-forward units; ``heads``: basis of each head's values, and without rotary embeddings of its queries and
    keys; ``residual``: one order of the residual coordinates, from the weights alone. A start at random has none."""
    repair: int = 0
    """Passes over the text in which, after any start but random, each block is trained against the dense block's
    outputs; 0: none."""
    repair_lr: float = 1e-3
    """Peak rate of that, for a dense weight; factors take the rates that ``optimizer.factor_rates=scaled`` gives."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context", "sweeps", "repair_lr"):
            _positive(f"calibration.{name}", getattr(self, name))
        _not_negative("calibration.repair", self.repair)
        _choice("calibration.gauge", self.gauge, ("equal", "unit_right", "equal_rms"))
        for name in self.symmetries:
            _choice("calibration.symmetries", name, ("hidden", "heads", "residual"))


@dataclass
class FactoringConfig(RunConfig):
    """Keys of the verbs that factor a model."""

    factors: FactorsConfig = field(default_factory=FactorsConfig)
    start: str = "nearest"
    """Start of the factors: ``random``; ``nearest`` to the weights; ``calibrated``: the least error on the inputs of
    each map; ``sequential``: the same, on inputs from the layers factored before, against the dense outputs."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dtype: str = "float32"
    """Type of the saved weights: float32, float16 or bfloat16."""

    def __post_init__(self) -> None:
        _choice("start", self.start, ("nearest", "random", "calibrated", "sequential"))
        _choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        if self.calibration.repair and self.start == "random":
            raise UserError(f"calibration.repair={self.calibration.repair}: needs a start that is fitted, not random")

    @property
    def needs_text(self) -> bool:
        """Whether the start, or the repair after it, reads text."""
        return self.start in ("calibrated", "sequential") or self.calibration.repair > 0


@dataclass
class SamplesConfig:
    """Texts that teacher and trained student write, always by the likeliest token: ``samples.json``."""

    count: int = 3
    """Prompts, from evenly spaced places of the test split; 0: no samples."""
    prompt_tokens: int = 16
    """Tokens of a prompt."""
    tokens: int = 32
    """Most new tokens after it."""

    def __post_init__(self) -> None:
        _not_negative("samples.count", self.count)
        _positive("samples.prompt_tokens", self.prompt_tokens)
        _positive("samples.tokens", self.tokens)


@dataclass
class TrainConfig(FactoringConfig):
    """``train``: teacher and text in, repaired student out."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    resume: str | None = None
    """Folder of an unfinished run or sweep to continue; ``auto``: the run in ``run_dir``, or without one the newest in
    ``runs/`` with this configuration, and a new run where there is none; ``never`` or null: a new run. A sweep goes on
    with the newest of the same jobs unless ``never``."""


@dataclass
class CompressConfig(FactoringConfig):
    """``compress``: factor a model and save it, without training."""


@dataclass
class PlanConfig(RunConfig):
    """``plan``: choose a shape for every map, so that the model keeps to a budget with the least harm.

    Moments come from the first ``calibration.tokens`` of the training split of ``data.source``, harms from the
    ``harm_tokens`` after them; the finished plan is measured on the validation split.
    """

    budget: float = 0.667
    """Up to 1: share of all unique parameters, embedding and head included, tied ones once; above 1: their number."""
    speed: bool = False
    """Only shapes whose product is faster than the dense one: at most 1 / 1.3 of its multiply-adds for outer products,
    1 / 1.9 where right factors have one row or column, 1 / 24 where they have several. The other maps stay dense."""
    harm: str | None = None
    """Folder of an earlier ``plan`` of the same model, whose table of harms is used again."""
    harm_tokens: int = 1024
    """Tokens on which the harm of each map is measured."""
    measure: bool | None = None
    """Fit the plan and measure its KL and perplexity; null: unless ``harm`` is given."""
    validation_tokens: int = 8192
    """Tokens of the validation split that this is measured on."""
    precision: str = "auto"
    """Of the harms: ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it natively."""
    start: str = "calibrated"
    """Fit with which the plan is measured: ``calibrated`` or ``sequential``."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _positive("budget", self.budget)
        for name in ("harm_tokens", "validation_tokens"):
            _positive(name, getattr(self, name))
        _choice("precision", self.precision, ("auto", "fp32", "bf16"))
        _choice("start", self.start, ("calibrated", "sequential"))

    @property
    def measures(self) -> bool:
        """Whether the finished plan is fitted and measured."""
        return self.harm is None if self.measure is None else self.measure


@dataclass
class InspectConfig(RunConfig):
    """``inspect``: what a model would be after factoring, from its configuration alone; no weights are read."""

    factors: FactorsConfig = field(default_factory=FactorsConfig)
    every_map: bool = False
    """One line for each map; otherwise equal maps of several layers share one."""


@dataclass
class EvaluateConfig(RunConfig):
    """``evaluate``: perplexity of a model on a text, by both protocols; or its scores on ``tasks`` or ``lambada``."""

    data: DataConfig = field(default_factory=DataConfig)
    context: int | None = None
    """Window in tokens; null: the model's context length."""
    stride: int | None = None
    """Tokens between windows of the token-weighted protocol; null: the window (no overlap)."""
    tokens: int | None = None
    """Score only the first tokens of the text; null: all."""
    batch_tokens: int = 8192
    """Tokens in one forward pass."""
    tasks: list[str] = field(default_factory=list)
    """In the place of perplexity: tasks of lm-evaluation-harness, or YAML files in its format (extra ``eval``)."""
    lambada: str | None = None
    """In the place of perplexity: passages whose last word is to be told: hub:EleutherAI/lambada_openai, a folder of
    jsonl or parquet files with a column ``text``, or a .txt file with a passage on each line."""
    limit: int | None = None
    """Only the first items of each task, or passages; null: all."""
    shots: int | None = None
    """Worked examples before each item of a task; null: as the task says."""

    def __post_init__(self) -> None:
        for name in ("context", "stride", "tokens", "batch_tokens", "limit"):
            _positive(name, getattr(self, name))
        _not_negative("shots", self.shots)
        if self.tasks and self.lambada is not None:
            raise UserError(f"lambada={self.lambada}: give lambada=... or tasks=[...], one of the two")
        if self.shots is not None and not self.tasks:
            raise UserError(f"shots={self.shots}: is for tasks; give tasks=[...]")
        if self.limit is not None and not self.tasks and self.lambada is None:
            raise UserError(f"limit={self.limit}: is for tasks and lambada; give tasks=[...] or lambada=...")


@dataclass
class BenchConfig(RunConfig):
    """``bench``: speed and memory of this package beside its rivals, and beside what this machine can do at best.

    Weights are random, of the sizes of ``model``. Ours and the rivals take turns in one process, or in pairs of fresh
    ones (``step``, ``startup``, ``memory``); figures are medians.
    """

    parts: Any = "all"
    """``all``, or some of ``product``, ``step``, ``fit``, ``generate``, ``tokens``, ``startup``, ``memory``."""
    size: str = "full"
    """``full``: the maps of ``model``, 2,048 tokens; ``small``: a GPT-2 of two layers 48 wide, for a look at the verb;
    its figures mean nothing."""
    presets: list[str] = field(default_factory=lambda: ["kngpt2", "kronypt_81m", "kronypt_80m", "outer"])
    """Of ``product``: presets of factors; ``outer``: outer products of half the parameters; ``speed``: shapes that
    ``plan speed=true`` may choose."""
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    """Of the student in the other parts."""
    precision: str = "auto"
    """``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it natively."""
    accelerator: str = "auto"
    """``cpu``, ``gpu`` or ``auto``."""
    threads: int | None = None
    """CPU threads; null: as torch has it."""
    tokens: int | None = None
    """Tokens of a product and of a training step; null: by ``size``."""
    repeats: int | None = None
    """Rounds; null: by ``size``."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text of ``tokens``."""

    PARTS = ("product", "step", "fit", "generate", "tokens", "startup", "memory")

    def __post_init__(self) -> None:
        for name in ("threads", "tokens", "repeats"):
            _positive(name, getattr(self, name))
        _choice("size", self.size, ("full", "small"))
        _choice("precision", self.precision, ("auto", "fp32", "bf16"))
        _choice("accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        for name in self.chosen:
            _choice("parts", name, ("all", *self.PARTS))
        if self.factors.depth is not None:
            raise UserError(f"factors.depth={self.factors.depth}: bench compares models of one depth; give null")

    @property
    def chosen(self) -> list[str]:
        """Parts to measure, in order."""
        named = list(self.parts) if isinstance(self.parts, list | tuple) else [self.parts]
        return list(self.PARTS) if "all" in named else [str(name) for name in named]


@dataclass
class ExportConfig(RunConfig):
    """``export``: a model, compressed or not, in a form that runs without this package, checked before it is kept.

    ``dense``, ``onnx`` and ``int8`` leave a folder ``model/``, with the tokenizer where there is one; ``merged`` leaves
    ``merged.safetensors``. An export that fails its check leaves neither, one line says why, and the exit code is 1.
    """

    format: str = "dense"
    """``dense``: a plain transformers folder, the factors multiplied out; ``merged``: its weights as one safetensors
    file; ``onnx``: ONNX, any batch and length, the factors as they are; ``int8``: the same, its weights as 8-bit
    integers by onnxruntime. ``onnx`` and ``int8`` need the extra ``onnx``."""
    dtype: str = "float32"
    """Type of the written weights: float32; float16 except of ``int8``; bfloat16 of ``dense`` and ``merged``."""
    tolerance: float | None = None
    """Most that a logit may change, as a share of the largest; null: 1e-4, or 1e-2 of an ONNX file in float16. ``int8``
    is measured by its perplexity instead."""
    int8_tolerance: float = 0.02
    """Most that ``int8`` may raise the perplexity, as a share of that of the ONNX file which it is made from."""
    tokens: int = 16384
    """Tokens of ``data`` on which that is measured."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text of ``int8``; other formats read none."""

    FORMATS = ("dense", "merged", "onnx", "int8")

    def __post_init__(self) -> None:
        _choice("format", self.format, self.FORMATS)
        _choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        types = {"onnx": ("float32", "float16"), "int8": ("float32",)}
        _choice("dtype", self.dtype, types.get(self.format, (self.dtype,)))
        for name in ("tolerance", "int8_tolerance", "tokens"):
            _positive(name, getattr(self, name))


@dataclass
class DoctorConfig(RunConfig):
    """``doctor``: checks the installation, the hub, W&B, devices, caches and disk, and says what to do.

    Exit code 0 where everything works that the verbs cannot do without (``model`` is not read), 1 otherwise. Without a
    network that is told, and is no fault.
    """

    network: bool = True
    """Ask the hub and W&B whether they answer."""
    timeout: float = 3.0
    """Seconds after which one of them counts as out of reach."""
    compile: bool = False
    """Try torch.compile, which takes up to a minute; false: look for a compiler."""
    free: float = 5.0
    """Gigabytes below which a disk is noted as full."""

    def __post_init__(self) -> None:
        _positive("timeout", self.timeout)
        _not_negative("free", self.free)


@dataclass
class ReportConfig(RunConfig):
    """``report``: one HTML page, without server or network, from any set of run folders."""

    runs: Any = "runs"
    """A run folder, a sweep, or a folder that holds such; or a list of these."""
    title: str = "Compressed models"
    baselines: dict[str, Any] = field(default_factory=dict)
    """Models measured elsewhere on the same text, {name: [unique parameters, perplexity]}, marked in the picture beside
    those of ``evaluate`` runs."""

    def __post_init__(self) -> None:
        if not self.folders or not all(isinstance(folder, str) for folder in self.folders):
            raise UserError(f"runs={self.runs}: must be a folder or a list of folders")
        for name, values in self.baselines.items():
            numbers = isinstance(values, list) and len(values) == 2 and all(type(v) in (int, float) for v in values)
            if not numbers or min(values) <= 0:
                raise UserError(f"baselines.{name}={values}: must be [unique parameters, perplexity]")

    @property
    def folders(self) -> list[Any]:
        """``runs`` as a list."""
        return list(self.runs) if isinstance(self.runs, list) else [self.runs]


@dataclass
class GenerateConfig(RunConfig):
    """``generate``: text from a model, shown as it comes; with ``compare`` another model's beside it.

    Both models draw with the same random numbers; ``result.json`` has the texts.
    """

    prompt: Any = None
    """What to go on from, or a list of such texts; ``''``: a new text."""
    prompts: str | None = None
    """A text file in the place of ``prompt``: a prompt on each line, blank lines left out."""
    compare: str | None = None
    """Second model, as ``model.path``: the teacher beside its student."""
    tokens: int = 64
    """Most new tokens of a text; it also ends at the model's end of text and at its last position."""
    samples: int = 1
    """Texts for each prompt, the n-th with the random numbers of ``seed`` + n - 1."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw among so many tokens, the likeliest ones; null: all."""
    top_p: float = 0.95
    """Draw among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text has already become less likely."""
    accelerator: str = "auto"
    """``cpu``, ``gpu`` or ``auto``."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            told = "null" if self.prompt is None else self.prompt
            raise UserError(f"prompt={told}: give prompt=... or prompts=<text file>, one of the two")
        if isinstance(self.prompt, dict) or (isinstance(self.prompt, list) and not self.prompt):
            raise UserError(f"prompt={self.prompt}: must be a text or a list of texts")
        for name in ("tokens", "samples", "top_k", "top_p", "repetition_penalty"):
            _positive(name, getattr(self, name))
        _not_negative("temperature", self.temperature)
        _share("top_p", self.top_p)
        _choice("accelerator", self.accelerator, ("auto", "cpu", "gpu"))


@dataclass
class DashboardConfig(RunConfig):
    """``dashboard``: a W&B workspace and a report for the ``train`` runs of a project, made by code."""

    project: str = "kncompress"
    """The W&B project: ``logger.project`` of its runs."""
    entity: str | None = None
    """User or team that it belongs to; null: the one of the key."""
    title: str = "Compression"
    save: str = "auto"
    """``auto``: to the server where W&B has a key and ``WANDB_MODE`` is not offline; ``always``; ``never``: only as
    files in the run folder."""

    def __post_init__(self) -> None:
        _choice("save", self.save, ("auto", "always", "never"))
        if not self.project:
            raise UserError("project=: give the name of a W&B project")


@dataclass
class GlueDataConfig:
    """The GLUE tasks, and how they become sequences."""

    source: str = "sample"
    """``hub``: ``nyu-mll/glue`` of the Hugging Face hub; a folder in the layout of the official download
    (``<folder>/CoLA/train.tsv``); ``sample``: the task ``polarity``, 200 sentences, a smoke run."""
    train_examples: int | None = None
    """Most training examples of a task, chosen by a hash of their texts; null: all."""
    max_length: int = 128
    """Most tokens of a sequence; longer ones lose the end of their longer text."""
    cache_dir: str | None = None
    """Fine-tuned teachers; null: ``$KNCOMPRESS_CACHE`` or ``~/.cache/kncompress``."""

    def __post_init__(self) -> None:
        _positive("data.train_examples", self.train_examples)
        if self.max_length < 8:
            raise UserError(f"data.max_length={self.max_length}: must be 8 or more")


@dataclass
class FineTuningConfig:
    """How long a model is fine-tuned, and on what."""

    epochs: int = 3
    """Most passes over the training set; the schedule ends with the last one."""
    batch_size: int = 32
    """Sequences of one optimiser step."""
    patience: int | None = None
    """Epochs without a better dev score after which training stops; null: never before the last."""
    dropout: bool = True
    """Keep the model's dropout while training."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 leaves it alone."""
    accelerator: str = "auto"
    """``cpu``, ``gpu`` or ``auto``."""
    precision: str = "auto"
    """``fp32``, ``bf16`` (autocast), or ``auto``: bf16 where the hardware multiplies it natively. Scores: fp32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            _positive(f"fine_tuning.{name}", getattr(self, name))
        _not_negative("fine_tuning.gradient_clip", self.gradient_clip)
        _choice("fine_tuning.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        _choice("fine_tuning.precision", self.precision, ("auto", "fp32", "bf16"))


@dataclass
class GlueConfig(RunConfig):
    """``glue``: fine-tune a teacher on GLUE tasks, then its students, plain and distilled from it (ILKD).

    ``model`` is the teacher; ``teacher=`` and ``teacher.KEY=`` mean the same. Every cell (task, seed, model) is a
    file in ``cells/`` that is not computed again when the run is resumed.
    """

    student: str | None = None
    """Folder or hub id of the student, with the teacher's tokenizer; null: the teacher with ``factors``, untrained."""
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    """Factors nearest to the teacher's weights; not read where ``student`` is given."""
    baselines: dict[str, str] = field(default_factory=dict)
    """Further students, {name: folder, hub id, preset of factors or YAML file}, e.g. ``baselines.half=layerdrop``."""
    tasks: Any = "all"
    """``all``: every task that the source has; or some of cola sst2 mrpc stsb qqp mnli qnli rte wnli ax polarity."""
    seeds: Any = 1
    """How many, counted from ``seed``; or a list of them. A seed sets the new head, the order of examples, dropout."""
    training: list[str] = field(default_factory=lambda: ["plain", "ilkd"])
    """How the student is fine-tuned: ``plain``, ``ilkd``, or both."""
    baseline_training: list[str] = field(default_factory=lambda: ["ilkd"])
    """How the baselines are."""
    data: GlueDataConfig = field(default_factory=GlueDataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Of ``ilkd``. ``cross_entropy`` is the loss on the labels (squared error of a score), ``logits`` compares the
    answers."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    predictions: bool | None = None
    """Write ``predictions/`` for the test sets in the format of a submission; null: where there are test sets. Those
    of QQP and QNLI, which the hub has, are larger than all dev sets together."""
    save_models: bool = False
    """Keep every fine-tuned student in ``models/``."""
    resume: str | None = None
    """Folder of an unfinished run to continue; ``auto``, ``never``: as in ``train``."""

    RECIPES = ("plain", "ilkd")

    def __post_init__(self) -> None:
        for key in ("training", "baseline_training"):
            for name in getattr(self, key):
                _choice(key, name, self.RECIPES)
        seeds = self.seeds if isinstance(self.seeds, list) else [self.seeds]
        if not seeds or any(type(seed) is not int for seed in seeds) or (self.seeds == seeds[0] and seeds[0] < 1):
            raise UserError(f"seeds={self.seeds}: must be a number from 1, or a list of seeds")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds={self.seeds}: names a seed twice")

    @property
    def all_training(self) -> set[str]:
        """Recipes of the student and of the baselines, if any."""
        return set(self.training) | (set(self.baseline_training) if self.baselines else set())

    @property
    def seed_list(self) -> list[int]:
        """The seeds of the run."""
        if isinstance(self.seeds, list):
            return list(self.seeds)
        return [self.seed + number for number in range(self.seeds)]
