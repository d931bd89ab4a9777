"""Packed outer products: the layer by the contract, the same matrix as unpacked, small coefficients, honest counts."""

import pytest
import torch
from contracts.factorisation import FactorisationContract, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from kron_inputs import correlated, moment_of
from torch.utils.flop_counter import FlopCounterMode

from kncompress.kron import (
    Factors,
    KroneckerLinear,
    KroneckerShape,
    PackedLinear,
    PackedShape,
    ShapeError,
    calibrated_factors,
    kronecker_weight,
    parse_shape,
    with_scalars,
)
from kncompress.kron.gauge import factor_rates
from kncompress.kron.packed import Packed, dominant_rows, pack, packed_weight

SHAPES = tuple(PackedShape.of_rank(*size) for size in ((11, 13, 4), (13, 11, 4), (9, 9, 8), (2, 40, 1), (40, 2, 1)))


class TestPackedLinear(FactorisationContract):
    shapes = SHAPES

    def make(self, shape, bias=True, dtype=None, device=None):
        return PackedLinear(shape, bias=bias, dtype=dtype, device=device)

    def from_dense(self, weight, bias, shape):
        return PackedLinear.from_dense(weight, bias, shape)


@st.composite
def shapes(draw):
    outputs, inputs = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    return PackedShape.of_rank(outputs, inputs, draw(st.integers(1, min(outputs, inputs) - 1)))


def random_factors(shape, rank=None, seed=0):
    """Outer products of ``shape``, of a lower ``rank`` where one is given."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(shape.rank, *shape.outer.left, generator=draw, dtype=torch.float64)
    right = torch.randn(shape.rank, *shape.outer.right, generator=draw, dtype=torch.float64)
    if rank is not None:
        left[rank:] = 0.0
    return Factors(left, right)


@given(shapes())
def test_text_and_counts(shape):
    assert parse_shape(str(shape)) == PackedShape.parse(f" {str(shape).replace('p*', 'p * ')} ") == shape
    packed = pack(random_factors(shape), shape)
    m, n, r = shape.out_features, shape.in_features, shape.rank
    assert shape.parameters == packed.kept.numel() + packed.mix.numel() == r * (m + n) - r * r
    assert len(packed.order) == min(m, n) and shape.parameters < m * n == shape.dense_parameters
    layer = PackedLinear(shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, n))
    assert shape.multiply_adds == counter.get_total_flops() // (2 * 3)


@given(shapes(), st.data())
@settings(deadline=None)
def test_packed_is_the_same_matrix_with_small_coefficients(shape, data):
    rank = data.draw(st.integers(0, shape.rank))
    factors = random_factors(shape, rank)
    packed = pack(factors, shape)
    want = kronecker_weight(*factors)
    torch.testing.assert_close(packed_weight(packed, shape.side), want, rtol=1e-9, atol=1e-9)
    assert float(packed.mix.abs().amax()) <= 1.05 + 1e-9
    assert sorted(packed.order.tolist()) == list(range(min(want.shape)))
    table = want if shape.side == "out" else want.T
    for row in packed.kept:
        assert ((table - row).abs().amax(dim=1) < 1e-9).any()


@pytest.mark.parametrize("size", [(60, 90, 25), (90, 60, 25), (40, 50, 30)])
def test_unpacked_is_the_same_map_as_orthogonal_products_or_dense(size):
    layer = PackedLinear.from_dense(torch.randn(*size[:2]), torch.randn(size[0]), PackedShape.of_rank(*size))
    made, x = layer.unpacked(), torch.randn(7, size[1])
    torch.testing.assert_close(made(x), layer(x), rtol=1e-4, atol=1e-4)
    if size[2] * (size[0] + size[1]) >= size[0] * size[1]:
        assert isinstance(made, torch.nn.Linear)
        return
    left, right = made.left[:, :, 0], made.right[:, 0]
    for factor in (left, right):
        products = factor @ factor.T
        torch.testing.assert_close(products, torch.diag(products.diag()), atol=1e-3, rtol=0)
    torch.testing.assert_close(left.norm(dim=1), right.norm(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(60, 90, 25), (90, 60, 25), (64, 64, 20)])
def test_product_equals_that_of_the_outer_products(size, dtype):
    shape = PackedShape.of_rank(*size)
    weight = torch.randn(shape.out_features, shape.in_features, dtype=dtype)
    fitted = calibrated_factors(weight, shape.outer, moment_of(correlated(shape.in_features, 500, dtype=dtype)))
    plain = KroneckerLinear(shape.outer, bias=True, dtype=dtype)
    plain.set_factors(*fitted)
    packed = PackedLinear(shape, bias=True, dtype=dtype)
    packed.set_factors(*fitted)
    packed.bias = plain.bias
    x = torch.randn(4, 7, shape.in_features, dtype=dtype)
    assert relative(packed(x), plain(x)) < (1e-12 if dtype == torch.float64 else 2e-6)
    assert relative(packed.weight, plain.weight) < (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_gradients_the_product_is_the_same(shape, batch, dtype):
    layer = PackedLinear(shape, dtype=dtype)
    layer.order = torch.randperm(len(layer.order), dtype=torch.int32)
    x = torch.randn(*batch, shape.in_features, dtype=dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y = layer(x).detach()
            with torch.no_grad():
                torch.testing.assert_close(layer(x), y)


def test_badly_scaled_factors_lose_nothing():
    shape = PackedShape.of_rank(50, 70, 20)
    left, right = random_factors(shape)
    scale = 10.0 ** -torch.arange(20, dtype=torch.float64)[:, None, None] * 10**4
    factors = Factors((left * scale).float(), (right / scale.sqrt()).float())
    kept, mix, order = pack(factors, shape)
    want = kronecker_weight(*(f.double() for f in factors))
    assert relative(packed_weight(Packed(kept.double(), mix.double(), order), "out"), want) < 1e-6
    assert float(mix.abs().amax()) <= 1.051


def test_dominant_rows_leave_no_exchange_that_pays():
    basis = torch.randn(80, 12, dtype=torch.float64)
    basis[:12] *= 1e-3  # rows that are bad to take
    rows = dominant_rows(basis)
    assert len(set(rows.tolist())) == 12 and int(rows.min()) >= 12
    table = torch.linalg.solve(basis[rows], basis, left=False)
    assert float(table.abs().amax()) <= 1.05 + 1e-9


def test_state_dict_and_repr():
    layer = PackedLinear(PackedShape.of_rank(6, 8, 2))
    assert list(layer.state_dict()) == ["kept", "mix", "bias", "order"]
    assert layer.order.dtype == torch.int32 and layer.order.tolist() == list(range(6))
    assert repr(layer).startswith("PackedLinear(p*6x1(x)1x8*2, parameters=24 of 48, multiply_adds=24 of 48")


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("size", [(96, 192, 40), (192, 96, 40)])
def test_reset_gives_the_std_asked_for(size, std):
    layer = PackedLinear(PackedShape.of_rank(*size))
    layer.reset_parameters(std)
    assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert not layer.bias.any()


@pytest.mark.parametrize("size", [(96, 192, 40), (192, 96, 40)])
def test_rates_move_the_weight_alike(size):
    torch.manual_seed(0)
    layer = PackedLinear(PackedShape.of_rank(*size), dtype=torch.float64)
    before = layer.weight.detach().clone()
    for name, rate in factor_rates(layer).items():
        parameter = layer.get_parameter(name)
        step = 1e-6 * rate * torch.randn_like(parameter).sign()
        with torch.no_grad():
            parameter += step
        moved = float((layer.weight.detach() - before).square().mean().sqrt())
        assert moved == pytest.approx(1e-6, rel=0.1)
        with torch.no_grad():
            parameter -= step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p*288x576(x)2x1", "p*288x576(x)2x1: only outer products are packed, as in p*576x1(x)1x1536*200"),
        ("p*s*6x1(x)1x8*2", "p*s*6x1(x)1x8*2: packed outer products take no scalars; leave out s*"),
        ("p*6x1(x)1x8*6", "p*6x1(x)1x8*6: as many numbers as the dense map; at most 5 terms"),
        ("p*6x1(x)1x8*2 + 3x8(x)2x1", "p*6x1(x)1x8*2: no part of a hybrid may be packed; leave out p*"),
        ("p*", "'': not a Kronecker shape; write left(x)right*terms, as in 768x768(x)4x1*2"),
    ],
)
def test_errors_name_the_value(text, message):
    with pytest.raises(ShapeError) as error:
        parse_shape(text)
    assert str(error.value) == message


def test_other_errors():
    shape = PackedShape.of_rank(6, 8, 2)
    with pytest.raises(ShapeError, match="scalars"):
        with_scalars(shape)
    with pytest.raises(ShapeError, match="not packed outer products"):
        PackedShape.parse("6x1(x)1x8*2")
    with pytest.raises(ShapeError, match="factors="):
        pack(random_factors(PackedShape.of_rank(6, 8, 3)), shape)
    with pytest.raises(ShapeError, match=r"x=\[2, 6\]: last side must be 8"):
        PackedLinear(shape)(torch.randn(2, 6))
    with pytest.raises(ShapeError, match="weight="):
        PackedLinear.from_dense(torch.randn(8, 6), None, shape)
    assert KroneckerShape.parse(str(shape).removeprefix("p*")) == shape.outer
