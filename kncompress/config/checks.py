"""Checks of single values; what they refuse is a UserError that names the key."""

from dataclasses import Field, field, fields
from typing import Any

from kncompress.errors import UserError

_CHOICES = "choices"


def choice(default: Any, *allowed: str) -> Any:
    """A field of a dataclass with one of ``allowed`` for a value, or a list of some of them."""
    metadata = {_CHOICES: allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choices_of(item: Field[Any]) -> tuple[str, ...]:
    """What a field made by ``choice`` allows; of others nothing."""
    return tuple(item.metadata.get(_CHOICES, ()))


def check_choices(config: Any, section: str = "") -> None:
    """Raises UserError where a field made by ``choice`` holds something else; ``section`` ends with a dot."""
    for item in fields(config):
        value, allowed = getattr(config, item.name), choices_of(item)
        for one in value if isinstance(value, list) else [value]:
            if allowed:
                check_choice(f"{section}{item.name}", one, allowed)


def check_choice(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises UserError where ``value`` is none of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key}={value}: not one of {', '.join(map(str, allowed))}")


def check_positive(key: str, value: float | None) -> None:
    """Raises UserError where a number is given that is not above 0."""
    if value is not None and value <= 0:
        raise UserError(f"{key}={value}: must be greater than 0")


def check_not_negative(key: str, value: float | None) -> None:
    """Raises UserError where a number is given that is below 0."""
    if value is not None and value < 0:
        raise UserError(f"{key}={value}: must be 0 or more")


def check_seed(key: str, value: int) -> None:
    """Raises UserError outside what every library takes as a seed."""
    if not 0 <= value < 2**32:
        raise UserError(f"{key}={value}: must lie between 0 and {2**32 - 1}")


def check_window(key: str, value: int | None) -> None:
    """Raises UserError for a window of one token, in which there is nothing to predict."""
    if value is not None and value < 2:
        raise UserError(f"{key}={value}: must be 2 or more")


def check_share(key: str, value: float) -> None:
    """Raises UserError outside 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"{key}={value}: must lie between 0 and 1")
