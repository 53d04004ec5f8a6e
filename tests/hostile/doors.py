"""A process that opens hostile files by every door that fits and prints, a line of JSON each, how that went.

`python -m tests.hostile.doors JOBS CARRIER`: what to open, and the sound model. Writes pictures into the working folder.
"""

import contextlib
import io
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_kontext import KontextError, KontextPipeline, cli
from mlx_kontext.lora import read_adapter
from mlx_kontext.weights.load import Checkpoint
from tests.hostile.carrier import PARTS

Told = tuple[str, str]
"""The class of an error, or the exit code ("" if all went well, "traceback" for what is no KontextError), and its message."""

PICTURE = "in.png"
MADE = ("-o", "out.png", "--overwrite", "--steps", "1", "--size", "32x32")
OPTIONS = {"text_encoder": "clip", "text_encoder_2": "t5"}


def edit(model: str, **sources: str) -> Told:
    """Open a model and make one small picture with it."""

    def run() -> None:
        pipe = KontextPipeline.from_pretrained(model, local_files_only=True, **sources)
        pipe(PICTURE, "make it red", seed=1, num_inference_steps=1, width=32, height=32, auto_resize=False)

    return caught(run)


def adapter(carrier: str, path: str) -> Told:
    config = Checkpoint.open(Path(carrier)).config("transformer")
    return caught(lambda: read_adapter(Path(path), config))


def command(*arguments: str, **sources: str) -> Told:
    """The command line, which says one line and nothing on stdout if it fails."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    options = [word for part, path in sources.items() for word in (f"--{OPTIONS.get(part, part)}", path)]

    def run() -> None:
        nonlocal code
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([*arguments, *options])
            except SystemExit as exited:
                code = exited.code

    error, message = caught(run)
    lines = [line for line in err.getvalue().splitlines() if not line.startswith(("opening ", "note: "))]
    if error or code == 0:
        return error, message
    if out.getvalue() or len(lines) != 1 or not lines[0].startswith("error: "):
        return "traceback", f"exit code {code}; on stdout {out.getvalue()!r}; on stderr {lines!r}"
    return f"exit code {code}", lines[0].removeprefix("error: ")


def caught(run: Callable[[], object]) -> Told:
    try:
        run()
    except KontextError as error:
        return type(error).__name__, str(error)
    except BaseException:  # a panic of Rust code is no Exception
        return "traceback", traceback.format_exc(limit=-3)
    return "", ""


def doors(job: dict[str, Any], carrier: str) -> Iterator[tuple[str, str, Callable[[], Told]]]:
    """Every door that fits a job: its name, the path it is given, and what opens it."""
    path: str = job["path"]
    if folder := job.get("folder"):
        yield "folder", folder, partial(edit, folder)
        yield "inspect folder", folder, partial(command, "inspect", folder)
    for slot in job["slots"]:
        if slot == "model":
            yield "model", path, partial(edit, path)
            yield "inspect", path, partial(command, "inspect", path)
        elif slot == "lora":
            yield "read_adapter", path, partial(adapter, carrier, path)
            yield "--lora", path, partial(command, "edit", PICTURE, "x", *MADE, "--model", carrier, "--lora", path)
            yield "inspect LoRA", path, partial(command, "inspect", path)
        elif slot == "alone":
            rest = {part: f"{carrier}/{part}" for part in PARTS if part != "transformer"} | {"tokenizers": carrier}
            yield "alone", path, partial(edit, path, **rest)
            yield "inspect alone", path, partial(command, "inspect", path, **rest)
        else:
            yield f"{slot}=", path, partial(edit, carrier, **{slot: path})
            yield f"inspect --{slot}", path, partial(command, "inspect", carrier, **{slot: path})


@contextlib.contextmanager
def written(noise: list[str]) -> Iterator[None]:
    """Collect what C++ and Rust write to file descriptor 2, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            noise.append(file.read().decode(errors="replace"))


def forget_peak() -> None:
    """Count the peak of memory anew, where that can be done: on Linux. Elsewhere it is that of all files so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most memory since, in MB: of the whole process, with Python and all libraries."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**10


def main(jobs: list[dict[str, Any]], carrier: str) -> None:
    Image.new("RGB", (32, 32), "red").save(PICTURE)
    for job in jobs:
        noise: list[str] = []
        results = {}
        forget_peak()
        for name, path, attempt in doors(job, carrier):
            started = time.process_time()
            with written(noise):
                error, message = attempt()
            named = "".join(letter if letter.isprintable() else "?" for letter in path[:150])
            found = {"error": error, "message": message, "named": named, "seconds": time.process_time() - started}
            results[name] = found
        print(json.dumps({"doors": results, "noise": "".join(noise), "megabytes": peak()}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
