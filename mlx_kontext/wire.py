"""Messages between the engine and its worker process as bytes: JSON and raw numbers, nothing that can be executed.

A frame is a head (magic, length and crc32 of the JSON, crc32 of the blobs), the JSON (kind, values, blob lengths), and the
blobs: pixels of pictures and float32 arrays. Both sides check every one; what is not exactly a message is a WireError.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import types
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from .edit import EditRequest, EditResult
from .messages import (
    Beat,
    Cancel,
    Cancelled,
    Command,
    Done,
    Edit,
    Event,
    Failed,
    Load,
    Loading,
    Progress,
    Ready,
    Started,
)
from .photo import Photo

_MAGIC = b"mkf1"
_HEAD = struct.Struct("<4sIII")
_MAX_JSON = 16 * 2**20  # bytes; a prompt may be long
_MAX_BLOBS = 2**30
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Load, Edit, Cancel, Loading, Ready, Started, Progress, Done, Cancelled, Failed, Beat)
}

Read = Callable[[int], bytes]
"""Exactly so many bytes; raises EOFError where the stream ends."""


class WireError(Exception):
    """Bytes that are not a message."""


def to_frame(message: Command | Event) -> list[bytes]:
    """The pieces of a frame, to be written one after another."""
    blobs: list[bytes] = []
    body = {"kind": type(message).__name__, "values": _lower(message, blobs), "blobs": [len(blob) for blob in blobs]}
    text = json.dumps(body, allow_nan=False).encode("ascii")
    check = 0
    for blob in blobs:
        check = zlib.crc32(blob, check)
    return [_HEAD.pack(_MAGIC, len(text), zlib.crc32(text), check), text, *blobs]


def read_message(read: Read, sent: EditRequest | None = None) -> Command | Event:
    """The next message. sent: the request under way, which a Done does not repeat the pictures of.

    Raises WireError for anything but a whole message, EOFError where the stream ends, be it within a frame.
    """
    magic, length, text_check, blobs_check = _HEAD.unpack(read(_HEAD.size))
    if magic != _MAGIC or length > _MAX_JSON:
        raise WireError(f"{magic!r} in place of a frame")
    text = read(length)
    if zlib.crc32(text) != text_check:
        raise WireError("a frame whose checksum is wrong")
    try:
        body = json.loads(text, parse_constant=_no_number)
        kind, values, sizes = body["kind"], body["values"], body["blobs"]
        if not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes) > _MAX_BLOBS:
            raise WireError("blobs of impossible sizes")
        blobs = [read(size) for size in sizes]
        check = 0
        for blob in blobs:
            check = zlib.crc32(blob, check)
        if check != blobs_check:
            raise WireError("a frame whose checksum is wrong")
        return _Reader(blobs, sent).value(values, _KINDS[kind])
    except (EOFError, WireError):
        raise
    except RecursionError:
        raise WireError("a frame that is nested without end") from None
    except Exception as error:  # whatever a wrong value makes json, PIL, numpy or our own dataclasses raise
        raise WireError(f"a frame that is no message ({type(error).__name__}: {str(error)[:200]})") from None


def _no_number(word: str) -> float:
    raise WireError(f"{word} where a number is expected")


# --- values to JSON and blobs ---


def _lower(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, Image.Image):
        if value.mode not in _CHANNELS:
            value = value.convert("RGB")
        blobs.append(value.tobytes())
        return {"mode": value.mode, "size": list(value.size), "blob": len(blobs) - 1}
    if isinstance(value, np.ndarray):
        blobs.append(np.ascontiguousarray(value, "<f4").tobytes())
        return {"shape": list(value.shape), "blob": len(blobs) - 1}
    if isinstance(value, Edit):
        return {**_lower_fields(value, blobs, "request"), "request": _lower_request(value.request, blobs)}
    if isinstance(value, EditResult):
        return {**_lower_fields(value, blobs, "request"), "request": _words(value.request)}
    if dataclasses.is_dataclass(value):
        return _lower_fields(value, blobs)
    if isinstance(value, (list, tuple)):
        return [_lower(item, blobs) for item in value]
    if isinstance(value, dict):
        return {key: _lower(item, blobs) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _lower_fields(value: Any, blobs: list[bytes], *but: str) -> dict[str, Any]:
    return {f.name: _lower(getattr(value, f.name), blobs) for f in dataclasses.fields(value) if f.name not in but}


def _words(request: EditRequest) -> dict[str, Any]:
    """All of a request but its data: image and starting noise."""
    loras = [lora.to_json() for lora in request.loras]
    return _lower_fields(request, [], "image", "latents", "loras") | {"loras": loras}


def _lower_request(request: EditRequest, blobs: list[bytes]) -> dict[str, Any]:
    """image: None, a path, a Photo, or of an earlier result what it takes to continue from it."""
    image: Any = request.image
    if isinstance(image, EditResult):
        names = ("image", "latents", "vae", "pixels")
        lowered: Any = {"earlier": {name: _lower(getattr(image, name), blobs) for name in names}}
    elif isinstance(image, Photo):
        lowered = {"photo": _lower_fields(image, blobs)}
    else:
        lowered = None if image is None else {"path": os.fspath(image)}
    latents = None if request.latents is None else _lower(request.latents, blobs)
    return {"words": _words(request), "image": lowered, "latents": latents}


# --- and back ---

_hints = cache(get_type_hints)


class _Reader:
    """Values of one frame, each checked against the type that its field has."""

    def __init__(self, blobs: list[bytes], sent: EditRequest | None):
        self.blobs, self.sent = blobs, sent

    def value(self, value: Any, kind: Any) -> Any:
        if kind is Image.Image:
            return self.picture(**value)
        if kind is np.ndarray:
            return self.array(**value)
        if kind is EditRequest:
            return self.request(**value)
        if kind is EditResult:
            return self.result(value)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind(**self.fields(value, kind))
        if get_origin(kind) in (Union, types.UnionType):
            (*real,) = (choice for choice in get_args(kind) if choice is not type(None))
            if value is None and len(real) < len(get_args(kind)):
                return None
            return self.value(value, next((choice for choice in real if type(value) is choice), real[0]))
        if get_origin(kind) is tuple:
            inner = get_args(kind)
            if not isinstance(value, list) or (inner[1:] != (Ellipsis,) and len(inner) != len(value)):
                raise WireError(f"{str(value)[:80]} where a list is expected")
            kinds = [inner[0]] * len(value) if inner[1:] == (Ellipsis,) else inner
            return tuple(self.value(item, kind) for item, kind in zip(value, kinds, strict=True))
        if get_origin(kind) is dict:
            return {key: self.value(item, get_args(kind)[1]) for key, item in value.items()}
        if type(value) is int and kind is float:
            return float(value)
        if type(value) is not kind:
            raise WireError(f"{str(value)[:80]} where {kind} is expected")
        return value

    def fields(self, values: dict[str, Any], kind: Any, *but: str) -> dict[str, Any]:
        hints = {name: hint for name, hint in _hints(kind).items() if name not in but}
        if set(values) != set(hints):
            raise WireError(f"{kind.__name__} with {sorted(values)}; expected {sorted(hints)}")
        return {name: self.value(values[name], hint) for name, hint in hints.items()}

    def picture(self, mode: str, size: list[int], blob: int) -> Image.Image:
        data, (width, height) = self.blobs[blob], size
        if width <= 0 or height <= 0 or len(data) != width * height * _CHANNELS[mode]:
            raise WireError(f"{len(data)} bytes for a picture of {width}x{height}")
        return Image.frombytes(mode, (width, height), data)

    def array(self, shape: list[int], blob: int) -> np.ndarray:
        if any(side < 0 for side in shape) or math.prod(shape) * 4 != len(self.blobs[blob]):
            raise WireError(f"{len(self.blobs[blob])} bytes for an array of {shape}")
        return np.frombuffer(self.blobs[blob], "<f4").reshape(shape).copy()  # a buffer of bytes cannot be written

    def request(self, words: dict[str, Any], image: Any, latents: Any) -> EditRequest:
        picture: Any = None
        if image is not None:
            ((kind, value),) = image.items()
            if kind == "earlier":
                hints = _hints(EditResult)
                earlier = {name: self.value(item, hints[name]) for name, item in value.items()}
                unknown = EditRequest("an earlier edit")  # continuing needs the picture and its latents only
                picture = EditResult(request=unknown, seed=0, seconds=0.0, model={}, **earlier)
            else:
                picture = self.value(value, {"photo": Photo, "path": str}[kind])
        noise = None if latents is None else self.value(latents, np.ndarray)
        return EditRequest.from_json(words, image=picture, latents=noise)

    def result(self, values: dict[str, Any]) -> EditResult:
        if self.sent is None:
            raise WireError("a result and no edit under way")
        values = dict(values)
        request = EditRequest.from_json(values.pop("request"), image=self.sent.image, latents=self.sent.latents)
        return EditResult(request=request, **self.fields(values, EditResult, "request"))
