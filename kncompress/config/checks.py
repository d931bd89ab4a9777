"""Checks of single values; what they refuse is a UserError that names the key."""

from typing import Any

from kncompress.errors import UserError


def check_choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises UserError where ``value`` is none of ``allowed``. Shell completion reads the calls of this by its name."""
    if value not in allowed:
        raise UserError(f"{key}={value}: not one of {', '.join(allowed)}")


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
