"""Models whose weights lie in several places: on GPUs, in main memory, and on disk until they are needed.

accelerate puts them there, and its hooks bring the weights of a module before it runs and let them go after it. One
that is away is a parameter on the meta device.
"""

import ctypes
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kncompress.config import PlacedModelConfig
from kncompress.errors import UserError
from kncompress.runs.process import tell

_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h"""


def placement(config: PlacedModelConfig) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told of where the weights go; nothing where ``device_map`` is null.

    Raises:
        UserError: accelerate is not installed, a GPU is named that is not there, or the folder is a file.
    """
    if config.device_map is None:
        return {}
    if find_spec("accelerate") is None:
        raise UserError(
            f"model.device_map={config.device_map}: the package accelerate, which places weights, is not installed; "
            "install it by `pip install 'kncompress[offload]'`"
        )
    most = config.most_memory
    if most is not None:
        there = torch.cuda.device_count()
        absent = [device for device in most if isinstance(device, int) and device >= there]
        if absent:
            raise UserError(f"model.max_memory.{absent[0]}: no such GPU; there are {there} here")
        if not isinstance(config.max_memory, dict):
            from accelerate.utils import get_max_memory

            most = get_max_memory() | most  # a single size is of main memory alone
    folder = None if config.offload_folder is None else Path(config.offload_folder).expanduser()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"model.offload_folder={config.offload_folder}: is a file; give a folder")
    return {
        "device_map": config.device_map,
        "max_memory": most,
        "offload_folder": None if folder is None else str(folder),
    }


def return_freed_memory() -> None:
    """Has glibc hand each block from 1 MiB back to the system when it is freed.

    By default it keeps blocks of up to 32 MiB, and weights that come and go, each of another size, left three times as
    much resident as was in use. Elsewhere than on Linux with glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def tell_placement(model: Any, path: str) -> None:
    """Say how many bytes of weights have gone where, on standard error, where some of them are not in memory."""
    places = getattr(model, "hf_device_map", None)
    if places is None:
        return
    sizes = dict.fromkeys(map(str, dict.fromkeys(places.values())), 0)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, parameter in model.named_parameters():
        place = next(places[part] for part in _parents(name) if part in places)
        sizes[str(place)] += 0 if name in tied else parameter.nbytes
    names = {"cpu": "in memory", "disk": "read from disk when needed"}
    told = [f"{size / 1e9:.2f} GB {names.get(place, f'on GPU {place}')}" for place, size in sizes.items()]
    tell(f"model.path={path}: weights: {', '.join(told)}")


def _parents(name: str) -> Iterator[str]:
    """A parameter's name and those of the modules that it is in, from the inside."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def weight_of(model: Any, name: str, parameter: Tensor) -> Tensor:
    """The numbers of a parameter, read from disk or wherever it was put where they are away."""
    if not parameter.is_meta or not hasattr(model, "hf_device_map"):
        return parameter
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)
