"""Hostile files, end to end: opened by every door that fits, each ends in one clear line, soon and in little memory.

`tests/hostile/` makes the files and opens them, in processes of their own: a crash is a result here, and memory can be counted.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_kontext import CheckpointError, EditResult, KontextPipeline
from tests.hostile import files, folders, ggufs, loras, tensors, words
from tests.hostile.carrier import HARMLESS, HEADER, PARTS, Carrier, Case, whole, write

ROOT = Path(__file__).parent.parent
CASES: dict[str, Case] = {
    f"{kind}: {name}": case
    for kind, cases in {
        "no weights": files.OTHER,
        "safetensors": files.STRUCTURE,
        "GGUF": ggufs.CASES,
        "tensors": tensors.CASES,
        "folder": folders.CASES,
        "tokenizer": words.CASES,
        "LoRA": loras.CASES,
    }.items()
    for name, case in cases.items()
}
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if case.slots == files.COSTLY else []) for name, case in CASES.items()
]
SECONDS, MEGABYTES, LETTERS = 2, 300, 400
HANGS = 300  # seconds after which a whole batch, which takes 20, is given up


def job(name: str, place: Path, carrier: Carrier) -> dict[str, Any]:
    """Make one case; what the process that opens it has to know."""
    case = CASES[name]
    place.mkdir()
    path = case.make(place, carrier)
    opened: dict[str, Any] = {"path": str(path), "slots": [slot for slot in case.slots if "/" not in slot]}
    for inside in (slot for slot in case.slots if "/" in slot):
        model = carrier.copy(place / "with it")
        (model / inside).unlink()
        os.link(path, model / inside)
        opened["folder"] = str(model)
    return opened


def open_all(jobs: dict[str, dict[str, Any]], place: Path, carrier: Path) -> dict[str, dict[str, Any]]:
    """Open files one after the other in one process, and the rest in a new one if it dies of one of them."""
    results: dict[str, dict[str, Any]] = {}
    place.mkdir()
    while left := [name for name in jobs if name not in results]:
        (place / "jobs.json").write_text(json.dumps([jobs[name] for name in left]))
        command = [sys.executable, "-m", "tests.hostile.doors", str(place / "jobs.json"), str(carrier)]
        with (place / "results").open("w") as out:
            try:
                # in a folder of its own: a pickle that is run makes a folder there
                done = subprocess.run(
                    command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=place, timeout=HANGS,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )  # fmt: skip
                end = f"exit code {done.returncode}, {done.stderr[-500:]}"
            except subprocess.TimeoutExpired:
                end = "it hung"
        lines = [json.loads(line) for line in (place / "results").read_text().splitlines()]
        results |= dict(zip(left, lines, strict=False))
        if len(lines) < len(left):
            results[left[len(lines)]] = {"end": end}
    assert not (place / "unpickled").exists()
    return results


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """What became of every case that was asked for, by name."""
    asked = {
        item.callspec.params["name"] for item in request.session.items if "results" in getattr(item, "fixturenames", ())
    }
    place = tmp_path_factory.mktemp("hostile")
    carrier = Carrier(place / "carrier")
    jobs = {name: job(name, place / f"{number}", carrier) for number, name in enumerate(CASES) if name in asked}
    halves = [dict(list(jobs.items())[start::2]) for start in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(open_all, halves, (place / "a", place / "b"), [carrier.folder] * 2)
    yield one | other
    shutil.rmtree(place)  # pytest would keep it, 200 MB


def test_there_are_hundreds() -> None:
    assert len(CASES) > 700


def test_the_carrier_is_sound(tmp_path: Path) -> None:
    """So a file is refused for what was done to it: whole, as single files, as GGUF and with a LoRA the carrier edits."""
    carrier = Carrier(tmp_path / "carrier")
    singles = [{part: write(tmp_path / f"{part}.safetensors", whole(carrier.tensors[part]))} for part in PARTS]
    sound = ggufs.transformer("", lambda _: {}).make(tmp_path, carrier)
    lora = write(tmp_path / "lora.safetensors", whole(loras.pair()))
    for sources in ({}, *singles, {"transformer": sound}):
        pipe = KontextPipeline.from_pretrained(carrier.folder, **sources)
        for used in ([], [lora]):
            result = pipe(prompt="make it red", num_inference_steps=1, width=32, height=32, loras=used)
            assert isinstance(result, EditResult) and np.isfinite(result.latents).all()


def test_a_message_is_one_printable_line() -> None:
    """Whatever a file's words are; its name and what to do stand at the ends, and stay."""
    message = str(CheckpointError(f"model.gguf: {'x' * 999}\x1b[2J\n; download it again"))
    assert message.isprintable() and len(message) == 390
    assert message.startswith("model.gguf: xxx") and message.endswith("x?[2J?; download it again")


@pytest.mark.parametrize("name", NAMES)
def test_ends_in_one_clear_line(name: str, results: dict[str, dict[str, Any]]) -> None:
    case, result = CASES[name], results[name]
    assert "end" not in result, f"the process that opened it died: {result['end']}"
    assert result["noise"] == "", "a library wrote to stderr"
    assert result["megabytes"] < MEGABYTES
    for door, found in result["doors"].items():
        error, message = found["error"], found["message"]
        assert found["seconds"] < SECONDS, door
        assert error != "traceback", f"{door}: {message}"
        if error == "":
            allowed = case.refused == HARMLESS or (case.refused != HEADER and door.startswith("inspect"))
            assert allowed, f"{door}: a quiet success"
            continue
        assert message.isprintable() and len(message) <= LETTERS, f"{door}: {message}"
        if case.refused != HARMLESS:
            assert re.search(case.told, message), f"{door}: {message}"
            assert found["named"] in message, f"{door}: {message}"
