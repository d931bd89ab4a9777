"""KroneckerLinear by the contract; KroneckerEmbedding against nn.Embedding; the tied head."""

import copy

import pytest
import torch
from contracts.factorisation import FactorisationContract
from torch import nn

from kncompress.kron import KroneckerEmbedding, KroneckerLinear, KroneckerShape, ShapeError

SHAPES = tuple(
    KroneckerShape.parse(text)
    for text in (
        "12x10(x)1x2",
        "12x10(x)1x3*2",
        "12x10(x)4x1",
        "12x10(x)3x1*3",
        "7x5(x)3x2*2",
        "8x6(x)4x4*8",  # more multiply-adds than dense
        "13x1(x)1x11*4",  # outer products
        "1x13(x)11x1*4",
        "17x19(x)1x1",
        "1x1(x)17x13",
        "s*12x10(x)1x3*2",  # a scalar for each term
        "s*2x3(x)7x5*4",  # the left factors are the smaller ones
        "s*8x6(x)4x4*8",
        "s*13x1(x)1x11*4",
    )
)


class TestKroneckerLinear(FactorisationContract):
    shapes = SHAPES

    def make(self, shape, bias=True, dtype=None, device=None):
        return KroneckerLinear(shape, bias=bias, dtype=dtype, device=device)

    def from_dense(self, weight, bias, shape):
        return KroneckerLinear.from_dense(weight, bias, shape)


def test_state_dict_keys():
    assert list(KroneckerLinear(SHAPES[0]).state_dict()) == ["left", "right", "bias"]
    assert list(KroneckerLinear(SHAPES[0], bias=False).state_dict()) == ["left", "right"]
    assert list(KroneckerEmbedding(SHAPES[0]).state_dict()) == ["left", "right"]
    scaled = KroneckerShape((12, 10), (1, 2), 2, scalars=True)
    assert list(KroneckerLinear(scaled).state_dict()) == ["left", "right", "scale", "bias"]
    assert KroneckerLinear(scaled).scale.tolist() == [1.0, 1.0]


def test_repr_names_shape_and_costs():
    text = repr(KroneckerLinear(KroneckerShape((768, 768), (4, 1))))
    assert "768x768(x)4x1" in text
    assert "parameters=589,828 of 2,359,296" in text
    assert "multiply_adds=592,896 of 2,359,296" in text
    assert "bias=True" in text


@pytest.mark.parametrize("text", ["96x96(x)1x2", "96x48(x)4x1*3", "48x48(x)4x4*8", "192x1(x)1x192*40"])
@pytest.mark.parametrize("std", [0.02, 0.5])
def test_reset_gives_the_std_asked_for(text, std):
    layer = KroneckerLinear(KroneckerShape.parse(text), dtype=torch.bfloat16).float()
    layer.reset_parameters(std=std)
    weight = layer.weight.detach()
    assert float(weight.std()) == pytest.approx(std, rel=0.05)
    assert abs(float(weight.mean())) < 0.05 * std
    torch.testing.assert_close(layer.left.flatten(1).norm(dim=1), layer.right.flatten(1).norm(dim=1), rtol=0.15, atol=0)
    assert not layer.bias.any()


def test_from_dense_owns_its_memory():
    dense = nn.Linear(20, 12)
    layer = KroneckerLinear.from_dense(dense.weight, dense.bias, SHAPES[0])
    bias = layer.bias.clone()
    with torch.no_grad():
        dense.bias.zero_()
    assert torch.equal(layer.bias, bias)
    assert layer.bias.requires_grad and layer.left.requires_grad and layer.left.is_leaf


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_lookup_equals_the_dense_table(shape, batch, index):
    layer = KroneckerEmbedding(shape, dtype=torch.float64)
    dense = layer.to_dense()
    ids = torch.randint(shape.out_features, batch, dtype=index)
    torch.testing.assert_close(layer(ids), dense(ids))
    every = torch.arange(shape.out_features)
    torch.testing.assert_close(layer(every), layer.weight)
    again = KroneckerEmbedding.from_dense(dense.weight, shape)
    torch.testing.assert_close(again(ids), layer(ids))


@pytest.mark.parametrize("padding", [None, 1, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookup_gradients_equal_the_dense_table(shape, padding):
    layer = KroneckerEmbedding(shape, padding_idx=padding, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    ids = torch.cat([torch.randint(shape.out_features, (20,)), torch.tensor([1, shape.out_features - 1])])
    upstream = torch.randn(22, shape.in_features, dtype=torch.float64)
    leaves = list(layer.parameters())
    got = torch.autograd.grad(layer(ids), leaves, upstream)
    rows = nn.functional.embedding(ids, layer.weight, padding_idx=padding)
    want = torch.autograd.grad(rows, leaves, upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_padding_row_starts_null():
    layer = KroneckerEmbedding(KroneckerShape((9, 4), (1, 2)), padding_idx=-1)
    assert layer.padding_idx == 8 == layer.to_dense().padding_idx
    assert not layer(torch.tensor(8)).any() and layer(torch.tensor(7)).any()
    with pytest.raises(ShapeError, match="padding_idx=9"):
        KroneckerEmbedding(KroneckerShape((9, 4), (1, 2)), padding_idx=9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [-1, 0], ids=["negative", "too large"])
def test_row_outside_the_table_is_refused(shape, offset):
    layer = KroneckerEmbedding(shape)
    row = offset if offset < 0 else shape.out_features
    with pytest.raises(IndexError):
        layer(torch.tensor([0, row]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_autocast_rounds_neither_lookup_nor_fit_nor_export(shape):
    layer = KroneckerEmbedding(shape)
    ids = torch.arange(shape.out_features)

    def results():
        fitted = KroneckerEmbedding.from_dense(dense, shape)
        return layer(ids), layer.to_dense().weight, fitted.left, fitted.right

    dense = layer.to_dense().weight
    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        cast = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_embedding_on_meta():
    with torch.device("meta"):
        layer = KroneckerEmbedding(KroneckerShape((9, 4), (1, 2)), padding_idx=0)
        ids = torch.zeros(2, 3, dtype=torch.int64)
    assert layer.left.is_meta and layer.right.is_meta
    assert layer(ids).shape == (2, 3, 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tied_head(shape):
    embedding = KroneckerEmbedding(shape, dtype=torch.float64)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    head = KroneckerLinear.tied_to(embedding)
    assert head.left is embedding.left and head.right is embedding.right and head.scale is embedding.scale
    assert head.bias is None
    hidden = torch.randn(3, shape.in_features, dtype=torch.float64)
    torch.testing.assert_close(head(hidden), hidden @ embedding.to_dense().weight.T)


def test_tie_survives_deepcopy_and_gathers_both_gradients():
    embedding = KroneckerEmbedding(SHAPES[1], dtype=torch.float64)
    model = copy.deepcopy(nn.ModuleDict({"embedding": embedding, "head": KroneckerLinear.tied_to(embedding)}))
    assert model.head.left is model.embedding.left and model.head.left is not embedding.left
    assert len(list(model.parameters())) == 2
    ids = torch.tensor([0, 5, 5])
    model.head(model.embedding(ids)).square().sum().backward()
    left, right = (p.detach().clone().requires_grad_() for p in (embedding.left, embedding.right))
    table = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    (table[ids] @ table.T).square().sum().backward()
    torch.testing.assert_close(model.embedding.left.grad, left.grad)
    torch.testing.assert_close(model.embedding.right.grad, right.grad)
