"""What every factorisation of a linear map must do, held against its dense twin.

A test file subclasses ``FactorisationContract``, names its shapes and says how to make a layer. The dense
twin is ``F.linear`` with the layer's formed ``weight``.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


class FactorisationContract:
    """Subclass: ``shapes`` (with out_features, in_features, parameters), ``make`` and ``from_dense``."""

    shapes: tuple = ()
    refit_error: float | None = None
    """Most relative error of a refit to the layer's own dense weight; None: exact up to rounding."""

    def make(self, shape, bias=True, dtype=None, device=None) -> nn.Module:
        """A layer of ``shape`` with random parameters."""
        raise NotImplementedError

    def from_dense(self, weight: Tensor, bias: Tensor | None, shape) -> nn.Module:
        """The layer fitted to a dense map."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", metafunc.cls.shapes, ids=str)

    def random(self, shape, bias=True, dtype=torch.float64) -> nn.Module:
        """A layer whose parameters, the bias too, are random and of size one."""
        layer = self.make(shape, bias=bias, dtype=dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
    def test_values_equal_the_dense_twin(self, shape, bias, batch):
        layer = self.random(shape, bias)
        x = torch.randn(*batch, shape.in_features, dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*batch, shape.out_features)
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))

    @pytest.mark.parametrize("batch", [(), (7,), (40, 10)], ids=str)
    def test_gradients_equal_the_dense_twin(self, shape, batch):
        layer = self.random(shape)
        x = torch.randn(*batch, shape.in_features, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(*batch, shape.out_features, dtype=torch.float64)
        leaves = [x, *layer.parameters()]
        got = torch.autograd.grad(layer(x), leaves, upstream)
        want = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), leaves, upstream)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)

    def test_empty_batch_has_null_gradients(self, shape):
        layer = self.random(shape)
        layer(torch.randn(0, shape.in_features, dtype=torch.float64)).sum().backward()
        assert all(not p.grad.any() for p in layer.parameters())

    def test_strided_input(self, shape):
        layer = self.random(shape)
        x = torch.randn(shape.in_features, 6, dtype=torch.float64).T
        torch.testing.assert_close(layer(x), layer(x.contiguous()))

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
    )
    def test_types(self, shape, dtype, tolerance):
        layer = self.random(shape, dtype=dtype)
        x = torch.randn(20, shape.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
        exact = copy.deepcopy(layer).double()
        assert relative(y, F.linear(x.double(), exact.weight, exact.bias)) < tolerance

    @pytest.mark.parametrize("vectors", [1, 20])
    def test_bf16_autocast(self, shape, vectors):
        layer = self.random(shape, dtype=torch.float32)
        x = torch.randn(vectors, shape.in_features)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
        assert relative(y, F.linear(x, layer.weight, layer.bias)) < 3e-2

    def test_counts_its_parameters(self, shape):
        layer = self.make(shape, bias=False)
        assert sum(p.numel() for p in layer.parameters()) == shape.parameters
        assert (layer.out_features, layer.in_features) == (shape.out_features, shape.in_features)

    @pytest.mark.parametrize("bias", [True, False])
    def test_dense_export_and_refit(self, shape, bias):
        layer = self.random(shape, bias)
        dense = layer.to_dense()
        x = torch.randn(3, shape.in_features, dtype=torch.float64)
        torch.testing.assert_close(dense(x), layer(x))
        again = self.from_dense(dense.weight, dense.bias, shape)
        if self.refit_error is None:
            torch.testing.assert_close(again(x), layer(x))
        else:
            assert relative(again.weight, layer.weight) < self.refit_error
            assert again.bias is None or torch.equal(again.bias, layer.bias)
        with torch.no_grad():
            dense.weight.zero_()
        assert layer.weight.any()  # an export shares nothing with its source

    def test_null_weight_gives_finite_factors(self, shape):
        layer = self.from_dense(torch.zeros(shape.out_features, shape.in_features), None, shape)
        assert all(p.isfinite().all() for p in layer.parameters())
        assert not layer.weight.any()
        x = torch.randn(3, shape.in_features)
        layer(x).sum().backward()
        assert any(p.grad.any() for p in layer.parameters())  # not stuck at zero

    def test_state_dict_and_deepcopy(self, shape):
        layer = self.random(shape)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded = self.make(shape, dtype=torch.float64)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        twin = copy.deepcopy(layer)
        x = torch.randn(3, shape.in_features, dtype=torch.float64)
        assert torch.equal(loaded(x), layer(x))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        assert torch.equal(twin(x), loaded(x))

    def test_meta_device(self, shape):
        for layer in (self.make(shape, device="meta"), self._under_meta(shape)):
            assert all(p.is_meta for p in layer.parameters())
            assert layer(torch.empty(2, shape.in_features, device="meta")).shape == (2, shape.out_features)

    def _under_meta(self, shape) -> nn.Module:
        with torch.device("meta"):
            return self.make(shape)
