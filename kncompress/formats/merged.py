"""The weights of a compressed model, multiplied out, as one file."""

import json
from pathlib import Path
from typing import Any

import torch

from kncompress.formats.pretrained import to_dense
from kncompress.runs.whole_file import give_usual_mode


def merged_weights(model: Any, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict of the plain dense model, and {name: the name that it shares its weight with}.

    Weights that are shared appear once, as in transformers' own files.
    """
    kept: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in to_dense(model).state_dict().items():
        place = tensor.data_ptr()
        if place in names:
            tied[name] = names[place]
            continue
        names[place] = name
        kept[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: tensor.contiguous() for name, tensor in kept.items()}, tied


def write_merged(model: Any, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write these weights to a safetensors file, whose metadata has ``tied`` as JSON."""
    from safetensors.torch import save_file

    weights, tied = merged_weights(model, dtype)
    save_file(weights, file, metadata={"format": "pt", "tied": json.dumps(tied)})
    give_usual_mode(file)


def read_merged_(dense: Any, file: Path) -> None:
    """Have a model of the plain class take the weights of such a file, in place and in their type.

    Raises:
        RuntimeError: the file lacks a weight, or has one that the class has not.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(file, framework="pt") as opened:
        tied = json.loads(opened.metadata()["tied"])
    weights = load_file(file)
    dense.load_state_dict(weights | {name: weights[other] for name, other in tied.items()}, assign=True)
