"""The mathematics of Kronecker sums; needs torch alone."""

from kncompress.kron.calibrated import calibrated_factors
from kncompress.kron.compound import HybridShape, PackedShape, Shape, parse_shape, with_scalars
from kncompress.kron.embeddings import calibrated_embedding
from kncompress.kron.gauge import Gauge, regauge
from kncompress.kron.hybrid_linear import HybridLinear
from kncompress.kron.hybrids import calibrated_hybrid, nearest_hybrid
from kncompress.kron.layers import KroneckerEmbedding, KroneckerLinear
from kncompress.kron.moments import Moment, PreparedMoment, corrected_bias, weighted_error
from kncompress.kron.nearest import Factors, nearest_factors, relative_error
from kncompress.kron.outputs import OutputMoment, Outputs, RowWeights, prepare_outputs, row_weights
from kncompress.kron.packed_linear import PackedLinear
from kncompress.kron.product import kronecker_linear
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import KroneckerShape, ShapeError, divisors
from kncompress.kron.two_sided import two_sided_error, two_sided_factors

__all__ = [
    "Factors",
    "Gauge",
    "HybridLinear",
    "HybridShape",
    "KroneckerEmbedding",
    "KroneckerLinear",
    "KroneckerShape",
    "Moment",
    "OutputMoment",
    "Outputs",
    "PackedLinear",
    "PackedShape",
    "PreparedMoment",
    "RowWeights",
    "Shape",
    "ShapeError",
    "calibrated_embedding",
    "calibrated_factors",
    "calibrated_hybrid",
    "corrected_bias",
    "divisors",
    "kronecker_linear",
    "kronecker_weight",
    "nearest_factors",
    "nearest_hybrid",
    "parse_shape",
    "prepare_outputs",
    "regauge",
    "relative_error",
    "row_weights",
    "two_sided_error",
    "two_sided_factors",
    "weighted_error",
    "with_scalars",
]
