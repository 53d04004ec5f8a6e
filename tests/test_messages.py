"""Where events wait for whoever reads them."""

import asyncio
import threading
import time

from PIL import Image

from mlx_kontext.engine import Inbox
from mlx_kontext.messages import (
    Cancelled,
    Closed,
    Event,
    Progress,
    Started,
)


def test_events_wait_in_an_inbox() -> None:
    inbox = Inbox()
    preview = Image.new("RGB", (1, 1))
    for event in (
        Started(1),
        Progress(1, "a", index=1, preview=preview),
        Progress(1, "b", index=2),
        Cancelled(1),
        Progress(2, "c"),
        Closed(),
    ):
        inbox.put(event)
    assert inbox.get() == Started(1)
    latest = inbox.get()  # steps that nobody looked at are left out, their picture is not
    assert isinstance(latest, Progress) and latest.index == 2 and latest.preview is preview
    assert [type(event) for event in inbox] == [Cancelled, Progress, Closed]
    assert inbox.get(timeout=0.01) is None


def test_events_from_another_thread_in_an_event_loop() -> None:
    async def main() -> list[Event]:
        inbox, ticks = Inbox(), 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        def fill() -> None:
            for number in range(20):
                inbox.put(Started(number))
                time.sleep(0.005)
            inbox.put(Closed())

        ticking = asyncio.create_task(tick())
        thread = threading.Thread(target=fill)
        thread.start()
        events = [event async for event in inbox]
        thread.join()
        ticking.cancel()
        assert ticks > 3  # the loop was not blocked
        inbox.put(Closed())  # nobody listens any more
        return events

    events = asyncio.run(main())
    assert events == [*(Started(number) for number in range(20)), Closed()]
