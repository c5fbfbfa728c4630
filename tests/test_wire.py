import asyncio
import socket

import pytest

from gossip.faults import Fault, ProtocolError
from gossip.wire import Wire, bounded


@pytest.mark.parametrize("turns", range(8))
def test_bounded_never_loses_a_cancellation(turns):
    """One that comes while the work ends, at any turn of the loop."""

    async def scene():
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        async def work():
            return await ready

        async def caller():
            await bounded(work(), 3600, "the work")
            await asyncio.sleep(3600)

        def cancel_after(left):
            task.cancel() if left == 0 else loop.call_soon(cancel_after, left - 1)

        task = asyncio.ensure_future(caller())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ready.set_result(None)
        loop.call_soon(cancel_after, turns)
        done, _ = await asyncio.wait({task}, timeout=10)
        assert done and task.cancelled()

    asyncio.run(scene())


def test_bounded_ends_the_work_at_its_deadline():
    ended = []

    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    with pytest.raises(ProtocolError) as caught:
        asyncio.run(bounded(work(), 0.01, "the work"))
    assert caught.value.fault is Fault.DEADLINE and ended == [True]


def test_bounded_counts_the_time_that_was_spent_before():
    async def work():
        await asyncio.sleep(3600)

    with pytest.raises(ProtocolError, match="3600 s for the work"):
        asyncio.run(bounded(work(), 3600, "the work", spent=3599.99))


def test_bounded_gives_the_works_result_or_error():
    async def work(error):
        if error:
            raise error
        return 7

    assert asyncio.run(bounded(work(None), 5, "the work")) == 7
    with pytest.raises(ProtocolError, match="busy"):
        asyncio.run(bounded(work(ProtocolError(Fault.BUSY)), 5, "the work"))


def test_wire_that_cannot_say_it_all_at_once_ends():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as caller:
        wire = Wire(caller)
        with pytest.raises(ProtocolError) as caught:
            while True:  # the other end reads nothing
                wire.say(bytes(1 << 20))
        assert caught.value.fault is Fault.CLOSED
