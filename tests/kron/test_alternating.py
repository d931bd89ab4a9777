"""The normal matrix against its definition, and the solver of last resort."""

import pytest
import torch

from kncompress.kron.alternating import normal_matrix, solve


@pytest.mark.parametrize(("terms", "m", "n", "side"), [(1, 3, 4, 2), (3, 5, 4, 2), (9, 1, 6, 2), (7, 2, 8, 1)])
def test_normal_matrix_is_its_definition(terms, m, n, side, monkeypatch):
    fixed = torch.randn(terms, m, n, dtype=torch.float64)
    metric = torch.randn(n, side, n, side, dtype=torch.float64)
    metric = metric + metric.permute(2, 3, 0, 1)  # symmetric as a moment
    want = torch.einsum("rij,sik,jakb->rasb", fixed, fixed, metric).reshape(terms * side, terms * side)
    pairs = metric.permute(0, 2, 1, 3).reshape(n * n, side * side)
    torch.testing.assert_close(normal_matrix(fixed, pairs, side), want)
    monkeypatch.setattr("kncompress.kron.alternating._PAIRS", 1)
    torch.testing.assert_close(normal_matrix(fixed, pairs, side), want)


def test_solve_is_exact_where_it_can_be_and_finite_where_not():
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, x = root @ root.T, torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(solve(matrix, x @ matrix), x)
    torch.testing.assert_close(solve(matrix * 1e-20, x @ matrix * 1e-20), x)
    flat = torch.cat([root[:, :2], root[:, :2], torch.zeros(6, 1)], dim=1)  # dependent columns and a null one
    matrix, rhs = flat.T @ flat, torch.randn(3, 6, dtype=torch.float64) @ flat
    got = solve(matrix, rhs)
    torch.testing.assert_close(got @ matrix, rhs, rtol=1e-5, atol=1e-5)
    assert not got[:, 4].any()
    assert not solve(torch.zeros(4, 4).double(), torch.zeros(2, 4).double()).any()


def test_solve_of_an_indefinite_matrix_is_least_squares():
    """Rounding can make a normal matrix slightly indefinite; what lies there is left out."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    values = torch.tensor([3.0, 2.0, 1.0, 1e-14, -1e-3], dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    kept = basis[:, :3]
    rhs = torch.randn(2, 3, dtype=torch.float64) @ kept.T
    got = solve(matrix, rhs)
    assert got.isfinite().all() and float((got @ matrix - rhs).norm()) < 1e-2 * float(rhs.norm())
