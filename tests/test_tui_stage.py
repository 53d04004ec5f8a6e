"""The stage: what is seen and what is sent, by methods, keys and mouse, and in a real pty."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image
from terminal import KittyCommand, Screen, kitty_commands
from textual import events
from textual.app import App, ComposeResult
from textual.geometry import Region
from textual.pilot import Pilot
from textual.screen import ModalScreen
from textual.widgets import Input

from tui import canvas, driver, stage, viewport
from tui.stage import Stage
from tui.terminal import Terminal
from tui.viewport import Stand, View

ROOT = Path(__file__).parent.parent
RED, BLUE = Image.new("RGB", (400, 200), (255, 0, 0)), Image.new("RGB", (400, 200), (0, 0, 255))
HALVES = Image.new("RGB", (400, 200), (255, 0, 0))
HALVES.paste((0, 0, 255), (200, 0, 400, 200))


class Program(App[None]):
    def __init__(self, pictures: str) -> None:
        super().__init__()
        self.stage = Stage(terminal=Terminal(pictures, "because"))  # type: ignore[arg-type]
        self.sent = ""

    def compose(self) -> ComposeResult:
        yield self.stage
        yield Input()

    def on_mount(self) -> None:
        self.stage.focus()

    def commands(self) -> list[KittyCommand]:
        found, self.sent = kitty_commands(self.sent.encode()), ""
        return found

    def rows(self) -> list[str]:
        return [self.stage.render_line(y).text for y in range(self.stage.size.height)]

    def colours(self, y: int) -> list[tuple[int, int, int] | None]:
        """The colour of the upper half of each cell of a row, None where it is empty."""
        found: list[tuple[int, int, int] | None] = []
        for text, style, _ in self.stage.render_line(y):
            colour = style.color.triplet if style and style.color and "▀" in text else None
            found += [tuple(colour) if colour else None] * len(text)  # type: ignore[list-item]
        return found


def run(
    test: Callable[[Program, Pilot[None]], Awaitable[None]],
    pictures: str = "halfblock",
    size: tuple[int, int] = (40, 14),
) -> None:
    """Run `test` in an app whose stage has `size` less three rows for an input: 40 x 11, the last row a caption."""

    async def main() -> None:
        app = Program(pictures)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "write", lambda app, text: setattr(app, "sent", app.sent + text))
            patch.setattr(canvas, "_REST", 0.01)
            async with app.run_test(size=size, notifications=True) as pilot:
                await pilot.pause()
                await test(app, pilot)

    asyncio.run(main())


async def settle(app: Program, pilot: Pilot[None]) -> None:
    """Until the sharp picture is out."""
    await pilot.pause(0.05)
    await app.workers.wait_for_complete()
    await pilot.pause()


# What is seen


def test_a_picture_stands_in_the_middle_above_its_caption() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED, "red \x1b[31m[b]\n")
        assert app.rows() == ["▀" * 40] * 10 + [f"{'red ·[31m[b]':40}"]
        app.stage.show_picture(RED.resize((100, 200)))
        assert app.rows() == [" " * 15 + "▀" * 10 + " " * 15] * 10 + [" " * 40]
        assert app.colours(0) == [None] * 15 + [(255, 0, 0)] * 10 + [None] * 15
        app.stage.clear()
        assert app.rows() == [" " * 40] * 11

    run(test)


def test_pictures_can_be_off() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED, "red")
        assert app.rows()[:10] == [" " * 40] * 10
        assert app.stage.caption() == "red │ 400 × 200, pictures are off: because"

    run(test, "none")


def test_flip() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED, "red")
        await pilot.press("f", "s")
        assert (app.stage.compare, app.stage.caption()) == ("off", "red")  # there is nothing to compare with
        app.stage.show_second(BLUE, "blue")
        await pilot.press("f")
        assert (app.colours(5)[0], app.stage.caption()) == ((0, 0, 255), "blue")
        await pilot.press("f")
        assert (app.colours(5)[0], app.stage.caption()) == ((255, 0, 0), "red")
        await pilot.press("f")
        app.stage.show_second(None)
        assert (app.stage.compare, app.colours(5)[0], app.stage.caption()) == ("off", (255, 0, 0), "red")

    run(test)


def test_split_by_keys_and_mouse() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED, "red")
        app.stage.show_second(BLUE, "blue")
        await pilot.press("s")
        row = app.colours(5)
        assert row[:20] == [(0, 0, 255)] * 20 and row[21:] == [(255, 0, 0)] * 19 and row[20] not in (row[0], row[39])
        assert app.stage.caption() == "blue │ red"
        await pilot.press("left", "left")
        assert app.stage.divider == pytest.approx(0.4) and app.colours(5)[15:18] == [(0, 0, 255), row[20], (255, 0, 0)]
        await pilot.mouse_down(app.stage, offset=(16, 5))
        await pilot.hover(app.stage, offset=(30, 5))
        await pilot.mouse_up(app.stage, offset=(30, 5))
        await pilot.hover(app.stage, offset=(3, 5))  # the button is up
        assert app.stage.divider == pytest.approx(30.5 / 40)
        await pilot.press(*["right"] * 30)
        assert app.stage.divider == 1
        await pilot.press("s")
        assert app.colours(5) == [(255, 0, 0)] * 40

    run(test)


def test_zoom_and_pan() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(HALVES)
        assert app.colours(5) == [(255, 0, 0)] * 20 + [(0, 0, 255)] * 20
        await pilot.press("right", "up")  # all of it is seen
        assert app.stage.view == View()
        await pilot.press("plus")
        assert app.stage.view.zoom == 1.5 and "%" in app.stage.caption()
        await pilot.press("shift+right")  # an eighth of what is seen is 5 cells
        assert app.colours(5).count((255, 0, 0)) == 15
        await pilot.press(*["left"] * 20)
        row = app.colours(5)  # the left two thirds of the picture
        assert row[:29] == [(255, 0, 0)] * 29 and row[31:] == [(0, 0, 255)] * 9
        await pilot.press("right")  # and back at once: the edge swallowed no keys
        assert abs(app.colours(5).count((255, 0, 0)) - 25) <= 1
        await pilot.press("minus")
        assert app.stage.view == View()
        await pilot.press("1")
        assert app.stage.caption() == "100 %"  # a half-block a pixel
        await pilot.press("0")
        assert app.stage.view == View()
        await pilot._post_mouse_events([events.MouseScrollUp], app.stage, button=0)
        assert app.stage.view.zoom == 1.5
        await pilot._post_mouse_events([events.MouseScrollDown], app.stage, button=0)
        assert app.stage.view == View()

    run(test)


STAND = Stand(40, 10, (8, 16))


def test_windows_keep_to_the_picture() -> None:
    """Whatever the view, the box lies inside the picture and has the shape of its cells."""
    for size in ((400, 200), (100, 3000), (5000, 20), (1, 1)):
        for view in (View(), View(1.7, 0.0, 1.0), View(9.0, 0.9, 0.2)):
            window = viewport.look(view, size, STAND)
            left, top, right, bottom = window.box
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert 1 <= window.columns <= 40 and 1 <= window.rows <= 10
    assert viewport.look(View(), (400, 200), STAND).box == (0, 0, 400, 200)


def test_zoom_has_ends() -> None:
    view = View()
    for _ in range(50):
        view = viewport.zoomed(view, 1.5, (400, 200), STAND)
    box = viewport.look(view, (400, 200), STAND).box
    assert box[2] - box[0] == pytest.approx(4)
    assert viewport.zoomed(view, 1e-9, (400, 200), STAND) == View()
    assert viewport.actual(View(), 1.0, (100, 50), STAND) == View()  # it is smaller than the stage
    assert viewport.look(viewport.actual(View(), 1.0, (4000, 2000), STAND), (4000, 2000), STAND).scale == pytest.approx(
        1
    )


# What is sent


def test_kitty_sends_a_small_picture_then_a_sharp_one() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(HALVES, "halves")
        (small,) = app.commands()
        await settle(app, pilot)
        sharp, deleted = app.commands()
        assert (small.options["c"], small.options["r"]) == (sharp.options["c"], sharp.options["r"]) == ("40", "10")
        assert deleted.options == {"a": "d", "d": "I", "q": "2", "i": small.options["i"]}
        assert app.rows()[0].count("\U0010eeee") == 40
        app.stage.redraw()
        await settle(app, pilot)
        assert app.commands() == []  # the terminal has it

    run(test, "kitty")


def test_kitty_keeps_both_pictures_while_one_flips() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED)
        app.stage.show_second(BLUE)
        await settle(app, pilot)
        app.stage.action_flip()
        await settle(app, pilot)
        app.commands()
        for _ in range(4):
            app.stage.action_flip()
            await settle(app, pilot)
        assert app.commands() == []
        app.stage.action_fit()
        app.stage.show_second(None)
        await settle(app, pilot)
        assert app.stage._kitty is not None and len(app.stage._kitty.held) == 1

    run(test, "kitty")


def test_a_sharp_picture_that_comes_too_late_is_made_again() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED)
        app.stage.show_second(BLUE)
        drawing = app.stage._drawing
        assert drawing is not None
        app.stage.action_flip()
        await app.stage._send_sharp(drawing)  # as if its thread ended now
        await settle(app, pilot)
        app.commands()
        app.stage.action_flip()
        await settle(app, pilot)
        assert [command.options["a"] for command in app.commands()] == ["T", "d"]

    run(test, "kitty")


@pytest.mark.parametrize("pictures", ["kitty", "iterm"])
def test_hidden_or_covered_the_stage_sends_nothing(pictures: str) -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        def held() -> int:
            return len(app.stage._kitty.held) if app.stage._kitty else int(app.stage._inline_place is not None)

        app.stage.show_picture(RED)
        await settle(app, pilot)
        assert held() == 1
        for away, back in [
            (lambda: setattr(app.stage, "display", False), lambda: setattr(app.stage, "display", True)),
            (lambda: app.push_screen(ModalScreen()), lambda: app.pop_screen()),
            # what Ctrl+Z and the return from it come to
            (lambda: app._driver.stop_application_mode(), lambda: app.app_resume_signal.publish(app)),  # type: ignore[union-attr]
        ]:
            away()
            await settle(app, pilot)
            assert held() == 0
            app.sent = ""
            app.stage.show_preview(BLUE)
            app.stage.show_picture(HALVES)
            await settle(app, pilot)
            assert app.sent == ""
            back()
            await settle(app, pilot)
            assert held() == 1 and app.sent

    run(test, pictures)


@pytest.mark.parametrize("how", ["resize", "remove"])
def test_kitty_pictures_are_taken_back(how: str) -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED)
        await settle(app, pilot)
        kitty = app.stage._kitty
        assert kitty is not None
        (old,) = kitty.held
        if how == "resize":
            await pilot.resize_terminal(30, 20)
            await settle(app, pilot)
            assert len(kitty.held) == 1 and len(app.rows()) == 17
        else:
            await app.stage.remove()
            assert not kitty.held
        assert [c for c in app.commands() if c.options["a"] == "d" and c.options["i"] == str(old)]

    run(test, "kitty")


def test_iterm_pictures_stand_over_the_half_blocks() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED.resize((100, 200)), "one")
        await settle(app, pilot)
        assert "\x1b[1;26H\x1b]1337;File=inline=1;" in app.sent and ";width=10;height=10;" in app.sent
        assert app.rows()[0].strip() == "▀" * 10
        app.sent = ""
        app.query_one(Input).focus()  # our colours may change with it: the cells are written again
        app.stage.refresh()
        await settle(app, pilot)
        assert app.sent.count("1337") == 1
        app.sent = ""
        refreshed: list[tuple[Region, ...]] = []
        app.stage.refresh = lambda *regions: refreshed.append(regions)  # type: ignore[method-assign]
        app.stage.show_picture(RED.resize((100, 200)), "two")
        assert app.sent.count("1337") == 1  # at once, over the old one
        assert refreshed == [(Region(0, 10, 60, 1),)]  # and only the caption is written again

    run(test, "iterm", (60, 14))


def test_iterm_pictures_keep_clear_of_a_toast() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(HALVES)
        await settle(app, pilot)
        app.notify("over\nthe\npicture", timeout=60)
        await settle(app, pilot)
        app.sent = ""
        app.stage.action_zoom_in()
        await settle(app, pilot)
        assert app.sent == ""
        app.clear_notifications()
        await settle(app, pilot)
        assert app.sent.count("1337") == 1
        app.notify("over\nthe\npicture", timeout=60)  # it wipes a part of the picture
        await settle(app, pilot)
        app.sent = ""
        app.clear_notifications()
        await settle(app, pilot)
        assert app.sent.count("1337") == 1

    run(test, "iterm", (60, 14))


# Previews


def test_previews_that_come_too_fast_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PREVIEW_SECONDS", 0.2)

    async def test(app: Program, pilot: Pilot[None]) -> None:
        app.stage.show_picture(RED, "before")
        for step in range(20):
            app.stage.show_preview(BLUE, f"step {step}")
        assert (app.stage.previews_drawn, app.stage.caption()) == (1, "step 0")
        await pilot.pause(0.5)
        assert (app.stage.previews_drawn, app.stage.caption()) == (2, "step 19")
        app.stage.end_preview()
        assert (app.colours(5)[0], app.stage.caption()) == ((255, 0, 0), "before")

    run(test)


def test_previews_wait_for_a_slow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = 3
    monkeypatch.setattr(driver, "backlog", lambda app: waiting)
    monkeypatch.setattr(stage, "PREVIEW_SECONDS", 0.05)

    async def test(app: Program, pilot: Pilot[None]) -> None:
        nonlocal waiting
        app.stage.show_preview(BLUE)
        await pilot.pause(0.2)
        assert app.stage.previews_drawn == 0
        waiting = 0
        await pilot.pause(0.6)
        assert app.stage.previews_drawn == 1

    run(test)


def test_previews_are_fewer_where_bytes_are_dear() -> None:
    async def test(app: Program, pilot: Pilot[None]) -> None:
        dues = []
        for remote in (False, True):
            app.stage.terminal = Terminal("halfblock", remote=remote)
            app.stage._preview_due = 0.0
            app.stage.show_preview(BLUE)
            dues.append(app.stage._preview_due - stage.time.monotonic())
        assert dues[0] == pytest.approx(0.25, abs=0.1)
        assert dues[1] == pytest.approx(160 * 48 * 40 / 250_000, abs=0.3)

    run(test, size=(160, 52))


# A real pty


def pty_program(what: str, **environ: str) -> Screen:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environ = {**kept, "TERM": "xterm-kitty", "COLORTERM": "truecolor", "PYTHONPATH": str(ROOT)} | environ
    return Screen([sys.executable, str(ROOT / "tests" / "stage_program.py"), what], environ)


def shown_and_deleted(data: bytes) -> tuple[list[str], list[str]]:
    commands = kitty_commands(data)
    return [[c.options["i"] for c in commands if c.options["a"] == kind] for kind in "Td"]  # type: ignore[return-value]


def test_the_bytes_of_an_edit_with_28_previews() -> None:
    """Noise, which does not compress, at 160 x 50: at most 8 MB, and one deletion for each picture."""
    screen = pty_program("previews")
    assert screen.close() == 0
    shown, deleted = shown_and_deleted(screen.data)
    # the photo, 28 steps, the edit small and sharp; the photo may have become sharp before the first step
    assert len(shown) in (31, 32)
    assert sorted(deleted) == sorted(shown) and len(set(shown)) == len(shown)
    print(f"{len(screen.data):,} bytes, {len(shown)} pictures")
    assert len(screen.data) <= 8_000_000
    # all of them before the alternate screen is left
    left = screen.data.rindex(b"\x1b[?1049l")
    assert all(command.place <= left for command in kitty_commands(screen.data))


@pytest.mark.parametrize(("keys", "status"), [("q", 0), ("b", 1)])
def test_no_picture_stays_when_the_program_ends(keys: str, status: int) -> None:
    screen = pty_program("picture")
    screen.read(20, until=b"\x1b_Ga=d")  # the sharp picture is there
    screen.press(keys)
    assert screen.close() == status
    shown, deleted = shown_and_deleted(screen.data)
    assert len(shown) == 2 and sorted(deleted) == sorted(shown)
    assert max(command.place for command in kitty_commands(screen.data)) <= screen.data.rindex(b"\x1b[?1049l")


@pytest.mark.parametrize(
    ("environ", "present", "absent"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": ""}, ["▀", "38;5;"], ["\x1b_G", "]1337", "38;2;"]),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, ["▒"], ["\x1b_G", "]1337", "▀"]),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, ["]1337;File=", "▀"], ["\x1b_G"]),
        ({"MLX_KONTEXT_IMAGES": "halfblock"}, ["▀", "38;2;"], ["\x1b_G", "]1337"]),
    ],
)
def test_other_terminals(environ: dict[str, str], present: list[str], absent: list[str]) -> None:
    screen = pty_program("picture", **environ)
    screen.read(20, until=present[0].encode())
    screen.press("q")
    assert screen.close() == 0
    for texts, expected in ((present, True), (absent, False)):
        for text in texts:
            assert (text.encode() in screen.data) == expected, text
