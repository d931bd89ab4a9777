"""Factors of a token embedding, fitted to what becomes of its rows.

Row v is looked up where token v stands. Where a head is tied to the embedding, row v is also multiplied by what the
head reads, and an error there counts with the probability that the model gives to token v: the second derivative of
the cross-entropy with respect to logit v is p_v (1 - p_v). Both happen about as often as the token occurs. So rows are
weighted by the tokens' frequencies p, and

    f = sum_v p_v (e_v - ê_v) M (e_v - ê_v)^T,   M = S / s + C / c

where S is what the loss feels of a look-up, the second moment E[g g^T] of its gradient with respect to a row that was
looked up (the identity where nothing is known), and C the second moment of what the head reads. s and c make both terms
alike at Ê = 0. That is a fit to both sides (``two_sided``), M on the one and a diagonal on the other.
"""

import torch
from torch import Tensor

from kncompress.kron.calibrated import check_moment
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.moments import Moment, PreparedMoment, prepare
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.outputs import RowWeights, row_weights
from kncompress.kron.shape import KroneckerShape, ShapeError
from kncompress.kron.two_sided import two_sided_factors

SWEEPS = 12
TOLERANCE = 2e-3
_RIDGE = 1e-6
_ROWS = 4096
"""Rows that are held in float64 at a time."""


@torch.no_grad()
def calibrated_embedding(
    weight: Tensor,
    shape: KroneckerShape,
    frequencies: Tensor,
    moment: Moment | PreparedMoment | None = None,
    felt: Moment | PreparedMoment | None = None,
    *,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    history: list[float] | None = None,
) -> Factors:
    """Factors of an embedding that tokens look up and, where a head is tied to it, hidden states multiply.

    Gauge, sign and types as ``nearest_factors``.

    Args:
        weight: (V, D).
        shape: the factors' shape.
        frequencies: (V,), counts or shares of the tokens at the input, 0 or more. A tenth of the whole is spread
            evenly.
        moment: of the tied head's inputs, (D, D); None: no head is tied.
        felt: of the loss's gradients at the embedding's outputs, (D, D); None: all directions count alike.
        sweeps: most sweeps over both sides.
        tolerance: stop where a sweep lowers the squared error by less than this share.
        history: gets sqrt(f / f(0)) at the start and after each half step; for a closed form only that of the result.

    Returns:
        Factors of the weight's type and device.

    Raises:
        ShapeError: ``weight`` is not (V, D), a moment not (D, D) or ``frequencies`` not (V,).
        ValueError: a value is not finite, or a frequency is negative.
    """
    if frequencies.shape != (len(weight),):
        raise ShapeError(f"frequencies={list(frequencies.shape)}: must be {[len(weight)]}")
    rows = row_weights(frequencies.to(weight.device))
    if not bool(weight.any()):
        return nearest_factors(weight, shape)
    with without_autocast(weight.device):
        metric = _metric(weight, shape, rows, moment, felt)
        return two_sided_factors(weight, shape, metric, rows, sweeps=sweeps, tolerance=tolerance, history=history)


def _metric(
    weight: Tensor,
    shape: KroneckerShape,
    rows: RowWeights,
    moment: Moment | PreparedMoment | None,
    felt: Moment | PreparedMoment | None,
) -> PreparedMoment:
    """M, ridged so little that it has a Cholesky factor: its parts have ridges of their own."""
    gram = torch.zeros(2 * [weight.shape[1]], dtype=torch.float64, device=weight.device)
    for block, counts in zip(weight.detach().split(_ROWS), rows.rows.split(_ROWS), strict=True):
        exact = block.double()
        gram += exact.T @ (counts[:, None] * exact)
    parts = [torch.eye(len(gram)).to(gram) if felt is None else _checked(felt, shape).matrix.to(gram)]
    if moment is not None:
        parts.append(_checked(moment, shape).matrix.to(gram))
    total = torch.stack([part / (part * gram).sum() for part in parts]).sum(0)
    return PreparedMoment(Moment(total, total.new_zeros(len(total)), 1), ridge=_RIDGE)


def _checked(moment: Moment | PreparedMoment, shape: KroneckerShape) -> PreparedMoment:
    prepared = prepare(moment)
    check_moment(prepared, shape)
    return prepared
