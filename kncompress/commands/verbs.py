"""What a verb is: one row of the table in ``__main__``."""

from dataclasses import dataclass

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
