"""The network thread: it listens, calls, holds one conversation at a time, and bounds and accounts for each."""

import asyncio
import functools
import socket
import threading
import traceback
from collections.abc import Callable

from gossip.address_book import AddressBook
from gossip.decision import Policy
from gossip.exchange import PIECE_BYTES, Outcome, converse
from gossip.faults import Fault, ProtocolError
from gossip.handshake import Session, authenticate
from gossip.ledger import Ledger, Talk
from gossip.network_utils import connect, join_address
from gossip.protocol import Hello
from gossip.reports import Reports
from gossip.snapshot_desk import Delivery, SnapshotDesk
from gossip.state import Snapshot
from gossip.strangers import Strangers
from gossip.wire import Channel, Wire, bounded
from gossip.wire_format import wire_format
from runtime.exhaustion import as_memory_error
from runtime.stderr import say

HANDSHAKE_SECONDS = 5.0  # to connect and to authenticate
ACCEPTS_AT_ONCE = 10  # callers, and then a pause: bounds the time that they take from training
ACCEPT_PAUSE_SECONDS = 0.2  # who comes meanwhile would most likely hear BUSY
REPORT_SECONDS = 10.0  # between two lines about the same kind of failure of strangers
OWN_FAULTS = (Fault.CLOSING, Fault.OUT_OF_MEMORY, Fault.INTERNAL)  # which say nothing of who was called
CLOSE_SECONDS = 5.0  # for the thread to end: whatever holds it, the process can end


class Switchboard:
    """Owns the listening socket and every connection of one rank, on one thread that runs an event loop.

    Memory and connections are bounded: one conversation with a peer, which has the buffers of the snapshot desk, and
    callers that wait for it or have not authenticated as in Strangers. Where memory is out, the conversation at hand
    ends.

    key: of the run; wire_dtype: see wire_format(); seconds: bound of a whole conversation. Called on the network
    thread: say_hello(address, theirs): what is published now, theirs None for a caller; distrusts(theirs): whether that
    peer's weights are not taken now; on_end_well(outcome): a conversation has ended without a fault. book: whom to
    call.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        desk: SnapshotDesk,
        policy: Policy,
        wire_dtype: str,
        ledger: Ledger,
        seconds: float,
        say_hello: Callable[[str, Hello | None], Hello],
        distrusts: Callable[[Hello], bool],
        book: AddressBook,
        on_end_well: Callable[[Outcome], None],
    ) -> None:
        self.error: BaseException | None = None  # what ended the thread before its time
        self._listener = listener
        self._key = key
        self._desk = desk
        self._policy = policy
        self._wire_dtype = wire_dtype
        self._wire_format = wire_format(wire_dtype, PIECE_BYTES)
        self._ledger = ledger
        self._seconds = seconds
        self._handshake_seconds = min(HANDSHAKE_SECONDS, seconds)
        self._say_hello = say_hello
        self._distrusts = distrusts
        self._book = book
        self._on_end_well = on_end_well
        self._slot = threading.Lock()  # held while in a conversation, until its merge: released by either thread
        self._reports = Reports(REPORT_SECONDS)
        self._calling: Talk | None = None  # which this rank began; who calls it before it has an answer is talked to
        self._strangers = Strangers(key, self._handshake_seconds, ledger, self._reports, self._welcome)
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
        """End every conversation, close every socket and join the thread, or leave it where something holds it."""
        self.post(lambda: self._stop.set())
        if self._thread.ident is not None:  # it was started
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            say(f"the network thread has not ended for {CLOSE_SECONDS:g} s: leaving it to the end of the process")

    def post(self, callback: Callable[..., None], *arguments: object) -> None:
        """Run `callback` on the network thread soon; from any thread. Nothing happens once it has ended, or if it could
        not begin."""
        if self._loop is None:
            return
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
            self._strangers.close()
            ending = {accepting, stopping, *self._tasks}
            for task in ending:
                task.cancel()
            await asyncio.wait(ending)
            self._reports.close()
            self._listener.close()
        if not accepting.cancelled():
            accepting.result()

    async def _accept(self) -> None:
        while True:
            try:
                self._admit(await self._loop.sock_accept(self._listener))
                for _ in range(ACCEPTS_AT_ONCE - 1):
                    self._admit(self._listener.accept())
            except BlockingIOError:
                pass  # these were all
            except (OSError, MemoryError) as error:  # out of descriptors or memory, or the caller is gone already
                self._loop.call_soon(self._report_accept, error)  # where memory is out there too, that ends alone
            await asyncio.sleep(ACCEPT_PAUSE_SECONDS)

    def _admit(self, accepted: tuple[socket.socket, tuple]) -> None:
        connection, address = accepted
        self._strangers.admit(connection, join_address(*address[:2]))

    def _report_accept(self, error: OSError | MemoryError) -> None:
        reason = str(error) or Fault.OUT_OF_MEMORY.value
        self._reports.tell("accept", lambda others: self._ledger.note("accept_failed", f"{reason}{others}"))

    def _begin_call(self) -> None:
        if self.engaged or self._calling is not None or (address := self._book.choose()) is None:
            return
        self._calling = Talk(address, initiator=True)
        self._ledger.count(initiated=1)
        self._begin(self._calling)

    def _welcome(self, talk: Talk, session: Session) -> asyncio.Task:
        self._use(talk, session)
        self._ledger.count(received=1)
        return self._begin(talk)

    def _use(self, talk: Talk, session: Session) -> None:
        talk.exchange_id = session.exchange_id
        talk.channel = Channel(talk.wire, session.send_key, session.receive_key)

    def _begin(self, talk: Talk) -> asyncio.Task:
        task = None
        try:
            task = asyncio.ensure_future(self._hold(talk))
            self._tasks.add(task)
            # A callback, since a task that is cancelled before its first step runs no line of its own.
            task.add_done_callback(functools.partial(self._end, talk))
        except MemoryError:
            if task is not None:
                task.cancel()
            self._let_go(talk, task)
            raise
        return task

    def _end(self, talk: Talk, task: asyncio.Task) -> None:
        self._let_go(talk, task)  # first: for what is said after it memory may be out
        if not task.cancelled() and task.exception() is not None:
            say("".join(traceback.format_exception(task.exception())))

    def _let_go(self, talk: Talk, task: asyncio.Task | None) -> None:
        self._tasks.discard(task)
        if talk is self._calling:
            self._calling = None
        if talk.claimed and not talk.delivered:
            self.release()
        if talk.connection is not None:
            self._strangers.dismiss(talk.connection)
            talk.connection.close()

    async def _hold(self, talk: Talk) -> None:
        """One conversation and its account."""
        error: ProtocolError | None = ProtocolError(Fault.INTERNAL)  # what any other exception counts as
        try:
            work = bounded(self._talk(talk), self._seconds, "the conversation", spent=talk.seconds)
            with as_memory_error():
                self._conclude(talk, await work)
            error = None
        except ProtocolError as fault:
            error = fault
        except MemoryError as exhausted:
            error = ProtocolError(Fault.OUT_OF_MEMORY, str(exhausted))
        except asyncio.CancelledError:
            error = ProtocolError(Fault.CLOSING)
            raise
        finally:
            if error is not None:
                self._fail(talk, error)

    async def _talk(self, talk: Talk) -> Outcome:
        if talk.initiator:
            await self._meet_in_time(talk)
        return await converse(talk.channel, _Party(self, talk), talk.initiator)

    async def _meet_in_time(self, talk: Talk) -> None:
        seconds = self._handshake_seconds
        try:
            await bounded(self._meet(talk), seconds, "the handshake")
        except ProtocolError as error:
            if error.fault is Fault.DEADLINE and talk.connection is None:
                raise ProtocolError(Fault.UNREACHABLE, f"no answer in {seconds:g} s") from error
            raise

    async def _meet(self, talk: Talk) -> None:
        talk.connection = await connect(talk.address)
        talk.wire = Wire(talk.connection)
        self._use(talk, await authenticate(talk.wire, self._key, initiator=True))
        self._book.answered(talk.address)

    def _conclude(self, talk: Talk, outcome: Outcome) -> None:
        self._on_end_well(outcome)
        if outcome.received is not None:  # the merge has yet to follow, and accounts for it
            self._desk.deliver(Delivery(talk, outcome))
            talk.delivered = True
            return
        ending, event = ("tied", "tied") if outcome.tied else ("won", "sent")
        self._ledger.write(talk, event, outcome.decision.reason)
        self._ledger.count_ended(talk, ending)

    def _fail(self, talk: Talk, error: ProtocolError) -> None:
        if error.fault is Fault.SELF:
            if not talk.initiator:
                return  # the calling end of the same conversation accounts for it
            self._book.own(talk.address)
        elif talk.initiator and talk.channel is None and error.fault not in OWN_FAULTS:
            self._book.silent(talk.address)
        self._ledger.fail(talk, error)


class _Party:
    """This rank's end of one conversation: an exchange.Party."""

    def __init__(self, board: Switchboard, talk: Talk) -> None:
        self.schema = board._desk.schema
        self.policy = board._policy
        self.scalar_names = board._desk.scalar_names
        self.gene_names = board._desk.gene_names
        self.wire_dtype = board._wire_dtype
        self.wire_format = board._wire_format
        self.receive_buffer = board._desk.receive_buffer
        self._board = board
        self._talk = talk

    def hello(self, theirs: Hello | None) -> Hello:
        self._talk.mine = self._board._say_hello(self._talk.address, theirs)
        return self._talk.mine

    def distrusts(self, theirs: Hello) -> bool:
        return self._board._distrusts(theirs)

    def claim(self) -> bool:
        self._talk.claimed = self._board._slot.acquire(blocking=False)
        if self._talk.claimed:
            self._board._strangers.dismiss(self._talk.connection)
        return self._talk.claimed

    async def snapshot(self, generation: int) -> Snapshot:
        return await self._board._desk.snapshot(generation)
