"""A peer whose base iterate has strayed is told from one that is only ahead."""

import math

import pytest
import torch
import torch.nn.functional as F

from mingru.minLM import MinLM, ModelConfig
from training import optimizer
from training.objections import LIMIT, ROUNDING, Objections
from training.optimizer import build_optimizer
from training.options import OptimizerOptions

STEPS, RATE = 100, 0.01
GENES = {"lr": RATE}


def scalars(steps):
    """Counters of an average of so many steps at RATE."""
    return {"k": 7.0, "weight_sum": steps * RATE**2, "lr_max": RATE}


def weights_of(**options):
    torch.manual_seed(0)
    return build_optimizer(MinLM(ModelConfig(dim=8, depth=1)), OptimizerOptions(**options))


def gone(times):
    """Tensors whose base iterate is `times` a hundredth of the weights from where training is."""
    tensors = {name: tensor.clone() for name, tensor in weights_of().tensors().items()}
    for name in tensors:
        if name[0] == "z":
            tensors[name].add_(tensors[f"y{name[1:]}"], alpha=0.01 * times)
    return tensors


def load(weights, tensors, counters):
    for name, tensor in weights.tensors().items():
        tensor.copy_(tensors[name])
    weights.load_scalars(counters)


@pytest.fixture
def own():
    weights = weights_of()
    load(weights, gone(1), scalars(STEPS))
    return weights


def objection(own, times, lr=RATE, evolves=False, limit=LIMIT, steps=STEPS):
    return Objections(own, lambda: GENES, evolves, limit).to(gone(times), scalars(steps), {"lr": lr})


@pytest.mark.parametrize("items", [7, 1024 * 1024])  # pieces that end within a tensor, and none that does
def test_excursion_is_the_distance_of_base_iterate_and_average(own, monkeypatch, items):
    monkeypatch.setattr(optimizer, "PIECE_ITEMS", items)
    averaged, tensors = own.averaged(), own.tensors()
    apart = torch.cat([(tensors[f"z.{name}"] - x).flatten() for name, x in averaged.items()])
    size = torch.cat([x.flatten() for x in averaged.values()])
    found = own.excursion(tensors)
    assert found.distance == pytest.approx(float(apart.norm()), rel=1e-4)
    assert found.size == pytest.approx(float(size.norm()), rel=0.01)


@pytest.mark.parametrize(("times", "objects"), [(0, False), (1, False), (9.9, False), (10.6, True), (30, True)])
def test_excursion_of_ten_times_ones_own_is_the_limit(own, times, objects):
    assert (objection(own, times) is not None) is objects
    assert (objection(own, -times) is not None) is objects
    assert objection(own, times, limit=math.inf) is None


def test_excursion_objection_tells_both_distances(own):
    distance = own.excursion(own.tensors()).distance
    assert f"is {20 * distance:.3g} from" in objection(own, 20) and f"where {distance:.3g} is" in objection(own, 20)


def test_excursion_may_grow_with_the_square_of_the_steps_behind_it(own):
    assert objection(own, 30, steps=1.6 * STEPS) is not None
    assert objection(own, 30, steps=1.8 * STEPS) is None
    assert objection(own, 11, steps=1) is not None and objection(own, 9, steps=1) is None  # fewer bound it no tighter


@pytest.mark.parametrize("lr_max", [1e-300, 1e-200, 1e-80, 1e15])
def test_excursion_is_judged_whatever_a_peer_counts(own, lr_max):
    theirs = {"k": 7.0, "weight_sum": 1e15, "lr_max": lr_max}
    said = Objections(own, lambda: GENES, False, LIMIT).to(gone(30), theirs, GENES)
    assert (said is None) is (lr_max == 1e-80)  # so many steps excuse any distance


def test_excursion_of_nobody_surprises_a_rank_whose_average_has_one_step(own):
    for steps, objects in ((0, False), (1, False), (1.1, True)):
        own.load_scalars(scalars(steps))
        assert (objection(own, 1000, steps=1) is not None) is objects
    own.load_scalars({"k": 0, "weight_sum": 0.0, "lr_max": -1.0})  # of a new optimizer
    assert objection(own, 1000) is None


def test_excursion_may_be_as_much_longer_as_an_evolving_rate_is_higher(own):
    assert objection(own, 30, 4 * RATE, evolves=True) is None
    assert objection(own, 50, 4 * RATE, evolves=True) is not None
    assert objection(own, 11, RATE / 4, evolves=True) is not None  # a lower one bounds it no tighter
    assert objection(own, 9, RATE / 4, evolves=True) is None
    assert objection(own, 30, 4 * RATE) is not None


@pytest.mark.parametrize("schedulefree", [True, False])
def test_a_rate_of_ten_times_ones_own_is_the_limit_where_rates_do_not_evolve(schedulefree):
    """Of weights that tell nothing yet, whatever the optimizer."""
    weights = weights_of(schedulefree=schedulefree)
    for lr, evolves, objects in ((9.9, False, False), (10.1, False, True), (10.1, True, False), (0.01, False, False)):
        objections = Objections(weights, lambda: GENES, evolves)
        found = objections.to(weights.tensors(), weights.scalars(), {"lr": lr * RATE})
        assert (found is not None) is objects
        assert found is None or found == "it trains at a rate of 0.101, where 0.01 is usual here"
    assert (
        Objections(weights, lambda: GENES, False, math.inf).to(weights.tensors(), weights.scalars(), {"lr": 9.0})
        is None
    )


@pytest.mark.parametrize("seed", range(5))
def test_excursion_in_the_first_steps_is_not_mistaken_for_the_wires_rounding(seed):
    """Sound ranks that have hardly moved: what bfloat16 leaves of the difference is rounding, far above what it was."""
    own = weights_of()
    own.load_scalars(scalars(2))
    generator = torch.Generator().manual_seed(seed)
    rounded = {}
    for name, tensor in own.tensors().items():
        ulp = 2.0 ** (tensor.abs().clamp(min=1e-30).log2().floor() - 7)
        rounded[name] = torch.floor(tensor / ulp + torch.rand(tensor.shape, generator=generator)) * ulp
    assert own.excursion(own.tensors()).distance == 0 < own.excursion(rounded).distance
    assert own.excursion(rounded).distance < ROUNDING * own.excursion(rounded).size
    assert Objections(own, lambda: GENES, False).to(rounded, scalars(2), GENES) is None


def test_excursion_is_unknown_to_an_optimizer_without_an_average():
    weights = weights_of(schedulefree=False)
    assert weights.excursion(weights.tensors()) is None
    weights.load_scalars({"steps": 9.0})
    assert Objections(weights, lambda: GENES, False).to(weights.tensors(), {"steps": 9.0}, GENES) is None


AGES = [1, 2, 3, 5, 8, 12, 20, 40, 80]


def course(seed, lr, warmup_steps):
    """A small model's states after AGES steps: (tensors, scalars) of each."""
    torch.manual_seed(0)
    model = MinLM(ModelConfig(dim=16, depth=1))
    weights = build_optimizer(model, OptimizerOptions(lr=lr, warmup_steps=warmup_steps))
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for step in range(1, AGES[-1] + 1):
        ids = torch.randint(0, 256, (4, 1), generator=generator) + torch.arange(17)  # each byte follows from the last
        logits, _ = model(ids[:, :-1] % 256)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten() % 256).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        weights.step()
        model.zero_grad()
        if step in AGES:
            states[step] = {name: tensor.clone() for name, tensor in weights.tensors().items()}, weights.scalars()
    return weights, states


@pytest.mark.parametrize("warmup_steps", [0, 40, 1000])
def test_excursion_of_sound_ranks_passes_whatever_their_ages_and_at_thirty_times_the_rate_not(warmup_steps):
    weights, own = course(1, 0.01, warmup_steps)
    _, others = course(2, 0.01, warmup_steps)
    _, eightfold = course(3, 0.08, warmup_steps)
    _, diverging = course(4, 0.3, warmup_steps)
    objections = Objections(weights, lambda: GENES, False)  # to no rate: all tell the same
    found = set()
    for age, state in own.items():
        load(weights, *state)
        assert not [of for of, other in others.items() if objections.to(*other, GENES)], age
        assert objections.to(*eightfold[age], GENES) is None, age
        if objections.to(*diverging[age], GENES):
            found.add(age)
    assert {12, 20} <= found and (warmup_steps == 1000 or {5, 8} <= found), found


def test_excursion_of_who_has_just_taken_an_elders_weights_is_the_elders():
    """A rank that adopts keeps the counter of its second moments, but its average is the elder's."""
    weights, own = course(1, 0.01, 40)
    _, others = course(2, 0.01, 40)
    tensors, counters = others[80]
    adopter = tensors, counters | {"k": own[3][1]["k"]}
    objections = Objections(weights, lambda: GENES, False)
    load(weights, *own[20])
    assert objections.to(*adopter, GENES) is None
    load(weights, *adopter)
    _, faster = course(4, 0.3, 40)
    tensors, counters = faster[80]
    strict = Objections(weights, lambda: GENES, False, limit=2.0)
    assert strict.to(tensors, counters, GENES) == strict.to(tensors, counters | {"k": 1}, GENES) is not None
