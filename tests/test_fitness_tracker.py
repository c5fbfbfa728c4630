"""The moving average that knows when it speaks of other weights."""

import pytest

from gossip.fitness_tracker import FitnessTracker
from runtime.errors import UserError


def test_fitness_tracker_is_unknown_before_the_first_loss():
    tracker = FitnessTracker(0.9)
    assert tracker.ema is None and tracker.fitness is None and tracker.best is None


def test_fitness_tracker_corrects_the_bias_of_its_start():
    tracker = FitnessTracker(0.9)
    for _ in range(3):
        tracker.observe(2.0)
    assert tracker.ema == pytest.approx(2.0)


def test_fitness_tracker_weighs_losses_by_their_age():
    tracker = FitnessTracker(0.5)
    tracker.observe(1.0)
    tracker.observe(4.0)
    assert tracker.ema == pytest.approx((0.25 * 1.0 + 0.5 * 4.0) / 0.75)


def test_fitness_tracker_knows_the_fitness_once_half_the_weight_is_in():
    tracker = FitnessTracker(0.9)  # 1 - 0.9^6 = 0.469, 1 - 0.9^7 = 0.522
    for _ in range(6):
        tracker.observe(1.0)
    assert tracker.fitness is None and tracker.ema is not None
    tracker.observe(1.0)
    assert tracker.fitness == pytest.approx(1.0)


def test_fitness_tracker_without_memory_knows_at_once():
    tracker = FitnessTracker(0.0)
    tracker.observe(3.0)
    assert tracker.fitness == 3.0


def test_fitness_tracker_forgets_the_fitness_of_replaced_weights():
    tracker = FitnessTracker(0.9)
    for _ in range(50):
        tracker.observe(1.0)
    tracker.reset()
    assert tracker.fitness is None and tracker.ema == pytest.approx(1.0)
    for _ in range(7):
        assert tracker.fitness is None
        tracker.observe(5.0)
    assert tracker.fitness == tracker.ema == pytest.approx(5.0)  # nothing of the older weights' losses


def test_fitness_tracker_keeps_the_best_over_resets():
    tracker = FitnessTracker(0.5)
    tracker.observe(2.0)
    tracker.reset()
    tracker.observe(3.0)
    assert tracker.best == 2.0


def test_fitness_tracker_continues_from_its_state():
    tracker, other = FitnessTracker(0.8), FitnessTracker(0.8)
    for loss in (3.0, 2.0, 1.0, 1.5):
        tracker.observe(loss)
    tracker.reset()
    tracker.observe(2.5)
    other.load_state_dict(tracker.state_dict())
    for each in (tracker, other):
        each.observe(1.25)
    assert other.state_dict() == tracker.state_dict() and other.ema == tracker.ema


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_fitness_tracker_refuses_an_impossible_decay(decay):
    with pytest.raises(UserError):
        FitnessTracker(decay)
