"""The nearest valid word, for messages about a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that looks most like ``word``, or None where nothing comes near."""
    found = get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def choices_hint(word: str, choices: Iterable[str]) -> str:
    """``nearest: x; choices: x, y, z`` for the end of a message."""
    listed = sorted(choices)
    near = nearest(word, listed, cutoff=0.4)
    choice_list = "choices: " + (", ".join(listed) or "none")
    return f"nearest: {near}; {choice_list}" if near else choice_list
