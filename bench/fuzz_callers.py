"""Hostile callers, each with its way to trouble a rank whose secret it lacks; a recorder for one of them; a decoy."""

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from gossip.faults import ProtocolError
from gossip.handshake import CALLER, proof
from gossip.protocol import NONCE_BYTES, OPENING_BYTES, PROOF_BYTES, decode_opening, encode_opening
from gossip.switchboard import HANDSHAKE_SECONDS

DRIP_SECONDS = 0.25  # between the bytes of a slow caller: all of them take longer than a handshake may
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger
_BROKEN = (ConnectionError, asyncio.IncompleteReadError)  # the rank has closed, or reset


@dataclass
class Account:
    """What the callers saw. By kind: connections that were made, and those of them that the rank was first to close.

    accepted: callers that heard more than a nonce; unreached: that could not connect.
    """

    connections: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    accepted: int = 0
    unreached: int = 0


@dataclass
class Line:
    """A stranger's connection. recording: what a friend once said to the same rank; heard: bytes that came back."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    recording: bytes
    heard: int = 0
    hung_up: bool = False

    async def say(self, content: bytes) -> None:
        """Send `content`."""
        self.writer.write(content)
        await self.writer.drain()

    async def hear(self, nbytes: int) -> bytes:
        """The next `nbytes`."""
        content = await self.reader.readexactly(nbytes)
        self.heard += nbytes
        return content

    async def hear_out(self) -> None:
        """Take in what comes until the rank closes."""
        while piece := await self.reader.read(4096):
            self.heard += len(piece)

    def abort(self) -> None:
        """Close with a reset. Again: nothing."""
        self.hung_up = True
        self.writer.transport.abort()


async def _garbage(line: Line) -> None:
    await line.say(os.urandom(4096))


async def _slow_loris(line: Line) -> None:
    for byte in _opening() + bytes(PROOF_BYTES):
        await line.say(bytes([byte]))
        await asyncio.sleep(DRIP_SECONDS)


async def _half_open(line: Line) -> None:
    """Say nothing, as a host that went away."""


async def _replay(line: Line) -> None:
    await line.say(line.recording[:OPENING_BYTES])
    await line.hear(OPENING_BYTES)
    await line.say(line.recording[OPENING_BYTES:])


async def _wrong_secret(line: Line) -> None:
    mine = _opening()
    await line.say(mine)
    theirs = await line.hear(OPENING_BYTES)
    await line.say(proof(secrets.token_bytes(32), CALLER, mine + theirs))


async def _reset(line: Line) -> None:
    line.abort()


CALLERS: dict[str, Callable[[Line], Awaitable[None]]] = {
    "garbage": _garbage,
    "slow-loris": _slow_loris,
    "half-open": _half_open,
    "replay": _replay,
    "wrong secret": _wrong_secret,
    "reset": _reset,
}


async def assault(where: tuple[str, int], count: int, rate: float, recording: bytes, account: Account) -> None:
    """`count` strangers call `where`, `rate` a second, of each kind in turn; those still there at the end hang up."""
    clock, calls, answered = asyncio.get_running_loop().time, [], asyncio.Semaphore(0)
    began = clock()
    try:
        for kind in itertools.islice(itertools.cycle(CALLERS), count):
            calls.append(asyncio.ensure_future(_call(where, kind, recording, account, answered)))
            await asyncio.sleep(began + len(calls) / rate - clock())
        for _ in calls:
            await answered.acquire()
    finally:
        for call in calls:
            call.cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def _call(
    where: tuple[str, int], kind: str, recording: bytes, account: Account, answered: asyncio.Semaphore
) -> None:
    try:
        reader, writer = await asyncio.open_connection(*where)
    except OSError:
        account.unreached += 1
        return
    finally:
        answered.release()
    account.connections[kind] += 1
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    line = Line(reader, writer, recording)
    try:
        await CALLERS[kind](line)
        await line.hear_out()
        account.refused[kind] += not line.hung_up
    except _BROKEN:
        account.refused[kind] += 1
    finally:
        account.accepted += line.heard > OPENING_BYTES
        line.abort()


@contextlib.asynccontextmanager
async def decoy() -> AsyncIterator[tuple[str, int]]:
    """Something that refuses strangers as a rank does; where it listens meanwhile.

    Called in a rank's stead it shows what the callers cost the machine by themselves.
    """
    server = await asyncio.start_server(_refuse, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        decode_opening(await asyncio.wait_for(reader.readexactly(OPENING_BYTES), HANDSHAKE_SECONDS))
        writer.write(_opening())
        await asyncio.wait_for(reader.readexactly(PROOF_BYTES), HANDSHAKE_SECONDS)
    except (*_BROKEN, ProtocolError, asyncio.TimeoutError):
        pass  # nothing is said about it
    finally:
        writer.close()


def _opening() -> bytes:
    return encode_opening(secrets.token_bytes(NONCE_BYTES))


class Recorder:
    """A man in the middle: passes on what callers and `target` say, and keeps what each caller said."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.recordings: list[bytearray] = []
        self._target = target
        self._passing: set[asyncio.Task] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Listens meanwhile; gives its address, "host:port"."""
        server = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        try:
            yield "{}:{}".format(*server.sockets[0].getsockname())
        finally:
            server.close()
            for task in self._passing:
                task.cancel()
            await asyncio.gather(*self._passing, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._passing.add(asyncio.ensure_future(self._pass_on(reader, writer)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            recording = bytearray()
            self.recordings.append(recording)
            await asyncio.gather(_pump(reader, far_writer, recording), _pump(far_reader, writer, bytearray()))
            far_writer.close()
        except ConnectionError:
            pass  # one end has left, and so does the other
        finally:
            writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray) -> None:
    while piece := await source.read(65536):
        kept += piece
        sink.write(piece)
        await sink.drain()
    sink.write_eof()
