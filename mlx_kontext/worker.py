"""What the one owner of MLX does: make a pipeline, edit as it is told, say how it goes. And that as a thread of ours.

Importing this module does not import MLX, `serve` does.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

from PIL import Image

from .edit import Step
from .errors import KontextError, ResourceError
from .messages import (
    Beat,
    Cancelled,
    Done,
    Edit,
    Event,
    Failed,
    Load,
    Loading,
    ModelInfo,
    Progress,
    Ready,
    Started,
)

if TYPE_CHECKING:
    from .pipeline import KontextPipeline

BUSY_BEAT, IDLE_BEAT = 0.2, 1.0  # seconds between signs of life
PREVIEW_SHARE = 0.05  # of the time may go into previews
_NO_MEMORY = ("insufficient memory", "outofmemory", "out of memory", "malloc", "maximum allowed buffer size")


def serve(load: Load, next_edit: Callable[[], Edit | None], cancelled: set[int], emit: Callable[[Event], None]) -> None:
    """Open the model, then make one edit after another until `next_edit` gives None. Never raises.

    cancelled: ids of edits that somebody wants stopped. emit: called by this thread and by that of the heartbeat, one at a
    time. Returns after Failed(None, ...) if the model cannot be opened.
    """
    report = _Report(emit)
    with report.beating():
        try:
            report.tell(Loading(load.model))
            pipe = _open(load)
            report.watch(pipe)
            report.tell(Ready(_about(pipe)))
        except BaseException as error:  # the tokenizers library panics in a class of its own
            report.tell(_failed(None, error))
            return
        while (edit := next_edit()) is not None:
            try:
                for event in _edit(pipe, edit, cancelled):
                    report.tell(event)
            except BaseException as error:
                report.tell(_failed(edit.id, error))


def _open(load: Load) -> KontextPipeline:
    from .pipeline import KontextPipeline

    options = asdict(load)
    return KontextPipeline.from_pretrained(options.pop("model"), **options.pop("sources"), **options)


def _about(pipe: KontextPipeline) -> ModelInfo:
    from .backend import accelerator
    from .image import nearest_size

    square = nearest_size(1, 1, pipe.sizes, 1)
    plan = pipe.plan(*square, square, None)
    return ModelInfo(
        name=pipe.name,
        quantization=pipe.quantization,
        dtype=str(pipe.dtype).removeprefix("mlx.core."),
        device=accelerator(),
        sizes=pipe.sizes,
        defaults=asdict(pipe.defaults),
        identity=pipe.checkpoint.identity,
        weights=plan.weights,
        peak=plan.peak,
        budget=plan.budget,
        keep_all=plan.keep_all,
    )


def _edit(pipe: KontextPipeline, edit: Edit, cancelled: set[int]) -> Iterator[Event]:
    """The events of one edit, made while they are asked for."""
    yield Started(edit.id)
    left = max(len(edit.request.seeds), 1)
    preview = _previews(edit)
    with closing(pipe.stream(edit.request)) as steps:
        while edit.id not in cancelled and left:
            step = next(steps)
            yield Progress(
                edit.id,
                pipe.phase,
                step.index,
                step.total,
                seed=step.seed,
                seconds=step.seconds,
                eta=step.eta,
                notices=step.notices,
                preview=preview(step) if step.result is None else None,
            )
            if step.result is not None:
                left -= 1
                yield Done(edit.id, step.result, left)
    if left:
        yield Cancelled(edit.id)
    cancelled.discard(edit.id)


def _previews(edit: Edit) -> Callable[[Step], Image.Image | None]:
    """A small picture of a step where one is wanted, seldom enough to take one twentieth of the time at most."""
    due = 0.0

    def preview(step: Step) -> Image.Image | None:
        nonlocal due
        started = time.monotonic()
        if edit.preview_every is None or started < due:
            return None
        picture = step.preview()
        picture.thumbnail((edit.preview_side, edit.preview_side))
        done = time.monotonic()
        due = done + max(edit.preview_every, (done - started) / PREVIEW_SHARE)
        return picture

    return preview


def _failed(edit: int | None, error: BaseException) -> Failed:
    words = " ".join(str(error).split())
    if isinstance(error, KontextError):
        return Failed(edit, type(error).__name__, words, error.exit_code)
    if isinstance(error, MemoryError) or any(sign in words.lower() for sign in _NO_MEMORY):
        told = f"there was not enough memory ({words[:200] or 'MemoryError'}); choose a smaller size or a smaller quantization"
        return Failed(edit, ResourceError.__name__, told, ResourceError.exit_code)
    told = f"{type(error).__name__}: {words[:200]}; this is our bug, please report it"
    return Failed(edit, type(error).__name__, told, 1, "".join(traceback.format_exception(error)))


class _Report:
    """What is told of the work: its events, and between them a heartbeat with phase, seconds and memory."""

    def __init__(self, emit: Callable[[Event], None]):
        self._emit = emit
        self._lock = threading.Lock()
        self._stir = threading.Event()
        self._ended = False
        self._at: Progress | None = None  # None while idle
        self._since = 0.0
        self._pipe: KontextPipeline | None = None
        self._memory: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def watch(self, pipe: KontextPipeline) -> None:
        from .backend import mx

        self._pipe = pipe
        self._memory = lambda: (mx.get_active_memory(), mx.get_peak_memory())

    def tell(self, event: Event) -> None:
        with self._lock:
            match event:
                case Loading():
                    self._at = Progress(None, "loading the model")
                case Started():
                    self._at = Progress(event.id, "starting")
                case Progress():
                    memory, peak = self._memory()
                    self._at = event = replace(event, memory=memory, peak=peak)
                case Done() if event.left and self._at:
                    self._at = replace(self._at, index=0)
                case _:
                    self._at = None
            self._since = time.monotonic()
            self._emit(event)
        self._stir.set()

    @contextmanager
    def beating(self) -> Iterator[None]:
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended = True
            self._stir.set()
            thread.join()

    def _beat(self) -> None:
        while not self._ended:
            if self._stir.wait(BUSY_BEAT if self._at else IDLE_BEAT):
                self._stir.clear()  # something else was told just now
                continue
            with self._lock:
                if self._at is None:
                    self._emit(Beat())
                    continue
                now = time.monotonic()
                if self._pipe and self._at.id is not None and self._pipe.phase != self._at.phase:
                    self._at, self._since = replace(self._at, phase=self._pipe.phase), now
                memory, peak = self._memory()
                self._emit(replace(self._at, elapsed=now - self._since, memory=memory, peak=peak, preview=None))


class ThreadWorker:
    """A long-lived thread of this process that makes the pipeline and runs every edit."""

    def __init__(self, load: Load, receive: Callable[[Event], None], gone: Callable[[], None]):
        self._load, self._receive, self._gone = load, receive, gone
        self._edits: SimpleQueue[Edit | None] = SimpleQueue()
        self._cancelled: set[int] = set()
        self._latest = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        serve(self._load, self._edits.get, self._cancelled, self._receive)
        with suppress(KontextError):  # where there is no MLX there is nothing to give back
            from .backend import mx

            gc.collect()  # a pipeline and its text encoders hold each other
            mx.clear_cache()
            mx.clear_streams()  # a thread must, or the program may abort when it ends
        self._gone()

    def send(self, edit: Edit) -> None:
        self._latest = edit.id
        self._edits.put(edit)

    def cancel(self, edit: int) -> None:
        self._cancelled.add(edit)

    def stop(self) -> None:
        """Ends after the present step: a thread cannot be killed."""
        self._cancelled.add(self._latest)
        self._edits.put(None)

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)
