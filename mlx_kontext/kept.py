"""What a session keeps of a picture or a result, and the same result again from what was kept. No MLX here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .edit import EditRequest, EditResult, pixels_sha256
from .errors import RequestError, SessionError
from .photo import read_photo
from .store import Store, object_name, write_latents, write_png
from .turns import Damaged, Node

_NOTHING: dict[str, Any] = {
    "parent": None,
    "name": "",
    "request": {},
    "seed": None,
    "latents": None,
    "noise": None,
    "vae": "",
    "input": None,
    "input_pixels": None,
    "model": {},
    "timings": {},
    "safety": None,
    "item": None,
    "follow": True,
}


@dataclass(frozen=True)
class Kept:
    """A turn with a picture that is not numbered yet: its fields, and its files by name."""

    body: dict[str, Any]
    objects: dict[str, bytes]


def keep_source(image: Any) -> Kept:
    """The picture a session begins with, normalised, from whatever `image=` takes. Raises ImageError."""
    photo = read_photo(image)
    objects: dict[str, bytes] = {}
    about = {
        "kind": "source",
        "name": Path(os.fspath(image)).name if isinstance(image, (str, os.PathLike)) else "",
        "pixels": pixels_sha256(photo.image),
        "notices": list(photo.notices),
    }
    return Kept(_NOTHING | about | _picture(photo.image, objects), objects)


def keep_result(
    result: EditResult,
    before: Node | None,
    *,
    item: int | None = None,
    follow: bool = True,
    timings: Mapping[str, float] | None = None,
    safety: Mapping[str, Any] | None = None,
) -> Kept:
    """A result, made from `before`; the keywords as in `EditSession.append`. Raises RequestError for one of another kind."""
    if result.image.mode != "RGB":
        raise RequestError(f"the result's picture has mode {result.image.mode}; a session keeps RGB")
    objects: dict[str, bytes] = {}
    body = {
        "kind": "edit" if before else "generate",
        "parent": before.id if before else None,
        "request": stored(result.request),
        "seed": int(result.seed),
        "pixels": result.pixels,
        "latents": _latents(result.latents, objects),
        "noise": _latents(result.request.latents, objects),
        "vae": result.vae,
        "input": before.image if before else None,
        "input_pixels": before.pixels if before else None,
        "model": {key: str(value) for key, value in result.model.items()},
        "timings": {"total": float(result.seconds), **(timings or {})},
        "safety": dict(safety) if safety is not None else None,
        "notices": list(result.notices),
        "item": item,
        "follow": follow,
    }
    return Kept(_NOTHING | body | _picture(result.image, objects), objects)


def stored(request: EditRequest) -> dict[str, Any]:
    """A request without its pictures and noise, which the turn names by their hashes."""
    return {k: v for k, v in request.to_json().items() if k not in ("image", "image_sha256", "latents_sha256")}


def _picture(image: Image.Image, objects: dict[str, bytes]) -> dict[str, Any]:
    return {"image": _put(write_png(image), "png", objects), "width": image.width, "height": image.height}


def _latents(latents: Any, objects: dict[str, bytes]) -> str | None:
    """None where a result came without, such as one put together from pixels."""
    if latents is None or not np.size(latents):
        return None
    return _put(write_latents(latents), "safetensors", objects)


def _put(data: bytes, suffix: str, objects: dict[str, bytes]) -> str:
    name = object_name(data, suffix)
    objects[name] = data
    return name.partition(".")[0]


def picture(store: Store, node: Node) -> Image.Image:
    """The picture of a node, RGB. Raises SessionError if its file is damaged or gone."""
    try:
        return store.picture(node.image)
    except Damaged as trouble:
        raise lost(store, node, "picture", trouble) from None


def result_again(store: Store, node: Node) -> EditResult:
    """The result of a node: an edit of it goes on from its latents, bit for bit as where it was made.

    Its `request.image` is the path of the picture that was edited. Raises SessionError for a source, and for whatever is
    damaged or gone.
    """
    if node.kind == "source":
        raise SessionError(f"picture {node.id} is the one the session began with, not a result")
    return _result(store, node, picture(store, node), _read(store, node, node.latents))


def record(store: Store, node: Node, image: Image.Image) -> dict[str, Any]:
    """What made a node, for the file it is exported to; raises as `result_again`, but needs no latents."""
    made: dict[str, Any] = _result(store, node, image, None).to_json()
    if made["request"].pop("image", None) is not None:  # its name within the session tells a stranger nothing
        made["request"]["image_sha256"] = node.input_pixels
    return made


def _result(store: Store, node: Node, image: Image.Image, latents: np.ndarray | None) -> EditResult:
    before = store.object_path(f"{node.input}.png") if node.input else None
    try:
        request = EditRequest.from_json(node.request, image=before, latents=_read(store, node, node.noise))
    except RequestError as error:
        raise SessionError(f"{store.folder}: the request of picture {node.id} is none ({error})") from None
    return EditResult(
        image=image,
        request=request,
        seed=node.seed or 0,
        seconds=node.timings.get("total", 0.0),
        model=dict(node.model),
        latents=np.zeros((1, 0, 0), np.float32) if latents is None else latents,
        notices=node.notices,
        vae=node.vae if latents is not None else "",
        pixels=node.pixels,
    )


def _read(store: Store, node: Node, sha: str | None) -> np.ndarray | None:
    try:
        return store.latents(sha) if sha else None
    except Damaged as trouble:
        raise lost(store, node, "latents", trouble) from None


def lost(store: Store, node: Node, what: str, trouble: Damaged) -> SessionError:
    return SessionError(
        f"{store.folder}: the {what} of picture {node.id} cannot be used: {trouble}; type: mlx-kontext sessions check"
    )
