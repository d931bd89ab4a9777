"""Presets (the YAML files of the groups under ``conf/``), and paths and hub ids given in a preset's place.

Hydra's groups take only the name of a YAML file. A folder, file or hub id is therefore registered as a preset
under a readable slug; ``References`` remembers what the user wrote for each slug.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from kncompress.cli.schema import nearest_key, unknown_keys
from kncompress.cli.spelling import choices_hint, nearest
from kncompress.config import FactorsConfig, ModelConfig
from kncompress.errors import UserError
from kncompress.reading import read_yaml
from kncompress.runs.config_file import literal
from kncompress.runs.process import tell
from kncompress.terminal import first_line

GROUPS_WITH_PATHS: dict[str, type] = {"model": ModelConfig, "factors": FactorsConfig}
_YAML = (".yaml", ".yml")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_RESERVED = {"null", "true", "false", "nan", "inf", "_self_"}


@cache
def config_folder() -> Path:
    """``conf/`` of the checkout that this package lies in, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    if (package.parent / "pyproject.toml").is_file() and (package.parent / "conf").is_dir():
        return package.parent / "conf"
    return package / "conf"


def groups() -> list[str]:
    """Names of the config groups, e.g. ``model``, ``factors``, ``experiment``; not those of Hydra itself."""
    return sorted(f.name for f in config_folder().iterdir() if f.is_dir() and f.name != "hydra")


def options(group: str) -> list[str]:
    """Names of a group's presets."""
    folder = config_folder() / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def preset_file(group: str, option: str) -> Path | None:
    """The YAML file of a preset, or None (a path or hub id in a preset's place)."""
    file = config_folder() / group / f"{option}.yaml"
    return file if file.is_file() else None


def read_factors(file: Path) -> FactorsConfig:
    """The factors that a YAML file holds. Raises UserError as ``read_preset``, and for wrong types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = read_preset("factors", file)
    try:
        return cast(FactorsConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(FactorsConfig), values)))
    except OmegaConfBaseException as error:
        raise UserError(f"factors={file}: {error.full_key}: {first_line(error)}") from None


def defaults_of(verb: str) -> dict[str, str]:
    """``{group: preset}`` of the verb's defaults list."""
    import yaml

    entries = yaml.safe_load((config_folder() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def existing_path(text: str) -> Path | None:
    """The absolute path that ``text`` names, where there is such a file or folder."""
    try:
        path = Path(text).expanduser()
        return path.absolute() if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null character, no such user
        return None


def looks_like_path(text: str) -> bool:
    """Whether the user can only have meant a path."""
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..") or text.endswith(_YAML)


@dataclass
class References:
    """Resolves values of ``model=`` and ``factors=``: presets that stand for paths and hub ids."""

    words: dict[str, str] = field(default_factory=dict)
    """``{"factors=my_plan": "factors=./my plan.yaml"}``: Hydra's override, and the user's word for it."""

    def option(self, group: str, text: str) -> str:
        """The name of the preset that ``text`` means; registers one where ``text`` is a path or hub id.

        Raises UserError where it is neither preset, nor path, nor (``model`` only) a plausible hub id.
        """
        names = options(group)
        if text in names:
            if existing_path(text) is not None:
                tell(f"{group}={text}: the preset; the folder or file of that name here is {group}=./{text}")
            return text
        path = existing_path(text)
        if path is not None:
            values = self._from_path(group, text, path)
        elif group == "model" and _plausible_model(text, names):
            values = {"path": text}
        else:
            siblings = _siblings(text) if looks_like_path(text) else []
            kinds = "preset, folder, file or hub id" if group == "model" else "preset or YAML file"
            near = nearest(text, siblings)
            hint = f"nearest: {near}" if near else choices_hint(text, names)
            raise UserError(f"{group}={text}: no such {kinds}; {hint}")
        return self._register(group, text, values)

    @staticmethod
    def _from_path(group: str, text: str, path: Path) -> dict[str, Any]:
        if path.suffix in _YAML and path.is_file():
            return read_preset(group, path)
        if group == "model":
            return {"path": str(path)}
        raise UserError(f"{group}={text}: not a YAML file")

    def _register(self, group: str, text: str, values: dict[str, Any]) -> str:
        from hydra.core.config_store import ConfigStore

        name = Path(text).name or Path(text).absolute().name
        stem = name.removesuffix(".yaml").removesuffix(".yml")
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or group
        if slug.lower() in _RESERVED or not slug[0].isalpha():
            slug = f"{group}-{slug}"
        word = f"{group}={text}"
        number, option = 1, slug
        while option in options(group) or self.words.get(f"{group}={option}", word) != word:
            number += 1
            option = f"{slug}-{number}"
        self.words[f"{group}={option}"] = word
        node = {key: literal(value) for key, value in values.items()}
        ConfigStore.instance().store(group=group, name=option, node=node, provider=text)
        return option


def read_preset(group: str, path: Path) -> dict[str, Any]:
    """A preset from outside ``conf/``: plain values for the group's schema, nothing that is looked up or run.

    Raises UserError where it cannot be read or has an unknown key, ``${...}``, an alias, or ``_target_``.
    """
    from omegaconf import OmegaConf

    where = f"{group}={path}"
    values = OmegaConf.to_container(read_yaml(path, where), resolve=False)
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold keys and values, not {type(values).__name__}")
    _refuse_code(where, values)
    schema = GROUPS_WITH_PATHS[group]
    for key in unknown_keys(schema, values):
        raise UserError(f"{where}: {key}: unknown key; {nearest_key(schema, key)}")
    return {str(key): value for key, value in values.items()}


def _refuse_code(where: str, value: Any, key: str = "") -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if str(name).startswith("_") or "${" in str(name):
                raise UserError(f"{where}: {key}{name}: such a key is not allowed in this file")
            _refuse_code(where, inner, f"{key}{name}.")
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(where, inner, key)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: {key.rstrip('.')}={value}: ${{...}} is not allowed in this file")


def _plausible_model(text: str, names: list[str]) -> bool:
    if text.startswith(("asset:", "package:")):
        return True
    if looks_like_path(text) or not _HUB_ID.fullmatch(text) or text.isdigit() or text.lower() in _RESERVED:
        return False
    if "/" in text:  # runs/x where runs/ exists is a folder that is missing, not a hub id
        return not Path(text).parent.is_dir()
    return nearest(text, names, cutoff=0.7) is None


def _siblings(text: str) -> list[str]:
    try:
        parent = Path(text).expanduser().parent
        entries = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
        return [f"{text[: len(text) - len(Path(text).name)]}{name}" for name in entries]
    except (OSError, RuntimeError):  # no such folder, no such user
        return []
