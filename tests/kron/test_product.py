"""The factored product against torch.kron, in each order."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kncompress.kron import KroneckerShape, ShapeError, kronecker_linear, kronecker_weight, product

ORDERS = ("right", "left", "formed", None)


def random_factors(shape: KroneckerShape) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(shape.terms, *shape.left, dtype=torch.float64),
        torch.randn(shape.terms, *shape.right, dtype=torch.float64),
    )


@given(st.tuples(*[st.integers(1, 7)] * 4), st.integers(1, 4), st.integers(0, 9), st.sampled_from(ORDERS))
def test_product_equals_torch_kron(sides, terms, vectors, order):
    m1, n1, m2, n2 = sides
    terms = min(terms, m1 * n1, m2 * n2)
    left, right = random_factors(KroneckerShape((m1, n1), (m2, n2), terms))
    dense = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    torch.testing.assert_close(kronecker_weight(left, right), dense)
    x, bias = torch.randn(vectors, n1 * n2, dtype=torch.float64), torch.randn(m1 * m2, dtype=torch.float64)
    torch.testing.assert_close(kronecker_linear(x, left, right, bias, order), F.linear(x, dense, bias))


@pytest.mark.parametrize("order", ["right", "left", "formed"])
@pytest.mark.parametrize("vectors", [1, 9])
@pytest.mark.parametrize("text", ["3x5(x)2x2*3", "3x7(x)4x1*2", "3x7(x)1x4*2", "6x1(x)1x5*4", "1x6(x)5x1*4"])
def test_gradients_in_each_order(text, vectors, order):
    shape = KroneckerShape.parse(text)
    inputs = [torch.randn(vectors, shape.in_features, dtype=torch.float64), *random_factors(shape)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: kronecker_linear(*args, order=order), inputs)


@pytest.mark.parametrize(
    ("text", "vectors", "formed"),
    [
        ("24x6(x)4x4*8", 4096, True),  # twice the dense multiply-adds, many vectors
        ("24x6(x)4x4*8", 8, False),  # too few to pay for forming
        ("24x24(x)4x1", 4096, False),  # cheaper than dense
        ("96x1(x)1x24*9", 4096, False),
    ],
)
def test_weight_is_formed_only_where_it_pays(text, vectors, formed, monkeypatch):
    calls = []

    def spy(left, right):
        calls.append(1)
        return kronecker_weight(left, right)

    monkeypatch.setattr("kncompress.kron.product.kronecker_weight", spy)
    shape = KroneckerShape.parse(text)
    left, right = random_factors(shape)
    kronecker_linear(torch.randn(vectors, shape.in_features, dtype=torch.float64), left, right)
    assert bool(calls) == formed


def test_outer_products_are_a_low_rank_map():
    shape = KroneckerShape.fit(11, 7, (1, 7), 3)
    left, right = random_factors(shape)
    x = torch.randn(4, 7, dtype=torch.float64)
    low_rank = x @ right.reshape(3, 7).T @ left.reshape(3, 11)
    torch.testing.assert_close(kronecker_linear(x, left, right), low_rank)


@pytest.mark.parametrize("shape", [(), (5,), (2, 7), (6, 1)])
def test_wrong_input_is_named(shape):
    left, right = random_factors(KroneckerShape((2, 3), (1, 2)))
    with pytest.raises(ShapeError, match="last side must be 6"):
        kronecker_linear(torch.randn(shape, dtype=torch.float64), left, right)


def test_unknown_order_is_named():
    left, right = random_factors(KroneckerShape((2, 3), (1, 2)))
    with pytest.raises(ShapeError, match="order=up: not one of right, left, formed"):
        kronecker_linear(torch.randn(6, dtype=torch.float64), left, right, order="up")


BLOCKS = [("12x64(x)2x1", 4), ("12x64(x)2x1*2", 4), ("64x12(x)1x2", 4), ("64x12(x)1x2*2", 4), ("64x640(x)4x1", 16)]
BLOCKS += [("12x64(x)2x2", 4), ("12x96(x)3x2*2", 4), ("64x12(x)2x2", 4), ("96x12(x)2x3*2", 4)]
BLOCKS += [("4x64(x)2x1", 4), ("4x64(x)2x2*2", 4)]  # the block is the whole of the left factor's side


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("text", "block"), [*BLOCKS, ("10x64(x)2x1", 0), ("64x12(x)1x3", 0)])
def test_blocks_of_the_identity_change_nothing(text, block, bias, monkeypatch):
    """Many vectors and a small right factor: values and gradients are those of the plain product."""
    shape = KroneckerShape.parse(text)
    x = torch.randn(3, 8, shape.in_features, dtype=torch.float64)
    inputs = [x, *random_factors(shape), *([torch.randn(shape.out_features, dtype=torch.float64)] if bias else [])]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    upstream = torch.randn(3, 8, shape.out_features, dtype=torch.float64)

    def run():
        y = kronecker_linear(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream)

    taken, choose = [], product._block
    monkeypatch.setattr(product, "_block", lambda *sizes: taken.append(choose(*sizes)) or taken[-1])
    found = run()
    assert taken == [block]
    monkeypatch.setattr(product, "_block", lambda *_: 0)
    torch.testing.assert_close(found, run())


def test_blocks_of_the_identity_under_autocast():
    """bfloat16 from float32 factors, the bias included; the same to its rounding."""
    shape = KroneckerShape.parse("64x640(x)4x1")
    left, right = (factor.float() for factor in random_factors(shape))
    x, bias = torch.randn(32, 640), torch.randn(256)
    with torch.autocast("cpu", torch.bfloat16):
        y = kronecker_linear(x, left, right, bias)
    assert y.dtype == torch.bfloat16
    wanted = F.linear(x, kronecker_weight(left, right), bias)
    assert float((y.float() - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("text", ["12x8(x)1x2", "12x8(x)2x1", "12x1(x)1x8*3", "1x8(x)12x1*3"])
def test_a_single_bfloat16_vector(text, bias):
    """It takes the product of a matrix and a vector; two equal vectors do not."""
    shape = KroneckerShape.parse(text)
    x = torch.randn(1, shape.in_features)
    values = [x, *(factor.float() for factor in random_factors(shape))]
    if bias:
        values.append(torch.randn(shape.out_features))
    one = [value.bfloat16().requires_grad_() for value in values]
    plain = [value.detach().float().requires_grad_() for value in one]
    y, wanted = kronecker_linear(one[0], *one[1:]), kronecker_linear(plain[0].expand(2, -1), *plain[1:])[:1]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.02)
    upstream = torch.randn(y.shape).bfloat16()
    found = torch.autograd.grad(y, one, upstream)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, plain, upstream.float()), strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=0.05, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert kronecker_linear(*values).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("text", ["83x8(x)1x2", "83x1(x)1x16*3"])
def test_outputs_of_a_head_some_at_a_time(text, autocast, monkeypatch):
    """Values and gradients are those of the product in one piece."""
    monkeypatch.setattr(product, "_MANY", 4)
    shape = KroneckerShape.parse(text)
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = [torch.randn(5, shape.in_features), *(factor.float() for factor in random_factors(shape))]
    inputs = [value.to(dtype).requires_grad_() for value in inputs]
    upstream = torch.randn(5, shape.out_features).bfloat16()
    found = []
    for wide in (8, 1000):
        monkeypatch.setattr(product, "_WIDE", wide)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = kronecker_linear(*inputs)
        assert y.dtype == torch.bfloat16 and ("_WideProduct" in graph_of(y)) == (wide == 8)
        found.append((y, *torch.autograd.grad(y, inputs, upstream)))
    torch.testing.assert_close(found[0], found[1], atol=0.02, rtol=0.02)


def graph_of(y: torch.Tensor) -> str:
    """Names of the functions that lead to ``y``."""
    names, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)


def test_an_exported_graph_serves_any_number_of_vectors_and_holds_the_factors():
    """Eager calls choose by the number of vectors between three ways; a recorded graph may not."""
    from kncompress.kron import KroneckerLinear, parse_shape

    layer = KroneckerLinear(parse_shape("8x12(x)4x4*9")).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(5, 48),), dynamic_shapes=({0: torch.export.Dim("vectors")},))
    recorded = program.module()
    for vectors in (1, 2, 3, 4096):
        x = torch.randn(vectors, 48)
        torch.testing.assert_close(recorded(x), layer(x), rtol=1e-4, atol=1e-5)
    made = [node.meta["val"].shape for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")]
    assert (32, 48) not in [tuple(shape) for shape in made]
