"""Engine: edits from any thread, made one after another by the one thread, or process, that owns MLX.

    with Engine("demo") as engine:
        engine.edit("cat.jpg", "give it a red scarf").save("scarf.png")

    inbox = Inbox()
    engine = Engine("demo", process=True, on_event=inbox.put)    # this process never imports mlx
    engine.submit("cat.jpg", "give it a red scarf")
    async for event in inbox: ...                                # Started, Progress, Done, ... of `messages`

What waits is kept here, so a worker that dies takes one edit with it; the next edit starts another. No MLX in this module.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np

from .awake import Awake
from .card import SOURCE
from .edit import EditRequest, EditResult
from .engine_process import Death, ProcessWorker
from .errors import KontextError, RequestError
from .messages import (
    Beat,
    Cancelled,
    Closed,
    Died,
    Done,
    Edit,
    Event,
    Failed,
    Inbox,
    Load,
    Loading,
    ModelInfo,
    Progress,
    Ready,
    Stalled,
    Unloaded,
)
from .photo import read_photo
from .wire import WireError
from .worker import ThreadWorker

__all__ = ["Engine", "Inbox", "Load"]

_DEATHS = 2  # in a row, with nothing finished between, until what waits is held


class Worker(Protocol):
    """What runs `worker.serve`: a thread or a process."""

    def send(self, edit: Edit) -> None: ...
    def cancel(self, edit: int) -> None: ...
    def stop(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...


@dataclass
class _Job:
    id: int
    request: EditRequest
    """As the caller gave it."""
    frozen: EditRequest
    """The same with pictures in memory read and copied, so that it can wait and travel."""
    waiter: Future[Any] | None = None
    results: list[EditResult] = field(default_factory=list)


@dataclass
class _Running:
    """A worker and how far it is."""

    worker: Worker
    load: Load
    heard: bool = False
    ready: bool = False
    failed: bool = False
    """It could not open the model, said so, and ends."""
    ending: bool = False
    """We told it to."""


class Engine:
    """Owner of one model, for callers on any thread.

    model: a name or path as for `KontextPipeline.from_pretrained`, or a Load with more said. It is opened by the first edit
    or by `load`.
    process: a process of its own in place of a thread: it survives a crash of MLX, gives all memory back, can be killed.
    on_event: called with every event of `messages`, one at a time, from the engine's threads; be quick, or pass `Inbox().put`.
    preview_every: seconds between previews in Progress, at least; None for none. preview_side: pixels of their longest side.
    hang_after: seconds without a sign of life (a slow step gives several a second) after which Stalled is told.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Load = SOURCE,
        *,
        process: bool = False,
        on_event: Callable[[Event], object] | None = None,
        preview_every: float | None = None,
        preview_side: int = 256,
        hang_after: float = 30.0,
    ):
        self.preview_every, self.preview_side = preview_every, preview_side
        self.info: ModelInfo | None = None
        """The model that is open now."""
        self.held = False
        """Whether the queue stands still after two deaths in a row, or since the model could not be opened."""
        self._load = model if isinstance(model, Load) else Load(os.fspath(model))
        self._process, self._hang_after, self._folder = process, hang_after, os.getcwd()
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._lock = threading.RLock()
        self._telling = threading.RLock()
        self._teller = 0  # the thread that is in `on_event`
        self._queue: list[_Job] = []
        self._job: _Job | None = None
        self._at: Progress | None = None
        self._running: _Running | None = None
        self._deaths = 0
        self._wanted = False  # a model is to be open although nothing waits for it
        self._unwanted = False
        self._closed = False
        self._awake = Awake()
        atexit.register(self.close)

    # --- for callers, from any thread ---

    def submit(self, image: Any = None, prompt: str | None = None, **options: Any) -> int:
        """Queue an edit, in the words of `KontextPipeline.__call__`, or an EditRequest; returns its id at once.

        Raises RequestError or ImageError for what cannot be edited; relative paths are those of the folder the engine was
        made in.
        """
        return self._add(EditRequest.of(image, prompt, **options), None)

    def edit(self, image: Any = None, prompt: str | None = None, **options: Any) -> EditResult | list[EditResult]:
        """Queue an edit and wait for it: what `pipe(...)` would return or raise. Not for the thread of `on_event`."""
        waiter: Future[Any] = Future()
        number = self._add(EditRequest.of(image, prompt, **options), waiter)
        try:
            result: EditResult | list[EditResult] = waiter.result()
        except BaseException:
            self.cancel(number)  # Ctrl-C; of an edit that failed nothing is left to cancel
            raise
        return result

    def load(self, model: str | os.PathLike[str] | Load | None = None) -> None:
        """Open the model now, or another one in its place: the former is let go first, once its edit is done.

        Edits that wait are made with the model that is open when their turn comes.
        """
        with self._lock:
            self._check_open()
            if model is not None:
                self._load = model if isinstance(model, Load) else Load(os.fspath(model))
            self._wanted, self._unwanted = True, False
            self.resume()

    def unload(self) -> None:
        """Give the memory back when nothing is left to do; the next edit opens the model again."""
        with self._lock:
            self._wanted, self._unwanted = False, True
            self._dispatch()

    def resume(self) -> None:
        """Go on with a queue that is held."""
        with self._lock:
            self.held, self._deaths = False, 0
            self._dispatch()

    @property
    def running(self) -> int | None:
        """The edit the worker has now."""
        job = self._job
        return job.id if job else None

    @property
    def waiting(self) -> tuple[tuple[int, EditRequest], ...]:
        """(id, request) of every edit that waits, the next one first."""
        with self._lock:
            return tuple((job.id, job.request) for job in self._queue)

    def move(self, number: int, position: int) -> None:
        """Put a waiting edit elsewhere in the queue, 0 is next. Raises RequestError if it does not wait."""
        with self._lock:
            job = next((job for job in self._queue if job.id == number), None)
            if job is None:
                raise RequestError(f"edit {number} does not wait; see `waiting`")
            self._queue.remove(job)
            self._queue.insert(position, job)

    def cancel(self, number: int) -> bool:
        """Take a waiting edit out of the queue (no event tells), or stop the running one after its present step.

        Whether there was such an edit.
        """
        with self._lock:
            for job in self._queue:
                if job.id == number:
                    self._queue.remove(job)
                    self._answer(job, KontextError("the edit was cancelled"))
                    self._dispatch()
                    return True
            if self._job and self._job.id == number and self._running:
                self._running.worker.cancel(number)
                return True
        return False

    def kill(self) -> None:
        """Stop the worker process at once, whatever it does; its edit is Cancelled, the next one starts another worker.

        Raises KontextError for an engine without a process.
        """
        if not self._process:
            raise KontextError("a thread cannot be killed; cancel the edit, or make the Engine with process=True")
        with self._lock:
            self._wanted = False  # or a model that hangs would be opened again
            self._stop()

    def close(self) -> None:
        """End the worker, drop what waits, and give all memory back. A process ends at once, a thread after its step."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            for job in self._queue:
                self._answer(job, KontextError("the engine was closed"))
            self._queue.clear()
            running = self._running
            self._stop()
        if running is None:
            self._tell(Closed())
        elif threading.get_ident() != self._teller:
            running.worker.join(10.0 if self._process else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what happens next; with the lock held ---

    def _add(self, request: EditRequest, waiter: Future[Any] | None) -> int:
        frozen = _frozen(request)
        with self._lock:
            self._check_open()
            job = _Job(next(self._ids), request, frozen, waiter)
            self._queue.append(job)
            self._unwanted = False
            self.resume()
            return job.id

    def _check_open(self) -> None:
        if self._closed:
            raise KontextError("the engine was closed; make another")

    def _dispatch(self) -> None:
        """Do what is to be done now; called after every change."""
        running, due = self._running, bool(self._queue) and not self.held
        if running and running.ready and running.load == self._load:
            self._wanted = False  # it is there
        if running is None:
            if (due or self._wanted) and not self._closed:
                self._running = _Running(self._worker(), self._load)
        elif running.ending or running.failed or self._job:
            pass  # its end comes back here
        elif (self._unwanted and not due) or (running.load != self._load and (due or self._wanted)):
            self._stop()
        elif due and running.ready:
            self._job, self._at = self._queue.pop(0), None
            running.worker.send(Edit(self._job.id, self._job.frozen, self.preview_every, self.preview_side))
        running = self._running
        if self._job or (running and not (running.ready or running.failed or running.ending)):
            self._awake.work()
        else:
            self._awake.rest()

    def _worker(self) -> Worker:
        """A new one; its thread's first event waits for our lock."""
        if self._process:
            return ProcessWorker(
                self._load, self._receive, self._gone, hang_after=self._hang_after, folder=self._folder
            )
        return ThreadWorker(self._load, self._receive, lambda: self._gone(Death(0)))

    def _stop(self) -> None:
        if self._running and not self._running.ending:
            self._running.ending = True
            self._running.worker.stop()

    def _answer(self, job: _Job, error: KontextError | None = None) -> None:
        """Tell the caller of `edit` who waits for this one, if there is one."""
        if job.waiter is None:
            return
        if error is not None:
            job.waiter.set_exception(error)
        else:
            job.waiter.set_result(job.results if isinstance(job.request.seed, Sequence) else job.results[0])

    def _hold(self, error: KontextError) -> None:
        """Let the queue stand still; who waits for an answer gets this one."""
        self.held = True
        for job in [job for job in self._queue if job.waiter]:
            self._queue.remove(job)
            self._answer(job, error)

    # --- what the worker tells, on its thread ---

    def _receive(self, event: Event) -> None:
        """Raises WireError for an event that cannot be now."""
        if isinstance(event, Beat):
            return
        with self._telling:
            with self._lock:
                running = self._running
                if running is None or running.ending:
                    return
                event = self._noted(event, running)
                self._dispatch()
            self._tell(event)

    def _noted(self, event: Event, running: _Running) -> Event:
        job = self._job
        number = getattr(event, "id", None)
        if number is not None and (job is None or job.id != number):
            raise WireError(f"a {type(event).__name__} of edit {number}, which is not under way")
        match event:
            case Loading():
                running.heard = True
            case Ready():
                running.ready, self.info = True, event.info
            case Failed(id=None):
                running.failed, self._wanted = True, False
                self._hold(event.error())
            case Stalled():
                return replace(event, id=self.running)
            case Progress():
                self._at = event
        if job is None or number is None:
            return event
        match event:
            case Done():
                request = replace(event.result.request, image=job.request.image)
                event = replace(event, result=replace(event.result, request=request))
                job.results.append(event.result)
                self._deaths = 0
                if not event.left:
                    self._job = None
                    self._answer(job)
            case Cancelled() | Failed():
                self._job = None
                self._answer(
                    job, event.error() if isinstance(event, Failed) else KontextError("the edit was cancelled")
                )
        return event

    def _gone(self, death: Death) -> None:
        """The worker ended: as we wanted, after telling that the model cannot be opened, or it died."""
        with self._telling:
            events: list[Event] = []
            with self._lock:
                running, job = self._running, self._job
                assert running is not None
                if running.ending or running.failed:
                    if job:
                        self._answer(job, KontextError("the edit was stopped"))
                        events.append(Cancelled(job.id))
                    events.append(Unloaded())
                else:
                    words = death.words(self._stage(running))
                    events.append(Died(job.id if job else None, death.code, words, death.tail))
                    self._deaths, self._wanted = self._deaths + 1, False
                    if job:
                        self._answer(job, KontextError(words))
                    if self._deaths >= _DEATHS:
                        self._hold(KontextError(words))
                if self._closed:
                    events.append(Closed())
                self._running = self._job = self._at = self.info = None
                self._unwanted = False
                self._dispatch()
            for event in events:
                self._tell(event)

    def _stage(self, running: _Running) -> str:
        if not running.heard:
            return "while starting"
        if not running.ready:
            return f"while opening {running.load.model}"
        if self._job is None:
            return "while idle"
        if self._at is None or not self._at.index:
            return f"before the first step ({self._at.phase})" if self._at else "before the first step"
        return f"after step {self._at.index} of {self._at.total}"

    def _tell(self, event: Event) -> None:
        if self._on_event is None:
            return
        before, self._teller = self._teller, threading.get_ident()
        try:
            self._on_event(event)
        except Exception:  # of the caller's making, and the edits of others go on
            logging.getLogger(__name__).exception("on_event failed on a %s", type(event).__name__)
        finally:
            self._teller = before


def _frozen(request: EditRequest) -> EditRequest:
    """The request with pictures and noise in memory copied. Raises ImageError or RequestError."""
    image: Any = request.image
    latents = request.latents
    if image is not None and not isinstance(image, (str, os.PathLike, EditResult)):
        image = read_photo(image)
    if latents is not None:
        try:
            latents = np.array(latents, np.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise RequestError(f"latents are no array of numbers ({error}); expected packed noise [1, N, 64]") from None
    return replace(request, image=image, latents=latents)
