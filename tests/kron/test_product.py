"""The factored product against torch.kron: each route, in each order, and the choice among them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kncompress.kron import KroneckerShape, ShapeError, dense_product, kronecker_linear, kronecker_weight, routes
from kncompress.kron.product import ROUTES, Route, Sizes, choose

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


ROUTE = {route.apply.__name__: route for route in ROUTES}
TAKEN = [
    ("96x1(x)1x24*9", None, 4096, "low_rank_right_first"),
    ("1x24(x)96x1*9", None, 4096, "low_rank_left_first"),
    ("24x24(x)1x4", None, 15, "single_row"),
    ("24x24(x)4x1", None, 15, "single_column"),
    ("24x24(x)1x4*2", None, 15, "right_first"),  # two terms
    ("64x64(x)1x2", None, 16, "right_first_by_blocks"),
    ("64x64(x)2x1*2", None, 16, "left_first_by_blocks"),
    ("96x64(x)3x3*2", None, 16, "right_first_by_blocks"),
    ("64x96(x)3x3*2", None, 16, "left_first_by_blocks"),
    ("96x64(x)3x3*3", None, 16, "right_first"),  # more numbers than it pays for
    ("64x96(x)3x3*3", None, 16, "left_first"),
    ("64x67(x)1x2", None, 16, "right_first"),  # no divisor for a block
    ("24x6(x)4x4*8", None, 4096, "formed"),  # twice the dense multiply-adds, many vectors
    ("24x6(x)4x4*8", None, 8, "right_first"),  # too few to pay for forming
    ("24x24(x)4x1", "formed", 1, "formed"),
    ("24x24(x)4x1", "right", 1, "right_first"),  # a column would come first as a scale of single inputs
    ("24x24(x)1x4", "left", 1, "left_first"),
    ("24x24(x)1x4", None, None, "right_first"),  # a recorded graph
    ("64x64(x)2x1", None, None, "left_first"),
    ("24x6(x)4x4*8", None, None, "right_first"),
]


def sizes_of(shape: KroneckerShape, vectors: int | None) -> Sizes:
    return Sizes(shape.terms, *shape.left, *shape.right, vectors)


@pytest.mark.parametrize(("text", "order", "vectors", "name"), TAKEN)
def test_the_route_that_is_taken(text, order, vectors, name):
    assert choose(sizes_of(KroneckerShape.parse(text), vectors), order).apply.__name__ == name


def test_every_route_is_taken_by_some_shape():
    assert {name for *_, name in TAKEN} == set(ROUTE)


def test_the_product_takes_the_route_that_was_chosen(monkeypatch):
    seen = []
    route = Route("left", lambda *_: "the product", lambda _: True, lambda _: 0)
    monkeypatch.setattr("kncompress.kron.product.choose", lambda *args: seen.append(args) or route)
    left, right = random_factors(KroneckerShape((41, 43), (2, 3), 5))  # sizes that no other test makes it remember
    x = torch.randn(2, 7, 129, dtype=torch.float64)
    assert [kronecker_linear(x, left, right, order="right") for _ in range(2)] == ["the product"] * 2
    assert seen == [((5, 41, 43, 2, 3, 14), "right")]  # once: it is remembered


# Shapes that a route can take, whether or not it is the one chosen for them; 16 vectors or more where it has blocks.
SHAPES = {
    "formed": ["3x5(x)2x2*3"],
    "low_rank_right_first": ["6x1(x)1x5*4", "6x1(x)1x5"],
    "low_rank_left_first": ["1x6(x)5x1*4", "1x6(x)5x1"],
    "single_row": ["3x7(x)1x4", "3x1(x)1x4"],
    "single_column": ["3x7(x)4x1", "1x7(x)4x1"],
    "right_first_by_blocks": ["32x4(x)1x1", "64x8(x)2x2", "64x4(x)3x2*2", "32x4(x)2x1*2"],
    "left_first_by_blocks": ["4x32(x)1x1", "8x64(x)2x2", "4x64(x)2x3*2", "4x32(x)1x2*2"],
    "right_first": ["3x5(x)2x2*3", "3x7(x)4x1*2", "3x7(x)1x4", "6x1(x)1x5*4"],
    "left_first": ["3x5(x)2x2*3", "3x7(x)4x1*2", "3x7(x)1x4", "1x6(x)5x1*4"],
}
CASES = [(name, text) for name in ROUTE for text in SHAPES[name]]


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 9)], ids=str)
@pytest.mark.parametrize(("name", "text"), CASES)
def test_each_route_equals_torch_kron(name, text, leading):
    """Values and gradients, with a bias and without."""
    shape = KroneckerShape.parse(text)
    left, right = random_factors(shape)
    x, bias = torch.randn(*leading, shape.in_features).double(), torch.randn(shape.out_features).double()
    upstream = torch.randn(*leading, shape.out_features).double()
    for inputs in ([x, left, right, bias], [x, left, right]):
        inputs = [tensor.requires_grad_() for tensor in inputs]
        x, left, right, *rest = inputs
        y = ROUTE[name].apply(x, left, right, *rest or [None])
        dense = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
        wanted = F.linear(x, dense, *rest)
        torch.testing.assert_close(y, wanted)
        found, plain = (torch.autograd.grad(value, inputs, upstream) for value in (y, wanted))
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(("name", "text"), [case for case in CASES if not case[0].startswith("single")])
def test_the_cost_of_a_route_is_what_is_counted(name, text):
    """By torch's counter, from 20 vectors more; it does not see the scaling by hand of the routes for few vectors."""
    shape = KroneckerShape.parse(text)
    left, right = random_factors(shape)
    counted = []
    for vectors in (20, 40):
        with FlopCounterMode(display=False) as counter:
            ROUTE[name].apply(torch.randn(vectors, shape.in_features).double(), left, right, None)
        counted.append(counter.get_total_flops())
    assert ROUTE[name].cost(sizes_of(shape, 20)) == (counted[1] - counted[0]) / (2 * 20)


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
BLOCKS += [("10x64(x)2x1", 0), ("64x12(x)1x3", 0), ("4x64(x)3x3*2", 0)]


@pytest.mark.parametrize(("text", "block"), BLOCKS)
def test_blocks_of_the_identity_divide_a_side_and_cost_an_eighth_at_most(text, block):
    shape = KroneckerShape.parse(text)
    sizes, (m1, n1), (m2, n2) = sizes_of(shape, 24), shape.left, shape.right
    side, other, facing = (n1, m1, n2) if shape.order == "right" else (m1, n1, m2)
    assert routes.identity_block(side, other, facing) == block
    route = choose(sizes)
    assert route.apply.__name__ == f"{shape.order}_first" + ("_by_blocks" if block else "")
    assert shape.multiply_adds <= route.cost(sizes) <= shape.multiply_adds * 9 / 8


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
    monkeypatch.setattr(dense_product, "_MANY", 4)
    shape = KroneckerShape.parse(text)
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = [torch.randn(5, shape.in_features), *(factor.float() for factor in random_factors(shape))]
    inputs = [value.to(dtype).requires_grad_() for value in inputs]
    upstream = torch.randn(5, shape.out_features).bfloat16()
    found = []
    for wide in (8, 1000):
        monkeypatch.setattr(dense_product, "_WIDE", wide)
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
