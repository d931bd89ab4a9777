"""``config.yaml``: the resolved configuration of a run, and how two of them differ."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.reading import read_yaml
from kncompress.runs.whole_file import write_text

_LOOKED_UP = re.compile(r"(?<!\\)(\\\\)*\$\{")
"""``${`` that OmegaConf would look up: behind no backslash, or behind pairs of them."""
_END = "..."
"""YAML's own mark of a document's end. The last line of what is written: a file that was cut lacks it."""


def to_yaml(config: Mapping[str, Any]) -> str:
    """A plain nested dict as YAML that OmegaConf reads back equal (it quotes the string "1e-3").

    A text with ``${...}`` is written ``\\${...}``: it is looked up no more.
    """
    from omegaconf import OmegaConf  # takes a tenth of a second, which --help need not wait

    return OmegaConf.to_yaml(OmegaConf.create(literal(dict(config))))


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write ``to_yaml`` of a plain nested dict, and YAML's mark of the end."""
    write_text(path, f"{to_yaml(config)}{_END}\n")


def read_config(path: Path, subject: str = "config.yaml", to_go_on: bool = True) -> Any:
    """Return the nested dict in ``path``; empty where there is no such file.

    Args:
        to_go_on: the values decide how a run goes on. Then the mark of the end must be there: a file that was cut at
            the end of a line is valid YAML, and its lost values would become defaults.

    Raises:
        UserError: begins with ``subject``; not valid, cut, or a value asks for more than stands there. A saved
        configuration is resolved. In a stranger's one ``${oc.env:...}`` would look up secrets of the environment and
        write them.
    """
    from omegaconf import OmegaConf

    if not path.is_file():
        return {}
    loaded = read_yaml(path, subject)
    values = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(values, dict):
        raise UserError(f"{subject}: {path.name} must hold keys and values, not {type(values).__name__}")
    for key, text in texts(values):
        if _LOOKED_UP.search(text):
            told = "nothing is looked up for a saved value, so it may not hold ${"
            raise UserError(f"{subject}: {path.name} has {key}={text}; {told}")
    if to_go_on and path.read_bytes().splitlines()[-1:] != [_END.encode()]:
        told = f"its last line is not {_END}, so it was cut, or an older version wrote it; add the line if it is whole"
        raise UserError(f"{subject}: {path.name}: {told}")
    return OmegaConf.to_container(loaded, resolve=True)  # takes the escapes away


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every string in nested dicts and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from texts(inner, f"{path}[{number}]")
    elif isinstance(value, str):
        yield path, value


def literal(value: Any) -> Any:
    """``value`` with ``${`` escaped in all its strings, as OmegaConf wants text that is not to be looked up."""
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def config_differences(old: Any, new: Any, key: str = "") -> dict[str, list[Any]]:
    """Return ``{dotted key: [old, new]}`` of the values in which two nested dicts differ; absent is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, list[Any]] = {}
        for name in {**old, **new}:
            found |= config_differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return found
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    return {} if old == new else {key: [old, new]}
