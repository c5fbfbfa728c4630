"""Faults of the network between ranks: real processes on hosts of their own, and a man in the middle."""

import contextlib
import time

import pytest

from bench.injection import Injection
from gossip.faults import Fault
from gossip.protocol import HEADER_BYTES, KEY_BYTES, OPENING_BYTES, PROOF_BYTES, Receipt, encode_frame
from tests.gossip_helpers import PATIENCE, Rank, call_until, counted, make_state, ranks, until, values_of
from tests.hosts import network
from tests.proxy import Proxy
from tests.remote_rank import PORT, RemoteRank

LARGE = 300_000  # items a tensor: 3.6 MB in all, 3 seconds at 10 Mbit/s
MBITS = 10


@pytest.fixture(scope="module")
def processes():
    """Three processes, each alone on its host; the first two have another interface, eth1."""
    with network(2, 2, 1) as hosts:
        started = [RemoteRank(host) for host in hosts]
        for process in started:
            process.order()  # it answers once it is up
        yield started
        for process in started:
            process.close()


@pytest.fixture
def trio(processes):
    """The processes with no rank begun, on hosts whose links are whole before and after."""
    yield processes
    for process in processes:
        process.host.mend()
        process.order(end=True)


def soon(condition):
    """What `condition` gave as soon as it was true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
    return result


def count(process, name):
    return process.order()["counters"][name]


def mix(caller, answerer):
    """Let one call the other until weights have travelled."""

    def travelled():
        return sum(count(process, "won") + count(process, "lost") for process in (caller, answerer))

    before = travelled()
    soon(lambda: caller.order(call=True) and travelled() >= before + 2)


def speeds(processes, condition):
    """Steps a second of each process, from now until `condition` holds."""
    first = [process.order() for process in processes]
    soon(condition)
    last = [process.order() for process in processes]
    return [(b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in zip(first, last, strict=True)]


@pytest.mark.injects(Injection.HALF_OPEN)
@pytest.mark.parametrize("fitness", [1.0, 9.0], ids=["sends", "receives"])
def test_a_rank_whose_peers_host_vanishes_mid_transfer_ends_it_by_the_deadline_and_goes_on(trio, tmp_path, fitness):
    survivor, lost, third = trio
    options = {"items": LARGE, "method": "clonal", "exchange_seconds": 2.0}
    survivor.begin(tmp_path, 0, value=3.0, fitness=fitness, peers=[third.address], **options)
    lost.begin(tmp_path, 1, value=5.0, fitness=5.0, peers=[survivor.address], **options)
    third.begin(tmp_path, 2, value=7.0, fitness=5.0, peers=[survivor.address], **options)
    lost.host.slow_down(MBITS)
    passed = lost.host.passed()
    lost.order(call=True)
    soon(lambda: lost.host.passed() > passed + 500_000)
    lost.host.unplug()
    began = time.monotonic()
    soon(lambda: count(survivor, "failed") == 1)
    assert time.monotonic() - began < 2.0 + 1.0
    assert survivor.failures()[0].startswith(f"{Fault.DEADLINE.value}: 2 s for the conversation")
    assert survivor.order()["values"] == [3.0]
    mix(survivor, third)


@pytest.mark.injects(Injection.PARTITION)
def test_ranks_train_on_through_a_partition_and_mix_again_after_it(trio, tmp_path):
    one, other, _ = trio
    options = {"filesystem_coordinator": True, "heartbeat_seconds": 0.1, "liveness_seconds": 5.0}
    one.begin(tmp_path, 0, value=3.0, fitness=1.0, exchange_seconds=1.0, **options)
    other.begin(tmp_path, 1, value=5.0, fitness=2.0, exchange_seconds=1.0, **options)
    soon(lambda: one.order()["addresses"] and other.order()["addresses"])
    mix(one, other)
    one.host.drop(other.host)
    cut_off = [(process.order()["step"], count(process, "failed")) for process in (one, other)]
    for process, (step, failed) in zip((one, other), cut_off, strict=True):
        soon(lambda p=process, n=failed: p.order(call=True)["counters"]["failed"] > n)
        assert process.failures()[-1].startswith((Fault.DEADLINE.value, Fault.UNREACHABLE.value))
        assert process.order()["step"] > step + 100
    one.host.mend()
    mix(one, other)
    mix(other, one)


@pytest.mark.injects(Injection.SLOW_LINK)
def test_an_exchange_over_a_slow_link_completes_and_does_not_slow_training_down(trio, tmp_path):
    one, other, _ = trio
    pair = one, other
    options = {"items": LARGE, "method": "clonal"}
    one.begin(tmp_path, 0, value=3.0, fitness=1.0, peers=[other.address], **options)
    other.begin(tmp_path, 1, value=5.0, fitness=2.0, **options)
    one.host.slow_down(MBITS)
    began = time.monotonic()
    alone = speeds(pair, lambda: time.monotonic() > began + 1.0)
    began = time.monotonic()
    one.order(call=True)
    meanwhile = speeds(pair, lambda: count(other, "lost") == 1 and count(one, "won") == 1)
    took = time.monotonic() - began
    assert 12 * LARGE * 8 / (MBITS * 1e6) * 0.9 < took < PATIENCE  # the link was as slow as it should be
    assert all(now > before / 2 for before, now in zip(alone, meanwhile, strict=True))
    assert other.order()["values"] == [3.0]


WRONG_ADDRESSES = [
    pytest.param("10.99.0.1:29400", id="no-route", marks=pytest.mark.injects(Injection.UNROUTABLE_ADDRESS)),
    pytest.param("10.77.0.99:29400", id="nobody-there", marks=pytest.mark.injects(Injection.UNROUTABLE_ADDRESS)),
    pytest.param("10.77.1.2:29400", id="other-interface", marks=pytest.mark.injects(Injection.WRONG_INTERFACE)),
    pytest.param("nowhere.invalid:29400", id="no-name", marks=pytest.mark.injects(Injection.UNRESOLVABLE_ADDRESS)),
]


@pytest.mark.parametrize("address", WRONG_ADDRESSES)
def test_a_rank_registered_under_a_wrong_address_cannot_be_called_but_calls(trio, tmp_path, address):
    caller, registered, _ = trio
    options = {"filesystem_coordinator": True, "heartbeat_seconds": 0.05, "liveness_seconds": 5.0}
    caller.begin(tmp_path, 0, value=3.0, fitness=1.0, exchange_seconds=1.0, **options)
    registered.begin(tmp_path, 1, value=5.0, fitness=2.0, exchange_seconds=1.0, **options)
    registered.order(register=address)
    soon(lambda: caller.order()["addresses"] == [address])
    soon(lambda: caller.order(call=True)["counters"]["failed"] > 0)
    assert caller.failures()[0].startswith((Fault.UNREACHABLE.value, Fault.DEADLINE.value))
    step = caller.order()["step"]
    soon(lambda: registered.order()["addresses"])
    mix(registered, caller)
    assert caller.order()["step"] > step


REACH = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"


@pytest.mark.injects(Injection.WRONG_INTERFACE)
def test_a_rank_listens_on_the_chosen_interface_alone(trio, tmp_path):
    caller, listening, _ = trio
    listening.begin(tmp_path, 1)
    reached = {
        address: caller.host.start("-c", REACH, address, str(PORT), stderr=-3).wait(PATIENCE) == 0
        for address in listening.host.addresses
    }
    assert reached == {"10.77.0.2": True, "10.77.1.2": False}


# Two ranks of this process, and a proxy between them.


@contextlib.contextmanager
def proxied(folder, seconds=PATIENCE, **badly):
    """(caller, answerer, proxy): the caller, of threes, is the fitter one; the proxy is as bad as it is told to be."""
    shapes = ((400, 400),)  # about 2 MB of state, more than sockets hold
    options = {"exchange_seconds": seconds, "method": "clonal"}
    answerer = Rank(folder, 1, state=make_state(5.0, shapes), **options)
    with ranks(answerer), Proxy(answerer.where, **badly) as proxy:
        caller = Rank(folder, 0, state=make_state(3.0, shapes), peers=(proxy.address,), **options)
        with ranks(caller):
            caller.fitness, answerer.fitness = 1.0, 2.0
            caller.boundary()
            answerer.boundary()
            yield caller, answerer, proxy


def first_failure(rank):
    return next((row["message"] for row in rank.events() if row["event"] == "failed"), "")


def assert_mixes_through(proxy, caller, answerer):
    """Weights travel as soon as the proxy lets them."""
    before = answerer.node.counters.lost
    proxy.cut = proxy.rate = None
    call_until(lambda: answerer.node.counters.lost > before and caller.node.counters.won > 0, caller, caller, answerer)
    assert values_of(answerer) == {3.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of a conversation in which the caller's weights travel: {True: up, False: down}."""
    with proxied(tmp_path_factory.mktemp("whole")) as (caller, answerer, proxy):
        caller.call()
        until(lambda: counted(caller, won=1) and counted(answerer, lost=1), caller, answerer)
        return dict(proxy.passed)


RECEIPT_BYTES = len(encode_frame(Receipt(True), 0, bytes(KEY_BYTES)))
# The direction, and the byte of it that a reset comes after, of those of a whole conversation, whose length varies by
# some digits.
PHASES = {
    "opening": (True, lambda total: OPENING_BYTES // 2),
    "opening-back": (False, lambda total: OPENING_BYTES // 2),
    "proof": (True, lambda total: OPENING_BYTES + PROOF_BYTES // 2),
    "hello": (True, lambda total: OPENING_BYTES + PROOF_BYTES + HEADER_BYTES),
    "hello-back": (False, lambda total: OPENING_BYTES + PROOF_BYTES + HEADER_BYTES),
    "decision-back": (False, lambda total: total - RECEIPT_BYTES - 60),
    "payload": (True, lambda total: total // 2),
    "end": (True, lambda total: total - 60),
    "receipt": (False, lambda total: total - RECEIPT_BYTES // 2),
}


@pytest.mark.injects(Injection.RESET)
@pytest.mark.parametrize("phase", PHASES)
def test_a_reset_ends_the_conversation_at_both_ends_and_the_next_one_is_whole(tmp_path, whole, phase):
    up, place = PHASES[phase]
    with proxied(tmp_path, cut=(up, place(whole[up]))) as (caller, answerer, proxy):
        caller.call()
        until(lambda: counted(caller, failed=1), caller, answerer)
        assert first_failure(caller).startswith((Fault.CLOSED.value, Fault.REFUSED.value))
        if phase == "receipt":  # the answerer had sent it, and had all that it needs
            until(lambda: counted(answerer, lost=1), caller, answerer)
        else:
            until(lambda: counted(answerer, failed=1), caller, answerer)
            assert values_of(answerer) == {5.0}
        assert_mixes_through(proxy, caller, answerer)


@pytest.mark.parametrize(
    "fast",
    [
        pytest.param(0, id="handshake", marks=pytest.mark.injects(Injection.SLOW_HANDSHAKE)),
        pytest.param(50_000, id="payload", marks=pytest.mark.injects(Injection.SLOW_TRANSFER)),
    ],
)
def test_bytes_that_drip_do_not_move_the_deadline(tmp_path, fast):
    with proxied(tmp_path, seconds=1.0, rate=25.0, fast=fast) as (caller, answerer, proxy):
        began = time.monotonic()
        caller.call()
        until(lambda: counted(caller, failed=1) and counted(answerer, failed=1), caller, answerer)
        assert time.monotonic() - began < 5.0
        assert proxy.passed[True] > fast + 10  # there was always another byte to wait for
        # Their deadlines are as good as one: who is first closes the connection, and the other may see that.
        said = [first_failure(rank) for rank in (caller, answerer)]
        assert any(text.startswith(f"{Fault.DEADLINE.value}: 1 s for the") for text in said)
        assert all(text.startswith((Fault.DEADLINE.value, Fault.CLOSED.value)) for text in said)
        assert values_of(answerer) == {5.0}
        assert_mixes_through(proxy, caller, answerer)


@pytest.mark.injects(Injection.CROSSED_CALLS)
def test_two_that_call_each_other_at_once_hear_busy_and_mix_later(tmp_path):
    with Proxy(delay=0.1) as to_one, Proxy(delay=0.1) as to_other:
        one = Rank(tmp_path, 0, 3.0, peers=(to_other.address,), method="clonal")
        other = Rank(tmp_path, 1, 5.0, peers=(to_one.address,), method="clonal")
        with ranks(one, other):
            to_one.target, to_other.target = one.where, other.where
            one.fitness, other.fitness = 1.0, 2.0
            for rank in (one, other):
                rank.boundary()
                rank.call()
            # Each hears it as the caller, and says it as the answerer.
            until(lambda: all(counted(rank, initiated=1, received=1, busy=2) for rank in (one, other)), one, other)
            until(lambda: one.idle and other.idle, one, other)
            other.call()
            until(lambda: counted(one, won=1) and counted(other, lost=1), one, other)
            assert values_of(other) == {3.0}
