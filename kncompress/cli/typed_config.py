"""The typed config that a verb gets, from what Hydra has composed.

``typed`` merges the plain container into the dataclass schema, which finds every key and type that Hydra lets pass.
All that a user can get wrong becomes one UserError of one line.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import safe_load

from kncompress.cli.plan_memory import recalled
from kncompress.cli.presets import preset_file
from kncompress.cli.schema import nearest_key, unknown_keys, with_lists
from kncompress.config import RunConfig
from kncompress.errors import UserError
from kncompress.runs.config_file import texts
from kncompress.terminal import first_line

C = TypeVar("C", bound=RunConfig)


def typed(config: type[C], composed: DictConfig, choices: dict[str, Any] | None = None) -> C:
    """The dataclass instance that ``composed`` describes; ``choices`` (group: preset) tells a key's file.

    Raises UserError for unknown keys, wrong types, unresolved ``${...}`` and what the dataclasses refuse.
    """
    plain = {key: value for key, value in _container(composed).items() if key != "hydra"}
    plain = recalled(config, plain, composed)
    for key in unknown_keys(config, plain):
        raise UserError(f"{key}: unknown key{_origin(key, choices or {})}; {nearest_key(config, key)}")
    plain = with_lists(config, plain)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config), plain)
        _check_lookups(cast(DictConfig, merged))
        return cast(C, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UserError(f"{_pair(key, plain)}: {reason(error)}{_origin(key, choices or {})}") from None


def check_homes(config: RunConfig, prose: tuple[str, ...]) -> None:
    """Raises UserError for a value, except of the keys ``prose``, that begins with ``~`` and a user who is unknown."""
    for key, text in texts(asdict(config)):
        if key.split("[")[0] not in prose:
            home(text, key)


def home(text: str, key: str) -> Path:
    """The path ``text`` with the folder of its user. Raises UserError, which names ``key``, for an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{key}={text}: {Path(text).parts[0]} is no user of this machine; ./~... is a file") from None


def _container(node: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))


def _check_lookups(config: DictConfig) -> None:
    """Look up each ``${...}``, one leaf at a time, so that the message can name the key. Raises UserError."""
    for path, text in texts(_container(config)):
        if "${" in text:
            try:
                OmegaConf.select(config, path, throw_on_missing=True)
            except InterpolationResolutionError as error:
                raise UserError(f"{path}={text}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The first line of OmegaConf's or Hydra's message, without the exception's name."""
    line = first_line(error)
    _, found, inner = line.partition("raised while resolving interpolation: ")
    return inner.strip("\"'") if found else line


def _pair(key: str, plain: dict[str, Any]) -> str:
    value: Any = plain
    for part in key.replace("[", ".[").split("."):
        try:
            value = value[int(part[1:-1])] if part.startswith("[") else value[part]
        except (KeyError, IndexError, TypeError):
            return key
    return f"{key}={value}"


def _origin(key: str, choices: dict[str, Any]) -> str:
    """`` (in conf/experiment/x.yaml)`` where a preset's YAML holds ``key``, else nothing (command line)."""
    for group, chosen in choices.items():
        for option in chosen if isinstance(chosen, list) else [chosen]:
            file = preset_file(group, str(option))
            if file is None or group.startswith("hydra/"):
                continue
            text = file.read_text(encoding="utf-8")
            whole = key if text.startswith("# @package _global_") else key.removeprefix(f"{group}.")
            if whole == key and not text.startswith("# @package _global_"):
                continue
            values: Any = safe_load(text)
            for part in whole.split("[")[0].split("."):
                values = values.get(part) if isinstance(values, dict) and part in values else None
            if values is not None:
                return f" (in {Path('conf') / group / f'{option}.yaml'})"
    return ""
