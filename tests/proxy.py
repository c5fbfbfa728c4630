"""A man in the middle: a TCP proxy on loopback that delays, throttles or cuts what passes."""

import asyncio
import socket
import struct
import threading
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Passes bytes between its callers and `target` from `with` to its end, as badly as it is told to.

    delay: seconds that every byte is under way; rate: bytes a second in each direction, once `fast` bytes of it have
    passed at full speed; cut: (up, n) resets both connections after n bytes went up (to the target), or else down.
    `passed` counts bytes by direction: passed[True] went up.
    """

    target: tuple[str, int] | None = None
    delay: float = 0.0
    rate: float | None = None
    fast: int = 0
    cut: tuple[bool, int] | None = None
    passed: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def __enter__(self) -> "Proxy":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.where = self._listener.getsockname()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """Where to call it, as "host:port"."""
        return "{}:{}".format(*self.where)

    async def _serve(self) -> None:
        passing: set[asyncio.Task] = set()
        server = await asyncio.start_server(
            lambda reader, writer: passing.add(asyncio.ensure_future(self._pass_on(reader, writer))),
            sock=self._listener,
        )
        await self._stop.wait()
        server.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            reset(writer)
            return
        ends = (writer, far_writer)
        pumps = [
            asyncio.ensure_future(self._pump(True, reader, far_writer, ends)),
            asyncio.ensure_future(self._pump(False, far_reader, writer, ends)),
        ]
        try:
            await asyncio.gather(*pumps)
        except ConnectionError:
            pass  # one end has left, and so does the other
        finally:
            for pump in pumps:
                pump.cancel()
            for end in ends:
                end.close()

    async def _pump(
        self,
        up: bool,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        while piece := await source.read(self._next(up)):
            if self.rate is not None and self.passed[up] >= self.fast:
                await asyncio.sleep(len(piece) / self.rate)
            self.passed[up] += len(piece)
            if self.delay:
                await asyncio.sleep(self.delay)  # frames are answered one by one: none waits for an earlier one
            sink.write(piece)
            await sink.drain()
            if self.cut is not None and self.cut[0] is up and self.passed[up] >= self.cut[1]:
                reset(*ends)
        if self.delay:
            await asyncio.sleep(self.delay)
        sink.write_eof()

    def _next(self, up: bool) -> int:
        """How many bytes to pass on at once."""
        passed = self.passed[up]
        if self.cut is not None and self.cut[0] is up:
            return max(1, self.cut[1] - passed)
        if self.rate is not None:
            return max(1, self.fast - passed)
        return 64 * 1024


def reset(*ends: asyncio.StreamWriter) -> None:
    """Close connections with a reset instead of an end."""
    for end in ends:
        connection = end.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.transport.abort()
