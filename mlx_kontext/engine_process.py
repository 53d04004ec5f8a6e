"""The engine's worker as a process of its own, both ends of it: frames (`wire`) over the process's stdin and stdout.

It may abort, hang or reply with garbage; none of it harms the end that started it. It ends when its stdin does, so that
it never outlives the program that started it. Only `main`, in the process, imports MLX.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, BinaryIO, NoReturn

from .messages import Cancel, Closed, Command, Edit, Event, Inbox, Load, Stalled
from .terminal import safe_text
from .wire import Read, WireError, read_message, to_frame
from .worker import serve

_TAIL = 8192  # bytes of stderr that are kept
_DEAF = 600.0  # seconds in which no Python thread could run, after which a worker ends itself
_GRACE = 2.0  # seconds a worker that closed its stdout has to end
# The worker finds the modules this program has: -m would put the working folder, with whatever lies in it, in front.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mlx_kontext.engine_process import main; main()"
_MEMORY = re.compile(r"insufficient memory|out ?of ?memory|malloc|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True)
class Death:
    """How a worker process ended. code: exit code, minus a signal, None if it never ran; problem: what was wrong before."""

    code: int | None
    problem: str = ""
    tail: str = ""

    def words(self, stage: str) -> str:
        """One line: what happened, when, what to do."""
        return f"the engine died {stage}: {self._cause()}; the next edit starts it again"

    def _cause(self) -> str:
        if self.problem:
            return self.problem
        if self.code is None or self.code >= 0:
            return f"it exited without an answer (code {self.code}){self._last_line() if self.code else ''}"
        known = {number.value: number.name for number in signal.Signals}
        name = known.get(-self.code, f"signal {-self.code}")
        if self.code == -signal.SIGKILL:
            return (
                f"it was killed ({name}), most often by the system for lack of memory; choose a smaller size or model"
            )
        if self.code == -signal.SIGABRT and _MEMORY.search(self.tail):
            return f"it ran out of GPU memory ({name}); choose a smaller size or a smaller quantization"
        if self.code == -signal.SIGABRT:
            return f"MLX or the GPU driver gave up ({name}){self._last_line()}"
        return f"it crashed ({name})"

    def _last_line(self) -> str:
        said = self.tail.partition("Fatal Python error")[0]  # after it come stacks
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return f", saying: {lines[-1][:160]}" if lines else ""


def worker_command() -> list[str]:
    """What starts a worker: this Python, these modules."""
    path = [os.path.abspath(entry) for entry in sys.path]  # '' is the working folder, as it is now
    return [sys.executable, "-P", "-c", _BOOT, json.dumps(path)]


class ProcessWorker:
    """One worker process, from its start to its end.

    receive: called with each event, gone: once, at last, with how it ended; both by the thread that reads. receive may
    raise WireError for an event that cannot be.
    """

    def __init__(
        self,
        load: Load,
        receive: Callable[[Event], None],
        gone: Callable[[Death], None],
        *,
        hang_after: float,
        folder: str,
    ):
        self.pid: int | None = None
        self._receive, self._gone = receive, gone
        self._hang_after, self._folder = hang_after, folder
        self._outgoing: SimpleQueue[Command | None] = SimpleQueue()
        self._outgoing.put(load)
        self._sent: Edit | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._problem = ""
        self._tail = bytearray()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def send(self, edit: Edit) -> None:
        self._sent = edit
        self._outgoing.put(edit)

    def cancel(self, edit: int) -> None:
        self._outgoing.put(Cancel(edit))

    def stop(self) -> None:
        """Kill it: it has nothing to save, and asked politely it would first finish its step."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait until `gone` has been called and came back."""
        self._thread.join(timeout)

    # --- threads ---

    def _run(self) -> None:
        try:
            process = self._start()
        except (OSError, ValueError) as error:
            self._gone(Death(None, f"its process cannot be started ({error})"))
            return
        assert process.stdin and process.stdout and process.stderr
        threading.Thread(target=self._write, args=(process.stdin,), name="engine-writer", daemon=True).start()
        drain = threading.Thread(target=self._drain, args=(process.stderr,), name="engine-stderr", daemon=True)
        drain.start()
        try:
            self._listen(process.stdout)
        except EOFError:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        except WireError as error:
            self._problem = f"the engine replied with garbage ({safe_text(str(error))[:160]})"
        if process.poll() is None:
            self._problem = self._problem or "it closed its side and did not end"
            process.kill()
        code = process.wait()
        self._outgoing.put(None)
        drain.join(1.0)  # not for ever: a child of the worker may hold its stderr
        process.stdout.close()
        self._gone(Death(code, self._problem, self.tail()))

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            self._process = process = subprocess.Popen(
                worker_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C in the terminal is for us
            )
            self.pid = process.pid
            if self._stopped:
                process.kill()
            return process

    def _listen(self, replies: IO[bytes]) -> None:
        """Hand on every message. Raises EOFError or WireError at the end."""
        stalled = False
        tick = min(0.25, self._hang_after / 4)
        with selectors.DefaultSelector() as selector:
            selector.register(replies, selectors.EVENT_READ)

            def read(size: int) -> bytes:
                nonlocal stalled
                data, silent = bytearray(), 0.0
                while len(data) < size:
                    # Waits are counted, not clocked: a machine that slept, or we ourselves stopped, is no hang.
                    if not selector.select(tick):
                        silent += tick
                        if silent >= self._hang_after and not stalled:
                            stalled = True
                            self._receive(Stalled(None, silent))
                        continue
                    piece = os.read(replies.fileno(), min(size - len(data), 2**20))
                    if not piece:
                        raise EOFError
                    data += piece
                    silent = 0.0
                return bytes(data)

            while True:
                event = read_message(read, self._sent.request if self._sent else None)
                if stalled:
                    stalled = False
                    self._receive(Stalled(None, 0.0))
                if isinstance(event, Command):
                    raise WireError(f"a {type(event).__name__}, which is for the worker")
                self._receive(event)

    def _write(self, commands: IO[bytes]) -> None:
        try:
            with commands:
                while (command := self._outgoing.get()) is not None:
                    for piece in to_frame(command):
                        commands.write(piece)
                    commands.flush()
        except OSError:
            pass  # it ended, which is the reader's to tell
        except Exception as error:  # nothing would ever come back for it
            self._problem = f"its orders could not be sent ({type(error).__name__}: {error})"
            self.stop()

    def _drain(self, errors: IO[bytes]) -> None:
        with errors:
            while piece := os.read(errors.fileno(), 4096):
                self._tail += piece
                del self._tail[:-_TAIL]

    def tail(self) -> str:
        """The last lines of its stderr as printable text, without the home folder's name and without tokens."""
        text = safe_text(self._tail.decode("utf-8", "replace")).replace(str(Path.home()), "~")
        return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_···", text).strip()


# --- the process's own end ---


def main() -> None:
    """Serve the program at the other end of stdin and stdout, until it closes stdin or the model cannot be opened."""
    commands, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print is no reply
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started us
    outbox, edits, cancelled = Inbox(), SimpleQueue[Edit | None](), set[int]()
    writer = threading.Thread(target=_write, args=(outbox, replies), name="writer", daemon=True)
    writer.start()
    load = _heard(commands)
    if not isinstance(load, Load):
        _quit(2, f"the first message is a {type(load).__name__} and not Load")
    threading.Thread(target=_listen, args=(commands, edits, cancelled), name="reader", daemon=True).start()

    def emit(event: Event) -> None:
        # If nothing is emitted for so long, no Python thread runs, not even the one that would see stdin end.
        faulthandler.dump_traceback_later(_DEAF, exit=True)
        outbox.put(event)

    serve(load, edits.get, cancelled, emit)
    outbox.put(Closed())
    writer.join()
    _quit(0)


def _heard(commands: BinaryIO) -> object:
    try:
        return read_message(_exactly(commands))
    except EOFError:
        _quit(0)
    except WireError as error:
        _quit(2, f"the engine sent {error}")


def _listen(commands: BinaryIO, edits: SimpleQueue[Edit | None], cancelled: set[int]) -> None:
    while True:
        command = _heard(commands)
        if isinstance(command, Edit):
            edits.put(command)
        elif isinstance(command, Cancel):
            cancelled.add(command.id)
        else:
            _quit(2, f"the engine sent a {type(command).__name__}")


def _exactly(file: BinaryIO) -> Read:
    def read(size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise EOFError
        return data

    return read


def _write(outbox: Inbox, replies: BinaryIO) -> None:
    try:
        for event in outbox:
            if not isinstance(event, Closed):
                for piece in to_frame(event):
                    replies.write(piece)
                replies.flush()
    except BrokenPipeError:
        _quit(0)
    except BaseException:
        _quit(3, traceback.format_exc())


def _quit(code: int, words: str = "") -> NoReturn:
    """At once, whatever the other threads do: they may be inside MLX for minutes."""
    if words:
        print(words, file=sys.stderr, flush=True)
    os._exit(code)
