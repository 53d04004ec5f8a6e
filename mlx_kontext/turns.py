"""One turn of an edit session as a file: immutable JSON that carries its own sha256. No MLX here.

    {"body": {"schema": 1, "turn": 5, "kind": "edit", "node": 3, "parent": 2, "request": {...}, "image": "<sha256>", ...},
    "sha256": "<of the body's bytes>"}

A turn is a picture (`source`, `edit`, `generate`) or a small step (`undo`, `star`, `queue`, ...). Its file may come from a
stranger: `decode` believes nothing that it has not looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
# How to read the schema before this one: {1: function of a body}, once there is a schema 2. Files are never rewritten.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
MAX_BYTES = 2**20

NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6})\.json")
LAST = 9_999_999
_HEAD, _MIDDLE, _TAIL = b'{"body": ', b',\n"sha256": "', b'"}\n'
_SHA = re.compile(r"[0-9a-f]{64}")
_MAX_SIDE = 2**15


class Damaged(ValueError):
    """What is wrong with a file of a session, in a few words."""


class Newer(Damaged):
    """Written by a later version of this program."""


@dataclass(frozen=True)
class Node:
    """A picture of the tree: number 0 is the one a session began with, results count from 1."""

    id: int
    turn: int
    """Number of its turn; small steps are turns, too, so it runs ahead of `id`."""
    parent: int | None
    kind: str
    """source, edit, or generate (a result that began with no picture)."""
    at: str
    """When, in UTC: 2026-11-25T14:18:24Z."""
    image: str
    """sha256 of its PNG."""
    width: int
    height: int
    pixels: str
    """As EditResult.pixels; of the picture itself for a source."""
    latents: str | None = None
    """sha256 of its safetensors file of packed latents."""
    vae: str = ""
    noise: str | None = None
    """sha256 of the starting noise if the request brought its own."""
    input: str | None = None
    input_pixels: str | None = None
    """Of the picture that was edited: sha256 of its PNG, and its `pixels`."""
    name: str = ""
    """Of the file that a source was read from, without its folders."""
    request: dict[str, Any] = field(default_factory=dict)
    """EditRequest.to_json() without pictures."""
    seed: int | None = None
    model: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by phase; `total` is EditResult.seconds."""
    safety: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()
    starred: bool = False
    note: str = ""

    @property
    def prompt(self) -> str:
        """What was asked for; empty for a source."""
        return str(self.request.get("prompt", ""))

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the files that belong to it."""
        tensors = [sha for sha in (self.latents, self.noise) if sha]
        return (f"{self.image}.png", *(f"{sha}.safetensors" for sha in tensors))


@dataclass(frozen=True)
class Queued:
    """An edit that waits; `id` is the number of its turn."""

    id: int
    request: dict[str, Any]
    """EditRequest.to_json() without the picture."""
    parent: int | None
    """The node to edit; None: the one that is current when its time comes."""


@dataclass(frozen=True)
class Turn:
    """A decoded turn: a node, or a small step whose `values` depend on its kind."""

    id: int
    kind: str
    node: Node | None = None
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def objects(self) -> tuple[str, ...]:
        return self.node.objects if self.node else ()


def encode(body: dict[str, Any]) -> bytes:
    """The file of a turn. Raises ValueError or TypeError for what JSON cannot hold or is over a megabyte."""
    text = json.dumps(body, indent=1, allow_nan=False).encode("ascii")
    data = _HEAD + text + _MIDDLE + hashlib.sha256(text).hexdigest().encode() + _TAIL
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, a turn at most {MAX_BYTES:,}")
    return data


def decode(data: bytes, number: int) -> Turn:
    """A turn from its file `number`. Raises Damaged, or Newer for a later schema (whose sum was right, too)."""
    body = _body(data)
    schema, found = body.get("schema"), body.get("turn")
    if type(schema) is not int or schema < 1:
        raise Damaged(f"its schema is {_cut(schema)}")
    if found != number or type(found) is not int:
        raise Damaged(f"it says it is turn {_cut(found)}")
    if schema > SCHEMA:
        raise Newer(f"it was written by a newer version (schema {schema}, this one knows {SCHEMA}); update mlx_kontext")
    if schema < SCHEMA:
        if schema != SCHEMA - 1 or schema not in UPGRADES:
            raise Damaged(f"its schema {schema} is too old for this version")
        body = UPGRADES[schema](body)
    kind = body.get("kind")
    if kind in ("source", "edit", "generate"):
        return Turn(number, kind, _node(body), {key: body.get(key) for key in ("item", "follow")})
    if kind not in _STEPS:
        raise Damaged(f"its kind is {_cut(kind)}")
    for key, good in _STEPS[kind].items():
        if not good(body.get(key)):
            raise Damaged(f"its {key} is {_cut(body.get(key))}")
    return Turn(number, kind, None, {key: body[key] for key in _STEPS[kind]})


def _body(data: bytes) -> dict[str, Any]:
    cut = len(data) - len(_MIDDLE) - 64 - len(_TAIL)
    text, end = data[len(_HEAD) : max(cut, 0)], data[max(cut, 0) :]
    if not data.startswith(_HEAD) or end != _MIDDLE + hashlib.sha256(text).hexdigest().encode() + _TAIL:
        raise Damaged("its checksum does not fit" if data else "it is empty")
    try:
        body = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Damaged("it is no JSON") from None
    if not isinstance(body, dict):
        raise Damaged("it is no JSON object")
    return body


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _node(body: dict[str, Any]) -> Node:
    for key, good in _PICTURE.items():
        if not good(body.get(key)):
            raise Damaged(f"its {key} is {_cut(body.get(key))}")
    request = body["request"]
    if body["kind"] != "source" and not isinstance(request.get("prompt"), str):
        raise Damaged("its request has no prompt")
    if body["parent"] is not None and body["parent"] >= body["node"]:
        raise Damaged(f"its parent is {body['parent']}, which comes after {body['node']}")
    values = {key: body[key] for key in _PICTURE if key not in ("node", "item", "follow")}
    return Node(body["node"], body["turn"], kind=body["kind"], **(values | {"notices": tuple(body["notices"])}))


def is_sha(value: Any) -> bool:
    """Whether it is 64 lower-case hexadecimal digits, so that it names a file and no path."""
    return isinstance(value, str) and _SHA.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAST


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIDE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict)


def _is_request(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("prompt"), str)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, dict) and all(type(seconds) in (int, float) for seconds in value.values())


def _of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(good(one) for one in value)


def _or_none(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or good(value)


_PICTURE: dict[str, Callable[[Any], bool]] = {
    "node": _is_number,
    "parent": _or_none(_is_number),
    "at": _is_text,
    "image": is_sha,
    "width": _is_side,
    "height": _is_side,
    "pixels": _is_text,
    "latents": _or_none(is_sha),
    "vae": _is_text,
    "noise": _or_none(is_sha),
    "input": _or_none(is_sha),
    "input_pixels": _or_none(is_sha),
    "name": _is_text,
    "request": _is_record,
    "seed": _or_none(lambda value: type(value) is int),
    "model": lambda value: isinstance(value, dict) and all(isinstance(words, str) for words in value.values()),
    "timings": _is_seconds,
    "safety": _or_none(_is_record),
    "notices": _of(_is_text),
    "item": _or_none(_is_number),
    "follow": _is_flag,
}
"""Fields of a turn with a picture. item: the queued edit that it carried out; follow: whether it became the current node."""

_STEPS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "undo": {"node": _is_number},
    "redo": {"node": _is_number},
    "checkout": {"node": _is_number},
    "star": {"node": _is_number, "on": _is_flag},
    "note": {"node": _is_number, "text": _is_text},
    "queue": {"request": _is_request, "parent": _or_none(_is_number)},
    "unqueue": {"item": _is_number, "why": _is_text},
    "reorder": {"items": _of(_is_number)},
}


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
