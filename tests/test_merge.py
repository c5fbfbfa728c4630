"""Merging: what each method gives, what it keeps, and that it happens whole or not at all."""

import contextlib
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.injection import Injection
from gossip import merge as merge_module
from gossip import state_native
from gossip.merge import merge, merge_judged, swap, weight_norm
from gossip.state import Rule, Schema, StateBuffer

SHAPES = {"y": (40, 30), "z": (40, 30), "v": (40, 30), "bias.y": (7,)}
SCHEMA = Schema.of(
    {name: torch.ones(shape) for name, shape in SHAPES.items()},
    {name: Rule.SECOND_MOMENT if name == "v" else Rule.WEIGHT for name in SHAPES},
    {},
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(merge_module, "PIECE_ITEMS", 256)  # several pieces to a tensor


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) - (0.0 if name == "v" else 0.5) for name, shape in SHAPES.items()
    }


def buffered(tensors):
    buffer = StateBuffer(SCHEMA)
    buffer.copy_from(tensors)
    return buffer.views


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(a, b, rtol=0.0, atol=0.0):
    for name in SHAPES:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


def test_merge_clonal_takes_all():
    live, peer = state(1), state(2)
    merge(live, SCHEMA, buffered(peer), None, "clonal", 0.5)
    assert_same(live, peer)


def test_merge_recombination_moves_weights_by_a_difference():
    live, own, peer = state(1), state(2), state(3)
    before = clone(live)
    merge(live, SCHEMA, buffered(peer), buffered(own), "recombination", 0.3)
    for name in ("y", "z", "bias.y"):
        torch.testing.assert_close(live[name], before[name] + 0.3 * (peer[name] - own[name]))


def test_merge_interpolates_second_moments_and_keeps_them_from_falling_below_zero():
    live, own, peer = state(1), state(2), state(3)
    own["v"] += 100.0  # a difference would take the moments far below zero
    before = clone(live)
    merge(live, SCHEMA, buffered(peer), buffered(own), "recombination", 0.9)
    torch.testing.assert_close(live["v"], torch.lerp(before["v"], peer["v"], 0.9))
    assert live["v"].min() >= 0


@pytest.mark.parametrize("alpha", [0.0, 1e-7, 0.1, 0.5, 1 - 1e-7, 1.0])
def test_merge_never_makes_a_second_moment_negative(alpha):
    live, peer = state(1), state(2)
    live["v"] *= torch.logspace(-30, 30, 30)
    peer["v"] *= torch.logspace(30, -30, 30)
    peer["v"][::3] = 0.0
    merge(live, SCHEMA, buffered(peer), None, "recombination", alpha)
    assert live["v"].min() >= 0 and live["v"].isfinite().all()


def test_merge_without_an_own_snapshot_interpolates_the_live_weights():
    live, peer = state(1), state(2)
    before = clone(live)
    merge(live, SCHEMA, buffered(peer), None, "recombination", 0.25)
    assert_same(live, {name: torch.lerp(before[name], peer[name], 0.25) for name in SHAPES}, rtol=1e-6, atol=1e-6)


def test_merge_average_keeps_the_sum_of_a_pair_that_trained_on():
    """Both ends move on between snapshot and merge, each by its own steps, which are kept whole."""
    a_then, b_then = state(1), state(2)
    a_now = {name: tensor + 0.01 * state(3)[name] for name, tensor in a_then.items()}
    b_now = {name: tensor + 0.02 * state(4)[name] for name, tensor in b_then.items()}
    a, b = clone(a_now), clone(b_now)
    merge(a, SCHEMA, buffered(b_then), buffered(a_then), "average", 0.123)
    merge(b, SCHEMA, buffered(a_then), buffered(b_then), "average", 0.123)
    for name in ("y", "z", "bias.y"):
        torch.testing.assert_close(a[name] + b[name], a_now[name] + b_now[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a[name] - b[name], (a_now[name] - a_then[name]) - (b_now[name] - b_then[name]),
                                   rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("method", ["clonal", "recombination", "average"])
def test_merge_leaves_in_the_peer_buffer_what_it_overwrote(method):
    live, own, peer = state(1), state(2), state(3)
    before, views = clone(live), buffered(peer)
    merge(live, SCHEMA, views, buffered(own), method, 0.5)
    merged = clone(live)
    assert_same(views, before)
    swap(live, SCHEMA, views)
    assert_same(live, before)
    assert_same(views, merged)


@pytest.mark.parametrize("method", ["clonal", "recombination", "average"])
def test_merge_undoes_itself_on_an_error_in_the_middle(method, monkeypatch):
    live, own, peer = state(1), state(2), state(3)
    before = clone(live)
    broken = buffered(peer)
    whole = merge_module._pieces

    def breaking(*arguments):
        for number, piece in enumerate(whole(*arguments)):
            if number == 7:
                assert not torch.equal(live["y"], before["y"])  # it was under way
                raise MemoryError
            yield piece

    monkeypatch.setattr(merge_module, "_pieces", breaking)
    with pytest.raises(MemoryError):
        merge(live, SCHEMA, broken, buffered(own), method, 0.5)
    assert_same(live, before)


def test_merge_undoes_itself_when_the_peer_lacks_a_tensor():
    live, peer = state(1), buffered(state(2))
    before = clone(live)
    del peer["bias.y"]
    with pytest.raises(KeyError):
        merge(live, SCHEMA, peer, None, "clonal", 0.5)
    assert_same(live, before)


def test_merge_writes_parameters_in_place_and_needs_no_gradient():
    live = {name: torch.nn.Parameter(tensor) for name, tensor in state(1).items()}
    places = {name: tensor.data_ptr() for name, tensor in live.items()}
    merge(live, SCHEMA, buffered(state(2)), buffered(state(3)), "recombination", 0.5)
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == places
    assert all(tensor.grad is None and tensor.is_leaf for tensor in live.values())


class Judge:
    """A loss before a merge and one after it, or several of each; an exception is raised instead."""

    def __init__(self, *losses):
        self.losses = list(losses)

    def __call__(self):
        loss = self.losses.pop(0)
        if isinstance(loss, BaseException):
            raise loss
        return loss if isinstance(loss, tuple) else (loss,)


METHODS = ["clonal", "recombination", "average"]


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1.0, 1.2),
        (1.0, math.nan),
        (1.0, math.inf),
        (math.nan, math.nan),
        ((1.0, 2.0), (0.9, 2.2)),
        ((1.0, 2.0), (1.2, 1.9)),
        ((1.0, 2.0), (0.9, math.nan)),
    ],
    ids=str,
)
def test_merge_judged_undoes_what_does_harm_bit_for_bit(method, before, after):
    live, own, views = state(1), state(2), buffered(state(3))
    kept, peer = clone(live), clone(views)
    trial = merge_judged(live, SCHEMA, views, buffered(own), method, 0.5, Judge(before, after), 0.1)
    assert not trial.kept and all(torch.equal(live[name], kept[name]) for name in SHAPES)
    assert method != "clonal" or all(torch.equal(views[name], peer[name]) for name in SHAPES)


KEPT = [(1.0, 1.0), (1.0, 1.09), (1.0, 0.2), (math.nan, 9.0), (math.inf, 9.0), ((1.0, 2.0), (1.09, 2.09))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("before", "after"), KEPT, ids=str)
def test_merge_judged_keeps_what_does_no_harm(method, before, after):
    live, judged, own, peer = state(1), state(1), state(2), state(3)
    merge(live, SCHEMA, buffered(peer), buffered(own), method, 0.5)
    trial = merge_judged(judged, SCHEMA, buffered(peer), buffered(own), method, 0.5, Judge(before, after), 0.1)
    assert trial.kept and trial.after == (after if isinstance(after, tuple) else (after,))
    assert_same(judged, live)


def test_merge_judged_judges_the_weights_before_and_after():
    live = state(1)
    means = [float(state(seed)["y"].mean()) for seed in (1, 3)]
    trial = merge_judged(
        live, SCHEMA, buffered(state(3)), None, "clonal", 0.5, lambda: (float(live["y"].mean()),), tolerance=9.0
    )
    assert [trial.before, trial.after] == [(mean,) for mean in means]
    assert str(trial) == f"{means[0]:.4f} before, {means[1]:.4f} nats/byte after"


def test_merge_judged_takes_losses_that_are_known_for_those_before():
    trial = merge_judged(state(1), SCHEMA, buffered(state(3)), None, "clonal", 0.5, Judge(1.05), 0.1, before=(1.0,))
    assert (trial.before, trial.after, trial.kept) == ((1.0,), (1.05,), True)


def test_merge_judged_undoes_nothing_by_losses_that_are_no_longer_true():
    """What was known as 1.0 has become 1.9: 1.2 is no harm."""
    live, seen = state(1), []

    def judge():
        seen.append(float(live["y"].mean()))
        return (1.9 if seen[-1] == unmerged else 1.2,)

    unmerged, merged = (float(state(seed)["y"].mean()) for seed in (1, 3))
    trial = merge_judged(live, SCHEMA, buffered(state(3)), None, "clonal", 0.5, judge, 0.1, before=(1.0,))
    assert (trial.before, trial.after, trial.kept) == ((1.9,), (1.2,), True)
    assert_same(live, state(3))
    assert seen == [merged, unmerged, merged]  # last of all the weights as they are


@pytest.mark.parametrize(
    "losses", [(1.2, 1.0), (1.2, MemoryError()), (1.2, 1.9, MemoryError())], ids=["as known", "before", "after"]
)
def test_merge_judged_by_known_losses_leaves_the_weights_where_it_does_harm_or_fails(losses):
    live, judge = state(1), Judge(*losses)
    with contextlib.suppress(MemoryError):
        trial = merge_judged(live, SCHEMA, buffered(state(3)), None, "clonal", 0.5, judge, 0.1, before=(1.0,))
        assert not trial.kept
    assert_same(live, state(1))


def test_merge_judged_without_a_judge_keeps_all():
    live = state(1)
    assert merge_judged(live, SCHEMA, buffered(state(3)), None, "clonal", 0.5, None, 0.1).kept
    assert_same(live, state(3))


@pytest.mark.parametrize("losses", [(MemoryError(),), (1.0, MemoryError())], ids=["before", "after"])
def test_merge_judged_leaves_the_weights_when_the_judge_fails(losses):
    live = state(1)
    with pytest.raises(MemoryError):
        merge_judged(live, SCHEMA, buffered(state(3)), state(2), "recombination", 0.5, Judge(*losses), 0.1)
    assert_same(live, state(1))


def test_merge_judged_lets_go_of_what_a_failed_judge_held_before_it_undoes(monkeypatch):
    held, left = [], []

    def judge():
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        if len(held) == 2:
            raise MemoryError
        return (1.0,)

    def watched(*arguments):
        left.append(held[-1]())
        swap(*arguments)

    monkeypatch.setattr("gossip.merge.swap", watched)
    live = state(1)
    with pytest.raises(MemoryError):
        merge_judged(live, SCHEMA, buffered(state(3)), state(2), "recombination", 0.5, judge, 0.1)
    assert left == [None]
    assert_same(live, state(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weight_norm_is_of_the_weights_alone(dtype):
    tensors = {"y": torch.randn(40, 30) * 100, "z": torch.randn(7), "v": torch.rand(1000) * 1000}
    live = {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in tensors.items()}
    rules = {"y": Rule.WEIGHT, "z": Rule.WEIGHT, "v": Rule.SECOND_MOMENT}
    expected = math.sqrt(sum(float(live[name].detach().double().square().sum()) for name in "yz"))
    assert weight_norm(live, Schema.of(live, rules, {})) == pytest.approx(expected, rel=1e-5)


def outcome(method, share_own, seeds=(1, 2, 3)):
    """What a merge of float32 states leaves in both, and its distance."""
    live, own, peer = (state(seed) for seed in seeds)
    views = buffered(peer)
    distance = merge(live, SCHEMA, views, buffered(own) if share_own else None, method, 0.3)
    return live, views, distance


@pytest.mark.parametrize("share_own", [True, False], ids=["own snapshot", "no own snapshot"])
@pytest.mark.parametrize("method", METHODS)
def test_merge_in_c_equals_torchs(method, share_own, monkeypatch):
    assert state_native.kernels() is not None
    found = outcome(method, share_own)
    monkeypatch.setattr(state_native, "kernels", lambda: None)
    expected = outcome(method, share_own)
    exact = 0.0 if method == "clonal" else 1e-6
    assert_same(found[0], expected[0], rtol=exact, atol=exact)
    assert_same(found[1], expected[1])
    assert found[2] == pytest.approx(expected[2], rel=1e-5)


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_merge_by_torch_asks_for_its_distance_once(method, monkeypatch):
    monkeypatch.setattr(state_native, "kernels", lambda: None)
    assert len(list(merge_module._pieces(SCHEMA, state(1), state(2), None))) > 10
    with Reads() as reads:
        outcome(method, True)
    assert reads.count == 2  # of what is apart and of the size


def test_weight_norm_asks_for_values_once():
    with Reads() as reads:
        weight_norm(state(1), SCHEMA)
    assert reads.count <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share_own", [True, False], ids=["own snapshot", "no own snapshot"])
@pytest.mark.parametrize("method", METHODS)
def test_merge_on_a_gpu_equals_the_one_in_c(method, share_own):
    """With page-locked buffers, as a rank has them; nothing is under way any more on return."""
    found, own, peer = ({name: tensor.cuda() for name, tensor in state(seed).items()} for seed in (1, 2, 3))
    before, buffers = clone(found), [StateBuffer(SCHEMA, pin=True) for _ in range(2)]
    for buffer, tensors in zip(buffers, (own, peer), strict=True):
        buffer.copy_from(tensors).synchronize()
    distance = merge(
        found, SCHEMA, buffers[1].views, buffers[0].views if share_own else None, method, 0.3
    )  # fmt: skip
    overwritten = clone(buffers[1].views)
    live, views, expected = outcome(method, share_own)
    assert_same({name: tensor.cpu() for name, tensor in found.items()}, live, rtol=1e-6, atol=1e-6)
    assert_same(overwritten, views)
    assert distance == pytest.approx(expected, rel=1e-5)
    merged = clone(found)
    swap(found, SCHEMA, buffers[1].views)
    assert_same({name: tensor.cpu() for name, tensor in merged.items()}, clone(buffers[1].views))
    assert_same(found, before)


def test_merge_distance_is_of_the_weights_alone():
    live, own, peer = state(1), state(2), state(3)
    weights = [name for name in SHAPES if name != "v"]
    apart, size = (
        math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in weights))
        for a, b in ((peer, own), (live, {name: 0 * tensor for name, tensor in live.items()}))
    )
    assert merge(live, SCHEMA, buffered(peer), buffered(own), "average", 0.5) == pytest.approx(apart / size, rel=1e-5)


def test_merge_piece_is_the_same_whatever_the_number_of_threads():
    torch.manual_seed(0)
    live, peer, own, threads = torch.randn(100_003), torch.randn(100_003), torch.randn(100_003), torch.get_num_threads()
    merged = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            merged.append((live.clone(), peer.clone()))
            far, large = state_native.merge_piece(*merged[-1], own, 0.3, False)
            assert far == pytest.approx(float((peer - own).double().square().sum()), rel=1e-5)
            assert large == pytest.approx(float(live.double().square().sum()), rel=1e-5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*merged, strict=True)) and torch.equal(merged[0][1], live)
