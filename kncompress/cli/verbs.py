"""What a verb is: one row of the table in ``__main__``."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kncompress.config import RunConfig

_LITERAL = re.compile(r"'.*'|\".*\"|\[.*\]", re.DOTALL)
"""A string in quotes, or a list, of Hydra's grammar."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    ``module`` is imported when the configuration is valid. It has ``run(config, run_dir) -> dict | None`` and may have
    ``check(config)``, a cheap validation that raises UserError before anything is written. What ``check`` returns,
    unless that is None, is the third argument of ``run``.
    """

    name: str
    config: type[RunConfig]
    module: str
    summary: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names of groups: {"teacher": "model"}."""
    texts: tuple[str, ...] = ()
    """Keys whose values are prose, with commas, quotes and brackets of its own."""

    @property
    def resumes(self) -> bool:
        """Whether a run of it goes on where it was stopped (``resume=``); another one is begun again."""
        return any(entry.name == "resume" for entry in fields(self.config))

    def check(self, config: RunConfig) -> Any:
        """What the module's ``check`` finds; None where there is none."""
        module = importlib.import_module(self.module)
        return module.check(config) if hasattr(module, "check") else None

    def run(self, config: RunConfig, run_dir: Path, found: Any) -> Any:
        """Run in ``run_dir``, with what ``check`` has found."""
        module = importlib.import_module(self.module)
        return module.run(config, run_dir, *(() if found is None else (found,)))

    def canonical(self, word: str) -> str:
        """A word of the command line with the group's own name: ``teacher.path=x`` is ``model.path=x``.

        Prose is put in quotes, unless it comes in quotes or is a list.
        """
        key, equals, value = word.partition("=")
        signs = key[: len(key) - len(key.lstrip("+~"))]
        if key[len(signs) :] in self.texts and value != "null" and not _LITERAL.fullmatch(value):
            from kncompress.cli.overrides import quoted

            value = quoted(value)
        first, dot, rest = key[len(signs) :].partition(".")
        return f"{signs}{self.aliases.get(first, first)}{dot}{rest}{equals}{value}"
