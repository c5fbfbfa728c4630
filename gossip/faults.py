"""Every way a conversation between two ranks can end badly, by name."""

import enum


class Fault(enum.Enum):
    """Every way a conversation can end badly; BUSY is counted apart from the others."""

    BUSY = "busy"
    UNREACHABLE = "unreachable"
    DEADLINE = "deadline passed"
    CLOSED = "connection closed early"
    REFUSED = "refused"
    BAD_MAGIC = "not this protocol"
    WRONG_VERSION = "wrong version"
    WRONG_SECRET = "wrong secret"
    OVERSIZE = "oversize length"
    BAD_SEQUENCE = "repeated or lost frame"
    BAD_MAC = "bad MAC"
    UNEXPECTED = "unexpected message"
    MALFORMED = "malformed message"
    SCHEMA_MISMATCH = "schema mismatch"
    WRONG_RUN = "wrong run"
    SELF = "own address"
    RANK_TAKEN = "rank taken"
    DISTRUSTED = "distrusted"
    DECISION_DIFFERS = "decisions differ"
    BAD_SNAPSHOT = "inconsistent snapshot"
    DIGEST_MISMATCH = "digest mismatch"
    TOO_FAR = "weights too far apart for remainders"
    NOT_FINITE = "not finite"
    NEGATIVE_SECOND_MOMENT = "negative second moment"
    EXPLODING_NORM = "exploding norm"
    DIVERGED = "diverged"
    REJECTED = "rejected by the peer"
    WEIGHTS_CHANGED = "weights changed"
    OUT_OF_MEMORY = "out of memory"
    CLOSING = "closing"
    INTERNAL = "internal error"


class ProtocolError(Exception):
    """A conversation's end by `fault`; the only exception that bytes from a peer can cause."""

    def __init__(self, fault: Fault, message: str = "") -> None:
        super().__init__(f"{fault.value}: {message}" if message else fault.value)
        self.fault = fault
