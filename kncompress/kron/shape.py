"""The shape of a Kronecker sum: a checked value that knows its size and its cost."""

import re
from dataclasses import dataclass
from typing import Literal

Order = Literal["right", "left"]

_SIZE = r"\s*(\d{1,9})\s*"
_TEXT = re.compile(rf"\s*(s\s*\*)?{_SIZE}x{_SIZE}\(x\){_SIZE}x{_SIZE}(?:\*{_SIZE})?", re.ASCII)


class ShapeError(ValueError):
    """Factor shapes that do not fit: one line that starts with the value at fault."""


def divisors(number: int) -> list[int]:
    """All positive divisors of ``number``, smallest first.

    Raises:
        ShapeError: ``number`` is below 1.
    """
    if number < 1:
        raise ShapeError(f"{number}: must be 1 or more")
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def product_cost(left: tuple[int, int], right: tuple[int, int], terms: int, order: Order) -> tuple[int, int]:
    """(multiply-adds, numbers written between the two products) of one input vector, in the given order."""
    (m1, n1), (m2, n2) = left, right
    if order == "right":
        return terms * (n1 * n2 * m2 + n1 * m2 * m1), terms * n1 * m2
    return terms * (m1 * n1 * n2 + m1 * n2 * m2), terms * m1 * n2


def cheaper_order(left: tuple[int, int], right: tuple[int, int], terms: int) -> Order:
    """Which factors to apply first: fewer multiply-adds, then fewer numbers written."""
    if product_cost(left, right, terms, "right") <= product_cost(left, right, terms, "left"):
        return "right"
    return "left"


def _pair(name: str, value: object) -> tuple[int, int]:
    """``value`` as two positive integers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ShapeError(f"{name}={value}: must be two numbers, rows and columns")
    for side in value:
        if type(side) is not int or side < 1:
            raise ShapeError(f"{name}={list(value)}: {side!r} is not a positive whole number")
    return value[0], value[1]


class FactoredShape:
    """What shapes of every kind have: the sizes of the dense map (M, N) in whose place the factors stand."""

    @property
    def sums(self) -> tuple["KroneckerShape", ...]:
        """Kronecker sums whose factors a fit has to find."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """M."""
        return self.sums[0].out_features

    @property
    def in_features(self) -> int:
        """N."""
        return self.sums[0].in_features

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense map: M N."""
        return self.out_features * self.in_features

    @property
    def dense_multiply_adds(self) -> int:
        """Multiply-adds of the dense map for one input vector: M N."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class KroneckerShape(FactoredShape):
    """Shape of ``sum_r s_r left[r] (x) right[r]``, a map of (M, N) = (m1 m2, n1 n2) = (out, in).

    Prints as ``768x768(x)4x1*2`` (left, right, terms; a single term is left out) and parses the same text; with
    ``s*`` before it where each term has a scalar of its own to learn, else s is 1.

    Raises:
        ShapeError: a side is not a positive whole number, or there are more terms than can be independent.
    """

    left: tuple[int, int]
    """(m1, n1): rows and columns of each left factor."""
    right: tuple[int, int]
    """(m2, n2): rows and columns of each right factor."""
    terms: int = 1
    """R: number of summed products."""
    scalars: bool = False
    """Whether each term has a learned scalar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", _pair("left", self.left))
        object.__setattr__(self, "right", _pair("right", self.right))
        if type(self.terms) is not int or self.terms < 1:
            raise ShapeError(f"terms={self.terms!r}: must be a positive whole number")
        most = min(self.left[0] * self.left[1], self.right[0] * self.right[1])
        if self.terms > most:
            product = f"{self.left[0]}x{self.left[1]}(x){self.right[0]}x{self.right[1]}"
            raise ShapeError(f"terms={self.terms}: {product} has at most {most} independent terms")

    @classmethod
    def fit(
        cls, out_features: int, in_features: int, right: tuple[int, int] | list[int], terms: int = 1
    ) -> "KroneckerShape":
        """The shape of an (out_features, in_features) map whose right factors are ``right``.

        Raises:
            ShapeError: a side of ``right`` does not divide the map's, or too many terms.
        """
        m2, n2 = _pair("right", right)
        for side, whole in ((m2, out_features), (n2, in_features)):
            if whole % side:
                raise ShapeError(f"right={[m2, n2]}: {side} does not divide {whole}")
        return cls((out_features // m2, in_features // n2), (m2, n2), terms)

    @classmethod
    def parse(cls, text: str) -> "KroneckerShape":
        """Read ``768x768(x)4x1*2``; the inverse of ``str``. Spaces between the parts are allowed.

        Raises:
            ShapeError: not of that form, or not a valid shape.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ShapeError(f"{text!r}: not a Kronecker shape; write left(x)right*terms, as in 768x768(x)4x1*2")
        scalars, *sizes = match.groups(default="")
        m1, n1, m2, n2, terms = (int(size or 1) for size in sizes)
        return cls((m1, n1), (m2, n2), terms, bool(scalars))

    def __str__(self) -> str:
        (m1, n1), (m2, n2) = self.left, self.right
        product = f"{m1}x{n1}(x){m2}x{n2}" + (f"*{self.terms}" if self.terms > 1 else "")
        return f"s*{product}" if self.scalars else product

    @property
    def sums(self) -> tuple["KroneckerShape", ...]:
        """Kronecker sums whose factors a fit has to find: this one."""
        return (self,)

    @property
    def out_features(self) -> int:
        """M = m1 m2."""
        return self.left[0] * self.right[0]

    @property
    def in_features(self) -> int:
        """N = n1 n2."""
        return self.left[1] * self.right[1]

    @property
    def parameters(self) -> int:
        """Numbers in all factors, and the scalars: R (m1 n1 + m2 n2), or R more."""
        return self.terms * (self.left[0] * self.left[1] + self.right[0] * self.right[1] + self.scalars)

    @property
    def order(self) -> Order:
        """Which factors are applied first: fewer multiply-adds, then fewer numbers written."""
        return cheaper_order(self.left, self.right, self.terms)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one input vector, in the cheaper order. Scalars cost none: a factor takes them first."""
        return product_cost(self.left, self.right, self.terms, self.order)[0]
