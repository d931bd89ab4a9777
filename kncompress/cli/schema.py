"""Reading the config dataclasses: their keys, types and docstrings, and which key of a config is unknown."""

import ast
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from kncompress.cli.spelling import nearest
from kncompress.config.checks import choices_of
from kncompress.errors import UserError


@dataclass(frozen=True)
class Key:
    """One dotted key of a config dataclass."""

    path: str
    type: str
    default: str | None
    doc: str
    choices: tuple[str, ...]
    """The values that it may have; none where they are not known one by one."""


def sections(config: type) -> dict[str, type | None]:
    """``{field: dataclass}`` of the fields that hold dataclasses, ``{field: None}`` of the others."""
    hints = typing.get_type_hints(config)
    found: dict[str, type | None] = {}
    for item in fields(config):
        hint = hints[item.name]
        held = [kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)]
        found[item.name] = typing.cast(type, held[0]) if held else None
    return found


def keys(config: type, prefix: str = "") -> Iterator[Key]:
    """Every leaf key of ``config`` and its sections, depth first, in the order of the source."""
    written = _written(config)
    by_name = {item.name: item for item in fields(config)}
    for name, section in sections(config).items():
        path = f"{prefix}{name}"
        if section is not None:
            yield from keys(section, f"{path}.")
            continue
        kind, doc = written[name]
        item = by_name[name]
        if item.default is not MISSING:
            default = item.default
        else:
            default = item.default_factory() if item.default_factory is not MISSING else None
        yield Key(path, kind, "null" if default is None else str(default), doc, choices_of(item))


@cache
def _written(config: type) -> dict[str, tuple[str, str]]:
    """``{field: (annotation, docstring)}`` as written in the source, those of base classes included."""
    found: dict[str, tuple[str, str]] = {}
    for owner in reversed(config.__mro__):
        if not is_dataclass(owner):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
        for index, node in enumerate(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                kind = ast.unparse(node.annotation).replace("None", "null")
                follower = body[index + 1] if index + 1 < len(body) else None
                found[node.target.id] = (kind, _text(follower))
    return found


def _text(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def unknown_keys(config: type, values: dict[Any, Any], prefix: str = "") -> list[str]:
    """Dotted paths in ``values`` that ``config`` has not. Raises UserError where a section holds a value."""
    found = []
    known = sections(config)
    for name, value in values.items():
        path = f"{prefix}{name}"
        section = known.get(name)
        if name not in known:
            found.append(path)
        elif section is not None and isinstance(value, dict):
            found += unknown_keys(section, value, f"{path}.")
        elif section is not None and value is not None:
            raise UserError(f"{path}={value}: a group of keys, not a value; keys: {', '.join(sections(section))}")
    return found


def with_lists(config: type, values: dict[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """``values`` with each lone text where ``config`` has a list of texts as a list of that one.

    Raises UserError for a lone value where there is a list of something else, and for a list, a group of keys or
    nothing where there is to be a text or a number.
    """
    found = dict(values)
    hints, known = typing.get_type_hints(config), sections(config)
    for name, value in values.items():
        section = known[name]
        if section is not None and isinstance(value, dict):
            found[name] = with_lists(section, value, f"{prefix}{name}.")
        elif typing.get_origin(hints[name]) is list and isinstance(value, str | int | float):
            if isinstance(value, str) and "${" in value:
                continue
            if typing.get_args(hints[name]) != (str,):
                raise UserError(f"{prefix}{name}={value}: a list; {prefix}{name}=[{value}]")
            found[name] = [value]
        elif _holds_text_or_number(hints[name]) and isinstance(value, list | dict):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                if isinstance(inner, list | dict) or inner is None:  # OmegaConf lets them through
                    place = f"{prefix}{name}.{key}" if isinstance(value, dict) else f"{prefix}{name}[{key}]"
                    raise UserError(f"{place}={'null' if inner is None else inner}: must be a text or a number")
    return found


def _holds_text_or_number(hint: Any) -> bool:
    """Whether a type is a list or a dict of texts or numbers, or null."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) in (list, dict)]
    return bool(kinds) and typing.get_args(kinds[0])[-1] in (str, int, float)


def nearest_key(config: type, path: str) -> str:
    """``nearest: trainer.steps`` or the keys that are valid at the level where ``path`` goes wrong."""
    level, prefix = config, ""
    parts = path.split(".")
    for part in parts:
        known = sections(level)
        if part in known:
            inner = known[part]
            if inner is None:
                break
            level, prefix = inner, f"{prefix}{part}."
            continue
        near = nearest(part, known)
        if near:
            return f"nearest: {prefix}{near}"
        every = [key.path for key in keys(config)]
        same = [key for key in every if key.rpartition(".")[2] == parts[-1]]
        near = " or ".join(same[:3]) or nearest(path, every)
        if near:
            return f"nearest: {near}"
        break
    return f"keys of {prefix.rstrip('.') or 'the config'}: {', '.join(sections(level))}"
