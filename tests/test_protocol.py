"""Messages and frames as bytes, and the decision that both ends take alike."""

import dataclasses
import json
import pickle
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.injection import Injection
from gossip.decision import ADOPTION_SLACK_STEPS, Policy, decide
from gossip.faults import Fault, ProtocolError
from gossip.protocol import (
    HEADER_BYTES,
    LINEAGE_LIMIT,
    LOSS_LIMIT,
    MAC_BYTES,
    MERGE_METHODS,
    OPENING_BYTES,
    Busy,
    Decision,
    End,
    Flow,
    Hello,
    Receipt,
    SnapshotHeader,
    decode,
    decode_frame,
    decode_header,
    decode_opening,
    encode,
    encode_frame,
    encode_opening,
)

KEY = bytes(range(32))
HELLO = Hello("run", "0f" * 32, 3, "ab" * 16, 500, 2, 400, 1.25, True)
MESSAGES = [
    HELLO,
    Decision(Flow.BOTH, "loss 1 against 2"),
    Decision(Flow.RESPONDER_SENDS, "adopts: lineage 500 against 0", whole=True),
    SnapshotHeader(500, 2, 400, 2**40, {"k": 500.0, "weight_sum": 0.1, "lr_max": 1e-300}),
    End("5a" * 32),
    Receipt(True),
    Receipt(False, Fault.NOT_FINITE),
    Busy(),
]
KINDS = (Hello, Decision, SnapshotHeader, End, Receipt, Busy)
ids = [type(message).__name__ for message in MESSAGES]
_, DECISION, _, SNAPSHOT, END, ACCEPTED, REFUSED, _ = MESSAGES


def open_frame(frame, sequence=0, key=KEY, expected=KINDS):
    kind, length = decode_header(frame[:HEADER_BYTES], sequence, expected)
    return decode_frame(kind, frame[:HEADER_BYTES], frame[HEADER_BYTES : HEADER_BYTES + length + MAC_BYTES], key)


def fault_of(action, *arguments):
    with pytest.raises(ProtocolError) as caught:
        action(*arguments)
    return caught.value.fault


@pytest.mark.parametrize("message", MESSAGES, ids=ids)
def test_frame_carries_its_message(message):
    assert open_frame(encode_frame(message, 7, KEY), sequence=7) == message


@pytest.mark.injects(Injection.BIT_FLIP)
@pytest.mark.parametrize("message", MESSAGES, ids=ids)
def test_frame_with_any_bit_flipped_is_refused(message):
    frame = encode_frame(message, 0, KEY)
    for place in range(len(frame)):
        broken = bytearray(frame)
        broken[place] ^= 1 << place % 8
        with pytest.raises(ProtocolError):
            open_frame(bytes(broken))


def test_frame_under_another_key_is_refused():
    assert fault_of(open_frame, encode_frame(HELLO, 0, bytes(32))) is Fault.BAD_MAC


@pytest.mark.injects(Injection.REPEATED_MESSAGE)
def test_frame_out_of_sequence_is_refused():
    assert fault_of(open_frame, encode_frame(HELLO, 0, KEY), 1) is Fault.BAD_SEQUENCE


def test_frame_of_a_kind_that_is_not_due_is_refused():
    assert fault_of(open_frame, encode_frame(HELLO, 0, KEY), 0, KEY, (Decision, End)) is Fault.UNEXPECTED


@pytest.mark.injects(Injection.HUGE_LENGTH)
@pytest.mark.parametrize("length", [65537, 2**32 - 1])
def test_header_with_an_oversize_length_is_refused_by_itself(length):
    header = struct.pack(">BBHIQ", 1, 0, 0, length, 0)
    assert fault_of(decode_header, header, 0, KINDS) is Fault.OVERSIZE


def test_opening_carries_its_nonce():
    assert decode_opening(encode_opening(KEY)) == KEY and len(encode_opening(KEY)) == OPENING_BYTES


@pytest.mark.parametrize(
    ("opening", "fault"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(OPENING_BYTES), Fault.BAD_MAGIC),
        (b"gruboros\x00\x01" + bytes(32), Fault.WRONG_VERSION),
        (b"gruboros", Fault.MALFORMED),
    ],
)
def test_opening_of_something_else_is_refused(opening, fault):
    assert fault_of(decode_opening, opening) is fault


def changed(message, **changes):
    return json.dumps({**json.loads(encode(message)), **changes}, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Hello, b""),
        (Hello, b"{}"),
        (Hello, b"[" * 60000),
        (Hello, b"\xff\xfe{\x00}\x00"),
        pytest.param(Hello, pickle.dumps({"run_id": "run"}), marks=pytest.mark.injects(Injection.PICKLE)),
        (Hello, encode(HELLO) + b" "),
        (Hello, encode(HELLO).replace(b'"rank":3', b'"rank":3,"rank":3')),
        (Hello, encode(HELLO).replace(b"1.25", b"1.250")),
        (Hello, encode(HELLO).replace(b"1.25", b"NaN")),
        (Hello, encode(HELLO).replace(b"1.25", b"1e999")),
        (Hello, encode(HELLO).replace(b"1.25", b"1" * 5000)),
        (Hello, changed(HELLO, fitness=float("inf"))),
        (Hello, changed(HELLO, fitness=1)),
        (Hello, changed(HELLO, fitness="1.25")),
        (Hello, changed(HELLO, rank=-1)),
        (Hello, changed(HELLO, rank=True)),
        (Hello, changed(HELLO, step=2**63)),
        (Hello, changed(HELLO, step=1.0)),
        (Hello, changed(HELLO, run_id="")),
        (Hello, changed(HELLO, run_id="a\nb")),
        (Hello, changed(HELLO, run_id="\ud800")),
        (Hello, changed(HELLO, run_id="r" * 201)),
        (Hello, changed(HELLO, schema_hash="0F" * 32)),
        (Hello, changed(HELLO, incarnation="ab" * 15)),
        (Hello, changed(HELLO, extra=1)),
        (Decision, changed(DECISION, flow="sideways")),
        (Hello, changed(HELLO, lineage=-1)),
        (Hello, changed(HELLO, lineage=None)),
        (Hello, changed(HELLO, lineage=LINEAGE_LIMIT + 1)),
        (Hello, changed(HELLO, probe="ab" * 16, losses=[1e308, 1.0])),
        (Hello, changed(HELLO, probe="ab" * 16, losses=[-1.0, 1.0])),
        (Hello, changed(HELLO, accepts=1)),
        (Hello, changed(HELLO, accepts="true")),
        (Decision, changed(DECISION, flow=["both send"])),
        (Decision, changed(DECISION, whole=0)),
        (SnapshotHeader, changed(SNAPSHOT, lineage=2**63)),
        pytest.param(
            SnapshotHeader, changed(SNAPSHOT, nbytes=2**64 - 1), marks=pytest.mark.injects(Injection.HUGE_LENGTH)
        ),
        (SnapshotHeader, changed(SNAPSHOT, scalars={"k": float("nan")})),
        (SnapshotHeader, changed(SNAPSHOT, scalars={"k": 1})),
        (SnapshotHeader, changed(SNAPSHOT, scalars={"k": -5.0})),
        (SnapshotHeader, changed(SNAPSHOT, scalars={"k": 1e200})),
        (SnapshotHeader, changed(SNAPSHOT, scalars={str(n): 1.0 for n in range(65)})),
        (SnapshotHeader, changed(SNAPSHOT, scalars=[1.0])),
        (SnapshotHeader, changed(SNAPSHOT, nbytes=-1)),
        (End, changed(END, digest="5a" * 31)),
        (Receipt, changed(ACCEPTED, accepted=1)),
        (Receipt, changed(ACCEPTED, accepted=False)),
        (Receipt, changed(REFUSED, fault="tired")),
        (Receipt, changed(REFUSED, accepted=True)),
        (Busy, b"[]"),
    ],
)
def test_decode_refuses_what_encode_does_not_make(kind, body):
    assert fault_of(decode, kind, body) is Fault.MALFORMED


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_decoders_raise_only_protocol_errors_for_mutated_messages(data):
    message = data.draw(st.sampled_from(MESSAGES))
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"[", b"1e999", b"-", b"null", b"NaN", b"\\ud800"])
        )
    kind = data.draw(st.sampled_from(KINDS))
    try:
        assert encode(decode(kind, bytes(body))) == bytes(body)
    except ProtocolError as error:
        assert error.fault is Fault.MALFORMED


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.integers(0, 2**64 - 1))
def test_decode_header_bounds_every_length(header, sequence):
    try:
        _, length = decode_header(header, sequence, KINDS)
    except ProtocolError:
        return
    assert length <= 65536


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_decode_opening_raises_only_protocol_errors(message):
    with pytest.raises(ProtocolError):
        decode_opening(message)


def fit(fitness, lineage=400, accepts=True):
    return Hello("run", "0f" * 32, 3, "ab" * 16, 500, 2, lineage, fitness, accepts)


@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize(("ours", "theirs"), [(None, 1.0), (1.0, None), (None, None)])
def test_decide_lets_nobody_win_by_an_unknown_fitness(method, ours, theirs):
    assert decide(fit(ours), fit(theirs), Policy(method, "ema")) == Decision(Flow.NONE, "fitness unknown")


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_decide_calls_equal_fitness_a_tie(method):
    assert decide(fit(1.0), fit(1.0), Policy(method, "ema")) == Decision(Flow.NONE, "tie")


@pytest.mark.parametrize(
    ("method", "ours", "theirs", "flow"),
    [
        ("clonal", 1.0, 2.0, Flow.INITIATOR_SENDS),
        ("clonal", 2.0, 1.0, Flow.RESPONDER_SENDS),
        ("recombination", -1.0, 0.0, Flow.INITIATOR_SENDS),
        ("recombination", 2.0, 1.0, Flow.RESPONDER_SENDS),
        ("average", 1.0, 2.0, Flow.BOTH),
        ("average", 2.0, 1.0, Flow.BOTH),
    ],
)
def test_decide_lets_the_lower_loss_win(method, ours, theirs, flow):
    decision = decide(fit(ours), fit(theirs), Policy(method, "ema"))
    assert decision.flow is flow and decision.whole == (method == "clonal")


@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("young", [0, 1, 450])
@pytest.mark.parametrize("fitness", [(None, None), (0.1, 2.0), (2.0, 0.1), (1.0, 1.0), (0.1, None), (None, 0.1)])
def test_decide_gives_the_younger_the_elders_weights_whole_whatever_the_fitness(method, young, fitness):
    younger, elder = fit(fitness[0], young), fit(fitness[1], 1001)
    reason = f"adopts: lineage 1001 against {young}"
    assert decide(younger, elder, Policy(method, "ema")) == Decision(Flow.RESPONDER_SENDS, reason, whole=True)
    assert decide(elder, younger, Policy(method, "ema")) == Decision(Flow.INITIATOR_SENDS, reason, whole=True)


@pytest.mark.parametrize(("young", "old"), [(0, 100), (50, 200), (450, 1000), (7, 7)])
def test_decide_tells_ranks_of_about_one_lineage_apart_by_fitness(young, old):
    younger = fit(1.0, young)
    assert decide(younger, fit(2.0, old), Policy("recombination", "ema")).flow is Flow.INITIATOR_SENDS
    assert decide(younger, fit(2.0, old), Policy("average", "ema")).flow is Flow.BOTH
    assert (
        decide(younger, fit(2.0, 2 * young + ADOPTION_SLACK_STEPS + 1), Policy("average", "ema")).flow
        is Flow.RESPONDER_SENDS
    )


@pytest.mark.parametrize("method", ["clonal", "recombination"])
@pytest.mark.parametrize(("lineage", "fitness"), [(400, 2.0), (0, None)], ids=["loser", "fresh"])
def test_decide_sends_nothing_to_a_rank_that_does_not_accept_it(method, lineage, fitness):
    elder, wary, willing = fit(1.0), fit(fitness, lineage, accepts=False), fit(fitness, lineage)
    assert (
        decide(wary, elder, Policy(method, "ema"))
        == decide(elder, wary, Policy(method, "ema"))
        == Decision(Flow.NONE, "not accepted")
    )
    assert (
        decide(willing, fit(1.0, accepts=False), Policy(method, "ema")).flow is Flow.RESPONDER_SENDS
    )  # the other way stays open


@pytest.mark.parametrize("wary", ["caller", "answerer", "both"])
def test_decide_averages_only_if_both_accept(wary):
    caller, answerer = fit(1.0, accepts=wary == "answerer"), fit(2.0, accepts=wary == "caller")
    assert decide(caller, answerer, Policy("average", "ema")) == Decision(Flow.NONE, "not accepted")


@pytest.mark.parametrize("losses", [(0.0, LOSS_LIMIT), (LOSS_LIMIT, 0.0), (LOSS_LIMIT, LOSS_LIMIT)])
def test_decide_compares_whatever_losses_a_hello_can_tell(losses):
    mine, theirs = (dataclasses.replace(HELLO, probe="ab" * 16, losses=(loss, 0.5 * loss) * 4) for loss in losses)
    assert decide(mine, theirs, Policy(fitness="probe")).flow is not Flow.NONE


def test_decide_says_what_it_would_have_said_when_nothing_was_to_travel():
    assert decide(fit(1.0, accepts=False), fit(None), Policy("average", "ema")) == Decision(
        Flow.NONE, "fitness unknown"
    )
