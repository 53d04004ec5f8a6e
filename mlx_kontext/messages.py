"""What goes to the worker that owns MLX and what comes back: plain frozen dataclasses, and the box they wait in. No MLX.

    to the worker     Load   Edit   Cancel
    from the worker   Loading   Ready   Started   Progress   Done   Cancelled   Failed   Beat
    from the engine   Stalled   Died   Unloaded   Closed

Of each edit comes Started, then any number of Progress, then one of Done (one for each seed), Cancelled, Failed, Died.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from PIL import Image

from . import errors
from .card import SOURCE
from .edit import EditRequest, EditResult
from .errors import KontextError, RequestError, SafetyRefusal

# --- to the worker ---


@dataclass(frozen=True)
class Load:
    """Which model, in the words of `KontextPipeline.from_pretrained`; nothing is downloaded unless it is asked for."""

    model: str = SOURCE
    dtype: str | None = None
    quantize: str | int | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """Parts from places of their own: transformer, vae, text_encoder, text_encoder_2, tokenizers, config."""
    revision: str | None = None
    local_files_only: bool = True

    def __post_init__(self) -> None:
        """Raises RequestError for a `quantize` that cannot travel; paths become strings."""
        if not isinstance(self.quantize, str | int | None):
            raise RequestError(f"quantize is {self.quantize!r}; an engine takes a scheme's name or a number of bits")
        object.__setattr__(self, "model", os.fspath(self.model))
        sources = {part: os.fspath(path) for part, path in self.sources.items() if path is not None}
        object.__setattr__(self, "sources", sources)


@dataclass(frozen=True)
class Edit:
    """One request. preview_every: seconds between previews, None for no previews; preview_side: of the longest side."""

    id: int
    request: EditRequest
    preview_every: float | None = None
    preview_side: int = 256


@dataclass(frozen=True)
class Cancel:
    """Let the present step be the last of this edit."""

    id: int


# --- from the worker ---


@dataclass(frozen=True)
class ModelInfo:
    """What a user interface needs to know of the model that is open. Sizes are (width, height) in pixels, memory is bytes."""

    name: str
    quantization: str | None
    dtype: str
    device: str
    """metal, cuda or cpu."""
    sizes: tuple[tuple[int, int], ...]
    defaults: dict[str, int | float]
    identity: dict[str, str]
    """Short hashes of transformer and vae, as in EditResult."""
    weights: dict[str, int]
    peak: int
    """What an edit at the model's square size needs."""
    budget: int
    """What a run may hold here without hurting the machine."""
    keep_all: bool
    """Whether all parts stay loaded between edits."""


@dataclass(frozen=True)
class Loading:
    """The worker runs and opens the model."""

    model: str


@dataclass(frozen=True)
class Ready:
    """The model is open; its weights are read by the first edit."""

    info: ModelInfo


@dataclass(frozen=True)
class Started:
    """The worker took this edit."""

    id: int


@dataclass(frozen=True)
class Progress:
    """Where the work is: after each step, and several times a second in between. id is None while the model is opened."""

    id: int | None
    phase: str
    """For people: loading T5, reading the prompt, encoding the picture, denoising, decoding, ..."""
    index: int = 0
    """Steps done of this seed, 0 … total."""
    total: int = 0
    """0 before the first step."""
    seed: int | None = None
    seconds: float = 0.0
    """How long the latest step took."""
    eta: float | None = None
    """Seconds until the last step of the last seed, as it was after the latest step."""
    elapsed: float = 0.0
    """Seconds since the phase changed or the latest step ended: grows while a step is slow."""
    memory: int = 0
    """Bytes that MLX holds now."""
    peak: int = 0
    """The most bytes it held."""
    notices: tuple[str, ...] = ()
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Done:
    """A finished picture."""

    id: int
    result: EditResult
    left: int = 0
    """How many more seeds of this edit are to come."""


@dataclass(frozen=True)
class Cancelled:
    """The edit ended because somebody said so; it gives no (more) results."""

    id: int


@dataclass(frozen=True)
class Failed:
    """The edit could not be made, or (id None) the model not be opened; in words, with the command line's exit code."""

    id: int | None
    kind: str
    """Class of the error."""
    message: str
    exit_code: int = 1
    details: str = ""
    """The traceback of an error that is nobody's but ours."""

    def error(self) -> KontextError:
        """The error as the pipeline would have raised it."""
        kind = getattr(errors, self.kind, None)
        if kind is SafetyRefusal:
            stage, _, reason = self.message.partition(" refused: ")
            return SafetyRefusal(stage, reason)
        if isinstance(kind, type) and issubclass(kind, KontextError):
            return kind(self.message)
        return KontextError(self.message)


@dataclass(frozen=True)
class Beat:
    """The worker is alive and idle. The engine keeps these to itself."""


# --- from the engine ---


@dataclass(frozen=True)
class Stalled:
    """The worker gave no sign of life for so many seconds, not even between steps; 0: it is heard again."""

    id: int | None
    seconds: float


@dataclass(frozen=True)
class Died:
    """The worker process ended and should not have; id: the edit that was lost with it, if one was under way."""

    id: int | None
    code: int | None
    """Exit code, the negative number of a signal, or None if it never ran."""
    message: str
    tail: str = ""
    """The last lines it wrote to stderr, printable."""


@dataclass(frozen=True)
class Unloaded:
    """The worker ended on purpose and gave its memory back; the next edit starts it again."""


@dataclass(frozen=True)
class Closed:
    """The engine was closed; the last event."""


Command = Load | Edit | Cancel
Event = Loading | Ready | Started | Progress | Done | Cancelled | Failed | Beat | Stalled | Died | Unloaded | Closed


class Inbox:
    """Where events wait to be taken, by `for`, `async for` or `get`. Only progress is ever left out.

    A Progress takes the place of one that still waits at the end (a Beat of a Beat), so that somebody slow gets the
    latest and what waits stays small. Any thread may put; one reader takes.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._filled = threading.Condition()
        self._wake: Callable[[], object] | None = None

    def put(self, event: Event) -> None:
        with self._filled:
            last = self._events[-1] if self._events else None
            if isinstance(event, Progress) and isinstance(last, Progress) and last.id == event.id:
                event = dataclasses.replace(event, preview=event.preview or last.preview)
                self._events.pop()
            elif isinstance(event, Beat) and isinstance(last, Beat):
                self._events.pop()
            self._events.append(event)
            self._filled.notify()
            if self._wake is not None:
                with suppress(RuntimeError):  # the reader's event loop was closed meanwhile
                    self._wake()

    def get(self, timeout: float | None = None) -> Event | None:
        """The oldest event, waiting for one up to `timeout` seconds; None if none came."""
        with self._filled:
            self._filled.wait_for(lambda: self._events, timeout)
            return self._events.popleft() if self._events else None

    def __iter__(self) -> Iterator[Event]:
        """Every event up to Closed."""
        while (event := self.get()) is not None:
            yield event
            if isinstance(event, Closed):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Every event up to Closed, without blocking the event loop."""
        loop, filled = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(filled.set)
        try:
            while True:
                filled.clear()
                while (event := self.get(0)) is not None:
                    yield event
                    if isinstance(event, Closed):
                        return
                await filled.wait()
        finally:
            self._wake = None
