"""Lines for people: what every command of the command line prints to stderr, and text that cannot steer a terminal."""

import unicodedata

import click


def say(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(safe_text(text), err=True)


def safe_text(text: str) -> str:
    """Text that cannot steer the terminal: control, bidirectional and invisible characters become dots, newlines stay."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else "·" for c in text
    )
