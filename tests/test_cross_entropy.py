"""The loss whose gradient takes the logits' place, by its C kernels and by torch alone, against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from mingru import cross_entropy as module
from mingru.cross_entropy import cross_entropy
from mingru.minLM import MinLM, ModelConfig
from training.data import Chunk
from training.losses import chunk_loss


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    """By which it is computed, in several pieces each."""
    monkeypatch.setattr(module, "ROWS", 3)
    if request.param == "torch":
        monkeypatch.setattr(module, "kernels", lambda: None)
    else:
        assert module.kernels() is not None
    return request.param


def logits_and_targets(dtype=torch.float32, rows=10, tokens=7, size=5.0):
    torch.manual_seed(0)
    return (torch.randn(rows, tokens) * size).to(dtype), torch.randint(0, tokens, (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.01, 5.0, 500.0])
@pytest.mark.parametrize("tokens", [1, 7, 256, 1000])
def test_cross_entropy_equals_torchs_and_makes_one_gradient(way, dtype, size, tokens):
    values, targets = logits_and_targets(dtype, tokens=tokens, size=size)
    exact = values.clone().double().requires_grad_()
    expected = F.cross_entropy(exact, targets)
    expected.backward(torch.tensor(3.0, dtype=torch.float64))
    leaf = values.clone().requires_grad_()
    logits = leaf * 1  # as a layer makes them
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=2e-7, abs=1e-6)
    loss.backward(torch.tensor(3.0), retain_graph=True)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6 + 2e-7 * size  # what float32 keeps of a difference of such numbers
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rtol, atol=1e-6)
    assert torch.equal(logits, leaf.grad)  # the gradient took the logits' place
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cross_entropy_leaves_the_logits_where_no_gradient_is_wanted(way):
    values, targets = logits_and_targets()
    before = values.clone()
    with torch.no_grad():
        loss = cross_entropy(values, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(before, targets).item(), rel=1e-6)
    assert torch.equal(values, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cross_entropy_of_what_is_not_finite_is_not(way, bad):
    values, targets = logits_and_targets()
    values[4, 2] = bad
    assert not math.isfinite(cross_entropy(values, targets).item())


def test_cross_entropy_takes_minus_infinity_for_an_impossible_token(way):
    values, targets = logits_and_targets(size=1.0)
    targets[:] = 1
    values[:, 3] = -math.inf
    logits = values.clone().requires_grad_()
    loss = cross_entropy(logits * 1, targets)
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(values, targets).item(), rel=1e-6)
    assert logits.grad[:, 3].abs().max() < 1e-30


@pytest.mark.parametrize("target", [-1, 7])
def test_cross_entropy_refuses_a_target_that_is_no_token(way, target):
    values, targets = logits_and_targets()
    targets[9] = target
    kind, words = (IndexError, r"expected targets in \[0, 7\)") if way == "native" else (RuntimeError, "out of bounds")
    with pytest.raises(kind, match=words):
        cross_entropy(values, targets)


def test_the_kernels_give_the_same_bits_on_any_number_of_threads():
    assert module.kernels() is not None
    values, targets = logits_and_targets(rows=300, tokens=256)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            logits = values.clone().requires_grad_()
            loss = cross_entropy(logits * 1, targets)
            loss.backward()
            found.append((loss.detach(), logits.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_training_takes_the_loss_from_the_kernels(monkeypatch):
    """chunk_loss() of a whole model: the logits become the gradient, without torch's own way."""
    monkeypatch.setattr(module._CrossEntropy, "apply", None)
    torch.manual_seed(0)
    model, seen = MinLM(ModelConfig(dim=16, depth=1)), []
    ids_BS = torch.randint(0, 256, (2, 9), dtype=torch.uint8).numpy()
    chunk = Chunk(ids_BS, torch.zeros(2, 8, dtype=torch.bool).numpy())
    model.to_logits.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    loss, _ = chunk_loss(model, chunk, None, torch.device("cpu"))
    expected = seen[0].detach().clone().requires_grad_()
    exact = F.cross_entropy(expected.flatten(0, 1), torch.from_numpy(ids_BS[:, 1:]).flatten().long())
    exact.backward()
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(seen[0].detach(), expected.grad)
