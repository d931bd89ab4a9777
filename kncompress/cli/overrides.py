"""Words of the command line -> overrides in Hydra's grammar.

Every key is forced (``++key=value``), since the composed config holds only what differs from the defaults of
the dataclasses; a key that does not exist is found afterwards, against the schema. Values of ``model=`` and
``factors=`` become presets, and paths with characters that the grammar does not take are quoted.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kncompress.cli.presets import GROUPS_WITH_PATHS, References, existing_path, groups, looks_like_path, options
from kncompress.cli.spelling import choices_hint, nearest
from kncompress.errors import UserError
from kncompress.runs.config_file import literal

FLAGS = {"-m": "multirun", "--multirun": "multirun", "-h": "help", "--help": "help", "--show": "show"}
_HALF = re.compile(r"[\ud800-\udbff]")
"""Halves of characters; the others, ``\\udc80`` and so on, stand for bytes of a name that is not UTF-8."""
_CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)
_FUNCTION = re.compile(r"(glob|sort|shuffle|tag|extend_list)\(.*\)", re.DOTALL)
_LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "sweeps"),
    "ray": ("hydra-ray-launcher", "ray"),
    "ray_cluster": ("hydra-ray-launcher", "ray"),
    "slurm": ("hydra-submitit-launcher", "slurm"),
    "submitit_slurm": ("hydra-submitit-launcher", "slurm"),
    "submitit_local": ("hydra-submitit-launcher", "slurm"),
}
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_SET_BY_DISPATCHER = (*_FOLDERS, "hydra.sweep.subdir", "hydra.job.chdir")


@dataclass(frozen=True)
class Line:
    """A command line behind the verb: its flags, wherever they stood, and the rest."""

    words: list[str]
    multirun: bool = False
    help: bool = False
    show: bool = False


def split_flags(words: list[str]) -> Line:
    """Take the flags out of ``words``. Raises UserError for a flag that does not exist."""
    flags: set[str] = set()
    rest = []
    for word in words:
        if word in FLAGS:
            flags.add(FLAGS[word])
        elif word.startswith("-") and "=" in word:
            raise UserError(f"{word}: unknown option; overrides have no dashes: {word.lstrip('-')}")
        elif word.startswith("-"):
            raise UserError(f"{word}: unknown option; {choices_hint(word, FLAGS)}")
        else:
            rest.append(word)
    return Line(rest, **dict.fromkeys(flags, True))


def hydras_folders(words: list[str], multirun: bool) -> list[str]:
    """``words`` with Hydra's own names for the folder of a run, or of a sweep, as ``run_dir``.

    As with Hydra, the name of the other kind has no effect.
    """
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if key.lstrip("+") not in _FOLDERS:
            found.append(word)
        elif equals and key.lstrip("+") == _FOLDERS[multirun]:
            found.append(f"run_dir={value}")
    return found


def to_hydra(
    words: list[str],
    defaults: dict[str, str],
    references: References,
    multirun: bool,
    child: bool = False,
    texts: Sequence[str] = (),
) -> list[str]:
    """``words`` as overrides for Hydra; ``defaults`` is the verb's defaults list, ``child`` a process of DDP.

    In the values of the keys ``texts`` nothing is looked up.

    Raises UserError for a word that is no override, an unknown preset, and grammar that quoting cannot mend.
    """
    parse = _parser()
    translated = []
    for word in words:
        key, equals, text = word.partition("=")
        plain = key.lstrip("+")
        if "\0" in word or _HALF.search(word):  # from a sweep's file; a command line has none
            raise UserError(f"{word}: holds a null character or half of one")
        if key.startswith("~"):
            translated.append(word)
        elif not equals:
            raise UserError(f"{word}: not an override; write key=value")
        elif plain in _SET_BY_DISPATCHER:
            if not child:  # Lightning repeats hydra.run.dir to its children, who know their folder already
                raise UserError(
                    f"{word}: the folder of a run is given by run_dir=..., and each job has its number in it"
                )
        elif plain == "hydra" or plain.startswith(("hydra.", "hydra/")):
            _check_plugin(plain, text)
            translated.append(word)
        elif plain.partition("@")[0] in groups():
            sign = "" if plain in defaults else "+"
            translated.append(f"{sign}{plain}={_group_value(plain, text, references, multirun)}")
        else:
            text = literal(text) if plain in texts else text
            translated.append(f"++{plain}={_value(plain, text, multirun, parse)}")
        _check_grammar(word, translated[-1:], multirun, parse)
    return translated


def _check_plugin(key: str, text: str) -> None:
    """Raises UserError for a launcher whose plugin is not installed, and for Hydra's sweeper that cannot go on."""
    if key == "hydra/launcher" and text in _LAUNCHERS:
        package, extra = _LAUNCHERS[text]
        if not _installed(f"hydra_plugins.{package.replace('-', '_')}"):
            raise UserError(f"{key}={text}: needs {package}: pip install 'kncompress[{extra}]'")
    if key == "hydra/sweeper" and text == "optuna":
        raise UserError(f"{key}={text}: its study cannot be resumed; hydra/sweeper=pareto is our own, on Optuna too")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _group_value(group: str, text: str, references: References, multirun: bool) -> str:
    """The option, or list of options, that ``text`` names for ``group``."""
    if _FUNCTION.fullmatch(text):
        return text
    chosen = _CHOICE.fullmatch(text)
    listed = chosen.group(1) if chosen else text
    with_paths = group in GROUPS_WITH_PATHS
    parts = _joined_paths(_split(listed)) if multirun else [text if with_paths else listed]
    found = []
    for part in map(_unquoted, parts):
        if with_paths:
            if not multirun and existing_path(part) is None and "," in part:
                raise UserError(f"{group}={text}: several values need -m (a sweep)")
            found.append(references.option(group, part))
        else:
            found.append(_option(group, part, multirun))
    return ",".join(found)


def _option(group: str, text: str, multirun: bool) -> str:
    names = options(group)
    if text == "null" and "none" in names:
        return "none"
    for name in _split(text.strip("[]")) if text.startswith("[") else [text]:
        if name not in names:
            if "," in name and not multirun:
                raise UserError(f"{group}={text}: several values need -m (a sweep)")
            raise UserError(f"{group}={name}: no such preset; {choices_hint(name, names)}")
    return text


def _value(key: str, text: str, multirun: bool, parse: Callable[[str], Any]) -> str:
    """``text`` with quotes around each path that the grammar does not take or reads as something else."""
    parts = _joined_paths(_split(text)) if multirun else [text]
    return ",".join(_quoted_path(key, part, parse) for part in parts)


def _quoted_path(key: str, text: str, parse: Callable[[str], Any]) -> str:
    try:
        one_value = not parse(f"{key}={text}").is_sweep_override()
        valid = True
    except ValueError:
        one_value = valid = False
    if existing_path(text) is not None and (not one_value or "${" in text):
        return quoted(literal(text))
    if text.startswith("[") and text.endswith("]"):
        return "[" + ",".join(_quoted_path(key, part, parse) for part in _joined_paths(_split(text[1:-1]))) + "]"
    if not valid and (looks_like_path(text) or ("/" in text and text[0] not in "[{(")):
        return quoted(text)
    return text


def _check_grammar(word: str, translated: list[str], multirun: bool, parse: Callable[[str], Any]) -> None:
    for override in translated:
        try:
            several = parse(override).is_sweep_override()
        except ValueError as error:
            raise UserError(f"{word}: not a valid override: {error}; quote the value: key='...'") from None
        if several and not multirun:
            key, _, text = word.partition("=")
            raise UserError(f"{word}: several values need -m (a sweep); a list is {key}=[{text}]")


def _parser() -> Callable[[str], Any]:
    """Hydra's parser of one override; raises ValueError with one line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()

    def parse(override: str) -> Any:
        try:
            return parser.parse_override(override)
        except HydraException as error:
            raise ValueError(" ".join(str(error).split())) from None

    return parse


def quoted(text: str) -> str:
    """``text`` as a quoted string of Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and existing_path(text) is None:
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text


def _split(text: str) -> list[str]:
    """``text`` at its commas, those inside quotes and brackets left alone."""
    parts, depth, quote, start = [], 0, "", 0
    for index, char in enumerate(text):
        if quote:
            if char == quote and text[index - 1] != "\\":
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth <= 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _joined_paths(parts: list[str]) -> list[str]:
    """``parts`` with neighbours joined again where they are one existing path with commas in its name."""
    joined, index = [], 0
    while index < len(parts):
        longest = next(
            (end for end in range(len(parts), index + 1, -1) if existing_path(",".join(parts[index:end]).strip())),
            index + 1,
        )
        joined.append(",".join(parts[index:longest]).strip())
        index = longest
    return joined


def unknown_verb(word: str, verbs: list[str]) -> UserError:
    """The error for a first word that is no verb."""
    near = nearest(word, verbs, cutoff=0.4)
    return UserError(f"{word}: unknown verb; {f'nearest: {near}; ' if near else ''}verbs: {', '.join(verbs)}")
