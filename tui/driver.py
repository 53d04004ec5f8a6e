"""The one place that reaches into Textual for what it keeps private: writing to the terminal beside its own drawing.

Checked against Textual 8.2; pyproject.toml keeps us below 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual.app import App


def write(app: App[Any], text: str) -> None:
    """Send `text` to the terminal, behind all that was drawn so far; nothing where no terminal is."""
    driver = app._driver
    if driver is not None and getattr(driver, "_writer_thread", driver) is not None:
        driver.write(text)


def backlog(app: App[Any]) -> int:
    """How many writes the terminal has not taken yet. At 30 the next one would block the whole UI."""
    queue = getattr(getattr(app._driver, "_writer_thread", None), "_queue", None)
    return queue.qsize() if queue is not None else 0


def before_leaving(app: App[Any], callback: Callable[[], None]) -> None:
    """Call `callback` each time just before the terminal is handed back: at exit, in a crash, at Ctrl+Z.

    Unmount comes too late: the alternate screen is gone by then, and with it the pictures that belong to it.
    """
    driver = app._driver
    assert driver is not None, "the app must be running"
    stop = driver.stop_application_mode

    def stop_after_callback() -> None:
        try:
            callback()
        finally:
            stop()

    setattr(driver, "stop_application_mode", stop_after_callback)  # noqa: B010  # mypy forbids assigning a method
