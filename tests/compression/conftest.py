"""Tiny models of every kind, as fixtures."""

from tiny_models import ids, kind, model_of_kind, tiny, tiny_config  # noqa: F401
