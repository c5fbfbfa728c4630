"""Dropout: the share and the mean that it keeps, one mask for both passes, and where its random bits come from."""

import math

import pytest
import torch
import torch.nn.functional as F

from mingru import MinLM, ModelConfig
from mingru.dropout import STEPS, dropout, kernels
from training.computation import training_pass
from training.options import ComputeOptions

COUNT = 1_000_003  # no multiple of what the kernel draws at once


def dropped(seed: int, chance: float = 0.25, count: int = COUNT) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(count), chance)


@pytest.mark.parametrize("chance", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_dropout_keeps_the_share_and_the_mean(chance):
    assert kernels() is not None
    out = dropped(1, chance)
    deviation = math.sqrt(chance * (1 - chance) / COUNT)
    assert abs(float((out != 0).double().mean()) - (1 - chance)) < 4 * deviation + 1 / STEPS
    assert abs(float(out.double().mean()) - 1) < 4 * deviation / (1 - chance)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - chance)], rel=1e-3)


def test_dropout_drops_each_element_by_itself():
    """As often together with a neighbour as chance has it, at any distance within what is drawn at once and beyond."""
    for distance in (1, 2, 3, 4, 5, 256, 512, 1024, 2048, 4096):
        zero = dropped(2, 0.5) == 0
        together = float((zero[distance:] & zero[:-distance]).double().mean())
        assert abs(together - 0.25) < 4 * math.sqrt(0.25 * 0.75 / COUNT), distance


def test_dropout_gives_the_gradient_the_mask_of_the_values():
    x = torch.ones(3, 1000, requires_grad=True)
    out = dropout(x, 0.3)
    dropout(torch.ones(5), 0.3)  # draws anew in between
    out.backward(torch.full_like(x, 2.0))
    assert torch.equal(x.grad, 2 * out.detach()) and 0 < int((x.grad == 0).sum()) < x.numel()
    turned = torch.ones(1000, 3, requires_grad=True)
    out = dropout(turned.T, 0.3)
    out.sum().backward()
    assert torch.equal(turned.grad.T, out.detach())


@pytest.mark.parametrize("chance", [0.0, 1e-9])
def test_dropout_of_nearly_no_chance_changes_nothing(chance):
    x = torch.randn(COUNT)
    assert torch.equal(dropout(x, chance), x)


@pytest.mark.parametrize("chance", [1 - 1e-6, math.nextafter(1, 0)])
def test_dropout_of_nearly_certainty_keeps_the_mean(chance):
    out = dropped(3, chance, 64 * STEPS)
    assert set(out.unique().tolist()) == {0.0, float(STEPS)} and abs(float(out.mean()) - 1) < 4 / math.sqrt(64)


def test_dropout_follows_torchs_generator_and_no_number_of_threads():
    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = dropout(torch.ones(4096), 0.5), dropout(torch.ones(4096), 0.5)
    torch.set_rng_state(state)
    assert torch.equal(dropout(torch.ones(4096), 0.5), first) and not torch.equal(first, second)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(dropped(7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_dropout_lets_what_is_not_finite_through():
    assert not dropout(torch.full((100,), math.nan), 0.5).isfinite().any()


def test_dropout_in_other_dtypes_and_where_there_is_no_kernel(monkeypatch):
    low = dropout(torch.ones(10_000, dtype=torch.bfloat16), 0.5)
    assert low.dtype == torch.bfloat16 and set(low.unique().tolist()) == {0.0, 2.0}
    for no_kernel in (False, True):
        if no_kernel:
            monkeypatch.setattr("mingru.dropout.kernels", lambda: None)
        for dtype in (torch.float32, torch.float64)[not no_kernel :]:
            torch.manual_seed(1)
            found = dropout(torch.ones(100, dtype=dtype), 0.5)
            torch.manual_seed(1)
            assert torch.equal(found, F.dropout(torch.ones(100, dtype=dtype), 0.5))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dropout_is_the_same_where_layers_are_computed_again(dtype):
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = MinLM(ModelConfig(dim=16, depth=2, conv_kernel_size=4, dropout=0.3))
        forward = training_pass(model, ComputeOptions(dtype=dtype, checkpoint_layers=again), torch.device("cpu"))
        logits, _ = forward(torch.arange(80, dtype=torch.uint8).view(2, 40))
        logits.float().square().mean().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_compiles_without_a_graph_break():
    model = MinLM(ModelConfig(dim=16, depth=1, dropout=0.5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids_BT = torch.randint(0, 256, (2, 20))
    first, second = compiled(ids_BT)[0], compiled(ids_BT)[0]
    first.sum().backward()
    assert not torch.equal(first, second) and model.token_emb.weight.grad.isfinite().all()
