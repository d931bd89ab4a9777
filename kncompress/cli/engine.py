"""Hydra behind one class: all that is taken from inside it, ``hydra._internal``, is named in this file.

Hydra's own ``run`` and launchers compose a job's configuration again from its words. Here a job starts from the
configuration that it was checked with, which is composed once.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kncompress.cli.overrides import quoted
from kncompress.cli.presets import config_folder
from kncompress.cli.spelling import choices_hint
from kncompress.cli.typed_config import reason
from kncompress.errors import CheckFailed, UserError
from kncompress.terminal import named_line

_OURS = ["hydra.job.chdir=false", "hydra/hydra_logging=none"]
_OWN_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"


class LostJob(CheckFailed):
    """A job's process ended before the job did, or was never there."""


class Engine:
    """A fresh Hydra that reads ``conf/``; ``name`` is the verb, which names its config, job and log file."""

    def __init__(self, name: str) -> None:
        version.setbase("1.3")
        GlobalHydra.instance().clear()
        self.name = name
        self._hydra = Hydra.create_main_hydra2(name, create_config_search_path(str(config_folder())))

    def compose(self, overrides: Sequence[str], name: str | None = None, *, sweep: bool = False) -> DictConfig:
        """The verb's config, or the one of another ``name``, with the node ``hydra`` in it. Raises UserError.

        ``sweep``: of a whole sweep, whose keys may have several values.
        """
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        with _one_line():
            return self._hydra.compose_config(
                name or self.name, [*_OURS, *overrides], mode, with_log_configuration=False, from_shell=False
            )

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Overrides by Hydra's grammar."""
        parser = OverridesParser.create(config_loader=self._hydra.config_loader)
        return list(parser.parse_overrides(list(overrides)))

    @staticmethod
    def lists_jobs(composed: DictConfig) -> bool:
        """Whether Hydra's own sweeper is chosen, which lists all jobs beforehand."""
        return bool(composed.hydra.sweeper._target_ == _OWN_SWEEPER)

    @staticmethod
    def jobs(parsed: list[Override]) -> list[list[str]]:
        """The overrides of each job: every combination of values. Raises ValueError for values without an end."""
        try:
            return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
        except HydraException as error:
            raise ValueError(str(error)) from None

    def run(self, task: TaskFunction, composed: DictConfig, folder: Path) -> Any:
        """What ``task`` returns for a job that is composed already and runs in ``folder``."""
        composed.hydra.mode = RunMode.RUN
        composed.hydra.run.dir = _literal(folder)
        callbacks = Callbacks(composed)
        callbacks.on_run_start(config=composed, config_name=self.name)
        context = HydraContext(self._hydra.config_loader, callbacks)
        done = run_job(task, composed, "hydra.run.dir", None, context)
        callbacks.on_run_end(config=composed, config_name=self.name, job_return=done)
        return done.return_value

    def sweep_node(self, folder: Path, own: Sequence[str], composed: DictConfig) -> DictConfig:
        """The config of the sweep in ``folder``, from that of one of its jobs: a preset may choose the launcher.

        ``own``: overrides of Hydra's own settings.
        """
        node = _in_sweep(composed, folder, "${hydra.job.num}")
        node.hydra.overrides.hydra = [*_OURS, *_sweep_words(folder), *own]
        return node

    def launch(
        self,
        task: TaskFunction,
        node: DictConfig,
        jobs: Mapping[int, Sequence[str]],
        composed: Mapping[int, DictConfig],
    ) -> None:
        """Start jobs by the launcher that ``node`` names, as many at once as it says; returns when all have ended.

        Args:
            task: is called with the config of each job.
            node: of ``sweep_node``.
            jobs: {number: overrides}.
            composed: {number: config} of those that are composed; a process of another launcher composes its own.

        Raises LostJob where a launcher of other processes could not start a job, or one was lost with its machine.
        """
        callbacks = Callbacks(node)
        folder = Path(node.hydra.sweep.dir)
        known = {tuple(jobs[n]): _in_sweep(config, folder, str(n)) for n, config in composed.items()}
        loader = _Composed(self._hydra.config_loader.get_search_path(), known)
        callbacks.on_multirun_start(config=node, config_name=self.name)
        context = HydraContext(loader, callbacks)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=node)
        numbers = list(jobs)
        size = node.hydra.sweeper.get("max_batch_size") or len(numbers)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            try:
                ended = launcher.launch([list(jobs[n]) for n in batch], initial_job_idx=batch[0])
            except Exception as error:  # jobs keep their own ones
                raise LostJob(f"{node.hydra.launcher._target_.rpartition('.')[2]}: {named_line(error)}") from error
            for returned in ended:
                _ = returned.return_value  # raises what a job of another process has raised
        callbacks.on_multirun_end(config=node, config_name=self.name)

    def multirun(self, task: TaskFunction, folder: Path, overrides: Sequence[str]) -> None:
        """A sweep in ``folder`` whose sweeper, of another package, chooses and starts its jobs itself."""
        self._hydra.multirun(self.name, task, [*_OURS, *_sweep_words(folder), *overrides])


class _Composed(ConfigLoaderImpl):
    """A loader for launchers: hands over the configs of jobs that are composed, which it takes to no other process."""

    def __init__(self, search_path: Any, known: dict[tuple[str, ...], DictConfig]) -> None:
        super().__init__(search_path)
        self.known = known

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        known = self.known.get(tuple(sweep_overrides))
        return super().load_sweep_config(master_config, sweep_overrides) if known is None else known

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"known": {}}


def _sweep_words(folder: Path) -> list[str]:
    return [f"hydra.sweep.dir={quoted(str(folder))}", "hydra.sweep.subdir=${hydra.job.num}", "hydra.mode=MULTIRUN"]


def _in_sweep(composed: DictConfig, folder: Path, subfolder: str) -> DictConfig:
    node = copy.deepcopy(composed)
    node.hydra.mode = RunMode.MULTIRUN
    node.hydra.sweep.dir = _literal(folder)
    node.hydra.sweep.subdir = subfolder
    return node


def _literal(folder: Path) -> str:
    """The folder with ``${`` escaped: its name is never an interpolation."""
    return str(folder).replace("${", "\\${")


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what Hydra raises about the user's words into UserError."""
    try:
        yield
    except OverrideParseException as error:
        raise UserError(f"{error.override}: not a valid override; {reason(error)}") from None
    except MissingConfigException as error:
        name = error.missing_cfg_file or "config"
        group, _, option = name.rpartition("/")
        hint = choices_hint(option, error.options or [])
        raise UserError(f"{group or 'config'}={option}: no such preset; {hint}") from None
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        words = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
        detail = reason(cause) if isinstance(cause, OmegaConfBaseException) else ""
        raise UserError(": ".join(part for part in (words, detail) if part)) from None
    except YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None
