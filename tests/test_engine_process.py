"""The engine's worker as a real process: killed, hanging, left behind, loud; and what the program that has it imports."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from watched import PROMPT, SAMPLE, Watched, gone, wait_until

from mlx_kontext import EditResult, KontextError, KontextPipeline
from mlx_kontext.engine import Engine
from mlx_kontext.messages import (
    Cancelled,
    Done,
    Progress,
    Stalled,
)


@pytest.fixture(scope="module")
def pipe() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def test_kill_stops_at_once_and_the_queue_goes_on() -> None:
    watched = Watched(process=True)
    with watched.engine as engine:
        running = engine.submit(SAMPLE, PROMPT, num_inference_steps=1000)
        after = engine.submit(SAMPLE, PROMPT, num_inference_steps=1)
        watched.until(lambda e: isinstance(e, Progress) and e.id == running and e.index > 0)
        pid, started = watched.pid, time.monotonic()
        engine.kill()
        watched.until(lambda e: e == Cancelled(running))
        assert time.monotonic() - started < 2 and gone(pid)
        watched.until(lambda e: isinstance(e, Done) and e.id == after)
    with Engine("demo") as thread, pytest.raises(KontextError, match=r"a thread cannot be killed; .* process=True"):
        thread.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_real_worker_that_dies_in_the_middle_of_an_edit(number: signal.Signals, pipe: KontextPipeline) -> None:
    watched = Watched(process=True)
    with watched.engine as engine:
        lost = engine.submit(SAMPLE, PROMPT, num_inference_steps=1000)
        stays = engine.submit(SAMPLE, PROMPT, seed=1)
        watched.until(lambda e: isinstance(e, Progress) and e.id == lost and e.index > 2)
        os.kill(watched.pid, number)
        died = watched.until(lambda e: type(e).__name__ == "Died")
        assert (died.id, died.code) == (lost, -number) and died.message.startswith("the engine died after step ")
        assert number.name in died.message and died.message.endswith("; the next edit starts it again")
        if number == signal.SIGABRT:  # the worker says where it was
            assert "Fatal Python error: Aborted" in died.tail and str(Path.home()) not in died.tail
        done = watched.until(lambda e: isinstance(e, Done))
        assert done.id == stays and np.array_equal(done.result.image, pipe(SAMPLE, PROMPT, seed=1).image)


def test_a_real_worker_that_hangs_is_told_from_a_slow_one() -> None:
    watched = Watched(process=True)
    watched.engine._hang_after = 1.0
    with watched.engine as engine:
        number = engine.submit(SAMPLE, PROMPT, num_inference_steps=1000)
        watched.until(lambda e: isinstance(e, Progress) and e.id == number and e.index > 2)
        pid = watched.pid
        os.kill(pid, signal.SIGSTOP)
        stalled = watched.until(lambda e: isinstance(e, Stalled))
        assert stalled.id == number and stalled.seconds >= 1
        os.kill(pid, signal.SIGCONT)
        assert watched.until(lambda e: isinstance(e, Stalled) and e.seconds == 0).id == number
        os.kill(pid, signal.SIGSTOP)
        watched.until(lambda e: isinstance(e, Stalled) and e.seconds > 0 and e is not stalled)
        engine.kill()
        watched.until(lambda e: e == Cancelled(number))
        assert gone(pid)


CHILD = """
import sys, time
from mlx_kontext.engine import Engine
engine = Engine("demo", process=len(sys.argv) < 4, on_event=lambda e: None)
number = engine.submit(sys.argv[1], "make the circle green", num_inference_steps=1000)
while engine.running is None: time.sleep(0.01)
print(getattr(engine._running.worker, "pid", 0), flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextmanager
def child(seconds: float, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program with an engine that is busy, and the engine's pid."""
    program = [sys.executable, "-c", CHILD, os.fspath(SAMPLE), str(seconds), *more]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        assert process.stdout
        yield process, int(process.stdout.readline())
        process.kill()


def test_no_worker_outlives_its_program() -> None:
    with child(60) as (process, pid):
        assert not gone(pid)
        process.kill()
        process.wait()
        wait_until(lambda: gone(pid))
    with child(0) as (process, pid):  # that ends without closing its engine
        assert process.wait(20) == 0
        wait_until(lambda: gone(pid))
    with child(0, "thread") as (process, _):
        assert process.wait(20) == 0


def test_the_worker_does_not_import_from_the_working_folder(tmp_path: Path) -> None:
    """As `python -m` would: a folder of pictures may hold a numpy.py."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('evil')")
    program = tmp_path / "elsewhere" / "program.py"
    program.parent.mkdir()
    program.write_text(
        "from mlx_kontext.engine import Engine\n"
        "with Engine('demo', process=True) as engine: print(engine.edit(prompt='a red circle').seed)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.fspath(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().isdigit() and not done.stderr, done.stderr


def test_the_program_never_imports_mlx() -> None:
    code = f"""
import sys
from mlx_kontext.engine import Engine
with Engine("demo", process=True) as engine:
    first = engine.edit({os.fspath(SAMPLE)!r}, "make the circle green", num_inference_steps=1)
    engine.edit(first, "remove the square", num_inference_steps=1)
print([m for m in ("mlx", "mlx.core", "torch", "tokenizers", "huggingface_hub", "pickle", "multiprocessing") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SAMPLE.parent.parent)
    found = done.stdout.strip()
    assert not done.stderr and "mlx" not in found and "torch" not in found, (found, done.stderr)


def test_what_libraries_print_is_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the worker imports prints from Python and from below it, and reads stdin."""
    (tmp_path / "sentencepiece.py").write_text("raise ImportError")
    (tmp_path / "tqdm.py").write_text("")
    (tmp_path / "tokenizers.py").write_text(
        "import importlib, os, sys\n"
        "print('loud'); os.write(1, b'louder'); os.system('echo loudest'); assert sys.stdin.read() == ''\n"
        f"sys.path.remove({os.fspath(tmp_path)!r}); del sys.modules['tokenizers']\n"
        "sys.modules['tokenizers'] = importlib.import_module('tokenizers')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Engine("demo", process=True) as engine:
        assert isinstance(engine.edit(SAMPLE, PROMPT, num_inference_steps=1), EditResult)
        assert {"loud", "louderloudest"} <= set(engine._running.worker.tail().split())
