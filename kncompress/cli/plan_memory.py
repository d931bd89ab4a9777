"""The fit and the text that a plan was made for: the plan's file keeps them, and they are used unless something else
is given.

A plan that was made for one fit is worth little with another: one for calibrated factors, say, with nearest ones.
``plan`` writes both into its file, as ``made_for``. A verb that is given the file takes them from there; what the
command line or another preset says comes first.
"""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kncompress.cli.presets import defaults_of
from kncompress.config import DataConfig, FactoringConfig
from kncompress.errors import UserError

KEYS = ("start", "fit", "calibration", "data")
"""What may be remembered: keys and sections of the verbs that factor."""


def recalled(config: type, plain: dict[str, Any], composed: DictConfig) -> dict[str, Any]:
    """``plain`` with what the plan in its ``factors`` remembers, in the place of keys that it lacks.

    Args:
        config: of the verb; one that fits no factors remembers nothing.
        plain: what is said: presets and command line.
        composed: where that comes from, with Hydra's node in it where there is one.

    Raises:
        UserError: a key that a plan does not remember, or a section that is none.
    """
    factors = plain.get("factors")
    memory = factors.get("made_for") if isinstance(factors, dict) else None
    if not memory or not issubclass(config, FactoringConfig):
        return plain
    if not isinstance(memory, dict):
        raise UserError(f"factors.made_for={memory}: must hold keys and values")
    found = dict(plain)
    for key, value in memory.items():
        if key not in KEYS:
            raise UserError(f"factors.made_for.{key}: unknown key; a plan remembers {', '.join(KEYS)}")
        if (key == "start") == isinstance(value, dict):
            raise UserError(f"factors.made_for.{key}={value}: must be {'a value' if key == 'start' else 'keys'}")
        if key == "data":
            if not _text_is_said(plain, composed):
                found[key] = {**plain.get(key, {}), **value}
        elif key == "start":
            found.setdefault(key, value)
        else:
            found[key] = {**value, **(plain.get(key) or {})}
    return found


def _text_is_said(plain: dict[str, Any], composed: DictConfig) -> bool:
    """Whether the user chose a text: it differs from the default in the verb's own YAML."""
    if len(plain.get("data", {})) == len(fields(DataConfig)):  # of a run that is resumed
        return True
    hydra = composed.get("hydra") or (HydraConfig.get() if HydraConfig.initialized() else None)
    if hydra is None:
        return True
    words: Collection[str] = OmegaConf.to_container(hydra.overrides.task) or ()  # type: ignore[assignment]
    choices = hydra.runtime.choices
    if "experiment" in choices or any(word.lstrip("+~").startswith(("data.", "data=")) for word in words):
        return True
    try:
        return bool(choices.get("data") != defaults_of(str(hydra.job.config_name)).get("data"))
    except OSError:  # a config that is no verb's
        return True
