"""Checks of single values; what they refuse is a UserError that names the key."""

from typing import Any

from kncompress.errors import UserError


def _choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: not one of {', '.join(allowed)}")


def _positive(key: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise UserError(f"{key}={value}: must be greater than 0")


def _not_negative(key: str, value: float | None) -> None:
    if value is not None and value < 0:
        raise UserError(f"{key}={value}: must be 0 or more")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{key}={value}: must lie between 0 and 1")
