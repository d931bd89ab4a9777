"""Shapes made of Kronecker sums: several added up, and outer products packed; and the text form of all shapes."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from kncompress.kron.shape import FactoredShape, KroneckerShape, ShapeError

_PACKED = re.compile(r"\s*p\s*\*(.*)", re.DOTALL)


@dataclass(frozen=True)
class HybridShape(FactoredShape):
    """Several Kronecker sums of different factor shapes, added up; a map of (M, N) = (out, in).

    Prints as ``576x1(x)1x1536*8 + 288x1536(x)2x1`` and parses the same text.

    Raises:
        ShapeError: fewer than two parts, parts of different outer size, or two of the same factor shapes.
    """

    parts: tuple[KroneckerShape, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) < 2:
            raise ShapeError(f"parts={len(self.parts)}: a hybrid has two parts or more")
        first = self.parts[0]
        for part in self.parts:
            if (part.out_features, part.in_features) != (first.out_features, first.in_features):
                raise ShapeError(
                    f"{part}: makes {part.out_features}x{part.in_features}, "
                    f"but {first} makes {first.out_features}x{first.in_features}"
                )
        for i, part in enumerate(self.parts):
            if any((part.left, part.right) == (other.left, other.right) for other in self.parts[:i]):
                raise ShapeError(f"{part}: stands twice; give one part more terms")

    @classmethod
    def parse(cls, text: str) -> "HybridShape":
        """Read parts joined by ``+``; the inverse of ``str``.

        Raises:
            ShapeError: a part is not a Kronecker shape, or they make no hybrid.
        """
        texts = text.split("+")
        for part in texts:
            if _PACKED.fullmatch(part):
                raise ShapeError(f"{part.strip()}: no part of a hybrid may be packed; leave out p*")
        return cls(tuple(KroneckerShape.parse(part) for part in texts))

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    @property
    def sums(self) -> tuple[KroneckerShape, ...]:
        """Kronecker sums whose factors a fit has to find: the parts."""
        return self.parts

    @property
    def parameters(self) -> int:
        """Numbers in all factors of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one input vector, each part in its cheaper order."""
        return sum(part.multiply_adds for part in self.parts)


@dataclass(frozen=True)
class PackedShape(FactoredShape):
    """Outer products, a map of (M, N) = (out, in) and rank R, in R (M + N) - R^2 numbers instead of R (M + N).

    A low-rank map: R pivot rows are kept as they are, and each other row is a combination of them (PIFA: arXiv
    2501.19090, ICML 2025). Where M > N, columns take the place of rows, since the product then has only N numbers to
    put in order instead of M.

    Prints as ``p*576x1(x)1x1536*200`` and parses the same text: ``p*`` before the outer products that are packed.

    Raises:
        ShapeError: no outer products, with scalars, or as many as the dense map has rows or columns.
    """

    outer: KroneckerShape
    """The outer products, (M, 1) (x) (1, N), R terms."""

    def __post_init__(self) -> None:
        outer = self.outer
        if outer.left[1] != 1 or outer.right[0] != 1:
            raise ShapeError(f"p*{outer}: only outer products are packed, as in p*576x1(x)1x1536*200")
        if outer.scalars:
            raise ShapeError(f"p*{outer}: packed outer products take no scalars; leave out s*")
        if self.rank >= min(self.out_features, self.in_features):
            most = min(self.out_features, self.in_features) - 1
            raise ShapeError(f"p*{outer}: as many numbers as the dense map; at most {most} terms")

    @classmethod
    def of_rank(cls, out_features: int, in_features: int, rank: int) -> "PackedShape":
        """The shape of an (out_features, in_features) map of that rank."""
        return cls(KroneckerShape((out_features, 1), (1, in_features), rank))

    @classmethod
    def parse(cls, text: str) -> "PackedShape":
        """Read ``p*576x1(x)1x1536*200``; the inverse of ``str``.

        Raises:
            ShapeError: not of that form, or not a valid shape.
        """
        match = _PACKED.fullmatch(text)
        if match is None:
            raise ShapeError(f"{text!r}: not packed outer products; write p* before them, as in p*576x1(x)1x1536*200")
        return cls(KroneckerShape.parse(match[1]))

    def __str__(self) -> str:
        return f"p*{self.outer}"

    @property
    def sums(self) -> tuple[KroneckerShape, ...]:
        """Kronecker sums whose factors a fit has to find: the outer products, which are packed then."""
        return (self.outer,)

    @property
    def rank(self) -> int:
        """R."""
        return self.outer.terms

    @property
    def side(self) -> Literal["out", "in"]:
        """Whether the pivots are rows (outputs) or columns (inputs)."""
        return "out" if self.out_features <= self.in_features else "in"

    @property
    def parameters(self) -> int:
        """Numbers that are trained: R (M + N) - R^2. The order of the rows or columns, min(M, N) integers, is not."""
        return self.outer.parameters - self.rank**2

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one input vector: R (M + N) - R^2; the pivots cost none."""
        return self.parameters


Shape = KroneckerShape | HybridShape | PackedShape


def with_scalars(shape: Shape) -> Shape:
    """The same shape with a learned scalar for each term, of every part of a hybrid.

    Raises:
        ShapeError: packed outer products, which take none.
    """
    if isinstance(shape, HybridShape):
        return HybridShape(tuple(replace(part, scalars=True) for part in shape.parts))
    if isinstance(shape, PackedShape):
        return replace(shape, outer=replace(shape.outer, scalars=True))
    return replace(shape, scalars=True)


def parse_shape(text: str) -> Shape:
    """A hybrid where ``text`` joins parts by ``+``, packed outer products after ``p*``, else a single Kronecker shape;
    the inverse of ``str``.

    Raises:
        ShapeError: none of them.
    """
    if "+" in text:
        return HybridShape.parse(text)
    return PackedShape.parse(text) if _PACKED.fullmatch(text) else KroneckerShape.parse(text)
