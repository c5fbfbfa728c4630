"""What the decoders are fed: valid messages, broken by hypothesis.

A Batch is one example of hypothesis: a few valid messages, and many attacks on them. Drawing takes hypothesis longer
than decoding takes a decoder, so all attacks of a batch come from one draw of bytes.
"""

import itertools
import json
import pickle
import string
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from blake3 import blake3
from hypothesis import strategies as st

from gossip.faults import Fault
from gossip.protocol import (
    HEADER_BYTES,
    LINEAGE_LIMIT,
    LOSS_LIMIT,
    MERGE_METHODS,
    NONCE_BYTES,
    PROOF_BYTES,
    Busy,
    Decision,
    End,
    Flow,
    Hello,
    Message,
    Receipt,
    SnapshotHeader,
    encode,
    encode_frame,
    encode_opening,
)

KEY = bytes(range(32))
KINDS = (Hello, Decision, SnapshotHeader, End, Receipt, Busy)
DECODERS = ("resealed frame", "frame", "header", "body", "opening", "handshake", "entry", "ranking")
# What a conversation waits for at some time, and everything at once.
EXPECTED = (KINDS, (Hello, Busy), (Decision,), (SnapshotHeader,), (End,), (Receipt,))
POOL = 3  # valid messages of each sort in a batch
ATTACKS = 128  # in a batch
LENGTHS = (0, 1, 2, 3, 255, 256, 257, 1023, 1024, 1025, 16384, 16385, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32 - 1)
TOKENS = (
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"-0", b"-0.0", b"0", b"0.0", b"1E5", b"1e-400", b"1e16", b"1.50"),
    *(b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"18446744073709551615", b"0x10"),
    *(b"9" * 4299, b"9" * 4301, b"1." + b"0" * 4000, b"0." + b"3" * 60000, b"null", b"true", b"false", b"[]", b"{}"),
    *(b'""', b'"a"', b'"' + b"0f" * 16 + b'"', b'"' + b"0f" * 32 + b'"', b'"' + b"0F" * 32 + b'"', b'"both send"'),
    *(b'"' + b"a" * 201 + b'"', b'"' + b"a" * 60000 + b'"', b'"\\ud800"', b'"\\u0000"', b'"\\u00e9"', b'"\\n"'),
    *('"\u00e9"'.encode(), '"\U0001f600"'.encode(), b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\x7f", b'"\x1b[2J"'),
    *(b"[" * 50, b"[" * 60000, b'{"":' * 10000, b"[[],[]" + b",[]" * 20000 + b"]", b"[" * 500 + b"]" * 500, b"{}" * 9),
    *(b'"', b"\\", b",", b":", b"{", b"}", b"[", b"]", b" ", b"\n", b"-", b"e", b"."),
    pickle.dumps({"run_id": "run"}),
)
# (operation, token): drawn evenly. The first changes nothing, which is where hypothesis shrinks to.
_OPERATIONS = (
    *[("keep", b"")] * 20,
    *((operation, b"") for operation in ("flip", "cut", "delete", "duplicate", "splice", "length") for _ in range(10)),
    *((operation, b"") for operation in ("repeat member", "drop member") for _ in range(10)),
    *((operation, token) for operation in ("insert", "replace value") for token in TOKENS),
)

_counts = st.integers(0, 2**63 - 1)
_losses = st.none() | st.floats(allow_nan=False, allow_infinity=False)
_words = st.text(string.ascii_letters + string.digits + " ._-\u00e9\u4e2d\U0001f600", min_size=1, max_size=60)
_digits = st.integers(0, 16**32 - 1)
_FIELDS = {
    "run_id": _words,
    "schema_hash": _digits.map(lambda number: f"{number:064x}"),
    "rank": st.integers(0, 4096),
    "incarnation": _digits.map(lambda number: f"{number:032x}"),
    "step": _counts,
    "generation": _counts,
    "lineage": st.integers(0, LINEAGE_LIMIT),
    "fitness": _losses,
    "accepts": st.booleans(),
    "flow": st.sampled_from(Flow),
    "reason": _words,
    "whole": st.booleans(),
    "nbytes": _counts,
    "scalars": st.dictionaries(_words, st.floats(0, 1e15), max_size=4),
    "digest": _digits.map(lambda number: f"{number:064x}"),
    "looks": st.integers(1, 2**63 - 1),
    "genes": st.dictionaries(_words, st.floats(1e-9, 1e15), max_size=3),
}
_windows = st.lists(st.floats(0, LOSS_LIMIT), min_size=1, max_size=4).map(tuple)
_probed = st.tuples(_digits.map(lambda number: f"{number:032x}"), _windows)
_evidence = st.just((None, ())) | _probed


def _messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    if kind is Receipt:
        return st.just(Receipt(True)) | st.sampled_from(Fault).map(lambda fault: Receipt(False, fault))
    drawn = {field.name: _FIELDS[field.name] for field in fields(kind) if field.name in _FIELDS}
    if kind is Hello:  # losses come with a probe, and only then
        return st.builds(lambda evidence, **others: Hello(probe=evidence[0], losses=evidence[1], **others),
                         _evidence, **drawn)  # fmt: skip
    return st.builds(kind, **drawn)


_entries = st.fixed_dictionaries(
    {
        **{name: _FIELDS[name] for name in ("rank", "incarnation", "step", "fitness", "lineage")},
        "sequence": _counts,
        "world_size": st.integers(1, 4096),
        "state": st.sampled_from(("running", "left")),
        "address": st.none() | st.just("127.0.0.1:29400") | _words,
        "life": _counts,
        "method": st.sampled_from(MERGE_METHODS),
    }
)


@dataclass(frozen=True)
class Edit:
    """One change to an input: at `place` modulo its length; size: of what is cut out, repeated or the like."""

    operation: str
    token: bytes
    place: int
    size: int


@dataclass(frozen=True)
class Attack:
    """One input in the making. base, other: places in the pool; expected: the kinds of frames that are due."""

    decoder: str
    base: int
    other: int
    expected: tuple[type[Message], ...]
    edits: tuple[Edit, Edit]


@dataclass(frozen=True)
class Batch:
    """messages, entries (of the registry): valid ones; noise: any bytes; sequence: a frame's number."""

    messages: list[Message]
    entries: list[dict]
    noise: bytes
    sequence: int
    attacks: list[Attack]

    def make_input(self, attack: Attack) -> bytes:
        """The bytes of `attack`."""
        base, other, edits = attack.base, attack.other, attack.edits
        match attack.decoder:
            case "opening":
                return _edited(encode_opening(bytes(NONCE_BYTES)), self._bodies[other], edits)
            case "handshake":
                proof = (self.noise * PROOF_BYTES).ljust(PROOF_BYTES, b"\0")[:PROOF_BYTES]
                return _edited(encode_opening(bytes(NONCE_BYTES)) + proof, self.noise, edits)
            case "header":
                header = encode_frame(self.messages[base], self.sequence, KEY)[:HEADER_BYTES]
                return _edited(header, self.noise, edits)
            case "frame":
                frames = self._frames[base] + encode_frame(self.messages[other], 1, KEY)
                return _edited(frames, self._frames[other], edits)
            case "resealed frame":
                return _sealed(type(self.messages[base]), _edited(self._bodies[base], self._bodies[other], edits))
            case "body":
                return _edited(self._bodies[base], self.noise, edits)
            case "entry":
                return _edited(self._entries[base], self._entries[other], edits)
            case "ranking":
                return _edited(self._ranking, self._entries[base], edits)
        raise ValueError(f"expected one of {DECODERS}, got {attack.decoder}")

    @cached_property
    def _bodies(self) -> list[bytes]:
        return [encode(message) for message in self.messages]

    @cached_property
    def _frames(self) -> list[bytes]:
        return [encode_frame(message, 0, KEY) for message in self.messages]

    @cached_property
    def _entries(self) -> list[bytes]:
        return [json.dumps(entry).encode() for entry in self.entries]

    @cached_property
    def _ranking(self) -> bytes:
        leader, ranks = self.entries[0], sorted({entry["rank"] for entry in self.entries})
        own = {"leader": leader["rank"], **{name: leader[name] for name in ("incarnation", "sequence", "state")}}
        return json.dumps({**own, "live": ranks, "ranking": ranks, "members": self.entries}).encode()


_TARGETS = tuple(itertools.product(DECODERS, range(POOL), range(POOL), EXPECTED))
_ATTACK = struct.Struct(">HHHBHHB")  # the target's number; of each edit the operation's number, place and size


@lru_cache(maxsize=16)  # hypothesis tries each draw again, beside other messages
def _attacks(drawn: bytes) -> list[Attack]:
    return [_attack(*numbers) for numbers in _ATTACK.iter_unpack(drawn)]


def _attack(target: int, *edits: int) -> Attack:
    return Attack(*_TARGETS[target % len(_TARGETS)], (_edit(*edits[:3]), _edit(*edits[3:])))


def _edit(operation: int, place: int, size: int) -> Edit:
    return Edit(*_OPERATIONS[operation % len(_OPERATIONS)], place, size)


batches = st.builds(
    Batch,
    messages=st.lists(st.sampled_from(KINDS).flatmap(_messages), min_size=POOL, max_size=POOL),
    entries=st.lists(_entries, min_size=POOL, max_size=POOL),
    noise=st.binary(max_size=128),
    sequence=st.sampled_from((0, 1, 2**32, 2**64 - 1)),
    attacks=st.binary(min_size=ATTACKS * _ATTACK.size, max_size=ATTACKS * _ATTACK.size).map(_attacks),
)


def _sealed(kind: type[Message], body: bytes) -> bytes:
    """A frame, the first of its direction, with the right length and MAC for whatever `body` holds."""
    head = struct.pack(">BBHIQ", KINDS.index(kind) + 1, 0, 0, len(body), 0) + body
    return head + blake3(head, key=KEY).digest()


def _edited(content: bytes, other: bytes, edits: Iterable[Edit]) -> bytes:
    for edit in edits:
        content = _with_edit(content, other, edit)
    return content


def _with_edit(content: bytes, other: bytes, edit: Edit) -> bytes:
    place, size = edit.place % (len(content) + 1), edit.size
    head, tail = content[:place], content[place:]
    match edit.operation:
        case "keep":
            return content
        case "flip":
            return head + bytes([tail[0] ^ 1 << size % 8]) + tail[1:] if tail else head
        case "cut":
            return head
        case "delete":
            return head + tail[size:]
        case "insert":
            return head + edit.token + tail
        case "duplicate":
            return head + tail[:size] + tail
        case "splice":
            return head + other[size % (len(other) + 1) :]
        case "length":  # where a frame's header has it
            return content[:4] + struct.pack(">I", LENGTHS[size % len(LENGTHS)]) + content[8:]
    return _with_member_edit(content, edit)


def _with_member_edit(content: bytes, edit: Edit) -> bytes:
    """One member of the object in `content` repeated, dropped or given another value; without an object, a cut."""
    try:
        members = list(json.loads(content).items())
        place = edit.place % len(members)
    except (ValueError, RecursionError, AttributeError, ZeroDivisionError):
        return content[: edit.place % (len(content) + 1)]
    texts = [json.dumps({name: value}, separators=(",", ":")).encode()[1:-1] for name, value in members]
    changed = {
        "replace value": [json.dumps(members[place][0]).encode() + b":" + edit.token],
        "repeat member": [texts[place], texts[place]],
        "drop member": [],
    }[edit.operation]
    return b"{" + b",".join([*texts[:place], *changed, *texts[place + 1 :]]) + b"}"
