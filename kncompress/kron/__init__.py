"""The mathematics of Kronecker sums; needs torch alone."""

from kncompress.kron.layers import KroneckerEmbedding, KroneckerLinear
from kncompress.kron.nearest import Factors, nearest_factors, relative_error
from kncompress.kron.product import kronecker_linear, kronecker_weight
from kncompress.kron.shape import KroneckerShape, ShapeError, divisors

__all__ = [
    "Factors",
    "KroneckerEmbedding",
    "KroneckerLinear",
    "KroneckerShape",
    "ShapeError",
    "divisors",
    "kronecker_linear",
    "kronecker_weight",
    "nearest_factors",
    "relative_error",
]
