"""The fused GELU against torch's, in float64 and at its edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mingru import gelu
from mingru.gelu import gelu_of


@pytest.fixture(autouse=True)
def native():
    assert gelu.kernels() is not None


def outcome(layer, x, grad, forward):
    """The output and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    out = forward(layer, x)
    out.backward(grad.to(out.dtype))
    return out.detach(), x.grad, layer.weight.grad, layer.bias.grad


def make(dtype, width=50):
    torch.manual_seed(0)
    layer = nn.Linear(24, width)
    with torch.no_grad():
        layer.bias.normal_()
    return layer.to(dtype), torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, width).to(dtype)


def plain(layer, x):
    return F.gelu(layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gelu_of_a_layer_equals_torch_with_gradients(dtype):
    layer, x, grad = make(dtype)
    found = outcome(layer, x, grad, gelu_of)
    layer.zero_grad()
    expected = outcome(layer.double(), x.double(), grad.double(), plain)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, rtol=10 * tolerance, atol=10 * tolerance)


def test_gelu_and_its_slope_are_as_near_as_float32_allows():
    v = torch.cat((torch.linspace(-15, 15, 30001), torch.tensor([0.0, -0.0, 1e-30, 100.0, -100.0, 3e38, -3e38])))
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    own, exact = v.clone().requires_grad_(), v.double().requires_grad_()
    for out in (gelu_of(layer, own.unsqueeze(1)), F.gelu(exact)):
        out.sum().backward()
    found, expected = gelu_of(layer, v.unsqueeze(1)).squeeze(1).detach().double(), F.gelu(v.double())
    assert ((found - expected).abs() <= 2e-7 + 2e-7 * v.abs()).all()
    assert ((own.grad - exact.grad).abs() <= 1e-6).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gelu_keeps_what_is_not_finite_in_its_place(bad):
    layer, x, _ = make(torch.float32)
    with torch.no_grad():
        layer.bias[7] = bad
    out = gelu_of(layer, x)
    assert out[..., 7].isnan().all() if math.isnan(bad) else (out[..., 7] == math.inf).all()
    assert out.isfinite().sum() == out.numel() - out[..., 7].numel()


def test_gelu_under_autocast_takes_bfloat16_products_and_a_float32_bias():
    layer, x, grad = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(layer, x, grad, gelu_of)
    layer.zero_grad()
    expected = outcome(layer, x, grad, plain)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), exact, rtol=0.05, atol=0.05)


def test_gelu_under_autocast_to_float16_is_torchs():
    layer, x, _ = make(torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(gelu_of(layer, x), plain(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_without_gradients_is_the_same_and_keeps_its_input(dtype):
    layer, x, _ = make(dtype)
    expected, before = gelu_of(layer, x).detach(), x.clone()
    with torch.no_grad():
        assert torch.equal(gelu_of(layer, x), expected)
    assert torch.equal(x, before)


def test_gelu_keeps_its_slope_alone():
    layer, x, grad = make(torch.float32)
    x, kept = x.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = gelu_of(layer, x)
    (slope,) = (tensor for tensor in kept if tensor.shape == out.shape)
    product = layer(x).detach().requires_grad_()
    F.gelu(product).sum().backward()
    torch.testing.assert_close(slope, product.grad, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)


def test_gelu_adds_up_the_rows_of_all_threads():
    layer, _, _ = make(torch.float32)
    x, grads, threads = torch.randn(1000, 24), [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            layer.zero_grad()
            gelu_of(layer, x).square().sum().backward()
            grads.append(layer.bias.grad.clone())
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(grads[1], grads[2])


def test_gelu_without_a_compiler_is_torchs(monkeypatch):
    layer, x, _ = make(torch.float32)
    expected = gelu_of(layer, x)
    monkeypatch.setattr(gelu, "kernels", lambda: None)
    torch.testing.assert_close(gelu_of(layer, x), expected)
