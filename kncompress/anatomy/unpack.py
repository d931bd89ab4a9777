"""Packed maps in numbers that bear rounding."""

from typing import Any

from kncompress.kron import PackedLinear


def unpack_(model: Any) -> int:
    """Replace packed maps by equal ones: outer products, or dense where those have fewer numbers; returns how many.

    The outputs of a packed map are combinations of a few of them, of norms 3 to 5 that mostly cancel: the error of a
    rounded pivot comes several times in every output that is made of it. An invertible matrix between two factors is
    free; that of the singular vectors leaves nothing that cancels.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PackedLinear)
    ]
    for parent, name, child in found:
        setattr(parent, name, child.unpacked().train(child.training))
    return len(found)
