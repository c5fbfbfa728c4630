"""The fused step against the library's own."""

import math

import pytest
import torch
from schedulefree import AdamWScheduleFree

from training import schedule_free
from training.schedule_free import FusedAdamWScheduleFree

SHAPES = ((67, 33), (130,), (1,), (300, 200))


def make(kind, dtype=torch.float32, device="cpu", **options):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype).to(device)) for shape in SHAPES]
    optimizer = kind(
        [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}],
        **{"lr": 3e-3, "betas": (0.9, 0.99), "warmup_steps": 50, **options},
    )
    optimizer.train()
    for parameter in parameters:
        optimizer.state[parameter] = {"z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}
    return parameters, optimizer


def train(parameters, optimizer, steps, seed=1):
    """The same gradients for everybody, of very different sizes: a slope that turns slowly, and noise."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.grad = (math.cos(step / 100) + 0.5 * noise) * 10.0 ** (2 * number - 3)
        optimizer.step()


def states(parameters, optimizer):
    return [(p.detach(), optimizer.state[p]["z"], optimizer.state[p]["exp_avg_sq"]) for p in parameters]


@pytest.fixture
def kernel():
    assert schedule_free.kernels() is not None


def test_fused_step_equals_the_librarys_over_1000_steps(kernel):
    ours, exact = make(FusedAdamWScheduleFree), make(AdamWScheduleFree)
    train(*ours, 1000)
    train(*exact, 1000)
    for found, expected in zip(states(*ours), states(*exact), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    for ours_group, exact_group in zip(ours[1].param_groups, exact[1].param_groups, strict=True):
        for name in ("k", "weight_sum", "lr_max", "scheduled_lr"):
            assert ours_group[name] == exact_group[name], name


@pytest.mark.parametrize("change", [{"warmup_steps": 0}, {"weight_lr_power": 0.0, "r": 1.0}], ids=str)
def test_fused_step_heeds_every_option(kernel, change):
    ours, exact = make(FusedAdamWScheduleFree, **change), make(AdamWScheduleFree, **change)
    train(*ours, 20)
    train(*exact, 20)
    for found, expected in zip(states(*ours), states(*exact), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_fused_step_reads_and_writes_the_librarys_state(kernel):
    (ours, fused), (theirs, library), (plain, reference) = (
        make(kind) for kind in (FusedAdamWScheduleFree, AdamWScheduleFree, AdamWScheduleFree)
    )
    train(plain, reference, 10)
    train(plain, reference, 10, seed=2)
    train(theirs, library, 10)
    fused.load_state_dict(library.state_dict())
    with torch.no_grad():
        for mine, its in zip(ours, theirs, strict=True):
            mine.copy_(its)
    train(ours, fused, 10, seed=2)
    for found, expected in zip(states(ours, fused), states(plain, reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_fused_step_leaves_the_gradients(kernel):
    parameters, optimizer = make(FusedAdamWScheduleFree)
    train(parameters, optimizer, 1)
    before = [p.grad.clone() for p in parameters]
    optimizer.step()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, before, strict=True))


def test_fused_step_passes_over_parameters_without_a_gradient(kernel):
    parameters, optimizer = make(FusedAdamWScheduleFree)
    train(parameters, optimizer, 3)
    before = parameters[0].detach().clone()
    parameters[0].grad = None
    optimizer.step()
    assert torch.equal(parameters[0], before)


@pytest.mark.parametrize("reason", ["no kernel", "float64"])
def test_step_is_the_librarys_where_the_kernel_cannot_serve(monkeypatch, reason):
    dtype = torch.float64 if reason == "float64" else torch.float32
    if reason == "no kernel":
        monkeypatch.setattr(schedule_free, "kernels", lambda: None)
    ours, exact = make(FusedAdamWScheduleFree, dtype), make(AdamWScheduleFree, dtype)
    train(*ours, 5)
    train(*exact, 5)
    for found, expected in zip(states(*ours), states(*exact), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
