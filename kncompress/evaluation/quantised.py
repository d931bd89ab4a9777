"""Weights rounded to a few bits: what a model loses by it, and the bytes that it then takes.

Round to nearest, weights alone, a scale for each group of neighbours: the plainest quantisation there is, so that dense
and factored models are treated alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kncompress.anatomy.unpack import unpack_

SCALE_BYTES = 2
"""Of a group's scale, and of every number that is not rounded: float16."""
_BEARS_PACKING = 8
"""Bits at which packed maps lose a few percent, and the outer products would be more bytes."""


@torch.no_grad()
def quantise_(model: nn.Module, bits: int, group: int | None) -> int:
    """Rounds maps, factors and tables of ``model`` to integers of ``bits`` times a scale, in place; packed maps are
    unpacked before (``unpack_``), but for 8 bits.

    Vectors (biases, gains of norms) are not rounded. Tied weights are rounded and counted once.

    Args:
        model: any module.
        bits: 2 to 8.
        group: neighbours in a row that share a scale; None: whole rows. Numbers of a factor are one row a term.

    Returns:
        Bytes of all parameters: integers and scales, float16 for what is not rounded.
    """
    if bits < _BEARS_PACKING:
        unpack_(model)
    total = 0
    for parameter in model.parameters():
        if parameter.dim() < 2:
            total += SCALE_BYTES * parameter.numel()
            continue
        rounded, scales = _rounded(parameter.flatten(1), bits, group)
        parameter.copy_(rounded.view_as(parameter))
        total += -(-parameter.numel() * bits // 8) + SCALE_BYTES * scales
    return total


def _rounded(rows: Tensor, bits: int, group: int | None) -> tuple[Tensor, int]:
    """(M, N) rounded group by group, and the number of groups."""
    width = rows.shape[1]
    size = min(group or width, width)
    groups = F.pad(rows.float(), (0, -width % size)).view(-1, size)
    most = 2 ** (bits - 1) - 1
    # A group of zeros has any scale; float16 has no scale below its least number.
    scale = (groups.abs().amax(1) / most).half().float().clamp(min=torch.finfo(torch.float16).tiny)
    none = torch.zeros_like(scale, dtype=torch.int32)
    made = torch.fake_quantize_per_channel_affine(groups, scale, none, 0, -most, most)
    return made.view(len(rows), -1)[:, :width].to(rows.dtype), len(groups)
