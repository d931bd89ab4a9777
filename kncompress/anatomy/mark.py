"""The mark of a compressed model in its ``config.json``: which map has which factors.

transformers keeps it under ``quantization_config``, where a loader of another weight format has its settings.
This module is imported while transformers itself is being imported, so at the top it may only use
``transformers.utils``.
"""

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "kronecker"


class KroneckerConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model: {map name: shape text}."""

    def __init__(self, maps: Mapping[str, str] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.maps = dict(maps or {})


def factored_maps(model: Any) -> dict[str, str]:
    """{map name: shape text} of a compressed model; empty for a dense one."""
    config = getattr(model.config, "quantization_config", None)
    return dict(config.maps) if isinstance(config, KroneckerConfig) else {}
