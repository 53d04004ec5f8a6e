"""A recipe: edits in order, to be repeated on other photos. Written and read as TOML. No MLX here.

    recipe = 1
    model = "demo"

    [[step]]
    prompt = "make it snow"
    seed = 7

The keys of a step are those of EditRequest; a step without seed draws a new one each time.
"""

from __future__ import annotations

import os
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .disk import write_atomic
from .edit import EditRequest, EditResult, Step
from .errors import RequestError
from .photo import printable
from .turns import Node

if TYPE_CHECKING:
    from .sessions import Editor

_VERSION = 1
_MAX_BYTES = 2**20
_MAX_STEPS = 1000
_ANY = Image.new("RGB", (16, 16))  # stands for the photo while a step is checked
_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_FIELD = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Recipe:
    """Edits in order, each as `EditRequest.to_json()` without a picture. Raises RequestError for what cannot work."""

    steps: tuple[dict[str, Any], ...]
    model: str = ""
    """The name of the model it was made with; empty if there were several."""

    def __post_init__(self) -> None:
        if not 0 < len(self.steps) <= _MAX_STEPS:
            raise RequestError(f"a recipe of {len(self.steps)} steps; expected 1 to {_MAX_STEPS}")
        for number, step in enumerate(self.steps, 1):
            try:
                request = EditRequest.from_json(step, image=_ANY)
            except RequestError as error:
                raise RequestError(f"step {number}: {error}") from None
            if "image" in step or len(request.seeds) > 1 or request.latents is not None:
                raise RequestError(f"step {number}: a step has one seed, no image and no latents")

    @classmethod
    def of_path(cls, path: Sequence[Node]) -> Recipe:
        """The edits of a session's path. Raises RequestError if there are none, or one cannot be repeated."""
        edits = [node for node in path if node.kind == "edit"]
        if not edits:
            raise RequestError(f"picture {path[-1].id} is no edit; a recipe needs one")
        if given := [node.id for node in edits if node.noise]:
            raise RequestError(f"picture {given[0]} began with latents of its own, which a recipe cannot hold")
        models = {node.model.get("name", "") for node in edits}
        return cls(tuple(node.request for node in edits), models.pop() if len(models) == 1 else "")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """Raises RequestError for a file that is missing, no TOML, or no recipe."""
        name = printable(os.fspath(path))
        try:
            with open(path, "rb") as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise ValueError("it has more than a megabyte")
            values = tomllib.loads(data.decode("utf-8"))
        except OSError as error:
            raise RequestError(f"{name} cannot be read ({error.strerror}); check the path") from None
        except (ValueError, RecursionError) as error:
            reason = printable(" ".join(str(error).split()))[:200]
            raise RequestError(f"{name} is no readable TOML ({reason}); mend it, or write it anew") from None
        if values.get("recipe") != _VERSION:
            found = printable(str(values.get("recipe"))[:40])
            raise RequestError(f"{name} says recipe = {found}; expected {_VERSION}: is it a recipe, of this version?")
        steps, model = values.get("step"), values.get("model", "")
        if unknown := sorted(set(values) - {"recipe", "model", "step"}):
            raise RequestError(
                f"{name}: unknown key {printable(unknown[0])[:80]}; known are recipe, model and [[step]]"
            )
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise RequestError(f"{name} has no [[step]]; expected one or more, each with a prompt")
        if not isinstance(model, str):
            raise RequestError(f"{name}: model is {printable(str(model)[:80])}; expected text")
        try:
            return cls(tuple(steps), model)
        except RequestError as error:
            raise RequestError(f"{name}: {printable(str(error))}") from None

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Raises RequestError if the name is taken (unless `overwrite`) or the place not writable."""
        write_atomic(Path(path), self.to_toml().encode("utf-8"), overwrite=overwrite)
        return Path(path)

    def to_toml(self) -> str:
        head = [f"recipe = {_VERSION}"] + ([f"model = {_toml(self.model)}"] if self.model else [])
        steps = (["[[step]]", *(f"{key} = {_toml(value)}" for key, value in step.items())] for step in self.steps)
        return "\n\n".join("\n".join(lines) for lines in (head, *steps)) + "\n"

    def stream(self, pipe: Editor, image: Any) -> Iterator[Step]:
        """Every Step of every edit, the last of each with its result; each edit starts from the latents before it."""
        for step in self.steps:
            for state in pipe.stream(EditRequest.from_json(step, image=image)):
                yield state
                image = state.result or image

    def run(self, pipe: Editor, image: Any) -> EditResult:
        """Carry it out on a photo; the last result, whose `request.image` is the one before, and so on."""
        results = [step.result for step in self.stream(pipe, image) if step.result is not None]
        return results[-1]


def fill(template: str, node: Node, name: str) -> str:
    """A path from a template with {name}, {node}, {seed}, {prompt}, {date}. Raises RequestError for other fields.

    What comes from the session never adds a folder: everything but letters, digits, - and _ becomes -.
    """
    values = {
        "name": slug(Path(name).stem) or "picture",
        "node": str(node.id),
        "seed": str(node.seed),
        "prompt": slug(node.prompt) or "edit",
        "date": slug(node.at[:10]),
    }

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            known = ", ".join(f"{{{key}}}" for key in values)
            raise RequestError(f"{{{match[1]}}} is no field of a name; known are {known}")
        return values[match[1]]

    return _FIELD.sub(value, template)


def slug(text: str) -> str:
    """Text as a part of a file's name: letters, digits and _ of any script, the rest becomes -; at most 60."""
    return re.sub(r"[\W]+", "-", text).strip("-")[:60].strip("-")


def _toml(value: Any) -> str:
    """A value of EditRequest.to_json() in TOML; texts are escaped so that a printed recipe cannot steer a terminal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(one) for one in value)}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(str(key))} = {_toml(one)}" for key, one in value.items()) + " }"
    return '"' + "".join(_ESCAPES.get(letter) or _letter(letter) for letter in str(value)) + '"'


def _letter(letter: str) -> str:
    if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return letter
    return f"\\u{ord(letter):04X}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08X}"
