"""An engine with all it tells kept, for the tests of the engine."""

import dataclasses
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_kontext import EditResult
from mlx_kontext.engine import Engine
from mlx_kontext.engine_process import ProcessWorker
from mlx_kontext.messages import (
    Event,
)

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"
PROMPT = "make the circle green"


class Watched:
    """An engine with the demo model and all it told."""

    def __init__(self, process: bool):
        self.events: list[Event] = []
        self._told = threading.Condition()
        self.engine = Engine("demo", process=process, on_event=self.put)

    def put(self, event: Event) -> None:
        with self._told:
            self.events.append(event)
            self._told.notify_all()

    def until(self, wanted: Callable[[Event], bool], since: int = 0, timeout: float = 60) -> Event:
        """The first event from number `since` on that is wanted; waits for it."""
        deadline = time.monotonic() + timeout
        with self._told:
            while True:
                for event in self.events[since:]:
                    if wanted(event):
                        return event
                left = deadline - time.monotonic()
                assert left > 0, [type(event).__name__ for event in self.events[since:]]
                self._told.wait(left)

    @property
    def pid(self) -> int:
        running = self.engine._running
        assert running and isinstance(running.worker, ProcessWorker) and running.worker.pid
        return running.worker.pid


def gone(pid: int) -> bool:
    """Whether no such process runs; one that ended and waits to be reaped does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state == "" or state.startswith("Z")


def wait_until(true: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same(ours: EditResult, theirs: EditResult) -> None:
    """All a result is, but the time it took."""
    assert np.array_equal(ours.image, theirs.image) and ours.image.mode == theirs.image.mode
    assert np.array_equal(ours.latents, theirs.latents) and ours.latents.dtype == theirs.latents.dtype
    for name in ("seed", "model", "notices", "vae", "pixels"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in (f.name for f in dataclasses.fields(ours.request)):
        mine, other = getattr(ours.request, name), getattr(theirs.request, name)
        if name in ("image", "latents"):
            assert np.array_equal(mine, other) if isinstance(mine, np.ndarray) else type(mine) is type(other)
        else:
            assert mine == other, name
