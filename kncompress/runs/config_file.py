"""``config.yaml``: the resolved configuration of a run, and how two of them differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kncompress.runs.whole_file import write_text


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a plain nested dict as YAML that OmegaConf reads back equal (it quotes the string "1e-3")."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def read_config(path: Path) -> Any:
    """Return the nested dict in ``path``; empty where there is no such file."""
    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}


def config_differences(old: Any, new: Any, key: str = "") -> dict[str, list[Any]]:
    """Return ``{dotted key: [old, new]}`` of the values in which two nested dicts differ; absent is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, list[Any]] = {}
        for name in {**old, **new}:
            found |= config_differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return found
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    return {} if old == new else {key: [old, new]}
