"""A terminal for tests: a real pty that answers nothing and keeps every byte."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from dataclasses import dataclass, field


@dataclass
class Screen:
    """A program in a pty of `columns` x `rows` cells of 9 x 18 pixels; `data` is all it wrote so far."""

    command: list[str]
    environ: dict[str, str]
    columns: int = 160
    rows: int = 50
    data: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        self.master, slave = pty.openpty()
        self.resize(self.columns, self.rows)
        self.process = subprocess.Popen(
            self.command, stdin=slave, stdout=slave, stderr=slave, env=self.environ, start_new_session=True
        )
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 9 * columns, 18 * rows))
        if hasattr(self, "process"):
            os.killpg(self.process.pid, signal.SIGWINCH)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, seconds: float, until: bytes = b"") -> None:
        """Read until `until` is in what was written since the call, the program ends, or the time is over."""
        start, deadline = len(self.data), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.master], [], [], left)[0]:
                try:
                    part = os.read(self.master, 1 << 16)
                except OSError:  # Linux's way to say that the other end is closed
                    part = b""
                if not part:
                    return
                self.data += part
                if until and until in self.data[start:]:
                    return

    def close(self) -> int:
        """Wait for the program, reading on, and return its exit status; it is killed after 20 seconds."""
        self.read(20)
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise
        finally:
            os.close(self.master)


@dataclass(frozen=True)
class KittyCommand:
    options: dict[str, str]
    payload: bytes
    place: int
    """Where in the stream it ends."""


def kitty_commands(data: bytes) -> list[KittyCommand]:
    """All graphics commands of a stream, chunks joined. Raises ValueError for a stray or overlong chunk."""
    found: list[KittyCommand] = []
    more = False
    for match in re.finditer(rb"\x1b_G([^;\x1b]*)(?:;([^\x1b]*))?\x1b\\", data):
        options = dict(part.split("=", 1) for part in match[1].decode().split(","))
        payload = match[2] or b""
        if len(payload) > 4096 or (more and set(options) - {"m", "q"}):
            raise ValueError(f"a chunk of {len(payload)} bytes with {options}")
        if more:
            found[-1] = KittyCommand(found[-1].options, found[-1].payload + payload, match.end())
        else:
            found.append(KittyCommand(options, payload, match.end()))
        more = options.get("m") == "1"
    if more:
        raise ValueError("the last picture is not complete")
    return found
