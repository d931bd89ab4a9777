"""Write the factors of one kind at one size: every map gets about the same share of its parameters.

Usage: python experiments/shapes/shapes.py KIND PARAMETERS > factors.yaml
The model is the mini teacher. Kinds: ``sum_2x2``, ``sum_2x4``, ``sum_4x4``: Kronecker sums with right factors of that
size, 1x4 in the embedding; ``low_rank``; ``packed``: low rank, packed but for the embedding.
"""

import sys
from collections.abc import Callable

from kncompress.kron import KroneckerShape, Shape
from kncompress.planner.candidates import outer, packed, packed_rank

PARAMETERS = 6_967_296
"""Unique ones of the mini teacher."""
BLOCK = {"attn.q": (256, 256), "attn.k": (256, 256), "attn.v": (256, 256), "attn.o": (256, 256)}
BLOCK |= {"mlp.up": (1024, 256), "mlp.down": (256, 1024)}
SIZES = {"embedding": (8192, 256)} | {f"layers.{i}.{name}": size for i in range(6) for name, size in BLOCK.items()}

Maker = Callable[[int, int, float], Shape]


def summed(rows: int, columns: int) -> Maker:
    """Makes the sum with the most terms within a share."""

    def make(outputs: int, inputs: int, share: float) -> Shape:
        one = KroneckerShape.fit(outputs, inputs, (rows, columns))
        terms = int(share * one.dense_parameters / one.parameters)
        return KroneckerShape(one.left, one.right, max(1, terms))

    return make


def low_rank(outputs: int, inputs: int, share: float) -> Shape:
    """Outer products within the share."""
    return outer(outputs, inputs, max(1, int(share * outputs * inputs / (outputs + inputs))))


def packed_low_rank(outputs: int, inputs: int, share: float) -> Shape:
    """Packed outer products within the share."""
    return packed(outputs, inputs, max(1, int(packed_rank(outputs, inputs, share * outputs * inputs))))


def largest(of_layers: Maker, of_embedding: Maker, budget: int) -> dict[str, Shape]:
    """Shapes by rising share, one map after the other; what would pass the budget is left as it was."""
    shapes: dict[str, Shape] = {}
    for step in range(40, 400):
        for name, size in SIZES.items():
            shape = (of_embedding if name == "embedding" else of_layers)(*size, step / 400)
            left = sum(other.dense_parameters - other.parameters for other in (shapes | {name: shape}).values())
            if len(shapes) < len(SIZES) or PARAMETERS - left <= budget:
                shapes[name] = shape
    return shapes


def main(kind: str, budget: int) -> None:
    """Print the plan."""
    if kind.startswith("sum_"):
        rows, columns = map(int, kind.removeprefix("sum_").split("x"))
        shapes = largest(summed(rows, columns), summed(1, 4), budget)
    else:
        shapes = largest({"low_rank": low_rank, "packed": packed_low_rank}[kind], low_rank, budget)
    count = PARAMETERS - sum(shape.dense_parameters - shape.parameters for shape in shapes.values())
    print(f"# {kind}: {count:,} of the mini teacher's {PARAMETERS:,} unique parameters.\nmaps:")
    print("\n".join(f"  {name}: {shape}" for name, shape in shapes.items()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
