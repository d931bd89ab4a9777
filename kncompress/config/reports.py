"""``report``, ``dashboard`` and ``doctor``: pages about runs, and about this installation."""

from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_not_negative, check_positive, choice
from kncompress.config.run import RunConfig
from kncompress.errors import UserError


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
        super().__post_init__()
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
class DashboardConfig(RunConfig):
    """``dashboard``: a W&B workspace and a report for the ``train`` runs of a project, made by code."""

    project: str = "kncompress"
    """The W&B project: ``logger.project`` of its runs."""
    entity: str | None = None
    """User or team that it belongs to; null: the one of the key."""
    title: str = "Compression"
    save: str = choice("auto", "auto", "always", "never")
    """``auto``: to the server where W&B has a key and ``WANDB_MODE`` is not offline; ``always``; ``never``: only as
    files in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.project:
            raise UserError("project=: give the name of a W&B project")


@dataclass
class DoctorConfig(RunConfig):
    """``doctor``: checks the installation, the hub, W&B, devices, caches and disk, and says what to do.

    Exit code 0 where everything works that the verbs cannot do without, 1 otherwise. Without a
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
        super().__post_init__()
        check_positive("timeout", self.timeout)
        check_not_negative("free", self.free)
