"""Shell completion: the script, and the candidates that it asks for at each TAB. Imports nothing heavy.

Hydra's own completion (``-sc``) knows no verbs, and of the keys only those that some YAML holds: here most live in the
dataclasses. It also imports Hydra at each TAB. So candidates come from the verb table, the dataclasses and ``conf/``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kncompress.cli.overrides import FLAGS
from kncompress.cli.presets import GROUPS_WITH_PATHS, config_folder, defaults_of, groups, options
from kncompress.cli.schema import keys
from kncompress.cli.verbs import Verb
from kncompress.errors import UserError

SHELLS = ("bash", "zsh")
_LAUNCHERS = "hydra/launcher"


def completion(words: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """What ``completion WORDS`` prints: the script of a shell, or for ``query`` the candidates of the last word.

    Raises:
        UserError: another shell, or none.
    """
    if words and words[0] == "query":
        found = candidates(words[1:-1], words[-1] if len(words) > 1 else "", verbs)
        marks = [name for name, on in (("files", found.files), ("open", found.open)) if on]
        return "\n".join([" ".join(marks), *found.words])
    shell = words[0] if words else "null"
    if list(words) != [shell] or shell not in SHELLS:
        raise UserError(f"completion {' '.join(words)}: name a shell: {', '.join(SHELLS)}")
    return Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8").rstrip("\n")


class Candidates:
    """``words`` that the present one may become, ``files`` too, and whether they stay ``open`` (no space follows)."""

    def __init__(self, words: Iterable[str] = (), start: str = "", files: bool = False) -> None:
        self.words = sorted({word for word in words if word.startswith(start)})
        self.files = files
        self.open = any(word[-1:] in ("=", ".") for word in self.words)


def candidates(before: Sequence[str], word: str, verbs: Mapping[str, Verb]) -> Candidates:
    """What ``word`` may become after the words ``before`` it (those behind the program's name)."""
    name = next((one for one in before if not one.startswith("-")), None)
    if name is None:
        return Candidates([*verbs, "completion", "--help", "--version"], word)
    if name == "completion":
        return Candidates(SHELLS, word)
    if name not in verbs:
        return Candidates()
    if word.startswith("-"):
        return Candidates(FLAGS, word)
    signs = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, text = word[len(signs) :].partition("=")
    verb = verbs[name]
    if not equals:
        return Candidates((signs + one for one in _keys(verb, key)), word)
    # In a list or a sweep the last of several values is being written.
    done = text[: max(text.rfind(","), text.rfind("[")) + 1]
    group, dot, rest = key.partition(".")
    values, files = _values(verb, f"{verb.aliases.get(group, group)}{dot}{rest}")
    return Candidates((f"{signs}{key}={done}{value}" for value in values), word, files)


def _groups(verb: Verb) -> list[str]:
    defaults = defaults_of(verb.name)
    return [group for group in groups() if group in defaults or group == "experiment"]


def _keys(verb: Verb, start: str) -> Iterable[str]:
    """``group=``, and one level of keys: ``trainer.`` where nothing is typed, ``trainer.steps=`` behind that dot."""
    yield from (f"{group}=" for group in [*_groups(verb), _LAUNCHERS])
    names = {own: alias for alias, own in verb.aliases.items()}
    yield from (f"{alias}=" for alias in verb.aliases)
    depth = start.count(".")
    for key in keys(verb.config):
        for path in (key.path, *(f"{names[own]}.{rest}" for own, _, rest in [key.path.partition(".")] if own in names)):
            parts = path.split(".")
            if len(parts) > depth:
                yield ".".join(parts[: depth + 1]) + ("." if len(parts) > depth + 1 else "=")


def _values(verb: Verb, path: str) -> tuple[list[str], bool]:
    """Values of a group or key, and whether it may be the name of a file."""
    if path == _LAUNCHERS:
        folder = config_folder() / "hydra" / "launcher"
        return sorted(file.stem for file in folder.glob("*.yaml")), False
    if path in _groups(verb):
        return options(path), path in GROUPS_WITH_PATHS
    found = next((key for key in keys(verb.config) if key.path == path), None)
    if found is None:
        return [], False
    values = list(found.choices)
    if found.type.startswith("bool"):
        values += ["true", "false"]
    if "null" in (found.default, *found.type.split(" | ")):
        values.append("null")
    files = found.type.startswith(("str", "Any", "list[str]", "dict")) and not found.choices
    return values, files
