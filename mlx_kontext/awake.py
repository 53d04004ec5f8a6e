"""Keep the machine awake while it works: macOS puts a Mac to sleep in the middle of an edit, elsewhere nothing is done."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress


class Awake:
    """Between `work` and `rest` the machine does not go to sleep by itself; the display may.

    Held by macOS's caffeinate, which ends by itself if this process does. Where there is none, both do nothing.
    """

    def __init__(self, platform: str = sys.platform):
        self._platform = platform
        self._process: subprocess.Popen[bytes] | None = None

    def work(self) -> None:
        """Stay awake from now on; again and again does no harm."""
        if self._platform != "darwin" or (self._process is not None and self._process.poll() is None):
            return
        program = shutil.which("caffeinate")
        if program is None:
            return
        # not -d: a display that is kept on makes Metal's watchdog stop long steps
        command = [program, "-i", "-s", "-w", str(os.getpid())]
        nothing = subprocess.DEVNULL
        with suppress(OSError):  # then it may fall asleep, which is no reason not to edit
            self._process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)

    def rest(self) -> None:
        """Sleep is allowed again."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
