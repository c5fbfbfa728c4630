"""Hyperparameters of one's own: how they are drawn, inherited and kept in bounds."""

import dataclasses
import math
import random
import statistics

import pytest

from runtime.errors import UserError
from training.heredity import REACH, Heredity
from training.options import OptimizerOptions

GIVEN = OptimizerOptions(lr=1e-2, weight_decay=0.1)


def drawn(rank, world_size=8, names=("lr", "weight_decay"), spread=3.0, scale=0.2, given=GIVEN):
    return Heredity(names, given, spread, scale, rank, world_size)


def test_first_values_cover_the_spread_evenly_over_the_ranks():
    values = [drawn(rank).values for rank in range(8)]
    for name, centre in (("lr", 1e-2), ("weight_decay", 0.1)):
        places = sorted(math.log(value[name] / centre, 3.0) for value in values)
        assert [math.floor((place + 1) * 4) for place in places] == list(range(8))  # one in each eighth


def test_first_values_are_the_same_for_a_rank_that_starts_again_and_by_another_seed_others():
    assert drawn(3).values == drawn(3).values != drawn(4).values
    assert drawn(3).values != drawn(3, given=dataclasses.replace(GIVEN, seed=1)).values


def test_two_hyperparameters_do_not_rise_together_over_the_ranks():
    order = [sorted(range(8), key=lambda rank: drawn(rank).values[name]) for name in ("lr", "weight_decay")]
    assert order[0] != order[1]


def test_a_mutation_of_any_scale_stays_within_reach():
    heredity, dice = drawn(0, scale=1e300), random.Random(0)
    for _ in range(20):
        heredity.inherit(heredity.values, dice)
        assert all(
            centre / REACH <= heredity.values[name] <= centre * REACH
            for name, centre in (("lr", 1e-2), ("weight_decay", 0.1))
        )


def test_a_spread_of_one_gives_every_rank_the_given_values():
    assert drawn(5, spread=1.0).values == {"lr": pytest.approx(1e-2), "weight_decay": pytest.approx(0.1)}


def test_inherited_values_are_the_winners_times_a_log_normal_factor():
    heir, dice, factors = drawn(0, scale=0.3), random.Random(0), []
    for _ in range(2000):
        heir.inherit({"lr": 2e-2, "weight_decay": 0.1}, dice)
        factors.append(math.log(heir.values["lr"] / 2e-2))
    assert statistics.fmean(factors) == pytest.approx(0, abs=0.03)
    assert statistics.stdev(factors) == pytest.approx(0.3, rel=0.1)


def test_inherited_values_stay_within_reach_of_the_given_ones():
    heir, dice = drawn(0), random.Random(0)
    heir.inherit({"lr": 1e9, "weight_decay": 1e-9}, dice)
    assert heir.values == {"lr": 1e-2 * REACH, "weight_decay": 0.1 / REACH}


def test_without_mutation_the_winners_values_are_taken_as_they_are():
    heir = drawn(0, scale=0.0)
    heir.inherit({"lr": 2e-2, "weight_decay": 0.05}, random.Random(0))
    assert heir.values == {"lr": 2e-2, "weight_decay": 0.05}


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [(("sf_beta",), GIVEN, "lr,weight_decay,grad_clip"), (("grad_clip",), OptimizerOptions(grad_clip=0.0), "above 0")],
)
def test_what_cannot_evolve_is_refused(names, given, message):
    with pytest.raises(UserError, match=message):
        drawn(0, names=names, given=given)
