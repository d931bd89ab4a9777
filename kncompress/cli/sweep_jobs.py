"""Sweeps (``-m``): which jobs there are, and whether every one of them is valid before the first starts."""

import importlib
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kncompress.cli.compose import check_homes, compose, typed
from kncompress.cli.verbs import Verb
from kncompress.config import RunConfig
from kncompress.errors import UserError
from kncompress.hub import check_model

_BASIC = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"


class SweepErrors(UserError):
    """Several jobs are wrong; ``lines`` has one line for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


def expand(hydra: Hydra, composed: DictConfig, overrides: list[str]) -> list[list[str]] | None:
    """The overrides of each job, by Hydra's own sweeper; None for a sweeper that chooses as it goes.

    Raises UserError where a key has no values, or some that this sweeper cannot count up.
    """
    if composed.hydra.sweeper._target_ != _BASIC:
        return None
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    task = [override for override in overrides if not override.lstrip("+~").startswith("hydra")]
    parsed = parser.parse_overrides(task)
    swept = ", ".join((override.input_line or "").lstrip("+") for override in parsed if override.is_sweep_override())
    try:
        jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:  # interval(...)
        raise UserError(f"{swept}: {error}; give values, or hydra/sweeper=pareto") from None
    if not jobs:
        raise UserError(f"{swept}: a key has no values; a range goes from its start up to its stop, range(1,5)")
    return jobs


def validated(
    hydra: Hydra, verb: Verb, config_name: str, jobs: list[list[str]], common: list[str], checks: bool = True
) -> tuple[list[RunConfig], list[DictConfig]]:
    """Compose and check every job: schema first, then, with ``checks``, the verb's own ``check``.

    Raises UserError: SweepErrors with one line for each wrong job where there are several jobs.
    """
    configs, nodes, wrong = [], [], {}
    for number, overrides in enumerate(jobs):
        try:
            node = compose(hydra, config_name, common + overrides)
            config = typed(verb.config, node, choices_of(node))
            check_homes(config, verb.texts)
            configs.append(config)
            nodes.append(node)
        except UserError as error:
            wrong[number] = error
    if checks and not wrong:
        # A model that cannot be had is answered before the verb's module, which takes seconds to import.
        for number, config in enumerate(configs):
            try:
                check_model(config.model.path, config.model.gguf_file)
            except UserError as error:
                wrong[number] = error
    if checks and not wrong:
        module = importlib.import_module(verb.module)
        for number, config in enumerate(configs if hasattr(module, "check") else []):
            try:
                module.check(config)
            except UserError as error:
                wrong[number] = error
    if wrong and len(jobs) == 1:
        raise next(iter(wrong.values()))
    if wrong:
        raise SweepErrors([f"job {number}: {error}" for number, error in wrong.items()])
    return configs, nodes


def choices_of(node: DictConfig) -> dict[str, object]:
    """``{group: preset}`` that Hydra chose."""
    choices = OmegaConf.to_container(node.hydra.runtime.choices)
    assert isinstance(choices, dict)
    return {str(group): option for group, option in choices.items() if not str(group).startswith("hydra/")}
