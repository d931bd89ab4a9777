"""What every run has: a folder and a seed; and what most have: a model and a text."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choices, check_positive, check_seed, check_share, check_window, choice
from kncompress.errors import UserError


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
class OwnTextConfig:
    """``data.source=model``: documents drawn from the model's own distribution, and kept in the cache."""

    tokens: int = 32768
    """Tokens drawn, or a few more."""
    length: int = 512
    """Most tokens of a document."""
    temperature: float = 1.0
    """1: as the model thinks; lower: likelier words, less variety."""
    batch: int = 16
    """Documents drawn at once."""

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "temperature", "batch"):
            check_positive(f"data.own.{name}", getattr(self, name))


@dataclass
class DataConfig:
    """Text, and how it becomes token blocks."""

    source: Any = "sample"
    """``sample``; a file of text or of rows (jsonl, json, csv, tsv, parquet, arrow), perhaps packed (gz, bz2, xz), or a
    folder of such files, hidden ones left out; ``hub:ID``, ``hub:ID:CONFIGURATION`` for a data set of the Hugging Face
    hub with its own splits; ``model``: what the model itself writes (``compress``, ``plan``, ``train``); or a list of
    these."""
    own: OwnTextConfig = field(default_factory=OwnTextConfig)
    validation: Any = None
    """Source of the validation split; null: part of ``source``, split by document."""
    test: Any = None
    """Source of the test split; null: part of ``source``, split by document."""
    context: int | None = None
    """Tokens in a block; null: the model's own context length, at most 2,048."""
    text_format: str = choice("auto", "auto", "plain", "wikitext", "lines")
    """``plain``; ``wikitext``: headings split articles, ``@-@`` marks and spacing are undone; ``lines``: as published,
    rows joined by a blank line, no end-of-text added; ``auto``: wikitext for ``*.tokens``, ``*.raw`` and data sets of
    that name, else plain. A row of a data set is a document, except of WikiText, whose rows are lines."""
    column: str | None = None
    """Column of rows that the text is in; null: ``text``."""
    split: str = choice("auto", "auto", "train", "validation", "test", "all")
    """``evaluate``: what is scored: ``train``, ``validation``, ``test``, ``all``; ``auto``: the test split where the
    source names one (the sample, a folder with a test file), the whole text otherwise."""
    fraction: float = 1.0
    """Share of the training documents that is used, chosen by a hash of their text and ``seed``."""
    seed: int = 0
    """Seeds the split by document, the choice of ``fraction`` and the order of the blocks."""
    cache_dir: str | None = None
    """Token caches; null: ``$KNCOMPRESS_CACHE`` or ``~/.cache/kncompress``."""

    def __post_init__(self) -> None:
        check_window("data.context", self.context)
        check_seed("data.seed", self.seed)
        check_positive("data.fraction", self.fraction)
        check_share("data.fraction", self.fraction)
        check_choices(self, "data.")


@dataclass
class RunConfig:
    """Keys that every verb has."""

    run_dir: str | None = None
    """Folder of this run; null: ``runs/<verb>-<experiment>-<time>``."""
    seed: int = 0
    fail_fast: bool = False
    """In a sweep (``-m``): start no further job once one has failed."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_choices(self)


@dataclass
class ModelRunConfig(RunConfig):
    """Keys of every verb that works on a model."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(path="asset:mini"))
