"""train.py in a process that stands still in the middle of something until the test lets it go on.

    python -m tests.held_train MOMENT VISITS FOLDER FLAGS...

MOMENT: "save" (a checkpoint is written, but not synced yet), "merge" (some tensors are merged, others not) or
"transfer" (a part of a payload is sent; training goes on). VISITS: when to stop there, "1,2" the first two times. Then
it makes FOLDER/held_<rank>_<visit> and waits for FOLDER/go_<rank>_<visit>. Visit 0 is the start of its training, where
it always stops.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

import gossip.exchange
import gossip.merge
import train
from gossip.wire import Wire
from runtime.arguments import run_main
from training.loop import Trainer

POLL_SECONDS = 0.005
MID_PAYLOAD = 50_000  # bytes; the tests' models have about 170 kB


class Hold:
    """Counts visits to the moment, and knows how long each has to last."""

    def __init__(self, visits: str, folder: str) -> None:
        self._visits = {0, *map(int, visits.split(","))}
        self._folder = Path(folder)
        self._visit = -1

    def begin(self) -> Path | None:
        """One more visit; if it is to be held, the file to wait for."""
        self._visit += 1
        if self._visit not in self._visits:
            return None
        name = f"{os.environ['RANK']}_{self._visit}"
        (self._folder / f"held_{name}").touch()
        return self._folder / f"go_{name}"

    def wait(self) -> None:
        """A visit of a thread that stands still."""
        go = self.begin()
        while go is not None and not go.exists():
            time.sleep(POLL_SECONDS)


def hold_saves(hold: Hold) -> None:
    """Stop before the sync of a checkpoint."""
    fsync = os.fsync

    def held(descriptor: int) -> None:
        if ".checkpoint_rank" in os.readlink(f"/proc/self/fd/{descriptor}"):
            hold.wait()
        fsync(descriptor)

    os.fsync = held


def hold_merges(hold: Hold) -> None:
    """Stop between two pieces of a merge, if both ends merge: where one takes all of the other's it has no `own`."""
    pieces = gossip.merge._pieces

    def held(schema, live, peer, own):
        for number, piece in enumerate(pieces(schema, live, peer, own)):
            if number == 2 and own is not None:
                hold.wait()
            yield piece

    gossip.merge._pieces = held


def hold_transfers(hold: Hold) -> None:
    """Stop in the middle of a payload that is sent, while the event loop goes on."""
    send, held_wires = Wire.send, set()

    async def held(self: Wire, content: bytes | memoryview) -> None:
        if self.sent > MID_PAYLOAD and self not in held_wires:
            held_wires.add(self)
            go = hold.begin()
            while go is not None and not go.exists():
                await asyncio.sleep(POLL_SECONDS)
        await send(self, content)

    Wire.send = held
    gossip.exchange.PIECE_BYTES = 4096


def hold_start(hold: Hold) -> None:
    """Stop before the first step."""
    run = Trainer.run

    def held(self: Trainer, *arguments) -> None:
        hold.wait()
        run(self, *arguments)

    Trainer.run = held


if __name__ == "__main__":
    moment, visits, folder, *flags = sys.argv[1:]
    hold = Hold(visits, folder)
    hold_start(hold)
    {"save": hold_saves, "merge": hold_merges, "transfer": hold_transfers}[moment](hold)
    sys.argv[1:] = flags
    run_main(train.main)
