"""Worker death of every kind at every stage, with a fake worker: the message is right, the next edit works, none is left."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_kontext import EditResult, KontextError, engine_process
from mlx_kontext.engine import Engine, Inbox
from mlx_kontext.engine_process import Death
from mlx_kontext.messages import Cancelled, Died, Done, Event, Ready, Stalled, Started, Unloaded

FAKE = Path(__file__).parent / "fake_worker.py"
FAULTS = ["SIGABRT", "SIGSEGV", "SIGKILL", "exit", "hang", "garbage"]
STAGES = {
    "starting": "while starting",
    "loading": "while opening nothing",
    "idle": "while idle",
    "taking": "before the first step",
    "started": "before the first step",
    "denoising": "after step 2 of 4",
    "sending": "after step 4 of 4",
}
CAUSES = {
    "SIGABRT": "MLX or the GPU driver gave up (SIGABRT), saying: last words",
    "SIGSEGV": "it crashed (SIGSEGV)",
    "SIGKILL": "it was killed (SIGKILL), most often by the system for lack of memory; choose a smaller size or model",
    "exit": "it exited without an answer (code 0)",
    "garbage": "the engine replied with garbage (",
}


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every process the engine starts; afterwards all have ended and been reaped."""
    started: list[int] = []
    popen = subprocess.Popen

    def noted(*args: object, **options: object) -> subprocess.Popen:
        process = popen(*args, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(engine_process.subprocess, "Popen", noted)
    yield started
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def fake(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    command = [sys.executable, "-S", os.fspath(FAKE), *map(str, arguments)]
    monkeypatch.setattr(engine_process, "worker_command", lambda: command)


def until(inbox: Inbox, wanted: Callable[[Event], bool]) -> Event:
    deadline = time.monotonic() + 20
    seen = []
    while time.monotonic() < deadline:
        if (event := inbox.get(0.1)) is not None:
            seen.append(event)
            if wanted(event):
                return event
    raise AssertionError(seen)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_death(fault: str, stage: str, pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, fault, stage, tmp_path / "mark")
    inbox = Inbox()
    with Engine("nothing", process=True, on_event=inbox.put, hang_after=0.3) as engine:
        early = stage in ("starting", "loading", "idle")
        if early:
            engine.load()
        lost = None if early else engine.submit(prompt="the one that is lost")
        stays = None if early else engine.submit(prompt="the one that waits")
        if fault == "hang":
            stalled = until(inbox, lambda e: isinstance(e, Stalled))
            assert stalled.id == lost and 0.3 <= stalled.seconds < 1
            engine.kill()
            if lost:
                until(inbox, lambda e: e == Cancelled(lost))
            until(inbox, lambda e: e == Unloaded())
        else:
            died = until(inbox, lambda e: isinstance(e, Died))
            assert died.id == lost and died.message.startswith(f"the engine died {STAGES[stage]}: {CAUSES[fault]}")
            assert died.message.endswith("; the next edit starts it again") and "\n" not in died.message
            code = {"exit": 0, "garbage": -signal.SIGKILL}.get(fault)
            assert died.code == (-getattr(signal, fault) if code is None else code)
            assert died.tail == "last words ·]52;c;evil· hf_···"
        assert not engine.held
        if stays:  # has waited, and comes by itself
            assert until(inbox, lambda e: isinstance(e, Done)).id == stays
        result = engine.edit(prompt="the next one")
        assert isinstance(result, EditResult) and result.request.prompt == "the next one" and result.seed == 1
        assert np.array(result.image).ravel().tolist() == list(range(192)) and result.notices == ("made up",)
        assert result.latents.tolist() == [[[1, 2, 3, 4]]] and result.latents.flags.writeable
    assert len(pids) == 2


def test_two_deaths_in_a_row_hold_the_queue(pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "nowhere" / "mark"  # cannot be made: the worker fails at each start
    fake(monkeypatch, "exit", "starting", mark)
    inbox = Inbox()
    with Engine("nothing", process=True, on_event=inbox.put) as engine:
        number = engine.submit(prompt="try")
        for _ in range(2):
            died = until(inbox, lambda e: isinstance(e, Died))
            assert died.id is None and "code 1), saying: FileNotFoundError" in died.message
        assert engine.held and engine.waiting[0][0] == number
        with pytest.raises(KontextError, match="the engine died while starting: it exited without an answer"):
            engine.edit(prompt="who waits for an answer gets one")
        assert engine.held and len(engine.waiting) == 1
        assert inbox.get(0.3) is None or len(pids) == 4  # and no third try by itself
        mark.parent.mkdir()
        mark.touch()
        engine.resume()
        assert until(inbox, lambda e: isinstance(e, Done)).id == number


def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_process, "worker_command", lambda: [os.fspath(tmp_path / "python")])
    inbox = Inbox()
    with Engine("nothing", process=True, on_event=inbox.put) as engine:
        engine.load()
        died = until(inbox, lambda e: isinstance(e, Died))
        assert died.code is None and "its process cannot be started ([Errno 2]" in died.message


def test_a_worker_in_which_no_thread_can_run_ends_itself(monkeypatch: pytest.MonkeyPatch, pids: list[int]) -> None:
    """C code that keeps the interpreter to itself: not even the end of stdin would be noticed."""
    code = (
        "import ctypes; from mlx_kontext import engine_process as p, messages as m; p._DEAF = 1\n"
        "p.serve = lambda load, edits, cancelled, emit: (emit(m.Loading('x')), ctypes.PyDLL(None).sleep(60))\n"
        "p.main()"
    )
    monkeypatch.setattr(engine_process, "worker_command", lambda: [sys.executable, "-c", code])
    inbox = Inbox()
    with Engine("nothing", process=True, on_event=inbox.put, hang_after=0.5) as engine:
        engine.load()
        assert until(inbox, lambda e: isinstance(e, Stalled)).id is None
        died = until(inbox, lambda e: isinstance(e, Died))
        assert died.code == 1 and "Timeout (0:00:01)!" in died.tail


def test_orders_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pids: list[int]) -> None:
    fake(monkeypatch, "none", "none", tmp_path / "mark")
    with Engine("nothing", process=True) as engine:
        earlier = engine.edit(prompt="first")
        broken = dataclasses.replace(earlier, latents=object())
        with pytest.raises(KontextError, match=r"its orders could not be sent \(TypeError"):
            engine.edit(image=broken, prompt="second")
        assert engine.edit(image=earlier, prompt="third").request.image is earlier


def test_causes_in_words() -> None:
    memory = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallback)"
    for death, words in (
        (Death(-signal.SIGABRT, tail=memory), "it ran out of GPU memory (SIGABRT); choose a smaller size"),
        (
            Death(-signal.SIGABRT, tail="what(): x\nFatal Python error: Aborted\n\nFile ..."),
            "(SIGABRT), saying: what(): x;",
        ),
        (Death(-signal.SIGABRT), "MLX or the GPU driver gave up (SIGABRT);"),
        (Death(3, tail="Traceback\nOSError: no\n"), "it exited without an answer (code 3), saying: OSError: no;"),
        (Death(-40), "it crashed (signal 40);"),
        (Death(-9, "it closed its side and did not end"), "it closed its side and did not end;"),
    ):
        assert words in death.words("while idle"), death.words("while idle")


def test_somebody_who_is_slow_loses_progress_and_no_result(
    pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does he hold up the worker, or is taken for a worker that hangs."""
    fake(monkeypatch, "none", "none", tmp_path / "mark")
    told: list[Event] = []

    def slow(event: Event) -> None:
        told.append(event)
        if isinstance(event, Ready):
            time.sleep(0.8)

    with Engine("nothing", process=True, on_event=slow, hang_after=0.3) as engine:
        numbers = [engine.submit(prompt=f"number {n}") for n in range(20)]
        while engine.running or engine.waiting:
            time.sleep(0.01)
    assert [e.id for e in told if isinstance(e, Done)] == numbers == [e.id for e in told if isinstance(e, Started)]
    assert not any(isinstance(e, (Stalled, Died)) for e in told)


def test_kill_at_random_moments(pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From several threads at once, with edits queued: each gets one end, and the engine works on."""
    fake(monkeypatch, "none", "none", tmp_path / "mark")
    inbox = Inbox()
    random = np.random.RandomState(0)
    with Engine("nothing", process=True, on_event=inbox.put) as engine:
        for _ in range(15):
            engine.submit(prompt="a")
            time.sleep(random.uniform(0, 0.08))
            threads = [threading.Thread(target=engine.kill), threading.Thread(target=engine.submit, args=(None, "b"))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        last = engine.submit(prompt="the last")
        ends: list[int] = []

        def over(event: Event) -> bool:
            if isinstance(event, (Done, Cancelled)):
                ends.append(event.id)
            assert not isinstance(event, Died)
            return isinstance(event, Done) and event.id == last

        until(inbox, over)
        assert sorted(ends) == list(range(1, 32)) and not engine.waiting and not engine.held
