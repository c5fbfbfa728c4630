import copy

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn

from gossip.state import Rule
from training import optimizer
from training.optimizer import build_optimizer
from training.options import OptimizerOptions


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def train(model: nn.Module, step, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(16, 4, generator=generator)).square().sum().backward()
        step()


FAMILIES = pytest.mark.parametrize("schedulefree", [True, False], ids=["schedule-free", "adamw"])


def test_schedule_free_weights_train_like_the_library_alone():
    ours, theirs = small_model(), small_model()
    options = OptimizerOptions(lr=0.01, weight_decay=0.1, warmup_steps=5)
    train(ours, build_optimizer(ours, options).step, 30)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    library = AdamWScheduleFree(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01, betas=(options.sf_beta, options.sf_beta2), warmup_steps=5,
    )  # fmt: skip
    library.train()
    train(theirs, library.step, 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_averaged_is_the_librarys_eval_and_leaves_training_bit_for_bit_alone():
    model = small_model()
    weights = build_optimizer(model, OptimizerOptions(lr=0.01))
    train(model, weights.step, 10)
    before = copy.deepcopy(weights.tensors())
    averaged = weights.averaged()
    for name, tensor in weights.tensors().items():
        assert torch.equal(tensor, before[name])
    weights._optimizer.eval()  # the library's own way to x, in place
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(averaged[name], parameter.detach())
        assert not torch.allclose(averaged[name], before[f"y.{name}"])


@FAMILIES
def test_tensors_are_the_live_ones_with_a_rule_each(schedulefree):
    model = small_model()
    weights = build_optimizer(model, OptimizerOptions(schedulefree=schedulefree))
    tensors = weights.tensors()
    assert tensors.keys() == weights.rules.keys()
    assert len(tensors) == 3 * len(list(model.parameters()))
    assert {name for name, rule in weights.rules.items() if rule is Rule.SECOND_MOMENT} == {
        name for name in tensors if name.startswith("v.")
    }
    for tensor in tensors.values():
        tensor.fill_(2.0)
    assert all(bool((p == 2).all()) for p in model.parameters())
    assert all(bool((tensor == 2).all()) for tensor in weights.tensors().values())


@FAMILIES
def test_tensors_and_scalars_are_all_that_going_on_needs(schedulefree):
    options = OptimizerOptions(lr=0.01, warmup_steps=20, weight_decay=0.1, schedulefree=schedulefree)
    model, other = small_model(), small_model()
    weights, copied = build_optimizer(model, options), build_optimizer(other, options)
    train(model, weights.step, 10)
    with torch.no_grad():
        for name, tensor in copied.tensors().items():
            tensor.copy_(weights.tensors()[name])
    copied.load_scalars(weights.scalars())
    train(model, weights.step, 10, seed=5)
    train(other, copied.step, 10, seed=5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@FAMILIES
def test_adopt_goes_on_as_a_new_optimizer_would(schedulefree):
    options = OptimizerOptions(lr=0.01, warmup_steps=3, schedulefree=schedulefree)
    model = small_model()
    weights = build_optimizer(model, options)
    train(model, weights.step, 10)
    adopted = weights.averaged()
    weights.adopt(adopted)
    fresh = small_model()
    fresh.load_state_dict(adopted)
    new = build_optimizer(fresh, options)
    for name, value in weights.averaged().items():
        assert torch.equal(value, adopted[name])
    train(model, weights.step, 5, seed=7)
    train(fresh, new.step, 5, seed=7)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


@FAMILIES
def test_warmup_raises_the_rate_linearly(schedulefree):
    model = small_model()
    weights = build_optimizer(model, OptimizerOptions(lr=0.4, warmup_steps=4, schedulefree=schedulefree))
    rates = []
    for _ in range(6):
        train(model, weights.step, 1)
        rates.append(weights.lr)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@FAMILIES
def test_weight_decay_shrinks_matrices_only(schedulefree):
    model = small_model()
    options = OptimizerOptions(lr=0.1, weight_decay=0.5, warmup_steps=0, schedulefree=schedulefree)
    weights = build_optimizer(model, options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weights.step()
    for name, p in model.named_parameters():
        shrunk = p.detach().abs().sum() < before[name].abs().sum()
        assert bool(shrunk) == (p.ndim > 1), name


def excursion_by_hand(weights, model, beta):
    """In float64, of the two sequences whole."""
    tensors = weights.tensors()
    y, z = (torch.cat([tensors[f"{kind}.{name}"].double().view(-1) for name, _ in model.named_parameters()]).cpu()
            for kind in "yz")  # fmt: skip
    return float((z - y).norm()) / beta, float(y.norm())


@pytest.mark.parametrize("items", [7, 10**6])
def test_excursion_is_the_same_in_any_pieces(items, monkeypatch):
    monkeypatch.setattr(optimizer, "PIECE_ITEMS", items)
    model, options = small_model(), OptimizerOptions(lr=0.01)
    weights = build_optimizer(model, options)
    train(model, weights.step, 10)
    found = weights.excursion(copy.deepcopy(weights.tensors()))
    assert (found.distance, found.size) == pytest.approx(excursion_by_hand(weights, model, options.sf_beta), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_excursion_of_a_state_on_the_host_equals_that_on_a_gpu():
    model, options = small_model().cuda(), OptimizerOptions(lr=0.01)
    weights = build_optimizer(model, options)
    for tensor in weights.tensors().values():
        tensor.add_(torch.rand_like(tensor))
    expected = pytest.approx(excursion_by_hand(weights, model, options.sf_beta), rel=1e-5)
    for tensors in (weights.tensors(), {name: tensor.cpu().pin_memory() for name, tensor in weights.tensors().items()}):
        found = weights.excursion(tensors)
        assert (found.distance, found.size) == expected
