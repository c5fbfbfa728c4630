"""What a rank makes of a peer's weights: whole for a fresh rank, undone where they do harm, refused from the sender."""

import math

import pytest
import torch

from bench.injection import Injection
from gossip.faults import Fault
from gossip.protocol import MERGE_METHODS, Flow, Hello
from gossip.reputation import FIRST_SECONDS, Reputation
from runtime.errors import UserError
from tests.clock import Clock
from tests.gossip_helpers import (
    GossipConfig,
    Rank,
    RawPeer,
    assert_answers,
    counted,
    hello,
    last_event,
    make_state,
    payload_of,
    ranks,
    until,
    values_of,
)


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


def idle(*population):
    return all(rank.idle for rank in population)


def call(caller, *turns):
    """A call of `caller` that ends, one way or another, at both ends."""
    until(lambda: idle(*turns), *turns)
    initiated = caller.node.counters.initiated
    caller.call()
    until(lambda: caller.node.counters.initiated > initiated and idle(*turns), *turns)


# Adoption


@pytest.mark.injects(Injection.FRESH_RESTART)
@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("caller", ["fresh", "old"])
@pytest.mark.parametrize("fitness", [None, 0.1, 9.0], ids=["unknown", "fitter", "less-fit"])
def test_fresh_rank_adopts_a_trained_ones_weights_whole_and_never_wins(tmp_path, method, caller, fitness):
    old = Rank(tmp_path, 0, 1.0, method=method)
    fresh = Rank(tmp_path, 1, 3.0, method=method, peers=(old.node.address,))
    with ranks(old, fresh):
        old.node._peers = (fresh.node.address,)
        old.step = old.lineage = 1000
        old.fitness, fresh.fitness = 1.0, fitness
        old.boundary()
        fresh.boundary()
        (fresh if caller == "fresh" else old).call()
        report = until(fresh.boundary, old)
        until(lambda: counted(old, won=1), old)
        assert report.clonal and report.peer_scalars == {"k": 0.0} and report.peer_lineage == 1000
        assert values_of(fresh) == values_of(old) == {1.0}
        assert counted(old, lost=0, failed=0) and counted(fresh, won=0, lost=1, failed=0)
        published = fresh.node._desk.published
        assert (published.lineage, published.fitness, published.generation) == (1000, None, 1)
        assert "adopts: lineage 1000 against 0" in last_event(fresh)["message"]


def test_ranks_of_one_lineage_are_averaged(tmp_path):
    one = Rank(tmp_path, 0, 1.0, method="average")
    other = Rank(tmp_path, 1, 3.0, method="average", peers=(one.node.address,))
    with ranks(one, other):
        one.lineage, other.lineage, one.fitness, other.fitness = 1000, 450, 1.0, 2.0
        one.boundary()
        other.boundary()
        other.call()
        reports = []
        until(lambda: (reports.append(other.boundary()), reports[-1])[1], one)
        until(lambda: counted(one, averaged=1), one)
        assert values_of(one) == values_of(other) == {2.0}
        assert not reports[-1].clonal and reports[-1].both and reports[-1].peer_lineage == 1000


# Judging


class Ward:
    """Rank 1, which rank 0's weights harm: its judge says `sound` before them and `harmed` once they are merged."""

    def __init__(self, folder, method="recombination", sound=1.0, harmed=1.5, registry=False, **config):
        generator = torch.Generator().manual_seed(1)
        live, schema = make_state()
        for tensor in live.values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
        config = {"method": method, **config}
        if registry:
            config |= {"filesystem_coordinator": True, "heartbeat_seconds": 0.02, "liveness_seconds": 5.0}
        self.bad = Rank(folder, 0, 1.0, **config)
        peers = () if registry else (self.bad.node.address,)
        self.rank = Rank(folder, 1, state=(live, schema), judge=self.judge, peers=peers, **config)
        self.clock = Clock()
        self.rank.node._reputation._clock = self.clock
        self.before = {name: tensor.clone() for name, tensor in live.items()}
        self.losses = (sound, harmed)
        self.judged = 0
        self.bad.node._peers = () if registry else (self.rank.node.address,)
        self.set_fitness(bad=1.0, rank=2.0)

    def judge(self):
        self.judged += 1
        return (self.losses[0 if self.unharmed() else 1],)

    def unharmed(self):
        return all(torch.equal(tensor, self.before[name]) for name, tensor in self.rank.live.items())

    def set_fitness(self, bad, rank):
        self.bad.fitness, self.rank.fitness = bad, rank
        self.bad.boundary()
        self.rank.boundary()

    def call(self, caller):
        call(caller, self.bad, self.rank)


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("harmed", [1.11, math.nan, math.inf])
def test_node_undoes_a_harmful_merge_bit_for_bit_and_counts_it(tmp_path, method, harmed):
    ward = Ward(tmp_path, method, harmed=harmed)
    bad, rank = ward.bad, ward.rank
    with ranks(bad, rank):
        rank.call()
        until(lambda: (rank.boundary() is None, counted(rank, rolled_back=1))[1], bad)
        assert ward.unharmed() and ward.judged == 2
        assert counted(rank, initiated=1, lost=0, won=0, averaged=0, tied=0, failed=0, busy=0)
        until(lambda: counted(bad, **{"averaged" if method == "average" else "won": 1}), bad)
        published = rank.node._desk.published
        assert (published.generation, published.fitness, published.lineage) == (0, 2.0, 0)
        event = last_event(rank)
        assert event["event"] == "rolled_back" and event["peer"] == "0"
        assert f"1.0000 before, {harmed:.4f} nats/byte after" in event["message"] and "60 s" in event["message"]
        until(lambda: idle(bad, rank), bad, rank)
        assert_answers(rank)  # the slot and the receive buffer are free again


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
@pytest.mark.parametrize(
    ("known", "harmed", "undone", "judged"), [(1.05, 1.2, 1, 2), (1.2, 1.2, 0, 1), (0.8, 1.05, 0, 3)]
)
def test_node_judges_by_losses_that_are_known_already_but_undoes_nothing_by_them(
    tmp_path, known, harmed, undone, judged
):  # fmt: skip
    ward = Ward(tmp_path, harmed=harmed)
    with ranks(ward.bad, ward.rank):
        ward.rank.known = (known,)
        ward.call(ward.rank)
        until(lambda: counted(ward.rank, rolled_back=undone, lost=1 - undone), ward.bad, ward.rank)
        assert ward.judged == judged


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
def test_node_keeps_a_merge_within_the_tolerance(tmp_path):
    ward = Ward(tmp_path, "clonal", harmed=1.09)
    with ranks(ward.bad, ward.rank):
        ward.rank.call()
        until(lambda: counted(ward.rank, lost=1, rolled_back=0), ward.bad, ward.rank)
        assert values_of(ward.rank) == {1.0}


def test_node_judges_nothing_without_a_tolerance(tmp_path):
    ward = Ward(tmp_path, "clonal", harmed=math.inf, rollback_tolerance=None)
    with ranks(ward.bad, ward.rank):
        ward.rank.call()
        until(lambda: counted(ward.rank, lost=1, rolled_back=0), ward.bad, ward.rank)
        assert values_of(ward.rank) == {1.0} and ward.judged == 0


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_config_refuses_a_tolerance_that_is_none(tolerance):
    with pytest.raises(UserError, match="rollback_tolerance"):
        GossipConfig(rollback_tolerance=tolerance)


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
@pytest.mark.parametrize("method", ["clonal", "recombination"])
def test_node_refuses_who_did_harm_for_a_while_and_still_sends_to_it(tmp_path, method):
    ward = Ward(tmp_path, method)
    bad, rank = ward.bad, ward.rank
    with ranks(bad, rank):
        ward.call(bad)
        assert counted(rank, rolled_back=1) and counted(bad, won=1)
        ward.call(bad)  # the answerer knows the caller: nothing flows
        until(lambda: counted(rank, tied=1) and counted(bad, tied=1), bad, rank)
        assert last_event(rank)["message"] == last_event(bad)["message"] == "not accepted"
        ward.call(rank)  # the caller learns only from the HELLO whom it reached
        until(lambda: counted(rank, failed=1) and counted(bad, failed=1), bad, rank)
        assert last_event(rank)["message"].startswith(Fault.DISTRUSTED.value)
        assert ward.unharmed() and counted(rank, rolled_back=1, lost=0) and counted(bad, won=1)

        ward.clock.now = FIRST_SECONDS  # trusted again, and harmful again
        ward.call(bad)
        until(lambda: counted(rank, rolled_back=2) and "120 s" in last_event(rank)["message"], bad, rank)
        assert ward.unharmed()

        ward.clock.now += 2 * FIRST_SECONDS - 1
        ward.set_fitness(bad=2.0, rank=1.0)  # the other direction, from either end
        ward.call(bad)
        until(lambda: counted(rank, won=1) and counted(bad, lost=1), bad, rank)
        ward.set_fitness(bad=2.0, rank=1.0)
        ward.call(rank)
        until(lambda: counted(rank, won=2) and counted(bad, lost=2), bad, rank)

        ward.clock.now += 1
        ward.losses = (1.0, 1.0)
        ward.set_fitness(bad=1.0, rank=2.0)
        ward.call(rank)
        until(lambda: counted(rank, lost=1), bad, rank)


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
def test_node_averages_with_nobody_that_did_harm(tmp_path):
    ward = Ward(tmp_path, "average")
    with ranks(ward.bad, ward.rank):
        ward.call(ward.bad)
        until(lambda: counted(ward.rank, rolled_back=1))
        until(lambda: counted(ward.bad, averaged=1), ward.bad)  # it had merged its half, and keeps that
        ward.set_fitness(bad=2.0, rank=1.0)
        kept = {name: tensor.clone() for name, tensor in ward.bad.live.items()}
        ward.call(ward.bad)
        until(lambda: counted(ward.rank, tied=1) and counted(ward.bad, tied=1), ward.bad, ward.rank)
        assert ward.unharmed() and all(torch.equal(ward.bad.live[name], kept[name]) for name in kept)


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
def test_caller_tells_who_did_harm_that_it_does_not_accept_by_the_registry(tmp_path):
    ward = Ward(tmp_path, registry=True)
    bad, rank = ward.bad, ward.rank
    with ranks(bad, rank):
        until(lambda: rank.node.roster and rank.node.roster.peers(1), bad, rank)
        ward.call(rank)
        until(lambda: counted(rank, rolled_back=1), bad, rank)
        ward.call(rank)
        until(lambda: counted(rank, tied=1, failed=0) and counted(bad, tied=1, failed=0), bad, rank)
        assert last_event(rank)["message"] == "not accepted"


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
def test_node_holds_nothing_against_another_process_of_that_rank(tmp_path):
    ward = Ward(tmp_path)
    bad, rank = ward.bad, ward.rank
    with ranks(bad, rank):
        ward.call(bad)
        until(lambda: counted(rank, rolled_back=1), bad, rank)
        peer = RawPeer.call(rank.where).handshake()
        theirs, decision = peer.greet(hello(rank.schema, rank=0))
        assert theirs.accepts and decision.flow is Flow.INITIATOR_SENDS
        peer.close()
        until(lambda: idle(rank), rank)
        peer = RawPeer.call(rank.where).handshake()
        peer.send(hello(rank.schema, rank=0, incarnation=bad.node.incarnation, fitness=None))
        assert not peer.receive(Hello).accepts


@pytest.mark.injects(Injection.HARMFUL_UPDATE)
def test_poisoned_elder_does_not_make_a_fresh_rank_worse(tmp_path):
    ward = Ward(tmp_path, harmed=9.0)
    with ranks(ward.bad, ward.rank):
        ward.bad.lineage = 5000
        ward.bad.boundary()
        ward.call(ward.rank)
        until(lambda: counted(ward.rank, rolled_back=1), ward.bad, ward.rank)
        assert ward.unharmed() and ward.rank.node._desk.published.lineage == 0


def exhaust_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("exhaust", [exhaust_gpu, lambda: torch.empty(10**15)], ids=["gpu", "cpu"])
@pytest.mark.parametrize("turn", [1, 2], ids=["before", "after"])
def test_node_goes_on_when_memory_for_the_judge_is_out(tmp_path, turn, exhaust):
    ward = Ward(tmp_path)
    judge = ward.rank.node._intake._judge

    def exhausted():
        loss = judge()
        if ward.judged == turn:
            exhaust()
        return loss

    ward.rank.node._intake._judge = exhausted
    with ranks(ward.bad, ward.rank):
        ward.call(ward.rank)
        until(lambda: counted(ward.rank, failed=1, lost=0, rolled_back=0), ward.bad, ward.rank)
        assert ward.unharmed() and last_event(ward.rank)["message"].startswith(Fault.OUT_OF_MEMORY.value)
        assert not ward.rank.node._reputation.distrusts(ward.bad.node.incarnation)


# Norms


@pytest.mark.injects(Injection.EXPLODING_NORM)
@pytest.mark.parametrize("method", MERGE_METHODS)
def test_node_refuses_an_exploding_norm_before_the_merge(tmp_path, method):
    ward = Ward(tmp_path, method, harmed=0.0)
    bad, rank = ward.bad, ward.rank
    with ranks(bad, rank):
        for tensor in bad.live.values():
            tensor.fill_(10.0)  # beside values evenly from 0 to 1: 17 times the norm
        ward.call(rank)
        until(lambda: counted(rank, failed=1, lost=0, rolled_back=0), bad, rank)
        event = last_event(rank)
        assert event["event"] == "failed" and event["message"].startswith(Fault.EXPLODING_NORM.value)
        assert "60 s" in event["message"] and ward.unharmed() and ward.judged == 0
        assert rank.node._reputation.distrusts(bad.node.incarnation)
        assert rank.node._desk.published.generation == 0
        until(lambda: idle(bad, rank), bad, rank)
        assert_answers(rank)


@pytest.mark.parametrize(("value", "merges"), [(9.9, True), (10.1, False)])
def test_node_bounds_the_norm_at_ten_times_its_own(tmp_path, value, merges):
    with ranks(Rank(tmp_path, 0, 1.0, method="clonal")) as (rank,):
        rank.fitness = 2.0
        rank.boundary()
        for name, tensor in rank.live.items():
            if name.endswith("v"):
                tensor.fill_(1e-9)  # second moments do not count
        peer = RawPeer.call(rank.where).handshake()
        peer.greet(hello(rank.schema))
        peer.send_snapshot(rank.schema, payload_of(make_state(value)[0], rank.schema))
        until(lambda: counted(rank, lost=int(merges), failed=int(not merges)), rank)
        assert (value in {round(held, 3) for held in values_of(rank)}) == merges


def test_node_leaves_alone_what_training_objects_to(tmp_path):
    ward = Ward(tmp_path, harmed=0.0)
    bad, rank = ward.bad, ward.rank
    seen = []
    rank.node._intake._objection = lambda peer: seen.append(peer) or "it has gone astray"
    bad.scalars = {"k": 7.0}
    bad.boundary()
    with ranks(bad, rank):
        ward.call(rank)
        until(lambda: counted(rank, failed=1, lost=0, rolled_back=0), bad, rank)
        (peer,) = seen
        assert peer.scalars == bad.scalars and peer.genes == {}
        assert all(torch.equal(peer.buffer.views[name], tensor) for name, tensor in bad.live.items())
        assert last_event(rank)["message"].startswith(f"{Fault.DIVERGED.value}: it has gone astray; no weights from")
        assert ward.unharmed() and ward.judged == 0 and rank.node._reputation.distrusts(bad.node.incarnation)


# Seeking


@pytest.mark.injects(Injection.RESTART)
def test_seeking_rank_calls_until_a_conversation_ends_well(tmp_path):
    with ranks(Rank(tmp_path, 0), Rank(tmp_path, 1, 3.0)) as (old, fresh):
        old.step = old.lineage = 1000
        old.boundary()
        fresh.node.seek()
        for _ in range(100):
            fresh.boundary()
        assert counted(fresh, initiated=0)  # it knows nobody yet
        assert old.node._switchboard._slot.acquire(blocking=False)
        fresh.node._peers = (old.node.address,)
        until(lambda: fresh.node.counters.busy >= 3, fresh)  # a busy peer does not end it
        old.node._switchboard.release()
        until(lambda: counted(fresh, lost=1), fresh, old)
        assert values_of(fresh) == {1.0}
        initiated = fresh.node.counters.initiated
        for _ in range(100):
            until(lambda: idle(fresh, old), old)
            fresh.boundary()
        assert counted(fresh, initiated=initiated)


def test_seeking_rank_goes_on_after_a_peer_that_cannot_be_reached(tmp_path):
    other = Rank(tmp_path, 0)
    fresh = Rank(tmp_path, 1, 3.0, peers=(other.node.address,))
    other.node.close()
    with ranks(other, fresh):
        fresh.node.seek()
        until(lambda: fresh.node.counters.failed >= 3, fresh)


def test_seeking_ends_when_a_peer_calls(tmp_path):
    with ranks(Rank(tmp_path, 0), Rank(tmp_path, 1, 3.0)) as (old, fresh):
        fresh.node.seek()
        old.node._peers = (fresh.node.address,)
        old.lineage = 1000
        old.boundary()
        old.call()
        until(lambda: counted(fresh, lost=1), fresh, old)
        fresh.node._peers = (old.node.address,)
        for _ in range(100):
            fresh.boundary()
        assert counted(fresh, initiated=0)


def test_clock_of_a_nodes_reputation_is_monotonic(tmp_path):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        assert isinstance(rank.node._reputation, Reputation)
        assert rank.node._reputation._clock.__name__ == "monotonic"
