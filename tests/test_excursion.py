"""A peer whose base iterate has strayed is told from one that is only ahead."""

import math

import pytest
import torch

from mingru.minLM import MinLM, ModelConfig
from training import optimizer
from training.excursion import LIMIT, ROUNDING, Excursions
from training.optimizer import build_optimizer
from training.options import OptimizerOptions

STEPS = 100


def weights_of(schedulefree=True):
    torch.manual_seed(0)
    return build_optimizer(MinLM(ModelConfig(dim=8, depth=1)), OptimizerOptions(schedulefree=schedulefree))


def gone(times):
    """(tensors, scalars) after STEPS steps, the base iterate `times` a hundredth of the weights from training's."""
    tensors = {name: tensor.clone() for name, tensor in weights_of().tensors().items()}
    for name in tensors:
        if name[0] == "z":
            tensors[name].add_(tensors[f"y{name[1:]}"], alpha=0.01 * times)
    return tensors, {"k": STEPS}


@pytest.fixture
def own():
    weights = weights_of()
    tensors, _ = gone(1)
    for name, tensor in weights.tensors().items():
        tensor.copy_(tensors[name])
    weights.load_scalars({"k": STEPS, "weight_sum": 1.0, "lr_max": 0.01})
    return weights


def objection(own, times, genes=None, own_genes=None, limit=LIMIT, **scalars):
    tensors, of_age = gone(times)
    return Excursions(own, lambda: own_genes or {}, limit).objection(tensors, of_age | scalars, genes or {})


@pytest.mark.parametrize("items", [7, 1024 * 1024])  # pieces that end within a tensor, and none that does
def test_excursion_is_the_distance_of_base_iterate_and_average(own, monkeypatch, items):
    monkeypatch.setattr(optimizer, "PIECE_ITEMS", items)
    averaged, tensors = own.averaged(), own.tensors()
    apart = torch.cat([(tensors[f"z.{name}"] - x).flatten() for name, x in averaged.items()])
    size = torch.cat([x.flatten() for x in averaged.values()])
    found = own.excursion(tensors)
    assert found.distance == pytest.approx(float(apart.norm()), rel=1e-4)
    assert found.size == pytest.approx(float(size.norm()), rel=0.01)


@pytest.mark.parametrize(("times", "objects"), [(0, False), (1, False), (9, False), (11, True), (30, True)])
def test_excursion_of_ten_times_ones_own_is_the_limit(own, times, objects):
    assert (objection(own, times) is not None) is objects
    assert objection(own, times, limit=math.inf) is None
    assert objection(own, -times, limit=20) is None or times == 30  # the direction does not matter


def test_excursion_objection_tells_both_distances(own):
    distance = own.excursion(own.tensors()).distance
    assert f"is {20 * distance:.3g} from" in objection(own, 20) and f"where {distance:.3g} is" in objection(own, 20)


def test_excursion_may_be_as_much_longer_as_there_were_more_steps(own):
    assert objection(own, 30, k=STEPS * 3.1) is None
    assert objection(own, 30, k=STEPS * 2.9) is not None
    assert objection(own, 11, k=1) is not None and objection(own, 9, k=1) is None  # fewer bound it no tighter


def test_excursion_of_nobody_surprises_a_rank_without_a_step(own):
    own.load_scalars({"k": 0, "weight_sum": 0.0, "lr_max": -1.0})
    assert objection(own, 1000) is None


def test_excursion_may_be_as_much_longer_as_an_evolving_rate_is_higher(own):
    assert objection(own, 30, {"lr": 0.04}, {"lr": 0.01}) is None
    assert objection(own, 50, {"lr": 0.04}, {"lr": 0.01}) is not None
    assert objection(own, 11, {"lr": 0.001}, {"lr": 0.01}) is not None  # a lower one bounds it no tighter
    assert objection(own, 9, {"lr": 0.001}, {"lr": 0.01}) is None
    assert objection(own, 30, {"weight_decay": 0.1}, {"weight_decay": 0.01}) is not None


@pytest.mark.parametrize("seed", range(5))
def test_excursion_in_the_first_step_is_not_mistaken_for_the_wires_rounding(seed):
    """Sound ranks that have hardly moved: what bfloat16 leaves of the difference is rounding, far above what it was."""
    own = weights_of()
    own.load_scalars({"k": 1, "weight_sum": 1.0, "lr_max": 0.01})
    generator = torch.Generator().manual_seed(seed)
    rounded = {}
    for name, tensor in own.tensors().items():
        ulp = 2.0 ** (tensor.abs().clamp(min=1e-30).log2().floor() - 7)
        rounded[name] = torch.floor(tensor / ulp + torch.rand(tensor.shape, generator=generator)) * ulp
    assert own.excursion(own.tensors()).distance == 0 < own.excursion(rounded).distance
    assert own.excursion(rounded).distance < ROUNDING * own.excursion(rounded).size
    assert Excursions(own, dict).objection(rounded, {"k": 1}, {}) is None


def test_excursion_is_unknown_to_an_optimizer_without_an_average():
    weights = weights_of(schedulefree=False)
    assert weights.excursion(weights.tensors()) is None
    assert Excursions(weights, dict).objection(weights.tensors(), {"steps": 0}, {}) is None
