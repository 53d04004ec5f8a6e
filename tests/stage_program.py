"""A program with a stage, for test_tui_stage.py to run in a pty: `stage_program.py WHAT`."""

import sys

import numpy as np
from PIL import Image
from textual.app import App, ComposeResult
from textual.widgets import Footer

from tui.stage import Stage

WHAT = sys.argv[1]
RANDOM = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    """The worst that can come: nothing compresses it."""
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8))


class Program(App[None]):
    BINDINGS = [("q", "quit", "Quit"), ("b", "break", "Break")]  # noqa: RUF012
    ENABLE_COMMAND_PALETTE = False

    def compose(self) -> ComposeResult:
        yield Stage()
        yield Footer()

    def on_mount(self) -> None:
        self.stage = self.query_one(Stage)
        self.stage.show_picture(noise(1248, 832), "the photo")
        self.stage.show_second(noise(1248, 832), "another")
        if WHAT == "previews":
            self.timer = self.set_interval(0.03, self.step)

    def step(self) -> None:
        """28 previews, all of them drawn: the stage's clock is put forward, only a slow terminal is waited for."""
        done = self.stage.previews_drawn
        if done == 28:
            self.timer.stop()
            self.stage.show_picture(noise(1248, 832), "the edit")
            self.set_timer(1.5, self.exit)
        elif self.stage._preview_timer is None:
            self.stage._preview_due = 0.0
            self.stage.show_preview(noise(512, 344), f"step {done + 1} of 28")

    def action_break(self) -> None:
        raise RuntimeError("broken on purpose")


if __name__ == "__main__":
    program = Program()
    program.run()
    sys.exit(program.return_code)
