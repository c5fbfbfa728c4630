"""Both ends prove that they hold the run's secret before either says anything else.

    caller -> answerer   magic, version, nonce
    answerer -> caller   magic, version, nonce
    caller -> answerer   proof of the caller, over both openings
    answerer -> caller   proof of the answerer, over both openings

The caller proves first, so that a stranger learns nothing from an answerer but a nonce. A refusal is a closed
connection. The key depends on the run: neither another secret nor another run id can authenticate. Keys are derived
after HKDF (RFC 5869).
"""

import hashlib
import hmac
import secrets
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from gossip.faults import Fault, ProtocolError
from gossip.protocol import (
    NONCE_BYTES,
    OPENING_BYTES,
    PROOF_BYTES,
    decode_opening,
    encode_opening,
)
from gossip.wire import Wire

CALLER = b"caller"
ANSWERER = b"answerer"


@dataclass(frozen=True)
class Session:
    """What a handshake leaves: a key for each direction, and an id (16 hex digits) that is the same at both ends."""

    send_key: bytes
    receive_key: bytes
    exchange_id: str


def run_key(secret: bytes, run_id: str) -> bytes:
    """The key of one run (32 bytes), extracted from the secret with the run's id as salt."""
    return _hmac(run_id.encode(), secret)


class Step(NamedTuple):
    """What one end says next, and how many bytes it wants to hear then; session: of the last step, which wants none."""

    say: bytes
    wants: int
    session: Session | None = None


def steps(key: bytes, initiator: bool) -> Generator[Step, bytes, None]:
    """One end's steps, each sent what the one before wanted; `key` from run_key().

    Raises ProtocolError: BAD_MAGIC, WRONG_VERSION or WRONG_SECRET (a proof under another secret or run id).
    """
    if initiator:
        mine = encode_opening(secrets.token_bytes(NONCE_BYTES))
        theirs = yield Step(mine, OPENING_BYTES)
        decode_opening(theirs)
        transcript = mine + theirs
        proven = yield Step(proof(key, CALLER, transcript), PROOF_BYTES)
        _check(proven, proof(key, ANSWERER, transcript))
        last = b""
    else:
        theirs = yield Step(b"", OPENING_BYTES)
        decode_opening(theirs)
        mine = encode_opening(secrets.token_bytes(NONCE_BYTES))
        transcript = theirs + mine
        proven = yield Step(mine, PROOF_BYTES)
        _check(proven, proof(key, CALLER, transcript))
        last = proof(key, ANSWERER, transcript)
    yield Step(last, 0, session(key, transcript, initiator))


async def authenticate(wire: Wire, key: bytes, initiator: bool) -> Session:
    """Run the handshake on a fresh connection; `key` from run_key().

    Raises ProtocolError: as steps(), REFUSED (the answerer closed instead of going on) or CLOSED.
    """
    handshake = steps(key, initiator)
    step = next(handshake)
    while step.session is None:
        await wire.send(step.say)
        step = handshake.send(await _receive(wire, step.wants, initiator))
    await wire.send(step.say)
    return step.session


def proof(key: bytes, role: bytes, transcript: bytes) -> bytes:
    """The proof of `role` (CALLER or ANSWERER) for both openings, which carry the version and the nonces."""
    return _hmac(key, b"gruboros proof " + role + b"\0" + transcript)


def session(key: bytes, transcript: bytes, initiator: bool) -> Session:
    """The session that follows from both openings, as seen from one end."""
    by_caller = _hmac(key, b"gruboros frames of " + CALLER + b"\0" + transcript)
    by_answerer = _hmac(key, b"gruboros frames of " + ANSWERER + b"\0" + transcript)
    exchange_id = hashlib.sha256(b"gruboros exchange\0" + transcript).digest()[:8].hex()
    return Session(*((by_caller, by_answerer) if initiator else (by_answerer, by_caller)), exchange_id)


def _hmac(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")


def _check(got: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(got, expected):
        raise ProtocolError(
            Fault.WRONG_SECRET, "or another run: both need the same, and --output of the same last name"
        )


async def _receive(wire: Wire, nbytes: int, initiator: bool) -> bytes:
    try:
        return await wire.receive(nbytes)
    except ProtocolError as error:
        if not initiator or error.fault is not Fault.CLOSED:
            raise
        raise ProtocolError(
            Fault.REFUSED, "another secret, run or version, too many callers, or a peer that is leaving"
        ) from error
