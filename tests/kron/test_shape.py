"""KroneckerShape: checks, text, and counts held against the factors themselves."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kncompress.kron import (
    HybridShape,
    KroneckerShape,
    ShapeError,
    divisors,
    kronecker_weight,
    parse_shape,
    with_scalars,
)
from kncompress.kron.routes import left_first, right_first
from kncompress.kron.shape import product_cost

sides = st.integers(1, 12)


@st.composite
def shapes(draw):
    left, right = draw(st.tuples(sides, sides)), draw(st.tuples(sides, sides))
    most = min(left[0] * left[1], right[0] * right[1])
    return KroneckerShape(left, right, draw(st.integers(1, most)), draw(st.booleans()))


@given(shapes())
def test_text_round_trip(shape):
    assert KroneckerShape.parse(str(shape)) == shape


def test_text_form():
    assert str(KroneckerShape((768, 768), (4, 1))) == "768x768(x)4x1"
    assert str(KroneckerShape((1024, 256), (3, 3), 2)) == "1024x256(x)3x3*2"
    assert str(KroneckerShape((768, 768), (4, 1), scalars=True)) == "s*768x768(x)4x1"
    assert KroneckerShape.parse(" 768 x 768 (x) 4 x 1 * 2 ") == KroneckerShape((768, 768), (4, 1), 2)
    assert KroneckerShape.parse(" s * 768x768(x)4x1*2") == KroneckerShape((768, 768), (4, 1), 2, True)


@pytest.mark.parametrize(
    "text", ["", "keep", "4x4", "4x4x2x2", "4x4(x)2x2*", "4x4(x)2x2 2", "-4x4(x)2x2", "4x4(x)2x2*1.5"]
)
def test_bad_text_is_named(text):
    with pytest.raises(ShapeError, match="not a Kronecker shape"):
        KroneckerShape.parse(text)


@given(shapes())
def test_fit_finds_the_same_shape(shape):
    found = KroneckerShape.fit(shape.out_features, shape.in_features, shape.right, shape.terms)
    assert found == replace(shape, scalars=False)
    assert with_scalars(found) == replace(shape, scalars=True)


@given(shapes())
def test_counts_match_the_tensors(shape):
    left, right = torch.randn(shape.terms, *shape.left), torch.randn(shape.terms, *shape.right)
    weight = kronecker_weight(left, right)
    assert weight.shape == (shape.out_features, shape.in_features)
    assert shape.parameters == left.numel() + right.numel() + (shape.terms if shape.scalars else 0)
    assert shape.dense_parameters == shape.dense_multiply_adds == weight.numel()


@given(shapes())
def test_multiply_adds_are_those_of_the_product(shape):
    left, right = torch.randn(shape.terms, *shape.left), torch.randn(shape.terms, *shape.right)
    counted = {}
    for order, apply in (("right", right_first), ("left", left_first)):
        with FlopCounterMode(display=False) as counter:
            apply(torch.randn(3, shape.in_features), left, right, None)
        counted[order] = counter.get_total_flops() // (2 * 3)
    assert shape.multiply_adds == counted[shape.order] == min(counted.values())


@pytest.mark.parametrize(
    ("right", "terms", "order", "multiply_adds", "numbers_written"),
    [
        ((4, 1), 1, "left", 768 * 768 + 3072, 768),
        ((1, 2), 1, "right", 768 + 3072 * 384, 384),
        ((4, 4), 8, "right", 8 * (192 * 16 + 192 * 4 * 768), 8 * 192 * 4),
        ((1, 768), 300, "right", 300 * (768 + 3072), 300),
    ],
)
def test_known_costs(right, terms, order, multiply_adds, numbers_written):
    shape = KroneckerShape.fit(3072, 768, right, terms)
    assert (shape.order, shape.multiply_adds) == (order, multiply_adds)
    assert product_cost(shape.left, right, terms, order) == (multiply_adds, numbers_written)


def test_equal_multiply_adds_are_split_by_numbers_written():
    wide = KroneckerShape((2, 8), (2, 2))  # right: 8*4 + 8*2*2 = 64; left: 2*8*2 + 2*4 = 40
    assert wide.order == "left"
    even = KroneckerShape((4, 2), (2, 4))  # 2*8 + 2*2*4 = 32 right; 4*2*4 + 4*8 = 64 left
    assert even.order == "right"
    tie = KroneckerShape((2, 2), (3, 3))  # 30 against 30; 6 numbers each: right
    assert tie.order == "right"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KroneckerShape.fit(3072, 768, [7, 1]), "right=[7, 1]: 7 does not divide 3072"),
        (lambda: KroneckerShape.fit(768, 3072, (1, 5)), "right=[1, 5]: 5 does not divide 3072"),
        (lambda: KroneckerShape.fit(6, 6, [0, 1]), "right=[0, 1]: 0 is not a positive whole number"),
        (lambda: KroneckerShape((2, 2), (1.0, 2)), "right=[1.0, 2]: 1.0 is not a positive whole number"),
        (lambda: KroneckerShape((2, 2, 2), (1, 2)), "left=(2, 2, 2): must be two numbers, rows and columns"),
        (lambda: KroneckerShape((2, 2), (True, 2)), "right=[True, 2]: True is not a positive whole number"),
        (lambda: KroneckerShape((6, 6), (2, 2), 5), "terms=5: 6x6(x)2x2 has at most 4 independent terms"),
        (lambda: KroneckerShape((1, 3), (9, 9), 4), "terms=4: 1x3(x)9x9 has at most 3 independent terms"),
        (lambda: KroneckerShape((6, 6), (2, 2), 0), "terms=0: must be a positive whole number"),
        (lambda: divisors(0), "0: must be 1 or more"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(ShapeError) as error:
        make()
    assert str(error.value) == message


def test_lists_become_tuples_and_shapes_hash():
    assert KroneckerShape([2, 3], [1, 2]) == KroneckerShape((2, 3), (1, 2))
    assert len({KroneckerShape([2, 3], [1, 2]), KroneckerShape((2, 3), (1, 2))}) == 1


@given(st.integers(1, 3000))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


HYBRID = "576x1(x)1x1536*8 + 288x1536(x)2x1"


def test_hybrid_text_and_counts():
    shape = HybridShape.parse(HYBRID)
    assert str(shape) == HYBRID and HybridShape.parse(f"  {HYBRID.replace(' + ', '+')} ") == shape
    assert len({shape, HybridShape(list(shape.parts))}) == 1
    assert (shape.out_features, shape.in_features) == (576, 1536)
    assert shape.parameters == 8 * (576 + 1536) + 288 * 1536 + 2
    assert shape.multiply_adds == 8 * (576 + 1536) + 288 * 1536 + 576
    assert shape.dense_parameters == shape.dense_multiply_adds == 576 * 1536


@given(shapes())
def test_parse_shape_reads_both(shape):
    assert parse_shape(str(shape)) == shape
    outer = KroneckerShape.fit(shape.out_features, shape.in_features, (1, shape.in_features))
    if (outer.left, outer.right) != (shape.left, shape.right):
        assert parse_shape(f"{outer} + {shape}") == HybridShape((outer, shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x4(x)2x2 +", "'': not a Kronecker shape; write left(x)right*terms, as in 768x768(x)4x1*2"),
        ("4x4(x)2x2 + 4x4(x)2x1", "4x4(x)2x1: makes 8x4, but 4x4(x)2x2 makes 8x8"),
        ("4x4(x)2x2 + 4x4(x)2x2*2", "4x4(x)2x2*2: stands twice; give one part more terms"),
    ],
)
def test_bad_hybrids_are_named(text, message):
    with pytest.raises(ShapeError) as error:
        parse_shape(text)
    assert str(error.value).replace("' '", "''") == message
    with pytest.raises(ShapeError, match="parts=1: a hybrid has two parts or more"):
        HybridShape((KroneckerShape((4, 4), (2, 2)),))
