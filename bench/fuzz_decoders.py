"""Every decoder of what a stranger, a peer or the shared folder may send, against mutated inputs.

Of frames, messages and handshakes only ProtocolError may come, of the registry's files only ValueError and OSError.
What is accepted must be the bytes that encoding it makes. No decoder may ask the wire for more than the bound, nor
allocate more than allowed_bytes() says.
"""

import json
import tempfile
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.errors import HypothesisWarning
from tqdm import tqdm

from bench.fuzz_inputs import DECODERS, KEY, KINDS, Attack, Batch, batches
from gossip.faults import Fault, ProtocolError
from gossip.filesystem_coordinator import Sightings, make_members
from gossip.handshake import authenticate
from gossip.protocol import (
    MAC_BYTES,
    OPENING_BYTES,
    Busy,
    Decision,
    End,
    Hello,
    Receipt,
    SnapshotHeader,
    decode,
    decode_header,
    decode_opening,
    encode,
    encode_frame,
    encode_opening,
)
from gossip.registry import RANK_FILE_LIMIT, RANKING_LIMIT, RANKING_NAME, rank_file, read_entry, read_ranking
from gossip.wire import Channel

ROUND = 200  # examples of hypothesis, which remembers all of a round's
MEMORY = Path("/dev/shm")  # where files are made and read without a disk
SAMPLED = 32  # one input in so many has its memory measured
# Bytes of a body that may be asked for: said again here, so that a bound that is raised by mistake is found.
BODY_LIMITS = {Hello: 65536, Decision: 1024, SnapshotHeader: 16384, End: 256, Receipt: 256, Busy: 2}
LARGEST_READ = max(BODY_LIMITS.values()) + MAC_BYTES
# A registry file is read at one go, into room for its bound.
READ_BYTES = {"entry": RANK_FILE_LIMIT, "ranking": RANKING_LIMIT}
FIXED_BYTES = 64 * 1024
GROWTH = 64  # times the input: "[]," becomes a list of 72 bytes and a place in the list around it


class Broken(AssertionError):
    """A decoder broke its promise; the message holds the input."""


@dataclass
class Tally:
    """What came of the inputs so far, by decoder.

    seen: their hashes; sampled: those whose memory was measured; peaks: most bytes that one of them allocated.
    """

    seen: set[int] = field(default_factory=set)
    inputs: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)
    faults: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in DECODERS})
    sampled: Counter = field(default_factory=Counter)
    peaks: Counter = field(default_factory=Counter)
    largest_read: int = 0


class Stream:
    """A wire whose other end has sent `content` and closed; `largest_read`: the most that was asked of it at once."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0
        self.largest_read = 0

    async def receive(self, nbytes: int) -> bytes:
        self.largest_read = max(self.largest_read, nbytes)
        piece = self.content[self.place : self.place + nbytes]
        self.place += len(piece)
        if len(piece) < nbytes:
            raise ProtocolError(Fault.CLOSED)
        return piece

    async def send(self, content: bytes) -> None:
        """Nobody listens."""


class Decoders:
    """The decoders by name, each a function that takes an input and returns once all of it was accepted."""

    def __init__(self, folder: Path) -> None:
        self.tally = Tally()
        self._folder = folder
        self._decoders: dict[str, Callable[[bytes, Batch, Attack], None]] = {
            "opening": self._opening,
            "handshake": self._handshake,
            "header": self._header,
            "frame": self._frames,
            "resealed frame": self._frames,
            "body": self._body,
            "entry": self._entry,
            "ranking": self._ranking,
        }

    def feed(self, batch: Batch, attack: Attack) -> None:
        """Make the input of `attack`, decode it and count it, unless it has been fed before. Raises Broken."""
        content, tally, name = batch.make_input(attack), self.tally, attack.decoder
        key = hash((name, content))
        if key in tally.seen:  # hypothesis likes to come back to what it has tried
            return
        sampled = zlib.crc32(content) % SAMPLED == 0
        if sampled:
            tracemalloc.start()
        try:
            fault = self._fault_of(content, batch, attack)
            peak = tracemalloc.get_traced_memory()[1]
            if peak > allowed_bytes(name, len(content)):
                raise AssertionError(f"{peak} bytes allocated of {allowed_bytes(name, len(content))}")
        except Exception as error:
            raise Broken(f"{name}: {error!r}\nfor {content!r}\nmade by {attack}") from error
        finally:
            tracemalloc.stop()
        tally.seen.add(key)
        tally.inputs[name] += 1
        if sampled:
            tally.sampled[name] += 1
            tally.peaks[name] = max(tally.peaks[name], peak)
        if fault is None:
            tally.accepted[name] += 1
        else:
            tally.faults[name][fault] += 1

    def _fault_of(self, content: bytes, batch: Batch, attack: Attack) -> str | None:
        """What the decoder found wrong in its own terms; None: it accepted the input."""
        try:
            self._decoders[attack.decoder](content, batch, attack)
        except ProtocolError as error:
            return error.fault.name + (", no JSON" if "no JSON" in str(error) else "")
        except (ValueError, OSError) as error:
            if attack.decoder not in READ_BYTES:
                raise
            return type(error).__name__
        return None

    def _opening(self, content: bytes, batch: Batch, attack: Attack) -> None:
        _require_same(encode_opening(decode_opening(content)), content)

    def _handshake(self, content: bytes, batch: Batch, attack: Attack) -> None:
        stream = Stream(content)
        try:
            _result(authenticate(stream, KEY, initiator=attack.base % 2 == 0))
        finally:
            self._judge_reads(stream, OPENING_BYTES)
        raise AssertionError("a stranger was let in")

    def _header(self, content: bytes, batch: Batch, attack: Attack) -> None:
        kind, length = decode_header(content, batch.sequence, attack.expected)
        if length > BODY_LIMITS[kind] or kind not in attack.expected:
            raise AssertionError(f"{kind.__name__} of {length} bytes was let through")
        number = KINDS.index(kind) + 1
        _require_same(bytes([number, 0, 0, 0]) + length.to_bytes(4, "big") + batch.sequence.to_bytes(8, "big"), content)

    def _frames(self, content: bytes, batch: Batch, attack: Attack) -> None:
        stream, sequence = Stream(content), 0
        channel = Channel(stream, send_key=bytes(32), receive_key=KEY)
        try:
            while sequence == 0 or stream.place < len(content):
                start = stream.place
                message = _result(channel.receive(*KINDS))
                _require_same(encode_frame(message, sequence, KEY), content[start : stream.place])
                sequence += 1
        finally:
            self._judge_reads(stream, LARGEST_READ)

    def _body(self, content: bytes, batch: Batch, attack: Attack) -> None:
        _require_same(encode(decode(type(batch.messages[attack.other]), content)), content)

    def _entry(self, content: bytes, batch: Batch, attack: Attack) -> None:
        rank = batch.entries[attack.base]["rank"]
        path = rank_file(self._folder, rank)
        path.write_bytes(content)
        entry = read_entry(rank, path)
        path.write_text(json.dumps(entry, allow_nan=False))
        _require_same(read_entry(rank, path), entry)
        _take_in([entry])

    def _ranking(self, content: bytes, batch: Batch, attack: Attack) -> None:
        path = self._folder / RANKING_NAME
        path.write_bytes(content)
        ranking = read_ranking(self._folder)
        path.write_text(json.dumps(ranking, allow_nan=False))
        _require_same(read_ranking(self._folder), ranking)
        _take_in(ranking["members"])

    def _judge_reads(self, stream: Stream, limit: int) -> None:
        self.tally.largest_read = max(self.tally.largest_read, stream.largest_read)
        if stream.largest_read > limit:
            raise AssertionError(f"{stream.largest_read} bytes asked of the wire, of {limit}")


def fuzz(inputs: int, seed: int, shrink: bool = True) -> dict[str, Any]:
    """Feed `inputs` distinct mutated inputs, or a few more, to the decoders, in rounds with seeds from `seed` on.

    Returns the figures. Raises Broken with an input that breaks a promise; `shrink`: the smallest that can be found.
    """
    began = time.monotonic()
    folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
    with folder as path, tqdm(total=inputs, unit="input", disable=None) as bar:
        decoders = Decoders(Path(path))
        while decoders.tally.inputs.total() < inputs:
            _round(decoders, inputs, seed, shrink, bar)
            seed += 1
    return _figures(decoders.tally, time.monotonic() - began)


def allowed_bytes(decoder: str, nbytes: int) -> int:
    """What `decoder` may allocate for an input of `nbytes`, whatever is in it."""
    return FIXED_BYTES + READ_BYTES.get(decoder, 0) + GROWTH * nbytes


def _round(decoders: Decoders, inputs: int, seed: int, shrink: bool, bar: tqdm) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=ROUND,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,  # Broken says it all
    )
    @hypothesis.given(batches)
    def attack_all(batch: Batch) -> None:
        if decoders.tally.inputs.total() < inputs:  # else what is left of the round has nothing to do
            for attack in batch.attacks:
                decoders.feed(batch, attack)
            bar.update(decoders.tally.inputs.total() - bar.n)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # of a batch that is too large to show, when one is broken
        attack_all()


def _figures(tally: Tally, seconds: float) -> dict[str, Any]:
    inputs = tally.inputs.total()
    return {
        "inputs": inputs,
        "seconds": round(seconds, 1),
        "inputs_per_second": round(inputs / seconds),
        "accepted": tally.accepted.total(),
        "largest_read": tally.largest_read,
        "decoders": {
            name: {
                "inputs": tally.inputs[name],
                "accepted": tally.accepted[name],
                "faults": dict(tally.faults[name].most_common()),
                "memory_sampled": tally.sampled[name],
                "largest_peak": tally.peaks[name],
            }
            for name in DECODERS
        },
    }


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What `coroutine` returns, which never has to wait: its wire is a Stream."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("expected no waiting")


def _take_in(entries: list[dict]) -> None:
    """What a reader of the registry makes of entries that were accepted."""
    seen = Sightings(timeout_seconds=1.0)
    for entry in entries:
        seen.observe(entry, now=0.0)
    make_members(seen.entries, live=set(seen.entries))


def _require_same(got: Any, given: Any) -> None:
    if got != given:
        raise AssertionError(f"accepted, but encoded again it is {str(got)[:2000]}")
