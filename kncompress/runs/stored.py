"""The records in a run folder, read back: each field that is used has its type checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kncompress.reading import Amount, Count, Number, read_fields

RUN, RESULT = "run.json", "result.json"
GONE_ON_WITH = ("command", "started", "wall_seconds", "wandb_id", "resumes")
"""Fields of ``run.json`` that a resumed run takes over."""


@dataclass
class _Run:
    verb: str
    status: str
    command: list[str] = field(default_factory=list)
    started: str | None = None
    wall_seconds: Amount = 0.0
    wandb_id: str | None = None
    resumes: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    ended: str | None = None
    error: str | None = None
    git: dict[str, str | bool | None] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: Count | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)


@dataclass
class _Result:
    status: str
    verb: str = ""
    metrics: dict[str, Number | None] = field(default_factory=dict)
    model: str | None = None
    plan: str | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    error: str | None = None


def read_run(folder: Path, subject: str) -> dict[str, Any]:
    """``run.json``; empty where there is none. Raises UserError, which begins with ``subject``."""
    return read_fields(folder / RUN, _Run, subject) if (folder / RUN).is_file() else {}


def read_result(folder: Path, subject: str) -> dict[str, Any]:
    """``result.json``; empty where there is none. Raises UserError, which begins with ``subject``."""
    return read_fields(folder / RESULT, _Result, subject) if (folder / RESULT).is_file() else {}
