"""Places on a lattice modulo sixteen: rotation, spacing, what arrives and when it cannot; by C and by torch alike."""

import pytest
import torch

from gossip import lattice
from gossip.lattice import BLOCK, decode, encode, rotate, settle, sketch, spacings, unrotate

DISTANCES = [1.0, 0.1, 0.01]


@pytest.fixture(params=["native", "torch"])
def kernel(request, monkeypatch):
    """Each way to compute it."""
    if request.param == "torch":
        monkeypatch.setattr(lattice, "kernels", lambda: None)
    elif lattice.kernels() is None:
        pytest.skip("there is no C compiler here")


def pair(count, distance, seed=0):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(count, generator=generator)
    return one, one + distance * torch.randn(count, generator=generator)


def sent(sender, receiver, spacing=None):
    """What arrives, and whether all of it does."""
    ours, theirs = rotate(sender), rotate(receiver)
    if spacing is None:
        spacing = spacings(sketch(ours), sketch(theirs))
    wrong = decode(encode(ours, spacing), theirs, spacing)
    assert torch.equal((ours != theirs).any(dim=1).nonzero().flatten(), torch.from_numpy(wrong))
    arrived = torch.empty_like(sender)
    unrotate(theirs, arrived)
    return arrived, not len(wrong)


@pytest.mark.parametrize("count", [1, 100, BLOCK, 3 * BLOCK + 17])
def test_rotation_keeps_lengths_and_is_undone(kernel, count):
    values, _ = pair(count, 0)
    rotated = rotate(values)
    assert rotated.shape == (-(-count // BLOCK), BLOCK)
    assert rotated.norm() == pytest.approx(float(values.norm()), rel=1e-5)
    back = torch.empty_like(values)
    unrotate(rotated, back)
    assert torch.allclose(back, values, atol=1e-5)


def test_rotation_spreads_what_stands_out(kernel):
    """A lone number, and a whole block that is off by the same: neither is far off after it."""
    lone, level = torch.zeros(BLOCK), torch.ones(BLOCK)
    lone[4711] = 1.0
    for values in (lone, level):
        rotated = rotate(values)
        assert rotated.abs().max() < 5.5 * rotated.square().mean().sqrt()


@pytest.mark.parametrize("count", [5, 1000, 4 * BLOCK + 3])
@pytest.mark.parametrize("distance", DISTANCES)
def test_what_arrives_is_near_beside_how_far_the_two_were_apart(kernel, count, distance):
    one, other = pair(count, distance)
    arrived, agreed = sent(one, other)
    assert agreed
    assert (arrived - one).norm() < 0.35 * (other - one).norm()  # a spacing of 0.75 over the root of 12 is 0.22


def test_rounding_errors_are_centred(kernel):
    one, other = pair(64 * BLOCK, 0.1)
    error = sent(one, other)[0] - one
    assert abs(float(error.mean())) < 4 * float(error.std()) / len(error) ** 0.5


def test_outliers_arrive(kernel):
    """A row of an embedding that one of the two has never trained."""
    one, other = pair(2 * BLOCK, 0.001)
    other[:96] += 1.0
    arrived, agreed = sent(one, other)
    assert agreed and (arrived - one).norm() < 0.35 * (other - one).norm()


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1.0, 1e20])
def test_ends_that_are_equal_or_zero_or_large_agree(kernel, factor):
    one, _ = pair(BLOCK, 0)
    arrived, agreed = sent(one * factor, one * factor)
    assert agreed and torch.allclose(arrived, one * factor, rtol=0, atol=1e-3 * factor + 1e-29)


def test_both_ends_choose_the_same_spacing(kernel):
    one, other = (sketch(rotate(values)) for values in pair(10 * BLOCK, 0.01))
    assert torch.equal(spacings(one, other), spacings(other, one))
    assert torch.allclose(spacings(one, other), torch.full((10,), 0.0075), rtol=0.5)


def test_few_of_many_blocks_are_left_out(kernel):
    one, other = pair(2000 * BLOCK, 1e-4)
    ours, theirs = rotate(one), rotate(other)
    spacing = spacings(sketch(ours), sketch(theirs))
    assert len(decode(encode(ours, spacing), theirs, spacing)) < 0.02 * 2000


def test_ends_too_far_apart_are_found_out(kernel):
    one, other = pair(BLOCK, 1.0)
    _, agreed = sent(one, other, spacing=torch.tensor([0.1]))
    assert not agreed


def test_settling_again_changes_nothing_but_last_bits(kernel):
    one, _ = pair(2 * BLOCK, 0)
    spacing = torch.tensor([0.01, 0.1])
    settled = one.clone()
    settle(settled, spacing)
    again = settled.clone()
    settle(again, spacing)
    assert 0.02 < (settled - one).norm() / one.norm() < 0.03  # 0.1 over the roots of 12 and 2
    assert torch.allclose(again, settled, atol=1e-5)


def test_numbers_beyond_all_places_are_left_out(kernel):
    one, other = pair(BLOCK, 1.0)
    one[3] = 3e38
    assert sent(one, other, spacing=torch.tensor([1e-9]))[1] is False


def test_the_rotation_is_this_one():
    """Two ranks of different versions of anything must agree on it."""
    rotated = rotate(torch.arange(BLOCK).float())
    assert rotated[0, :3].tolist() == pytest.approx([3492.378, -1866.387, -574.590], abs=0.05)
    assert lattice._sampled()[:4].tolist() == [2269, 6702, 5651, 4716]


def test_what_is_not_finite_shows_in_the_sketch(kernel):
    one, _ = pair(3 * BLOCK, 0)
    one[BLOCK + 5] = float("nan")
    assert sketch(rotate(one)).isfinite().all(dim=1).tolist() == [True, False, True]


def test_both_ways_to_compute_it_understand_each_other(monkeypatch):
    if lattice.kernels() is None:
        pytest.skip("there is no C compiler here")
    one, other = pair(3 * BLOCK, 0.05)
    spacing = spacings(sketch(rotate(one)), sketch(rotate(other)))
    packed = encode(rotate(one), spacing)
    with monkeypatch.context() as patch:
        patch.setattr(lattice, "kernels", lambda: None)
        slow = rotate(other)
        assert torch.allclose(slow, rotate(other), atol=1e-5)
        assert not len(decode(packed, slow, spacing))
    fast = rotate(other)
    assert not len(decode(packed, fast, spacing))
    assert torch.equal(fast, slow)
