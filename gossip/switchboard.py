"""The network thread: it listens, calls, holds one conversation at a time, and bounds and accounts for each."""

import asyncio
import functools
import socket
import threading
import traceback
from collections.abc import Callable

from gossip.exchange import Outcome, converse
from gossip.faults import Fault, ProtocolError
from gossip.handshake import Session, authenticate
from gossip.ledger import Ledger, Talk
from gossip.network_utils import connect, join_address
from gossip.protocol import Hello
from gossip.snapshot_desk import Delivery, SnapshotDesk
from gossip.state import Snapshot
from gossip.wire import Channel, Wire, bounded
from runtime.stderr import say

STRANGERS_LIMIT = 32  # connections at once that have not authenticated yet
HANDSHAKE_SECONDS = 5.0  # to connect and to authenticate
ACCEPT_PAUSE_SECONDS = 0.1  # after the system had no descriptor or memory for a connection


class Switchboard:
    """Owns the listening socket and every connection of one rank, on one thread that runs an event loop.

    say_hello: what is published now, from any thread; key: of the run; seconds: bound of a whole conversation;
    choose_peer: the address to call, or None; on_self: told an address that turned out to be this rank's own.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        desk: SnapshotDesk,
        method: str,
        ledger: Ledger,
        seconds: float,
        say_hello: Callable[[], Hello],
        choose_peer: Callable[[], str | None],
        on_self: Callable[[str], None],
    ) -> None:
        self.error: BaseException | None = None  # what ended the thread before its time
        self._listener = listener
        self._key = key
        self._desk = desk
        self._method = method
        self._ledger = ledger
        self._seconds = seconds
        self._say_hello = say_hello
        self._choose_peer = choose_peer
        self._on_self = on_self
        self._slot = threading.Lock()  # held while in a conversation, until its merge: released by either thread
        self._strangers = 0
        self._tasks: set[asyncio.Task] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gossip-network", daemon=True)

    def start(self) -> None:
        """Start the thread; on return it can be posted to."""
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        """End every conversation, close every socket and join the thread."""
        self.post(lambda: self._stop.set())
        self._thread.join()

    def post(self, callback: Callable[..., None], *arguments: object) -> None:
        """Run `callback` on the network thread soon; from any thread. Nothing happens once the thread has ended."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: the thread has ended, by close() or by its error
            assert self._loop.is_closed()

    @property
    def engaged(self) -> bool:
        """In a conversation, or with a snapshot that is still to be merged."""
        return self._slot.locked()

    def ring(self) -> None:
        """Call some peer, unless a conversation is going on. From the training thread; returns at once."""
        if not self.engaged:
            self.post(self._begin_call)

    def release(self) -> None:
        """The conversation is over: its snapshot was merged or dropped."""
        self._slot.release()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        accepting = asyncio.ensure_future(self._accept())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({accepting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending = {accepting, stopping, *self._tasks}
            for task in ending:
                task.cancel()
            await asyncio.wait(ending)
            self._listener.close()
        if not accepting.cancelled():
            accepting.result()

    async def _accept(self) -> None:
        while True:
            try:
                connection, address = await self._loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors or memory, or the caller is gone already
                self._ledger.note("accept_failed", str(error))
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            if self._strangers >= STRANGERS_LIMIT:
                connection.close()
                continue
            self._strangers += 1
            self._begin(Talk(join_address(*address[:2]), initiator=False, connection=connection))
            await asyncio.sleep(0)  # while callers wait in line accepting never does, and others have their turn too

    def _begin_call(self) -> None:
        address = self._choose_peer()
        if address is not None and self._slot.acquire(blocking=False):
            self._ledger.count(initiated=1)
            self._begin(Talk(address, initiator=True, claimed=True))

    def _begin(self, talk: Talk) -> None:
        task = asyncio.ensure_future(self._hold(talk))
        self._tasks.add(task)
        # A callback, since a task that is cancelled before its first step runs no line of its own.
        task.add_done_callback(functools.partial(self._end, talk))

    def _end(self, talk: Talk, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            say("".join(traceback.format_exception(task.exception())))
        if talk.connection is not None:
            talk.connection.close()
        if not talk.initiator and talk.exchange_id is None:
            self._strangers -= 1
        if talk.claimed and not talk.delivered:
            self.release()

    async def _hold(self, talk: Talk) -> None:
        """One conversation and its account."""
        error: ProtocolError | None = ProtocolError(Fault.INTERNAL)  # what any other exception counts as
        try:
            outcome = await bounded(self._talk(talk), self._seconds, "the conversation")
            error = None
        except ProtocolError as fault:
            error = fault
        except asyncio.CancelledError:
            error = ProtocolError(Fault.CLOSING)
            raise
        finally:
            if error is not None:
                self._fail(talk, error)
        if error is None:
            self._conclude(talk, outcome)

    async def _talk(self, talk: Talk) -> Outcome:
        session = await bounded(self._meet(talk), min(HANDSHAKE_SECONDS, self._seconds), "the handshake")
        talk.exchange_id = session.exchange_id
        if not talk.initiator:
            self._strangers -= 1
            self._ledger.count(received=1)
        talk.channel = Channel(talk.wire, session.send_key, session.receive_key)
        return await converse(talk.channel, _Party(self, talk), talk.initiator)

    async def _meet(self, talk: Talk) -> Session:
        if talk.initiator:
            talk.connection = await connect(talk.address)
        talk.wire = Wire(talk.connection)
        return await authenticate(talk.wire, self._key, talk.initiator)

    def _conclude(self, talk: Talk, outcome: Outcome) -> None:
        if outcome.received is not None:  # the merge has yet to follow, and accounts for it
            talk.delivered = True
            self._desk.deliver(Delivery(talk, outcome))
            return
        ending, event = ("tied", "tied") if outcome.tied else ("won", "sent")
        self._ledger.write(talk, event, outcome.decision.reason)
        self._ledger.count_ended(talk, ending)

    def _fail(self, talk: Talk, error: ProtocolError) -> None:
        if error.fault is Fault.SELF:
            if not talk.initiator:
                return  # the calling end of the same conversation accounts for it
            self._on_self(talk.address)
        self._ledger.fail(talk, error)


class _Party:
    """This rank's end of one conversation: an exchange.Party."""

    def __init__(self, board: Switchboard, talk: Talk) -> None:
        self.schema = board._desk.schema
        self.method = board._method
        self.scalar_names = board._desk.scalar_names
        self.receive_buffer = board._desk.receive_buffer
        self._board = board
        self._talk = talk

    def hello(self) -> Hello:
        self._talk.mine = self._board._say_hello()
        return self._talk.mine

    def claim(self) -> bool:
        self._talk.claimed = self._board._slot.acquire(blocking=False)
        return self._talk.claimed

    async def snapshot(self, generation: int) -> Snapshot:
        return await self._board._desk.snapshot(generation)
