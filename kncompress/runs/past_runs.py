"""What finished and unfinished runs have left in their folders, read back for a report."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.reading import Amount, Count, read_fields, read_json, shown
from kncompress.runs.config_file import read_config
from kncompress.runs.metrics_file import complete_rows
from kncompress.runs.stored import read_result, read_run

_PLACES = ("hydra.", "hydra/", "run_dir=", "resume=")
COMPRESSION, SAMPLES = "compression.json", "samples.json"


@dataclass
class _Row:
    name: str
    shape: str = ""
    parameters: Count = 0
    dense_parameters: Count = 0
    multiply_adds: Count = 0
    dense_multiply_adds: Count = 0
    error: Amount | None = None
    weighted: Amount | None = None


@dataclass
class _Table:
    rows: list[_Row]


@dataclass
class Run:
    """One run folder."""

    name: str
    """Its path below the folder that all runs share."""
    verb: str
    status: str
    command: str
    record: dict[str, Any]
    """``run.json``."""
    metrics: dict[str, Any]
    """Of ``result.json``; what was not finite is None."""
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """``{metric: [(step, value)]}`` of ``metrics.csv``."""
    maps: list[dict[str, Any]] = field(default_factory=list)
    """Rows of ``compression.json``, one a factored map."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """Rows of ``samples.json``, one a prompt."""
    text: str = ""
    """What the perplexity was measured on."""
    differs: str = ""
    """Words of its command that not all runs share, keys by their last two parts: ``mlp.right=[1,2] mlp.terms=2``."""

    @property
    def label(self) -> str:
        """Name, and what tells it from the others."""
        return f"{self.name}: {self.differs}" if self.differs else self.name

    def by_tokens(self, metric: str) -> list[tuple[float, float]]:
        """A curve as (training tokens, value), as near as its steps allow; empty where the tokens were not logged."""
        seen = self.curves.get("train/tokens")
        if not seen:
            return []
        first, tokens = seen[-1]
        return [(tokens / (first + 1) * (step + 1), value) for step, value in self.curves.get(metric, [])]

    @property
    def point(self) -> tuple[float, float] | None:
        """(unique parameters, perplexity) of the model that the run made; None where either was not measured."""
        return _pair(self.metrics, "/student")

    @property
    def dense(self) -> tuple[float, float] | None:
        """The same of the dense model that it was made from."""
        return _pair(self.metrics, "/teacher")

    @property
    def measured(self) -> tuple[float, float] | None:
        """The same of a model that the run has only measured (``evaluate``)."""
        return _pair(self.metrics, "")


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Every run at or below ``paths`` but earlier reports, in the order given, those of one folder by name.

    Raises UserError where a path does not exist or holds no run.
    """
    folders: list[Path] = []
    for text in paths:
        top = Path(text).expanduser().absolute()
        if not top.is_dir():
            raise UserError(f"runs={text}: no such folder")
        found = sorted((file.parent for file in top.rglob("run.json")), key=_natural)
        if not found:
            raise UserError(f"runs={text}: no run in it (no run.json)")
        folders += [folder for folder in found if folder not in folders]
    shared = folders[0].parent if folders else Path()
    while not all(folder.is_relative_to(shared) for folder in folders):
        shared = shared.parent
    runs = [_read(folder, folder.relative_to(shared).as_posix()) for folder in folders]
    kept = [run for run in runs if run.verb != "report"]
    if not kept:
        raise UserError(f"runs={', '.join(paths)}: no run in it but earlier reports")
    words = [_chosen(run) for run in kept]
    told = [set(chosen) for chosen in words if chosen]  # a record may lack its command
    shared_words = told[0].intersection(*told[1:]) if told else set()
    for run, chosen in zip(kept, words, strict=True):
        run.differs = " ".join(_short(word) for word in chosen if word not in shared_words)
    return kept


def _chosen(run: Run) -> list[str]:
    """The overrides of a run's command, without those that only say where it ran."""
    return [word for word in run.record.get("command", [])[2:] if "=" in word and not word.startswith(_PLACES)]


def _short(word: str) -> str:
    key, _, value = word.lstrip("+").partition("=")
    return f"{'.'.join(key.split('.')[-2:])}={value}"


def _read(folder: Path, name: str) -> Run:
    subject = f"runs={folder}"
    record, result = read_run(folder, subject), read_result(folder, subject)
    words = record.get("command", [])
    command = f"python -m kncompress {shlex.join(words[1:])}" if words else ""
    return Run(
        name,
        record["verb"],
        result.get("status") or record["status"],
        command,
        record,
        result.get("metrics") or {},
        _curves(folder / "metrics.csv", subject),
        _maps(folder / COMPRESSION, subject),
        _samples(folder / SAMPLES, subject),
        _text(folder / "config.yaml", record["verb"], subject),
    )


def _text(file: Path, verb: str, subject: str) -> str:
    """Source, split, tokens and window of the text that the perplexity is of, as the configuration names them."""
    config = read_config(file, subject, to_go_on=False)
    for section in ("data", "trainer"):
        if not isinstance(config.get(section, {}), dict | None):
            raise UserError(f"{subject}: {file.name}: {section}={shown(config[section])}: a group of keys")
    data, trainer = config.get("data") or {}, config.get("trainer") or {}
    split = {"train": "test", "plan": "validation"}.get(verb) or data.get("split", "auto")
    source = data.get(split) or data.get("source")
    if source is None:
        return ""
    if split == "auto":
        split = "test" if source == "sample" else "auto (test where the source has one, else all)"
    tokens = config.get("validation_tokens" if verb == "plan" else "tokens") or trainer.get("test_tokens") or "all"
    window = config.get("context") or data.get("context") or "the model's"
    stride = f", stride: {config['stride']}" if config.get("stride") else ""
    return f"{source}, split: {split}, tokens: {tokens}, context: {window}{stride}"


def _maps(file: Path, subject: str) -> list[dict[str, Any]]:
    return read_fields(file, _Table, subject)["rows"] if file.is_file() else []


def _samples(file: Path, subject: str) -> list[dict[str, str]]:
    return read_json(file, list[dict[str, str]], subject) if file.is_file() else []


def _pair(metrics: dict[str, Any], model: str) -> tuple[float, float] | None:
    parameters, perplexity = metrics.get(f"parameters{model}"), metrics.get(f"perplexity{model}")
    return (float(parameters), float(perplexity)) if parameters and perplexity else None


def _curves(file: Path, subject: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    if file.is_file():
        for row in complete_rows(file, subject):
            step = int(row.pop("step"))
            for name, text in row.items():
                if text and math.isfinite(value := float(text)):
                    curves.setdefault(name, []).append((step, value))
    return curves


def _natural(folder: Path) -> list[tuple[int, str]]:
    """Job 10 of a sweep comes after job 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in folder.parts]
