"""A session survives kill -9 at any moment (`kills.py` does the killing, in processes of its own)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def kills(number: int) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost(number: int) -> None:
    counts = kills(number)
    wrong = ("lost", "more than one unacknowledged", "check not sound", "second check not clean", "child failed")
    assert not any(counts.get(name) for name in wrong), counts
    # Otherwise nobody was killed while writing, and the test tests nothing.
    assert counts["acknowledged"] > number and counts["with leftovers"] > number / 20, counts
