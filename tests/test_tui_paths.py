"""What counts as a pasted path, in every quoting style, and what is refused."""

from pathlib import Path

import pytest

from mlx_kontext.errors import RequestError
from tui.paths import pasted_paths

THERE = {
    "/p/a.png",
    "/p/two words.jpg",
    "/p/it's.png",
    "/p/Bildschirm\u202ffoto 10.12.png",
    "/p/100% #1?.png",
    "/p/größe.png",
    "/home/me/b.webp",
    "./c.png",
    "c.png",
    "word",
    "/p/esc\x1b[31m.png",
    "/p/line\nbreak.png",
}


def paths(text: str) -> list[str]:
    return [str(path) for path in pasted_paths(text, THERE.__contains__, "/home/me", "mymac")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/p/a.png", ["/p/a.png"]),
        ("  /p/a.png \r\n", ["/p/a.png"]),
        ("/p/two words.jpg", ["/p/two words.jpg"]),
        ("'/p/two words.jpg'", ["/p/two words.jpg"]),
        ('"/p/two words.jpg"', ["/p/two words.jpg"]),
        (r"/p/two\ words.jpg", ["/p/two words.jpg"]),
        (r"/p/it\'s.png", ["/p/it's.png"]),
        ("/p/it's.png", ["/p/it's.png"]),
        (r"'/p/it'\''s.png'", ["/p/it's.png"]),
        ("/p/Bildschirm\u202ffoto 10.12.png", ["/p/Bildschirm\u202ffoto 10.12.png"]),
        ("/p/Bildschirm\u202ffoto\\ 10.12.png", ["/p/Bildschirm\u202ffoto 10.12.png"]),
        ("/p/a.png /p/two\\ words.jpg", ["/p/a.png", "/p/two words.jpg"]),
        ("/p/a.png\t/p/a.png", ["/p/a.png", "/p/a.png"]),
        ("/p/a.png\n/p/two words.jpg\n", ["/p/a.png", "/p/two words.jpg"]),
        ("/p/a.png\r\n/p/two words.jpg\r\n", ["/p/a.png", "/p/two words.jpg"]),
        ("~/b.webp", ["/home/me/b.webp"]),
        ("file:///p/two%20words.jpg", ["/p/two words.jpg"]),
        ("file://localhost/p/a.png", ["/p/a.png"]),
        ("FILE://MyMac/p/a.png", ["/p/a.png"]),
        ("file:/p/a.png", ["/p/a.png"]),
        ("file:///p/100%25%20#1?.png", ["/p/100% #1?.png"]),
        ("file:///p/gr%C3%B6%C3%9Fe.png", ["/p/größe.png"]),
        ("./c.png", ["c.png"]),
        ("c.png", ["c.png"]),
        # ordinary text
        ("", []),
        (" \n ", []),
        ("word", []),  # there is such a file, but it is a word
        ("make it red", []),
        ("don't change it's colour", []),
        ("/ar 16:9", []),
        ("/p/a.png make it red", []),
        ("/p/missing.png", []),
        ("put c.png on the wall", []),
        ("/p/a.png\n" * 10_000, []),
        ("/p/" + "x" * 5_000, []),
    ],
)
def test_paths(text: str, expected: list[str]) -> None:
    assert paths(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/p/esc\x1b[31m.png", r"^/p/esc·\[31m\.png has control characters in its name; rename the file first$"),
        ("file:///p/esc%1b[31m.png", r"^/p/esc·\[31m\.png has control characters"),
        ("file:///p/line%0Abreak.png", r"^/p/line·break\.png has control characters"),
        ("'/p/line\nbreak.png'", r"^/p/line·break\.png has control characters"),
        ("file:///p/zero%00.png", "^/p/zero·.png has control characters"),
        ("/p/c1\x9b31m.png", "^/p/c1·31m.png has control characters"),
        (r"C:\Users\me\a.png", r"^C:\\Users\\me\\a\.png is a Windows path; give the path on this machine$"),
        ("'C:/a.png'", "is a Windows path"),
        ("file:///C:/a.png", "is a Windows path"),
        (r"\\server\share\a.png", "is a Windows path"),
        (
            "file://elsewhere/p/a.png",
            r"^file://elsewhere/p/a\.png lies on another machine \(elsewhere\); copy the file to this one first$",
        ),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        paths(text)
    assert "\x1b" not in str(caught.value)


def test_names_too_long_for_the_system_are_text(tmp_path: Path) -> None:
    """With the real file system, which raises for them."""
    (tmp_path / "a b.png").touch()
    assert pasted_paths(str(tmp_path / "a b.png")) == [tmp_path / "a b.png"]
    assert pasted_paths("/" + "x" * 60_000) == []
    assert pasted_paths("~/there is no such picture.png") == []
