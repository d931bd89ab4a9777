"""What a verb is: one row of the table in ``__main__``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kncompress.config import RunConfig


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    ``module`` is imported when the configuration is valid. It has ``run(config, run_dir) -> dict | None``
    and may have ``check(config)``, a cheap validation that raises UserError before anything is written.
    """

    name: str
    config: type[RunConfig]
    module: str
    summary: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names of groups: {"teacher": "model"}."""

    def canonical(self, word: str) -> str:
        """A word of the command line with the group's own name: ``teacher.path=x`` is ``model.path=x``."""
        key, equals, value = word.partition("=")
        signs = key[: len(key) - len(key.lstrip("+~"))]
        first, dot, rest = key[len(signs) :].partition(".")
        return f"{signs}{self.aliases.get(first, first)}{dot}{rest}{equals}{value}"
