"""The convolution by C kernels against torch's way in float64, with resets at every place that matters."""

import pytest
import torch

from mingru import conv
from mingru.conv import CausalConv, reach
from mingru.minLM import MinLM, ModelConfig


@pytest.fixture(autouse=True)
def native():
    assert conv.kernels() is not None


def make(taps, width=70, lanes=3, steps=9):
    """A convolution with weights drawn, and x, the steps before it, and gradients of the output and of the state."""
    torch.manual_seed(0)
    module = CausalConv(width, taps)
    with torch.no_grad():
        for parameter in (module.taps, module.bias):
            parameter.normal_()
    x, past = torch.randn(lanes, steps, width), torch.randn(lanes, taps - 1, width)
    return module, x, past, torch.randn_like(x), torch.randn_like(past)


def resets(lanes, steps):
    """In the first lane none, in the second at the start, and two neighbours; in the others by chance."""
    reset = torch.rand(lanes, steps, generator=torch.Generator().manual_seed(1)) < 0.3
    reset[0] = False
    reset[1] = torch.arange(steps) % 5 < 2
    return reset


def outcome(module, x, past, grad, grad_state, reset):
    """Output, state, and the gradients of both inputs and all weights."""
    module.zero_grad()
    x, past = x.clone().requires_grad_(), past.clone().requires_grad_()
    reached = None if reset is None else reach(reset, len(module.taps), x.dtype)
    out, state = module(x, past, reached)
    torch.autograd.backward((out, state), (grad.to(out.dtype), grad_state.to(state.dtype)))
    weights = [parameter.grad.clone() for parameter in module.parameters()]
    return [out.detach(), state.detach(), x.grad, past.grad, *weights]


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("with_resets", [False, True], ids=["one document", "resets"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_convolution_equals_torchs_in_float64_with_gradients(steps, taps, with_resets, autocast):
    module, x, *rest = make(taps, steps=steps)
    reset = resets(*x.shape[:2]) if with_resets else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outcome(module, x, *rest, reset)
    expected = outcome(module.double(), x.double(), *(tensor.double() for tensor in rest), reset)
    assert found[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(mine.dtype == torch.float32 for mine in found[1:])
    tolerance = 0.06 if autocast else 2e-6
    for mine, exact in zip(found, expected, strict=True):
        scale = exact.abs().max() if exact.numel() else 1.0
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=tolerance * float(scale))


def test_convolution_sees_nothing_out_of_reach_not_even_nan():
    module, x, past, *_ = make(4)
    past[:] = torch.nan
    x[:, :3] = torch.nan
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset[:, 3] = True
    out, _ = module(x, past, reach(reset, 4, x.dtype))
    assert out[:, :3].isnan().all() and out[:, 3:].isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"past": torch.zeros(3, 2, 70)}, {"reset": torch.zeros(1, 9, dtype=torch.bool)},
              {"reset": torch.zeros(3, 9, dtype=torch.uint8)}], ids=["past", "one lane", "uint8"],
)  # fmt: skip
def test_convolution_hands_no_other_shapes_to_the_kernels(wrong):
    module, x, past, *_ = make(4)
    reset = wrong.get("reset", torch.zeros(3, 9, dtype=torch.bool))
    with pytest.raises((AssertionError, RuntimeError)):
        module(x, wrong.get("past", past), reach(reset, 4, x.dtype))


def test_convolution_adds_up_the_steps_of_all_threads():
    module, *inputs = make(4, steps=501)
    reset, grads, threads = resets(3, 501), [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            grads.append(outcome(module, *inputs, reset))
    finally:
        torch.set_num_threads(threads)
    for one, two, again in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        assert torch.equal(two, again)


def test_convolution_without_a_compiler_is_torchs(monkeypatch):
    module, *inputs = make(4)
    found = outcome(module, *inputs, resets(3, 9))
    monkeypatch.setattr(conv, "kernels", lambda: None)
    for mine, theirs in zip(found, outcome(module, *inputs, resets(3, 9)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_training_takes_the_convolution_from_the_kernels(monkeypatch, autocast):
    monkeypatch.setattr(conv._Taps, "apply", None)
    model = MinLM(ModelConfig(dim=8, depth=2, conv_kernel_size=4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, _ = model(torch.zeros(2, 5, dtype=torch.uint8), None, torch.ones(2, 5, dtype=torch.bool))
    logits.float().sum().backward()
    assert all(layer.conv.taps.grad.isfinite().all() for layer in model.layers)
