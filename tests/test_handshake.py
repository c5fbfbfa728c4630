"""The handshake over real sockets: who gets in, who does not, and what a stranger learns."""

import asyncio
import contextlib
import socket

import pytest

from bench.injection import Injection
from gossip.faults import Fault, ProtocolError
from gossip.handshake import ANSWERER, CALLER, authenticate, proof, run_key
from gossip.protocol import OPENING_BYTES, VERSION, encode_opening
from gossip.wire import Wire

SECRET = bytes(range(32))
KEY = run_key(SECRET, "run")


@contextlib.contextmanager
def connected():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname())
        answerer, _ = listener.accept()
    with caller, answerer:
        yield caller, answerer


async def end(connection, key, initiator):
    """A handshake's result at one end: a session or a fault. A refusal is a bare close."""
    try:
        return await asyncio.wait_for(authenticate(Wire(connection), key, initiator), 10)
    except ProtocolError as error:
        connection.close()
        return error.fault


def both_ends(caller_key, answerer_key):
    async def meet(caller, answerer):
        return await asyncio.gather(end(caller, caller_key, True), end(answerer, answerer_key, False))

    with connected() as (caller, answerer):
        return asyncio.run(meet(caller, answerer))


def test_authenticate_gives_both_ends_each_others_keys_and_one_id():
    caller, answerer = both_ends(KEY, KEY)
    assert caller.send_key == answerer.receive_key and caller.receive_key == answerer.send_key
    assert caller.send_key != caller.receive_key and len(caller.send_key) == 32
    assert caller.exchange_id == answerer.exchange_id and len(caller.exchange_id) == 16


def test_authenticate_gives_every_connection_other_keys():
    (first, _), (second, _) = both_ends(KEY, KEY), both_ends(KEY, KEY)
    keys = {first.send_key, first.receive_key, second.send_key, second.receive_key}
    assert len(keys) == 4 and first.exchange_id != second.exchange_id


@pytest.mark.injects(Injection.WRONG_RUN)
@pytest.mark.parametrize("other", [run_key(bytes(32), "run"), run_key(SECRET, "other run")], ids=["secret", "run"])
def test_authenticate_refuses_another_secret_or_run(other):
    assert both_ends(KEY, other) == [Fault.REFUSED, Fault.WRONG_SECRET]
    assert both_ends(other, KEY) == [Fault.REFUSED, Fault.WRONG_SECRET]


def against(script, initiator):
    """The fault of a handshake whose peer is `script`, run on a blocking socket, and what the script heard."""

    async def meet(honest, peer):
        loop = asyncio.get_running_loop()
        return await asyncio.gather(end(honest, KEY, initiator), loop.run_in_executor(None, script, peer))

    with connected() as (caller, answerer):
        honest, peer = (caller, answerer) if initiator else (answerer, caller)
        peer.settimeout(10)
        fault, heard = asyncio.run(meet(honest, peer))
        if isinstance(fault, Fault):
            with contextlib.suppress(ConnectionError):
                heard += peer.recv(1000)
        return fault, heard


def test_authenticate_tells_a_stranger_nothing_but_a_nonce():
    def stranger(peer):
        peer.sendall(encode_opening(bytes(32)) + bytes(32))
        return peer.recv(OPENING_BYTES, socket.MSG_WAITALL)

    fault, heard = against(stranger, initiator=False)
    assert fault is Fault.WRONG_SECRET
    assert len(heard) == OPENING_BYTES and heard[:10] == encode_opening(bytes(32))[:10]


@pytest.mark.injects(Injection.WRONG_VERSION)
@pytest.mark.parametrize(
    ("opening", "fault"),
    [
        (b"GET / HTTP/1.1\r\nHost: rank0\r\n\r\n".ljust(OPENING_BYTES), Fault.BAD_MAGIC),
        (b"gruboros" + (VERSION + 1).to_bytes(2, "big") + bytes(32), Fault.WRONG_VERSION),
    ],
    ids=["http", "newer"],
)
def test_authenticate_is_silent_to_what_does_not_speak_this_version(opening, fault):
    def stranger(peer):
        peer.sendall(opening)
        return b""

    assert against(stranger, initiator=False) == (fault, b"")


@pytest.mark.injects(Injection.REFLECTED_MESSAGE)
def test_authenticate_as_caller_is_not_fooled_by_its_own_proof():
    """A peer without the secret sends the caller's opening and then its proof back to it."""

    def mirror(peer):
        peer.sendall(peer.recv(OPENING_BYTES, socket.MSG_WAITALL))
        peer.sendall(peer.recv(32, socket.MSG_WAITALL))
        return b""

    assert against(mirror, initiator=True)[0] is Fault.WRONG_SECRET


@pytest.mark.injects(Injection.REPLAYED_MESSAGE)
def test_authenticate_as_answerer_is_not_fooled_by_an_older_conversation():
    """Everything that a caller once said, said again: the answerer's nonce is another."""
    with connected() as (caller, answerer):
        opening = encode_opening(b"n" * 32)

        async def overheard():
            honest = asyncio.ensure_future(end(answerer, KEY, False))
            loop = asyncio.get_running_loop()
            caller.setblocking(False)
            await loop.sock_sendall(caller, opening)
            transcript = opening + await loop.sock_recv(caller, OPENING_BYTES)
            said = proof(KEY, CALLER, transcript)
            await loop.sock_sendall(caller, said)
            assert await loop.sock_recv(caller, 32) == proof(KEY, ANSWERER, transcript)
            assert not isinstance(await honest, Fault)
            return said

        said = asyncio.run(overheard())

    def replay(peer):
        peer.sendall(opening + said)
        return peer.recv(OPENING_BYTES, socket.MSG_WAITALL)

    assert against(replay, initiator=False)[0] is Fault.WRONG_SECRET


@pytest.mark.injects(Injection.TRUNCATION)
@pytest.mark.parametrize("said", [0, 1, OPENING_BYTES - 1, OPENING_BYTES, OPENING_BYTES + 31])
@pytest.mark.parametrize("initiator", [True, False])
def test_authenticate_ends_when_the_peer_closes_in_the_middle(said, initiator):
    def leave(peer):
        peer.sendall((encode_opening(bytes(32)) + bytes(32))[:said])
        peer.shutdown(socket.SHUT_WR)
        return b""

    assert against(leave, initiator)[0] in ((Fault.REFUSED,) if initiator else (Fault.CLOSED,))
