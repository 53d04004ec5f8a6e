"""`python -m tui.show PICTURE [SECOND]`: look at pictures, and see at once what your terminal can show."""

import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Show one picture, or two to flip and split. Raises ImageError for a file that is no picture."""
    from .terminal import claim_colours, detect

    terminal = detect()
    claim_colours(terminal)  # before Textual is imported, which reads it then
    from textual.app import App, ComposeResult
    from textual.widgets import Footer

    from mlx_kontext.photo import read_photo

    from .stage import Stage

    pictures = [(read_photo(Path(name)).image, os.path.basename(name)) for name in arguments]

    class Show(App[None]):
        BINDINGS = [("q", "quit", "Quit")]  # noqa: RUF012

        def compose(self) -> ComposeResult:
            yield Stage(terminal=terminal)
            yield Footer()

        def on_mount(self) -> None:
            stage = self.query_one(Stage)
            image, name = pictures[0]
            stage.show_picture(
                image, f"{name}, {image.width} × {image.height} │ {terminal.pictures}: {terminal.reason}"
            )
            if len(pictures) > 1:
                stage.show_second(*pictures[1])

    Show().run()


if __name__ == "__main__":
    from mlx_kontext.errors import KontextError

    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m tui.show PICTURE [SECOND]")
    try:
        main(sys.argv[1:])
    except KontextError as error:
        sys.exit(str(error))
