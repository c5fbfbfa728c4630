"""What a rank knows of its own fitness, and when it is measured."""

import itertools
import math

import pytest

from gossip.comparison import Evidence
from gossip.fitness_tracker import FitnessTracker
from training.fitness import Fitness


class Scripted:
    """A probe whose windows both have the next of some losses; training's own weights are worse by 1."""

    id, windows = "ab" * 16, 2

    def __init__(self, *losses):
        self.losses, self.measured = list(losses), 0

    def measure(self):
        self.measured += 1
        loss = self.losses.pop(0)
        return (loss, loss + 1), Evidence(self.id, (loss, loss)) if math.isfinite(loss) else None


def fitness_of(*losses, kind="probe", every=10):
    return Fitness(kind, FitnessTracker(0.5), Scripted(*losses), every)


def measured_steps(fitness, steps):
    """Of these steps, those at which the probe was measured."""
    found = []
    for step in steps:
        before = fitness.probe.measured
        fitness.measure_if_due(step)
        found += [step] * (fitness.probe.measured - before)
    return found


def test_fitness_is_measured_at_once_and_then_every_so_many_steps():
    fitness = fitness_of(3.0, 2.0)
    assert measured_steps(fitness, range(1000, 1015)) == [1000, 1010]
    assert fitness.value == fitness.best == 2.0


def test_evidence_of_a_young_rank_is_never_older_than_a_quarter_of_its_steps():
    fitness = fitness_of(*[1.0] * 100, every=50)
    steps = measured_steps(fitness, range(400))
    assert all(later - sooner <= max(1, later / 4) for sooner, later in itertools.pairwise(steps))
    assert steps[:6] == [0, 1, 2, 3, 4, 5] and steps[-3:] == [257, 307, 357] and len(steps) < 25


def test_evidence_of_a_judged_merge_is_as_old_as_the_merge():
    fitness = fitness_of(*[1.0] * 9, every=50)
    assert measured_steps(fitness, range(1000, 1030)) == [1000]
    fitness.judge()
    fitness.replaced(judged=True)
    assert measured_steps(fitness, range(1030, 1100)) == [1079]


def test_fitness_of_replaced_weights_is_unknown_until_it_is_measured():
    fitness = fitness_of(3.0, 5.0)
    fitness.measure_if_due(1)
    fitness.replaced(judged=False)
    assert fitness.value is None and fitness.evidence is None and fitness.known is None and fitness.best == 3.0
    fitness.measure_if_due(2)
    assert fitness.value == 5.0 and fitness.best == 3.0


def test_fitness_of_a_judged_merge_is_what_the_judge_saw_last():
    fitness = fitness_of(3.0, 2.5)
    fitness.measure_if_due(1001)
    assert fitness.judge() == (2.5, 3.5) and fitness.value == 3.0  # nothing is settled yet: it may be undone
    assert fitness.known == (3.0, 4.0)
    fitness.replaced(judged=True)
    assert fitness.value == fitness.best == 2.5 and fitness.evidence.losses == (2.5, 2.5)
    assert fitness.known == (2.5, 3.5)
    fitness.measure_if_due(1002)
    assert fitness.probe.measured == 2


def test_fitness_by_a_moving_average_costs_no_probe():
    fitness = fitness_of(9.0, kind="ema")
    fitness.measure_if_due(0)
    assert fitness.probe.measured == 0 and fitness.value is None
    fitness.tracker.observe(2.0)
    assert fitness.value == fitness.best == 2.0 and fitness.evidence is None and fitness.known is None
    fitness.replaced(judged=True)
    assert fitness.value is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_fitness_of_what_is_not_finite_is_unknown(loss):
    fitness = fitness_of(loss, 1.0)
    fitness.measure_if_due(1)
    assert fitness.value is None and fitness.known is None and fitness.best is None
    fitness.measure_if_due(2)
    assert fitness.value == 1.0


def test_fitness_goes_on_with_the_evidence_of_a_checkpoint_of_the_same_probe():
    fitness = fitness_of(2.0, 3.0)
    assert measured_steps(fitness, range(2)) == [0, 1]
    state = fitness.state_dict()
    same, other = fitness_of(4.0), fitness_of(4.0)
    other.probe.id = "cd" * 16
    for resumed, expected, best in ((same, 3.0, 2.0), (other, 4.0, 4.0)):
        resumed.load_state_dict(state)
        resumed.measure_if_due(1)
        assert resumed.value == expected and resumed.best == best
    same.probe.losses = [5.0]
    assert measured_steps(same, range(2, 3)) == [2]
