"""What peers say to each other, as bytes: pure encoding and decoding, with no sockets.

After the handshake every message is a frame: a header (kind, two reserved fields, length, sequence number), a body of
canonical JSON, and a MAC over both. Nothing is ever unpickled, and a length is judged before anything is allocated.
"""

import enum
import hmac
import json
import math
import struct
from dataclasses import dataclass, field, fields

from blake3 import blake3

from gossip.faults import Fault, ProtocolError

MAGIC = b"gruboros"
VERSION = 3
NONCE_BYTES = 32
PROOF_BYTES = 32
KEY_BYTES = 32
MAC_BYTES = 32
MERGE_METHODS = ("clonal", "recombination", "average")
PROBE_WINDOWS_LIMIT = 256
LOSS_LIMIT = 1e6  # nats per byte, of a probe window: no comparison of such losses overflows
LINEAGE_LIMIT = 2**48  # steps: centuries of them
SCALAR_LIMIT = 1e15  # an optimizer counts and sums: more, squared or as an exponent, would overflow

_OPENING = struct.Struct(f">{len(MAGIC)}sH{NONCE_BYTES}s")
_HEADER = struct.Struct(">BBHIQ")  # kind, reserved, reserved, length of the body, sequence number
OPENING_BYTES = _OPENING.size
HEADER_BYTES = _HEADER.size
_COUNT_LIMIT = 2**63
_SCALARS_LIMIT = 64
_GENES_LIMIT = 16


class Flow(enum.Enum):
    """Whose weights travel."""

    INITIATOR_SENDS = "initiator sends"
    RESPONDER_SENDS = "responder sends"
    BOTH = "both send"
    NONE = "none"


@dataclass(frozen=True)
class Hello:
    """Who is speaking, how long its weights have been trained and how fit they are.

    incarnation: a nonce of the process, 32 hex digits; generation: counts replacements of the weights other than by a
    training step; lineage: optimizer steps behind these weights, own or inherited, LINEAGE_LIMIT for more; fitness: a
    loss in nats per byte, lower is fitter, None while it is not known for these weights; accepts: whether it would take
    the hearer's weights; probe: digest of the probe's bytes, None where none was measured for these weights; losses: of
    its windows, from 0 to LOSS_LIMIT nats per byte, at most PROBE_WINDOWS_LIMIT; looks: comparisons since the weights
    last changed hands, this one included.
    """

    run_id: str
    schema_hash: str
    rank: int
    incarnation: str
    step: int
    generation: int
    lineage: int
    fitness: float | None
    accepts: bool
    probe: str | None = None
    losses: tuple[float, ...] = ()
    looks: int = 1

    def __post_init__(self) -> None:
        _require_text("run_id", self.run_id, limit=200)
        _require_hex("schema_hash", self.schema_hash, digits=64)
        _require_count("rank", self.rank)
        _require_hex("incarnation", self.incarnation, digits=32)
        _require_count("step", self.step)
        _require_count("generation", self.generation)
        _require_lineage(self.lineage)
        if self.fitness is not None:
            _require_finite("fitness", self.fitness)
        _require_truth("accepts", self.accepts)
        if self.probe is not None:
            _require_hex("probe", self.probe, digits=32)
        fits = isinstance(self.losses, tuple | list) and len(self.losses) <= PROBE_WINDOWS_LIMIT
        _require(fits, "losses", f"at most {PROBE_WINDOWS_LIMIT} numbers", type(self.losses).__name__)
        object.__setattr__(self, "losses", tuple(self.losses))
        for loss in self.losses:
            _require_finite("loss", loss)
            _require(0 <= loss <= LOSS_LIMIT, "loss", f"from 0 to {LOSS_LIMIT:g}", loss)
        _require((self.probe is None) == (not self.losses), "losses", "with a probe, and only then", len(self.losses))
        _require_count("looks", self.looks)
        _require(self.looks >= 1, "looks", "at least 1", self.looks)


@dataclass(frozen=True)
class Decision:
    """What both ends concluded from the two HELLOs; they must agree on it.

    whole: a receiver takes the snapshot as it is, with the optimizer's scalars, whatever the merge method; reason: for
    people, with numbers that another processor may have rounded otherwise.
    """

    flow: Flow
    reason: str
    whole: bool = False

    def __post_init__(self) -> None:
        if type(self.flow) is str:
            object.__setattr__(self, "flow", _member(Flow, self.flow))
        _require(isinstance(self.flow, Flow), "flow", "a flow", self.flow)
        _require_text("reason", self.reason, limit=200)
        _require_truth("whole", self.whole)

    def agrees(self, other: "Decision") -> bool:
        """Whether the same is to be done, for whatever reason."""
        return (self.flow, self.whole) == (other.flow, other.whole)


@dataclass(frozen=True)
class SnapshotHeader:
    """What the raw payload that follows is: `nbytes` of state after `step` whole steps, in `generation`.

    lineage: as in HELLO, at that step; scalars: the optimizer's counters and sums, from 0 to 1e15; genes: the
    hyperparameters it was trained with, all above 0.
    """

    step: int
    generation: int
    lineage: int
    nbytes: int
    scalars: dict[str, float]
    genes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_count("step", self.step)
        _require_count("generation", self.generation)
        _require_lineage(self.lineage)
        _require_count("nbytes", self.nbytes)
        _require_numbers("scalars", self.scalars, _SCALARS_LIMIT)
        _require_numbers("genes", self.genes, _GENES_LIMIT)
        _require(all(self.genes.values()), "genes", "above 0", 0.0)


@dataclass(frozen=True)
class End:
    """The BLAKE3 digest of the payload that came before it, in hex."""

    digest: str

    def __post_init__(self) -> None:
        _require_hex("digest", self.digest, digits=64)


@dataclass(frozen=True)
class Receipt:
    """The receiver's last word: accepted, or the fault that it found."""

    accepted: bool
    fault: Fault | None = None

    def __post_init__(self) -> None:
        if type(self.fault) is str:
            object.__setattr__(self, "fault", _member(Fault, self.fault))
        _require_truth("accepted", self.accepted)
        _require(self.fault is None or isinstance(self.fault, Fault), "fault", "a fault", self.fault)
        _require(self.accepted == (self.fault is None), "receipt", "a fault if and only if refused", self.fault)


@dataclass(frozen=True)
class Busy:
    """The answer to a HELLO while another conversation is going on."""


Message = Hello | Decision | SnapshotHeader | End | Receipt | Busy

# Kind of frame: its number is its place here, from 1. With it the longest body that is read, in bytes; HELLO's leaves
# room for a vector of losses.
_KINDS: tuple[tuple[type, int], ...] = (
    (Hello, 65536),
    (Decision, 1024),
    (SnapshotHeader, 16384),
    (End, 256),
    (Receipt, 256),
    (Busy, 2),
)
_NUMBERS = {kind: number for number, (kind, _) in enumerate(_KINDS, start=1)}


def encode_opening(nonce: bytes) -> bytes:
    """The first message of each end: magic, version, nonce (32 bytes)."""
    return _OPENING.pack(MAGIC, VERSION, nonce)


def decode_opening(message: bytes) -> bytes:
    """The nonce of a peer's opening. Raises ProtocolError: BAD_MAGIC, WRONG_VERSION or MALFORMED."""
    _require(len(message) == OPENING_BYTES, "opening", f"{OPENING_BYTES} bytes", len(message))
    magic, version, nonce = _OPENING.unpack(message)
    if magic != MAGIC:
        raise ProtocolError(Fault.BAD_MAGIC)
    if version != VERSION:
        raise ProtocolError(Fault.WRONG_VERSION, f"expected {VERSION}, got {version}")
    return nonce


def encode(message: Message) -> bytes:
    """`message` as a frame's body: canonical JSON, in ASCII."""
    return canonical_json({item.name: getattr(message, item.name) for item in fields(message)})


def decode(kind: type[Message], body: bytes) -> Message:
    """The message of `kind` in `body`. Raises ProtocolError MALFORMED unless `body` is exactly what encode() makes."""
    try:
        content = json.loads(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(Fault.MALFORMED, f"no JSON: {type(error).__name__}") from None
    names = {item.name for item in fields(kind)}
    if not isinstance(content, dict) or set(content) != names:
        raise ProtocolError(Fault.MALFORMED, f"expected the fields of {kind.__name__}")
    message = kind(**content)
    # One form for each message: repeated keys, spaces, 1e0 for 1.0 and the like end here.
    _require(encode(message) == body, kind.__name__, "canonical JSON", "another form")
    return message


def encode_frame(message: Message, sequence: int, key: bytes) -> bytes:
    """`message` as a whole frame: header, body, MAC under `key` (32 bytes)."""
    body = encode(message)
    kind = type(message)
    assert len(body) <= _KINDS[_NUMBERS[kind] - 1][1], f"{kind.__name__} of {len(body)} bytes"
    head = _HEADER.pack(_NUMBERS[kind], 0, 0, len(body), sequence) + body
    return head + _mac(head, key)


def decode_header(header: bytes, sequence: int, expected: tuple[type[Message], ...]) -> tuple[type[Message], int]:
    """Kind and length of the body of the frame that `header` begins, before anything is allocated for it.

    Raises ProtocolError: UNEXPECTED (a kind not in `expected`), OVERSIZE, BAD_SEQUENCE or MALFORMED.
    """
    _require(len(header) == HEADER_BYTES, "header", f"{HEADER_BYTES} bytes", len(header))
    number, reserved, reserved_too, length, got_sequence = _HEADER.unpack(header)
    _require(reserved == reserved_too == 0 and 1 <= number <= len(_KINDS), "header", "a known kind", number)
    kind, limit = _KINDS[number - 1]
    if length > limit:
        raise ProtocolError(Fault.OVERSIZE, f"{length} bytes where {kind.__name__} has at most {limit}")
    if got_sequence != sequence:
        raise ProtocolError(Fault.BAD_SEQUENCE, f"expected {sequence}, got {got_sequence}")
    if kind not in expected:
        raise ProtocolError(Fault.UNEXPECTED, f"{kind.__name__} for {' or '.join(k.__name__ for k in expected)}")
    return kind, length


def decode_frame(kind: type[Message], header: bytes, rest: bytes, key: bytes) -> Message:
    """The message of a frame whose `header` decode_header() took; rest: its body and MAC.

    Raises ProtocolError: BAD_MAC or MALFORMED.
    """
    body, mac = rest[:-MAC_BYTES], rest[-MAC_BYTES:]
    if not hmac.compare_digest(_mac(header + body, key), mac):
        raise ProtocolError(Fault.BAD_MAC)
    return decode(kind, body)


def canonical_json(content: dict) -> bytes:
    """The one JSON of `content`: sorted keys, no spaces, ASCII, enums by value. ValueError for NaN or infinity."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, default=lambda item: item.value)
    return text.encode("ascii")


def _mac(content: bytes, key: bytes) -> bytes:
    return blake3(content, key=key).digest()


def _member(kind: type[enum.Enum], value: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError:
        raise ProtocolError(Fault.MALFORMED, f"unknown {kind.__name__}") from None


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ProtocolError(Fault.MALFORMED, f"{name}: expected {expected}, got {str(got)[:60]!r}")


def _require_count(name: str, value: object) -> None:
    _require(type(value) is int and 0 <= value < _COUNT_LIMIT, name, "a whole number from 0", type(value).__name__)


def _require_lineage(value: object) -> None:
    _require_count("lineage", value)
    _require(value <= LINEAGE_LIMIT, "lineage", f"at most {LINEAGE_LIMIT}", value)


def _require_truth(name: str, value: object) -> None:
    _require(type(value) is bool, name, "true or false", value)


def _require_finite(name: str, value: object) -> None:
    _require(type(value) is float and math.isfinite(value), name, "a finite number", value)


def _require_numbers(name: str, numbers: object, limit: int) -> None:
    """A dict of at most `limit` names of numbers from 0 to SCALAR_LIMIT."""
    fits = isinstance(numbers, dict) and len(numbers) <= limit
    _require(fits, name, f"at most {limit} named numbers", type(numbers).__name__)
    for key, value in numbers.items():
        _require_text(f"name in {name}", key, limit=64)
        _require_finite(name, value)
        _require(0 <= value <= SCALAR_LIMIT, name, f"from 0 to {SCALAR_LIMIT:g}", value)


def _require_text(name: str, value: object, limit: int) -> None:
    fits = type(value) is str and 0 < len(value) <= limit and value.isprintable()
    _require(fits, name, f"1 to {limit} printable characters", type(value).__name__)


def _require_hex(name: str, value: object, digits: int) -> None:
    fits = type(value) is str and len(value) == digits and set(value) <= set("0123456789abcdef")
    _require(fits, name, f"{digits} hex digits", type(value).__name__)
