"""``resume=``: which run is continued, and that its saved configuration is the one asked for."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from kncompress.cli.presets import existing_path, groups
from kncompress.cli.saved_paths import with_absolute_paths
from kncompress.cli.spelling import nearest
from kncompress.cli.typed_config import typed
from kncompress.cli.verbs import Verb
from kncompress.config import RunConfig
from kncompress.errors import UserError
from kncompress.runs import run_folder
from kncompress.runs.config_file import literal, read_config
from kncompress.runs.lock import in_use
from kncompress.runs.process import process_rank

OWN = ("run_dir", "resume", "fail_fast")
"""Keys that tell where and how a run or a sweep runs, not what it computes."""
PLACES = tuple(f"trainer.{key}" for key in ("accelerator", "strategy", "devices", "nodes", "micro_batch_tokens"))
"""Keys that a resumed run may have other values of: batches are those of all processes together."""


def not_own(words: Sequence[str]) -> list[str]:
    """``words`` without the keys of ``OWN``."""
    return [word for word in words if word.lstrip("+").partition("=")[0] not in OWN]


def register_saved(
    verb: Verb, folder_text: str, overrides: list[str], composed: DictConfig, whole: bool = False
) -> tuple[Path, str]:
    """Make the saved config of a run a primary config of Hydra; return the folder and the config's name.

    Args:
        overrides: the command's.
        composed: what they make.
        whole: ``find_run`` has found the folder by all of ``composed``, whose ``PLACES`` are taken.

    Raises UserError where the folder holds no run of this verb or an override differs from the saved value, unless it
    is among ``PLACES``.
    """
    folder = unfinished_run(verb, folder_text)
    saved = _saved(verb, folder)
    given, touched = plain(verb, composed), list(PLACES) if whole else _touched(overrides, composed)
    _refuse(folder_text, _differences(saved, given, touched))
    for path in set(touched) & set(PLACES) & set(_leaves_of(saved)):
        saved["trainer"][path.removeprefix("trainer.")] = _at(given, path)
    name = f"resumed_{verb.name}"
    node = literal(saved) | {"run_dir": literal(str(folder)), "resume": literal(str(folder))}
    ConfigStore.instance().store(name=name, node=node, provider="resume")
    return folder, name


def unfinished_run(verb: Verb, text: str) -> Path:
    """The folder that ``resume=`` names. Raises UserError where it holds no unfinished run of ``verb``."""
    folder = existing_path(text)
    if folder is None or not folder.is_dir():
        parent = Path(text).expanduser().parent
        siblings = [str(parent / f.name) for f in parent.iterdir() if f.is_dir()] if parent.is_dir() else []
        near = nearest(text, siblings)
        raise UserError(f"resume={text}: no such run folder{f'; nearest: {near}' if near else ''}")
    run_folder.unfinished_run(folder, verb.name)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={text}: not a run folder (no config.yaml in it)")
    if process_rank() == 0 and in_use(folder):  # the others of a distributed run find the first at work
        raise UserError(f"resume={text}: another process is at work in it; wait or name another folder")
    return folder


def plain(verb: Verb, composed: DictConfig) -> dict[str, Any]:
    """``composed`` checked against the verb's schema, with every default, as a nested dict."""
    return _plain_of(typed(verb.config, composed))


def find_run(verb: Verb, config: RunConfig, name: str) -> Path | None:
    """``resume=auto``: the folder of the run that ``config`` describes, or None for a new run.

    With ``run_dir`` the run in that folder; without it the newest unfinished one among ``runs/<name>-*``.

    Raises:
        UserError: the run in ``run_dir`` is finished, or has another configuration: names the keys that differ.
    """
    given = _plain_of(config)
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser().absolute()
        if not (folder / "run.json").is_file():
            if run_folder.killed_at_the_start(folder, verb.name):
                run_folder.discard(folder, made=False)
            return None
        unfinished_run(verb, str(folder))
        _refuse(str(folder), _differences(_saved(verb, folder), given))
        return folder
    for folder in sorted(Path("runs").absolute().glob(f"{name}-*"), reverse=True):
        with contextlib.suppress(UserError):
            if not _differences(_saved(verb, unfinished_run(verb, str(folder))), given):
                return folder
    return None


def stopped_run(verb: Verb, config: RunConfig) -> Path | None:
    """The folder ``run_dir`` where the same command was stopped there before its end; None: it is not.

    Raises UserError where another configuration was, or another process is at work there.
    """
    if config.run_dir is None:
        return None
    folder = Path(config.run_dir).expanduser().absolute()
    if not run_folder.begun_before(folder, verb.name):
        return None
    if in_use(folder):
        raise UserError(f"run_dir={folder}: another process is at work in it; wait or name another folder")
    _refuse(str(folder), _differences(_saved(verb, folder, "run_dir"), _plain_of(config)))
    return folder


def differences_from_saved(verb: Verb, folder: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """``{key: (saved, given)}`` of all keys that keep ``config`` from going on with the run in ``folder``."""
    return _differences(_saved(verb, folder), _plain_of(config))


def _saved(verb: Verb, folder: Path, key: str = "resume") -> dict[str, Any]:
    subject = f"{key}={folder}"
    values = read_config(folder / "config.yaml", subject)
    try:
        return plain(verb, cast(DictConfig, OmegaConf.create(literal(values))))
    except UserError as error:
        raise UserError(f"{subject}: config.yaml: {error}") from None


def _plain_of(config: RunConfig) -> dict[str, Any]:
    return asdict(with_absolute_paths(config))


def _touched(overrides: list[str], composed: DictConfig) -> list[str]:
    """Paths of all values that these overrides set."""
    names = [override.lstrip("+").partition("=")[0] for override in overrides]
    names = [name for name in names if name not in OWN and not name.startswith("hydra")]
    touched = []
    for name in names:
        if name == "experiment":
            touched += [path for path in _leaves(composed) if not path.startswith("hydra.")]
        elif name in groups():
            touched += [path for path in _leaves(composed) if path.startswith(f"{name}.")]
        else:
            touched.append(name)
    return touched


def _differences(
    saved: dict[str, Any], given: dict[str, Any], paths: Sequence[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """``{key: (saved, given)}`` of those of ``paths`` (None: all keys) that may not differ and do."""
    asked = dict.fromkeys([*_leaves_of(saved), *_leaves_of(given)] if paths is None else paths)
    pairs = {path: (_at(saved, path), _at(given, path)) for path in asked if path not in (*OWN, *PLACES)}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def _refuse(folder: str, differences: dict[str, tuple[Any, Any]]) -> None:
    if differences:
        given = ", ".join(f"{path}={new}" for path, (_, new) in differences.items())
        saved = ", ".join(f"{path}={old}" for path, (old, _) in differences.items())
        raise UserError(f"{given}: the run in {folder} has {saved}; leave it out, or start a new run")


def _leaves(node: DictConfig) -> list[str]:
    return _leaves_of(OmegaConf.to_container(node, resolve=False))


def _leaves_of(value: Any, path: str = "") -> list[str]:
    """Paths of all values inside nested dicts."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves_of(inner, f"{path}.{key}" if path else key)]
    return [path]


def _at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
