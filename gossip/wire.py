"""One TCP connection: bytes sent whole and read exactly, and authenticated frames on top of them.

Deadlines belong to the whole conversation, so there are none here: the caller bounds it and cancels.
"""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from gossip.faults import Fault, ProtocolError
from gossip.protocol import (
    HEADER_BYTES,
    MAC_BYTES,
    Hello,
    Message,
    decode_frame,
    decode_header,
    encode_frame,
)

Result = TypeVar("Result")


async def bounded(work: Coroutine[Any, Any, Result], seconds: float, what: str, spent: float = 0.0) -> Result:
    """The result of `work`, or ProtocolError DEADLINE once `seconds` have passed; `work` has ended in either case.
    spent: of the seconds, before.

    asyncio.wait_for, before Python 3.12, loses a cancellation that comes just as `work` ends: the caller would go on.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds - spent)
        if not done:
            raise ProtocolError(Fault.DEADLINE, f"{seconds:g} s for {what}")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Wire:
    """A connected socket, made non-blocking; `sent` and `received` count its bytes. One event loop's thread only.

    Every way the connection can break raises ProtocolError CLOSED.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        # Frames are small and answered one by one; payloads fill segments by themselves. The kernel sizes the buffers:
        # a size set here would be capped by net.core.*mem_max and end the kernel's own, larger tuning.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self.sent = 0
        self.received = 0

    async def send(self, content: bytes | memoryview) -> None:
        """Send all of `content`."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, content)
        except OSError as error:
            raise ProtocolError(Fault.CLOSED, _reason(error)) from error
        self.sent += len(content)

    async def receive_into(self, target: memoryview) -> None:
        """Fill `target`."""
        loop = asyncio.get_running_loop()
        while target:
            try:
                count = await loop.sock_recv_into(self._socket, target)
            except OSError as error:
                raise ProtocolError(Fault.CLOSED, _reason(error)) from error
            if count == 0:
                raise ProtocolError(Fault.CLOSED, f"{len(target)} bytes short")
            self.received += count
            target = target[count:]

    async def receive(self, nbytes: int) -> bytes:
        """The next `nbytes`, which the caller has bounded."""
        content = bytearray(nbytes)
        await self.receive_into(memoryview(content))
        return bytes(content)

    def take(self, nbytes: int) -> bytes:
        """What has come of the next `nbytes`, without waiting: b"" for nothing yet."""
        try:
            content = self._socket.recv(nbytes)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ProtocolError(Fault.CLOSED, _reason(error)) from error
        if not content:
            raise ProtocolError(Fault.CLOSED, f"{nbytes} bytes short")
        self.received += len(content)
        return content

    def say(self, content: bytes) -> None:
        """Send all of `content`, without waiting: so little that it fits into what the kernel holds."""
        try:
            count = self._socket.send(content)
        except OSError as error:
            raise ProtocolError(Fault.CLOSED, _reason(error)) from error
        if count < len(content):
            raise ProtocolError(Fault.CLOSED, f"{count} of {len(content)} bytes taken")
        self.sent += count

    def wake_at(self, nbytes: int) -> None:
        """Let the event loop be woken once `nbytes` have come, or the connection has ended."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)


class Channel:
    """Frames on a wire: each direction with its own key and its own sequence of numbers.

    peer: the HELLO that came over it, once it has.
    """

    def __init__(self, wire: Wire, send_key: bytes, receive_key: bytes) -> None:
        self.wire = wire
        self.peer: Hello | None = None
        self._send_key = send_key
        self._receive_key = receive_key
        self._next_sent = 0
        self._next_received = 0

    async def send(self, message: Message) -> None:
        """Send one message."""
        frame = encode_frame(message, self._next_sent, self._send_key)
        self._next_sent += 1
        await self.wire.send(frame)

    async def receive(self, *expected: type[Message]) -> Message:
        """The next message, one of the `expected` kinds. Raises ProtocolError for anything else."""
        header = await self.wire.receive(HEADER_BYTES)
        kind, length = decode_header(header, self._next_received, expected)
        rest = await self.wire.receive(length + MAC_BYTES)
        message = decode_frame(kind, header, rest, self._receive_key)
        self._next_received += 1
        if isinstance(message, Hello):
            self.peer = message
        return message


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
