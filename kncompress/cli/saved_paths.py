"""Paths in the configuration of a run: absolute, so that it can go on from any folder and is told by what it reads."""

import copy
import os
from pathlib import Path
from typing import Any, TypeVar

from kncompress.cli.presets import existing_path, looks_like_path
from kncompress.config import RunConfig

C = TypeVar("C", bound=RunConfig)
_PATHS = (
    "model.path",
    "model.tokenizer",
    "data.source",
    "data.validation",
    "data.test",
    "data.cache_dir",
    "calibration.moments",
    "student",
    "compare",
    "prompts",
    "lambada",
    "unseen",
    "objective.cache",
    "tasks",
    "run_dir",
)
_WRITTEN = ("data.cache_dir", "calibration.moments", "objective.cache", "run_dir")
"""Paths that need not exist yet; the others may be hub ids and the like, which stay."""
_WORDS = ("sample", "model", "hub", "all")
"""Values that are no paths, whatever lies in the folder."""


def with_absolute_paths(config: C) -> C:
    """A copy of ``config`` in which each path of a file or folder is absolute, ``..`` and ``~`` undone."""
    config = copy.deepcopy(config)
    for key in _PATHS:
        *sections, name = key.split(".")
        node: Any = config
        for section in sections:
            node = getattr(node, section, None)
        value = getattr(node, name, None)
        if value is not None:
            setattr(node, name, _absolute(value, written=key in _WRITTEN))
    return config


def _absolute(value: Any, written: bool) -> Any:
    if isinstance(value, list):
        return [_absolute(one, written) for one in value]
    if not isinstance(value, str) or value in _WORDS:
        return value
    if written or looks_like_path(value) or existing_path(value) is not None:
        return os.path.normpath(Path(value).expanduser().absolute())
    return value
