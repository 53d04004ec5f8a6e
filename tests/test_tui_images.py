"""Pictures as text and as bytes for terminals, and what a terminal is taken for."""

import base64
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.color import ColorSystem
from terminal import kitty_commands
from textual.strip import Strip

from mlx_kontext.errors import RequestError
from tui import images, pixels
from tui.terminal import DEFAULT_CELL, Outer, Terminal, cell_pixels, claim_colours, detect

ROOT = Path(__file__).parent.parent
RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def picture(*rows: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.new("RGB", (len(rows[0]), len(rows)))
    image.putdata([colour for row in rows for colour in row])
    return image


def ramp(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(90).resize((width, height)).convert("RGB")


def written(strips: list[Strip], system: ColorSystem) -> list[str]:
    """What a terminal with these colours receives."""
    return [
        "".join(s.style.render(s.text, color_system=system) if s.style else s.text for s in strip) for strip in strips
    ]


# Half-blocks


def test_half_blocks_in_full_colour() -> None:
    found = images.strips(picture([RED, RED, GREEN], [BLUE, BLUE, BLACK], [WHITE] * 3, [BLACK] * 3), "truecolor")
    assert written(found, ColorSystem.TRUECOLOR) == [
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀▀\x1b[0m\x1b[38;2;0;255;0;48;2;0;0;0m▀\x1b[0m",
        "\x1b[38;2;255;255;255;48;2;0;0;0m▀▀▀\x1b[0m",
    ]
    assert [strip.cell_length for strip in found] == [3, 3]


def test_half_blocks_keep_six_bits() -> None:
    (strip,) = images.strips(picture([(3, 4, 131)], [(252, 127, 128)]), "truecolor")
    assert written([strip], ColorSystem.TRUECOLOR) == ["\x1b[38;2;0;4;130;48;2;255;125;130m▀\x1b[0m"]


def test_256_colours_are_written_as_chosen() -> None:
    images._pair_style.cache_clear()  # a style keeps the first text it was written as, whatever the colours
    found = images.strips(picture([RED, GREEN], [BLUE, WHITE]), "256")
    assert written(found, ColorSystem.EIGHT_BIT) == ["\x1b[38;5;196;48;5;21m▀\x1b[0m\x1b[38;5;46;48;5;231m▀\x1b[0m"]


def test_rich_changes_no_colour_of_the_palette() -> None:
    palette = images.palette()
    assert len(set(palette)) == len(palette) > 200
    for colour in palette:
        pair = images.strips(picture([colour], [colour]), "256")
        (segment,) = pair[0]
        assert segment.style is not None and segment.style.color is not None
        number = segment.style.color.downgrade(ColorSystem.EIGHT_BIT).number
        assert number is not None and images._xterm(number) == colour


def test_256_colours_are_dithered() -> None:
    """An even colour between two of the palette comes out as a mixture whose mean is that colour."""
    (strip, *_) = found = images.strips(Image.new("RGB", (40, 40), (115, 115, 160)), "256")
    assert len(strip._segments) > 10
    seen = [
        channel
        for row in found
        for s in row
        for colour in (s.style.color, s.style.bgcolor)
        for channel in [colour.triplet] * len(s.text)
    ]
    for channel, expected in enumerate((115, 115, 160)):
        assert abs(sum(triplet[channel] for triplet in seen) / len(seen) - expected) < 4


def test_shades_have_no_colours() -> None:
    found = images.strips(picture([BLACK, (64,) * 3, (128,) * 3, (191,) * 3, WHITE]), "shades")
    assert written(found, ColorSystem.TRUECOLOR) == [" ░▒▓█"]
    assert images.samples(10, 4, "shades") == (10, 4)
    assert images.samples(10, 4, "256") == images.samples(10, 4, "truecolor") == (10, 8)
    assert {letter for strip in images.strips(ramp(64, 16), "shades") for letter in strip.text} == set(" ░▒▓█")


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert images.flat(image).getpixel((0, 0)) == WHITE
    rgb = Image.new("RGB", (1, 1), RED)
    assert images.flat(rgb) is rgb
    assert images.flat(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


# kitty


class Terminals:
    """A list of what was written."""

    def __init__(self) -> None:
        self.data = ""

    def write(self, text: str) -> None:
        self.data += text


def test_marks_are_those_of_the_protocol() -> None:
    """First, last and number as in kitty's own list."""
    assert (len(pixels.MARKS), pixels.MARKS[:5], pixels.MARKS[-1]) == (
        297,
        ["\u0305", "\u030d", "\u030e", "\u0310", "\u0312"],
        "\U0001d244",
    )


def test_placeholders_name_picture_row_and_column() -> None:
    found = pixels.placeholders(0x123456, 3, 2)
    a, b, c = pixels.MARKS[:3]
    letter = "\U0010eeee"
    assert written(found, ColorSystem.TRUECOLOR) == [
        f"\x1b[38;2;18;52;86m{letter}{a}{a}{a}{letter}{a}{b}{a}{letter}{a}{c}{a}\x1b[0m",
        f"\x1b[38;2;18;52;86m{letter}{b}{a}{a}{letter}{b}{b}{a}{letter}{b}{c}{a}\x1b[0m",
    ]


def test_placeholders_are_one_cell_each_and_can_be_cut() -> None:
    found = pixels.placeholders(1, pixels.MOST_CELLS, pixels.MOST_CELLS)
    assert {cell_len(strip.text) for strip in found} == {pixels.MOST_CELLS}
    assert found[2].crop(5, 6).text == "\U0010eeee" + pixels.MARKS[2] + pixels.MARKS[5] + pixels.MARKS[0]


def test_kitty_pictures_come_in_chunks() -> None:
    terminal = Terminals()
    pictures = pixels.KittyPictures(terminal.write)
    png = os.urandom(10_000)
    number = pictures.show("a", png, 30, 10)
    data = terminal.data.encode()
    assert data.count(b"\x1b_G") == 4  # 13,336 letters in chunks of 4,096
    (command,) = kitty_commands(data)
    assert command.options == {
        "a": "T",
        "U": "1",
        "q": "2",
        "f": "100",
        "i": str(number),
        "c": "30",
        "r": "10",
        "m": "1",
    }
    assert base64.b64decode(command.payload) == png
    assert pictures.bytes_sent == len(data)
    assert 1 <= number < 2**24


def test_kitty_pictures_are_deleted_once() -> None:
    terminal = Terminals()
    pictures = pixels.KittyPictures(terminal.write)
    one, two, again = (pictures.show(key, b"png", 1, 1) for key in ("a", "b", "a"))
    assert len({one, two, again}) == 3
    assert (pictures.find("a"), pictures.find("b"), pictures.find("c")) == (again, two, None)
    terminal.data = ""
    pictures.delete([one, two])
    pictures.delete([one, two])
    assert terminal.data == "".join(f"\x1b_Ga=d,d=I,q=2,i={n}\x1b\\" for n in (one, two))
    assert pictures.held == {again: "a"}


def test_kitty_numbers_start_over_before_they_leave_24_bits() -> None:
    pictures = pixels.KittyPictures(Terminals().write)
    pictures._next = 2**24 - 1
    assert [pictures.show(key, b"png", 1, 1) for key in "ab"] == [2**24 - 1, 1]


def test_kitty_inside_tmux_is_wrapped() -> None:
    terminal = Terminals()
    number = pixels.KittyPictures(terminal.write, tmux=True).show("a", b"png", 2, 1)
    assert terminal.data == f"\x1bPtmux;\x1b\x1b_Ga=T,U=1,q=2,f=100,i={number},c=2,r=1,m=0;cG5n\x1b\x1b\\\x1b\\"


# iTerm2, and the files that are sent


def test_inline_pictures() -> None:
    assert pixels.inline_picture(b"jpeg", 4, 2, 30, 10) == (
        "\x1b7\x1b[3;5H\x1b]1337;File=inline=1;size=4;width=30;height=10;preserveAspectRatio=0;doNotMoveCursor=1"
        ":anBlZw==\x07\x1b8"
    )


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG")])
def test_encoding_keeps_to_side_and_bytes(kind: str, name: str) -> None:
    noise = Image.effect_noise((600, 400), 90).convert("RGB")
    asked = []

    def draw(size: tuple[int, int]) -> Image.Image:
        asked.append(size)
        return noise.resize(size)

    data = pixels.encode(draw, (1200, 800), kind, 256, 30_000)
    image = Image.open(io.BytesIO(data))
    assert asked[0] == (256, 171) and image.size == asked[-1] and image.format == name
    assert len(base64.b64encode(data)) <= 30_004  # base64 fills up to four
    assert abs(image.width / image.height - 1.5) < 0.05


def test_encoding_does_not_enlarge() -> None:
    data = pixels.encode(lambda size: Image.new("RGB", size), (40, 30), "png", 256, 1_000_000)
    assert Image.open(io.BytesIO(data)).size == (40, 30)


# Detection

KITTY_INSIDE = Outer("xterm-kitty", truecolor=True, passthrough=True)


@pytest.mark.parametrize(
    ("environ", "outer", "pictures", "reason"),
    [
        ({"TERM": "xterm-kitty"}, None, "kitty", "TERM is xterm-kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, None, "kitty", "KITTY_WINDOW_ID is set"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, None, "kitty", "TERM_PROGRAM is ghostty"),
        ({"TERM": "xterm-ghostty", "SSH_TTY": "/dev/pts/1"}, None, "kitty", "TERM is xterm-ghostty"),
        ({"TERM_PROGRAM": "iTerm.app"}, None, "iterm", "TERM_PROGRAM is iTerm.app"),
        ({"TERM_PROGRAM": "WezTerm"}, None, "iterm", "TERM_PROGRAM is WezTerm"),
        ({"TERM_PROGRAM": "vscode"}, None, "iterm", "TERM_PROGRAM is vscode"),
        ({"LC_TERMINAL": "iTerm2", "SSH_CONNECTION": "1"}, None, "iterm", "LC_TERMINAL is iTerm2"),
        # VS Code started from kitty: the innermost counts
        ({"TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, None, "iterm", "TERM_PROGRAM is vscode"),
        ({"TERM_PROGRAM": "Apple_Terminal"}, None, "halfblock", "nothing better is known of Apple_Terminal"),
        ({"TERM": "xterm-256color"}, None, "halfblock", "nothing better is known of TERM=xterm-256color"),
        ({}, None, "halfblock", "nothing better is known of TERM="),
        ({"STY": "1", "TERM_PROGRAM": "iTerm.app"}, None, "halfblock", "screen keeps graphics back"),
        ({"ZELLIJ": "0", "TERM": "xterm-kitty"}, None, "halfblock", "zellij keeps graphics back"),
        ({"TMUX": "x", "KITTY_WINDOW_ID": "1"}, None, "halfblock", "tmux does not say which terminal is around it"),
        ({"TMUX": "x"}, KITTY_INSIDE, "kitty", "tmux runs in xterm-kitty and lets graphics through"),
        ({"TMUX": "x"}, Outer("xterm-256color", True, True), "halfblock", "tmux runs in xterm-256color"),
        ({"TMUX": "x"}, Outer("xterm-kitty", True, False), "halfblock", "allow-passthrough on` lets them through"),
        ({"TMUX": "x"}, Outer("xterm-kitty", False, True), "halfblock", "no 24-bit colours"),
        ({"MLX_KONTEXT_IMAGES": "none", "TERM": "xterm-kitty"}, None, "none", "MLX_KONTEXT_IMAGES is none"),
        ({"MLX_KONTEXT_IMAGES": "auto", "TERM": "xterm-kitty"}, None, "kitty", "TERM is xterm-kitty"),
        ({"MLX_KONTEXT_IMAGES": "", "TERM": "xterm-kitty"}, None, "kitty", "TERM is xterm-kitty"),
        ({"MLX_KONTEXT_IMAGES": "kitty", "TMUX": "x"}, KITTY_INSIDE, "kitty", "MLX_KONTEXT_IMAGES is kitty"),
    ],
)
def test_detection(environ: dict[str, str], outer: Outer | None, pictures: str, reason: str) -> None:
    found = detect(environ, ask=lambda: outer, macos=0)
    assert found.pictures == pictures and reason in found.reason
    assert found.tmux == ("TMUX" in environ)
    assert found.remote == bool({"SSH_TTY", "SSH_CONNECTION"} & set(environ))


def test_the_setting_wins_over_the_environment() -> None:
    found = detect({"MLX_KONTEXT_IMAGES": "none"}, choice="iterm")
    assert (found.pictures, found.reason) == ("iterm", "the setting for pictures is iterm")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"MLX_KONTEXT_IMAGES": "sixel"},
            r"^MLX_KONTEXT_IMAGES is 'sixel'; expected one of auto, halfblock, kitty, iterm, none$",
        ),
        ({"MLX_KONTEXT_IMAGES": "iterm", "TMUX": "x"}, "iterm inside tmux, .*; choose halfblock or kitty$"),
        ({"MLX_KONTEXT_IMAGES": "kitty", "TMUX": "x"}, "kitty, but tmux sends xterm-kitty no 24-bit colours"),
    ],
)
def test_choices_that_cannot_work(environ: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        detect(environ, ask=lambda: Outer("xterm-kitty", False, True))


@pytest.mark.parametrize(
    ("environ", "macos", "truecolor"),
    [
        ({"COLORTERM": "truecolor"}, 0, True),
        ({"COLORTERM": "24bit"}, 0, True),
        ({"TERM": "xterm-256color"}, 0, None),
        ({"TERM": "xterm-kitty", "SSH_TTY": "x"}, 0, True),
        ({"TERM": "xterm-256color", "MLX_KONTEXT_IMAGES": "kitty"}, 0, True),
        ({"TERM_PROGRAM": "Apple_Terminal"}, 15, False),
        ({"TERM_PROGRAM": "Apple_Terminal"}, 26, True),
        ({"TMUX": "x", "COLORTERM": "truecolor"}, 0, None),
    ],
)
def test_colours(environ: dict[str, str], macos: int, truecolor: bool | None) -> None:
    assert detect(environ, ask=lambda: None, macos=macos).truecolor is truecolor


def test_colours_are_claimed_unless_the_user_did() -> None:
    for given, truecolor, expected in [
        ({}, True, "truecolor"),
        ({}, False, "256"),
        ({}, None, None),
        ({"TEXTUAL_COLOR_SYSTEM": "standard"}, True, "standard"),
    ]:
        environ: dict[str, str] = dict(given)
        claim_colours(Terminal(truecolor=truecolor), environ)
        assert environ.get("TEXTUAL_COLOR_SYSTEM") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("xterm-kitty\\n256,RGB,title\\non", Outer("xterm-kitty", True, True)),
        ("screen\\n256\\noff", Outer("screen", False, False)),
        ("xterm-kitty\\nRGB", None),
    ],
)
def test_asking_tmux(answer: str, expected: Outer | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tui.terminal import ask_tmux

    (tmp_path / "tmux").write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    (tmp_path / "tmux").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ask_tmux() == expected
    (tmp_path / "tmux").write_text("#!/bin/sh\nexit 1\n")
    assert ask_tmux() is None


def test_the_size_of_a_character() -> None:
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 160 * 9, 50 * 18))
        assert cell_pixels(slave) == (9, 18)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        assert cell_pixels(slave) is None
    finally:
        os.close(master)
        os.close(slave)
    with open(os.devnull) as file:
        assert cell_pixels(file.fileno()) is None
    assert DEFAULT_CELL == (8, 16)


# The house


def test_the_ui_loads_neither_mlx_nor_torch() -> None:
    names = [f"tui.{path.stem}" for path in (ROOT / "tui").glob("*.py") if path.stem != "__init__"]
    assert len(names) > 5
    heavy = ["mlx", "mlx.core", "torch", "huggingface_hub"]
    code = f"import sys, {', '.join(names)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_textuals_private_names_are_used_in_one_place() -> None:
    users = [path.name for path in (ROOT / "tui").glob("*.py") if "_driver" in path.read_text()]
    assert users == ["driver.py"]
