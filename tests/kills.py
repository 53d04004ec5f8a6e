"""kill -9 at random moments while a session is written: `python tests/kills.py --kills 1000`. Prints one JSON line.

A child appends turns as fast as it can and acknowledges each on a pipe; it is killed, and the session must hold every turn
that was acknowledged, perhaps one more, and nothing that `check` calls damaged.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from power import made, picture

from mlx_kontext.sessions import EditSession, is_session

A_SESSION = 25  # kills before another one begins, so that sessions stay small


def child(folder: Path, pipe: int, seed: int) -> None:
    """Begin or open the session and never stop; each acknowledgement is a line: number and sha256 of the turn's file."""

    def acknowledge(turn: int) -> None:
        os.write(pipe, f"{turn} {digest(folder, turn)}\n".encode())

    if is_session(folder):
        session = EditSession.open(folder)
    else:
        session = EditSession.create(folder, picture(0))
        acknowledge(1)
    draw = random.Random(seed)
    while True:
        if draw.random() < 0.7:
            turn = session.append(made(draw.randrange(200)), parent=draw.choice(list(session.nodes))).turn
        else:
            session.star(draw.choice(list(session.nodes)), on=draw.random() < 0.5)
            turn = max(numbers(folder))
        acknowledge(turn)


def numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in (folder / "turns").glob("0*.json")]


def digest(folder: Path, number: int) -> str:
    return hashlib.sha256((folder / "turns" / f"{number:06}.json").read_bytes()).hexdigest()


def kill_one(folder: Path, seed: int, told: dict[int, str], counts: Counter) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            child(folder, writer, seed)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(random.Random(-seed).uniform(0.0005, 0.04))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as lines:
        for line in lines:
            number, sha = line.split()
            told[int(number)] = sha
            counts["acknowledged"] += 1
    if not os.WIFSIGNALED(status):
        counts["child failed"] += 1
    if not is_session(folder):
        counts["before the first turn"] += 1
        counts["lost"] += bool(told)
        return
    with EditSession.open(folder) as session:
        found = {number: digest(folder, number) for number in numbers(folder)}
        counts["lost"] += sum(found.get(number) != sha for number, sha in told.items())
        counts["more than one unacknowledged"] += len(found) > len(told) + 1
        counts["one more than acknowledged"] += len(found) == len(told) + 1
        report = session.check()
        counts["check not sound"] += bool(session.damage) or not report.sound
        counts["with leftovers"] += any(finding.kind == "leftover" for finding in report.findings)
        counts["second check not clean"] += bool(session.check().findings)
        told.update(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    counts, begun = Counter(kills=args.kills), time.time()
    for i in range(args.kills):
        if i % A_SESSION == 0:
            place = tempfile.TemporaryDirectory()
            told: dict[int, str] = {}
        kill_one(Path(place.name) / "session", args.seed * 100_000 + i, told, counts)
    print(json.dumps({**counts, "seconds": round(time.time() - begun)}))


if __name__ == "__main__":
    main()
