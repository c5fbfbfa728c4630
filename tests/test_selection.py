"""Real nodes that compare probes: three outcomes, what is inherited, and how the numbers travel."""

import pytest
import torch

from gossip import lattice, state_native
from gossip.comparison import Evidence
from gossip.decision import Policy
from gossip.faults import Fault
from gossip.protocol import Flow
from gossip.state import Rule, Schema
from gossip.wire_format import Bfloat16Wire
from runtime.errors import UserError
from tests.gossip_helpers import Rank, RawPeer, counted, hello, last_event, make_state, ranks, until, values_of

PROBE = "5a" * 16
GOOD = tuple(2.0 + 0.1 * window for window in range(8))
NOISE = (0.01, -0.02, 0.015, -0.01, 0.02, -0.015, 0.005, -0.005)
BAD = tuple(loss + 0.2 + noise for loss, noise in zip(GOOD, NOISE, strict=True))
EVEN = tuple(loss + noise for loss, noise in zip(GOOD, NOISE, strict=True))


def pair(folder, losses, others, **config):
    """A rank of all 1 that nobody is called by, and one of all 3 that calls it."""
    one = Rank(folder, 0, 1.0, fitness="probe", genes={"lr": 0.1}, **config)
    other = Rank(folder, 1, 3.0, fitness="probe", genes={"lr": 0.3}, peers=(one.node.address,), **config)
    for rank, measured in ((one, losses), (other, others)):
        rank.evidence = Evidence(PROBE, measured) if measured else None
        rank.boundary()
    return one, other


@pytest.mark.parametrize("method", ["clonal", "recombination"])
def test_a_clear_winners_weights_and_genes_come_to_the_loser(tmp_path, method):
    with ranks(*pair(tmp_path, GOOD, BAD, method=method)) as (one, other):
        other.call()
        reports = []
        until(lambda: (reports.append(other.boundary()), reports[-1])[1], one)
        until(lambda: counted(one, won=1) and counted(other, lost=1), one)
        assert values_of(other) == {1.0 if method == "clonal" else 2.0} and values_of(one) == {1.0}
        assert reports[-1].peer_genes == {"lr": 0.1} and not reports[-1].both
        message = last_event(other)["message"]
        assert "clear: +0.2000 nats/byte in 8 windows" in message and "distance 0.667" in message


def test_without_a_clear_winner_both_take_the_mean(tmp_path):
    with ranks(*pair(tmp_path, GOOD, EVEN)) as (one, other):
        other.call()
        until(lambda: counted(one, averaged=1) and counted(other, averaged=1), one, other)
        assert values_of(one) == values_of(other) == {2.0}
        assert "no clear winner" in last_event(one)["message"] and counted(one, won=0, lost=0, tied=0)


def test_without_a_clear_winner_nothing_moves_where_that_is_wanted(tmp_path):
    with ranks(*pair(tmp_path, GOOD, EVEN, tie="none")) as (one, other):
        other.call()
        until(lambda: counted(one, tied=1) and counted(other, tied=1), one, other)
        assert values_of(one) == {1.0} and values_of(other) == {3.0}


@pytest.mark.parametrize("losses", [None, GOOD])
def test_missing_evidence_is_no_tie(tmp_path, losses):
    with ranks(*pair(tmp_path, losses, None)) as (one, other):
        other.call()
        until(lambda: counted(one, tied=1) and counted(other, tied=1), one, other)
        assert last_event(other)["message"] == "fitness unknown" and values_of(other) == {3.0}


def test_evidence_of_other_bytes_is_none(tmp_path):
    one, other = pair(tmp_path, GOOD, BAD)
    other.evidence = Evidence("00" * 16, BAD)
    other.boundary()
    with ranks(one, other):
        other.call()
        until(lambda: counted(other, tied=1), one, other)
        assert last_event(other)["message"] == "probes of different bytes"


def test_evidence_older_than_the_weights_is_not_shown(tmp_path):
    (rank, other) = pair(tmp_path, GOOD, GOOD)
    with ranks(rank, other):
        rank.node.weights_changed()
        peer = RawPeer.call(rank.where).handshake()
        theirs, decision = peer.greet(hello(rank.schema, probe=PROBE, losses=GOOD), Policy(fitness="probe"))
        assert theirs.probe is None and theirs.losses == () and decision.reason == "fitness unknown"


def test_each_look_at_the_same_weights_asks_for_more_evidence(tmp_path):
    with ranks(*pair(tmp_path, GOOD, EVEN, tie="none")) as (one, other):
        for look in range(1, 4):
            other.call()
            until(lambda look=look: counted(one, tied=look) and counted(other, tied=look), one, other)
            assert f"at {0.05 / (look * (look + 1)):.2g}" in last_event(other)["message"]
        other.node.weights_changed()
        one.node.weights_changed()
        other.call()
        until(lambda: counted(one, tied=4) and counted(other, tied=4), one, other)
        assert last_event(other)["message"].endswith("at 0.025")


def test_bfloat16_moves_half_the_bytes_and_rounds(tmp_path):
    third = 1 / 3
    moved = {}
    for dtype in ("fp32", "bf16"):
        folder = tmp_path / dtype
        one, other = pair(folder, GOOD, BAD, method="clonal", wire_dtype=dtype)
        for tensor in one.live.values():
            tensor.fill_(third)
        with ranks(one, other):
            other.call()
            until(lambda one=one, other=other: counted(one, won=1) and counted(other, lost=1), one, other)
            moved[dtype] = one.node.counters.bytes_sent
        sent = torch.tensor(third)
        assert values_of(other) == {float(sent if dtype == "fp32" else sent.bfloat16())}
    header = moved["fp32"] - one.schema.nbytes
    assert abs(moved["bf16"] - header - one.schema.nbytes // 2) < 64


def test_remainders_of_four_bits_bring_both_near_the_mean(tmp_path):
    def state(value):
        live = {name: tensor for name, tensor in make_state(value)[0].items() if not name.endswith("v")}
        return live, Schema.of(live, dict.fromkeys(live, Rule.WEIGHT), {})

    config = {"fitness": "probe", "wire_dtype": "int4"}
    one = Rank(tmp_path, 0, state=state(1.0), **config)
    other = Rank(tmp_path, 1, state=state(3.0), peers=(one.node.address,), **config)
    with ranks(one, other):
        for rank, measured in ((one, GOOD), (other, EVEN)):
            rank.evidence = Evidence(PROBE, measured)
            rank.boundary()
        other.call()
        until(lambda: counted(one, averaged=1) and counted(other, averaged=1), one, other)
    for rank in (one, other):
        values = torch.cat([tensor.view(-1) for tensor in rank.live.values()])
        assert 0 < (values - 2).square().mean().sqrt() < 0.5  # half of what rounding adds to a distance of 2
    for name, tensor in one.live.items():  # what rounding adds to one it takes from the other
        assert torch.allclose(tensor + other.live[name], torch.tensor(4.0), atol=1e-4)


def test_a_merge_tells_what_was_left_out_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Bfloat16Wire, "left_out", lambda form: 0.125)
    with ranks(*pair(tmp_path, GOOD, EVEN, wire_dtype="bf16")) as (one, other):
        other.call()
        until(lambda: counted(one, averaged=1) and counted(other, averaged=1), one, other)
        assert last_event(one)["message"].endswith(", 12.5% left out")


def test_kernels_are_built_before_anybody_calls(tmp_path, monkeypatch):
    built = []
    for module in (lattice, state_native):
        monkeypatch.setattr(module, "kernels", lambda module=module: built.append(module))
    for dtype, wanted in (("bf16", [state_native]), ("int4", [state_native, lattice])):
        with ranks(Rank(tmp_path / dtype, 0, wire_dtype=dtype)):
            assert built == wanted
        built.clear()


@pytest.mark.parametrize("genes", [{}, {"lr": 0.1, "grad_clip": 1.0}])
def test_a_snapshot_with_other_genes_is_refused(tmp_path, genes):
    live, schema = make_state(1.0)
    rank = Rank(tmp_path, 0, state=(live, schema), fitness="probe", genes={"lr": 0.1})
    rank.evidence = Evidence(PROBE, BAD)
    with ranks(rank):
        rank.boundary()
        peer = RawPeer.call(rank.where).handshake()
        policy = Policy(fitness="probe")
        _, decision = peer.greet(hello(schema, probe=PROBE, losses=GOOD), policy)
        assert decision.flow is Flow.INITIATOR_SENDS
        peer.send_snapshot(schema, bytearray(schema.nbytes), genes=genes)
        until(lambda: counted(rank, failed=1), rank)
        assert last_event(rank)["message"].startswith(Fault.BAD_SNAPSHOT.value)


@pytest.mark.parametrize("wrong", [{"fitness": "luck"}, {"tie": "x"}, {"significance": 2.0}, {"least_effect": -1.0}])
def test_policy_refuses_what_it_does_not_know(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Policy(**wrong)
