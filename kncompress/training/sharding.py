"""Models in shards over processes (FSDP2), and back: whole on one process, to be saved.

A parameter becomes a ``DTensor``, of which each process keeps a piece; its name stays. A layer is gathered for its
forward and backward pass and let go again. What belongs to no layer (embedding, head, last norm) is one group, in which
a weight that embedding and head share is one parameter.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from kncompress.anatomy.sites import anatomy_of


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` are in pieces."""
    return isinstance(model, FSDPModule)


def shard_(model: Any, mesh: DeviceMesh, trained: bool) -> None:
    """Cut ``model`` into shards over ``mesh`` (one dimension), in place: each layer, then the rest.

    Args:
        model: transformers model of a family with an anatomy, whole and equal in every process.
        trained: a backward pass follows the forward pass, so that what belongs to no layer stays gathered in between;
            of a frozen model it does not.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard takes no other

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter.shape, mesh.size()))

    options: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": place}
    for layer in model.base_model.get_submodule(anatomy_of(model).family.layers):
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=None if trained else True, **options)


def shard_dimension(shape: torch.Size, pieces: int) -> int:
    """The first dimension that ``pieces`` divide; else the first, whose last pieces are then shorter or empty.

    Factors of a few terms, (terms, m, n), cannot be cut between their terms.
    """
    return next((dim for dim, size in enumerate(shape) if size % pieces == 0), 0)


@torch.no_grad()
def gathered(state: Any, keep: bool) -> Any:
    """Nested dicts and lists with every tensor whole on the CPU; what other processes send is dropped unless ``keep``.

    All processes call it together. A parameter that stands in several places stays one tensor.
    """
    seen: dict[int, Any] = {}

    def whole(tensor: Tensor) -> Any:
        if id(tensor) not in seen:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            seen[id(tensor)] = full.cpu() if keep else None
        return seen[id(tensor)]

    return apply_to_collection(state, Tensor, whole)


def scattered(full: Tensor, like: Any) -> Tensor:
    """This process's piece of a whole tensor that every process has, cut as the parameter ``like`` is."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return distribute_tensor(full.detach().to(like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def scattered_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state of whole tensors, for ``optimizer.load_state_dict``: in pieces as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pieces = {
        number: {
            key: scattered(value, parameters[number]) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": pieces}


class Whole:
    """The model that a sharded one was, on the CPU and without weights, until it gets the trained ones.

    A sharded model cannot be made whole again; so this is made before.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
        self.model = copy.deepcopy(model, empty)

    def of(self, sharded: nn.Module, keep: bool) -> nn.Module:
        """The model with the weights of ``sharded``, where ``keep``, else still without weights.

        All processes call it together.
        """
        reshard(sharded)
        weights = dict(sharded.named_parameters())
        made: dict[int, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            full = gathered(weights[name], keep)
            made[id(parameter)] = nn.Parameter(full, parameter.requires_grad) if keep else parameter
        for module in self.model.modules():
            for name, own in _own_parameters(module):
                setattr(module, name, made[id(own)])
        return self.model


def reshard(model: nn.Module) -> None:
    """Let go of what is gathered; after a forward pass without a backward pass some is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from list(module.named_parameters(recurse=False, remove_duplicate=False))
