"""Where the weights of a model lie while it runs: keys of the verbs that run one as it is."""

import re
from dataclasses import dataclass, field
from typing import Any

from kncompress.config.checks import check_choice, choice
from kncompress.config.run import ModelConfig, ModelRunConfig
from kncompress.errors import UserError

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of ``device_map`` in transformers' ``from_pretrained``."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B?", re.IGNORECASE)
_POWERS = " KMGT"


@dataclass
class PlacedModelConfig(ModelConfig):
    """A model that may be larger than memory: its weights lie on GPUs, in main memory, and for the rest on disk."""

    device_map: str | None = choice(None, *MAPS)
    """``auto``: weights fill the GPUs, then main memory, and the rest is read from the model's files whenever it is
    needed; also ``balanced``, ``balanced_low_0`` and ``sequential``, as in transformers, for several GPUs (extra
    ``offload``). null: all of it in memory."""
    max_memory: Any = None
    """Of ``device_map``: most main memory for weights, such as ``4GB``; or most of each device, ``{cpu: 4GB, 0: 8GB}``,
    where a GPU is called by its number and one that is not named stays empty. null: nine tenths of what is free. What
    a model computes with comes on top: the largest of its maps in float32, and the states and logits of the tokens at
    work."""
    offload_folder: str | None = None
    """Of ``device_map``: folder for weights that transformers has to change before they can be used, as of mixtures of
    experts; all others are read from the model's own files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_map is not None:
            check_choice("model.device_map", self.device_map, MAPS)
        for key in ("max_memory", "offload_folder"):
            if getattr(self, key) is not None and self.device_map is None:
                raise UserError(f"model.{key}={getattr(self, key)}: needs model.device_map=auto")
        if self.device_map is not None and self.gguf_file is not None:
            raise UserError(
                f"model.device_map={self.device_map}: a GGUF file is read whole; take a folder of safetensors, which "
                "compress and export format=dense write"
            )
        _ = self.most_memory

    @property
    def most_memory(self) -> dict[int | str, int] | None:
        """``max_memory`` as ``{"cpu" or number of a GPU: bytes}``; None where it is left open.

        Raises:
            UserError: no size, or no such kind of device.
        """
        if self.max_memory is None:
            return None
        if not isinstance(self.max_memory, dict):
            return {"cpu": _bytes("model.max_memory", self.max_memory)}
        sizes: dict[int | str, int] = {}
        for device, size in self.max_memory.items():
            name = str(device)
            if name != "cpu" and not name.isdecimal():
                raise UserError(f"model.max_memory: {device}: not cpu or the number of a GPU")
            sizes[int(name) if name.isdecimal() else name] = _bytes(f"model.max_memory.{device}", size)
        return sizes


def _bytes(key: str, size: Any) -> int:
    """Bytes of a size as 4GB, 4GiB or a number of bytes."""
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or isinstance(size, bool):
        raise UserError(f"{key}={size}: must be a size, such as 4GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS.index(match[2].upper() or " "))


@dataclass
class PlacedRunConfig(ModelRunConfig):
    """Keys of every verb that runs a model as it is."""

    model: PlacedModelConfig = field(default_factory=lambda: PlacedModelConfig(path="asset:mini"))
