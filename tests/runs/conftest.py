"""A real but tiny training, as fixtures."""

from training.conftest import fit, linear_task  # noqa: F401
