"""What goes into an edit and what comes out: plain frozen dataclasses, JSON in and out. No MLX here."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import RequestError

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray
MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
_MAX_SCALE = 100.0  # of a LoRA; sliders go to 5 or so

# diffusers' words that we spell differently; naming ours saves the reader a search.
_FOREIGN = {
    "generator": "pass seed=7, or seed=[1, 2, 3] for several results",
    "num_images_per_prompt": "pass seed=[1, 2, 3] for several results",
    "callback_on_step_end": "iterate over pipe.stream(...) and look at each Step",
    "num_steps": "it is called num_inference_steps",
    "steps": "it is called num_inference_steps",
    "guidance": "it is called guidance_scale",
    "prompt_2": "one prompt feeds both text encoders",
    "joint_attention_kwargs": "pass loras=[('style.safetensors', 0.8)]",
    "output_type": "result.image is a PIL image, result.latents are the packed latents",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file of this machine and how strongly it counts; negative scales turn its change round.

    sha256: of the file, filled in by the edit; where it is given the file must be that one.
    Raises RequestError for values that cannot work.
    """

    path: str
    scale: float = 1.0
    sha256: str | None = None

    def __post_init__(self) -> None:
        if (
            not isinstance(self.path, str)
            or not self.path
            or any("\ud800" <= c <= "\udfff" or c == "\0" for c in self.path)
        ):
            raise RequestError(f"a LoRA is {self.path!r}; expected the path of a safetensors file")
        _number(f"the scale of {self.path}", self.scale, -_MAX_SCALE, _MAX_SCALE)
        if not self.scale:
            raise RequestError(f"the scale of {self.path} is {self.scale!r}, which does nothing; leave the LoRA out")
        object.__setattr__(self, "scale", float(self.scale))
        if self.sha256 is not None and not (isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256)):
            raise RequestError(
                f"the sha256 of {self.path} is {str(self.sha256)[:80]!r}; expected 64 hexadecimal digits"
            )

    @classmethod
    def of(cls, value: Any) -> Lora:
        """From a path, "file.safetensors:0.8", (path, scale), or what `to_json` wrote. Raises RequestError."""
        if isinstance(value, Lora):
            return value
        if isinstance(value, os.PathLike):
            return cls(os.fspath(value))
        if isinstance(value, str):
            path, colon, scale = value.rpartition(":")
            try:
                return cls(path, float(scale)) if colon and not os.path.exists(value) else cls(value)
            except ValueError as error:  # no number behind the colon: part of the name
                if isinstance(error, RequestError):
                    raise
                return cls(value)
        if isinstance(value, dict) and set(value) <= {"path", "scale", "sha256"}:
            return cls(**{"path": "", **value})
        if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], (str, os.PathLike)):
            return cls(os.fspath(value[0]), value[1])
        raise RequestError(f"a LoRA is {str(value)[:80]!r}; expected a path, (path, scale) or 'file.safetensors:0.8'")

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class EditRequest:
    """One edit, or one text-to-image picture when `image` is None.

    `None` means "the model's own default"; `EditResult.request` has every such value filled in except width and
    height, which stay None when they were to follow the picture, so that a repetition on another picture does too.
    Raises RequestError (a ValueError) for values that cannot work.
    """

    prompt: str
    image: ImageInput | EditResult | None = None
    seed: int | Sequence[int] | None = None
    """One seed, several (one result each), or None to draw one. Noise equals torch's CPU generator of that seed."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    """Output size in pixels, taken exactly; both or neither. Neither: the bucket of the input's aspect."""
    height: int | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    """Classifier-free guidance with `negative_prompt`, above 1 only; doubles the cost of a step."""
    max_sequence_length: int | None = None
    """T5 tokens the prompt is padded or cut to. Part of the model's input: another length is another picture."""
    auto_resize: bool = True
    """False keeps the input at its own size (floored to what the model takes) instead of its size bucket."""
    draft: bool = False
    """A quick preview: a quarter of the pixels, fewer steps, the same seed."""
    loras: Sequence[Any] = ()
    """LoRA files for this edit, which add up: each a path, (path, scale), or "file.safetensors:0.8"; kept as Lora."""
    latents: Any = field(default=None, compare=False, repr=False)
    """Packed starting noise [1, N, 64] (numpy or mx.array) instead of the seed's."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("the prompt is empty; say what to change, for example: make the car red")
        for text in (self.prompt, self.negative_prompt or ""):
            if isinstance(text, str) and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise RequestError("the prompt is not valid UTF-8 text; type it again")
        for seed in self.seeds or (0,):
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
                raise RequestError(f"seed is {seed!r}; it must be a whole number from 0 to 2**64 - 1")
        if self.seed is not None and not self.seeds:
            raise RequestError("seed is an empty list; give at least one seed, or none at all to draw one")
        if len(set(self.seeds)) < len(self.seeds):
            raise RequestError(
                f"seed is {list(self.seeds)}; each seed may appear once, equal seeds give equal pictures"
            )
        _whole("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _whole("max_sequence_length", self.max_sequence_length, 1, 512)
        _whole("width", self.width, 1, 2**15)
        _whole("height", self.height, 1, 2**15)
        if (self.width is None) != (self.height is None):
            raise RequestError(f"width is {self.width}, height is {self.height}; give both or neither")
        for name in ("auto_resize", "draft"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if not isinstance(self.negative_prompt, str | None):
            raise RequestError(f"negative_prompt is {self.negative_prompt!r}; it must be text")
        _number("guidance_scale", self.guidance_scale, 0.0)
        if self.true_cfg_scale is None:
            raise RequestError("true_cfg_scale is None; leave it out, or give a number of at least 1")
        _number("true_cfg_scale", self.true_cfg_scale, 1.0)
        if (self.negative_prompt is None) != (self.true_cfg_scale == 1):
            raise RequestError(
                f"negative_prompt is {self.negative_prompt!r}, true_cfg_scale is {self.true_cfg_scale}; they work only "
                "together: a negative prompt and a scale above 1"
            )
        if not self.auto_resize and self.image is None:
            raise RequestError("auto_resize=False needs an input image; without one give width and height")
        if isinstance(self.loras, (str, os.PathLike, dict)) or not isinstance(self.loras, Sequence):
            raise RequestError(
                f"loras is {str(self.loras)[:80]!r}; expected a list, for example ['style.safetensors:0.8']"
            )
        object.__setattr__(self, "loras", tuple(Lora.of(value) for value in self.loras))
        if self.latents is not None and len(self.seeds) > 1:
            raise RequestError("latents are one starting noise; give one seed with them, not several")

    @classmethod
    def of(cls, image: Any = None, prompt: Any = None, **options: Any) -> EditRequest:
        """The request of a `pipe(...)` call. Raises TypeError for a keyword we do not have, naming the one we do."""
        if isinstance(image, EditRequest):
            if prompt is not None or options:
                raise TypeError("an EditRequest stands alone; use dataclasses.replace(request, ...) to change it")
            return image
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name in _FOREIGN:
                raise TypeError(f"unexpected keyword {name!r}: {_FOREIGN[name]}")
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise TypeError(f"unexpected keyword {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return cls(prompt=prompt if prompt is not None else "", image=image, **options)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds asked for; empty if one is to be drawn."""
        if self.seed is None:
            return ()
        return tuple(self.seed) if isinstance(self.seed, Sequence) else (self.seed,)

    def to_json(self) -> dict[str, Any]:
        """Everything but the defaults and the data: pictures given in memory and latents appear as their sha256."""
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("image", "latents", "loras") and value != f.default:
                values[f.name] = [int(v) for v in value] if f.name == "seed" and isinstance(value, Sequence) else value
                if isinstance(value, np.generic):
                    values[f.name] = value.item()  # JSON knows no numpy numbers
        if self.loras:
            values["loras"] = [lora.to_json() for lora in self.loras]
        if isinstance(self.image, (str, os.PathLike)):
            values["image"] = os.fspath(self.image)
        elif self.image is not None:
            picture = self.image.image if isinstance(self.image, EditResult) else self.image
            values["image_sha256"] = pixels_sha256(picture)
        if self.latents is not None:
            values["latents_sha256"] = hashlib.sha256(np.array(self.latents, np.float32).tobytes()).hexdigest()
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any], *, image: Any = None, latents: Any = None) -> EditRequest:
        """Inverse of `to_json`; what it could not hold (a picture in memory, latents) must be given again.

        Raises RequestError for unknown keys, wrong types or missing data.
        """
        values = dict(values)
        stored_image = values.pop("image", None)
        had_image = values.pop("image_sha256", None) is not None
        if values.pop("latents_sha256", None) is not None and latents is None:
            raise RequestError("this request started from explicit latents; pass them again as latents=")
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise RequestError(
                f"unknown keys in a stored request: {', '.join(unknown)}; was it written by a newer version?"
            )
        if image is None:
            image = stored_image
        if image is None and had_image:
            raise RequestError("this request edited a picture held in memory; pass it again as image=")
        try:
            return cls(image=image, latents=latents, **values)
        except TypeError as error:
            raise RequestError(f"a stored request is incomplete or malformed ({error})") from None


@dataclass(frozen=True)
class Step:
    """One finished denoising step of `KontextPipeline.stream`; the last one of each seed carries the result."""

    index: int
    """1 … total."""
    total: int
    seed: int
    seconds: float
    """How long this step took."""
    eta: float
    """Seconds until the last step of the last seed, at the present pace."""
    sigma: float
    """Noise level left after this step, 1 … 0."""
    notices: tuple[str, ...] = ()
    """As in EditResult, known before the first step: the size used, a prompt that was cut off, memory that is short."""
    result: EditResult | None = None
    _preview: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)

    def preview(self) -> Image.Image:
        """What the picture is heading for, at most 512 pixels a side; decoded on demand on the pipeline's thread."""
        if self.result is not None:
            return self.result.image
        if self._preview is None:
            raise RequestError("this step came without a preview; it was stored or sent, not streamed")
        return self._preview()


@dataclass(frozen=True)
class EditResult:
    """A finished picture and all it takes to make it again."""

    image: Image.Image
    request: EditRequest
    seed: int
    seconds: float
    model: dict[str, str]
    """`name`, `dtype`, `transformer`: what made it, as written into the file."""
    latents: np.ndarray = field(repr=False, compare=False)
    """Packed final latents [1, N, 64] fp32: the next edit starts from these rather than from re-encoded pixels."""
    notices: tuple[str, ...] = ()
    """What a careful user would want to know: the size used, a truncated prompt, flattened transparency."""
    vae: str = ""
    """Identity of the VAE that decoded `latents`."""
    pixels: str = ""
    """sha256 of the decoded pixels; a picture changed since is continued from its pixels, not from `latents`."""

    @property
    def images(self) -> list[Image.Image]:
        """`[image]`, for code written for diffusers."""
        return [self.image]

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def to_json(self) -> dict[str, Any]:
        """The record that is written into the file: request, seed, size, model; no pixels and no folder names."""
        request = self.request.to_json()
        if "image" in request:
            request["image"] = Path(request["image"]).name  # a shared picture should not tell where its source lay
        for lora in request.get("loras", ()):
            lora["path"] = Path(lora["path"]).name  # likewise; its sha256 tells which file it was
        return {
            "request": request,
            "width": self.width,
            "height": self.height,
            "model": self.model,
            **({"draft": True} if self.request.draft else {}),
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
        """Write PNG, JPEG or WebP by the suffix, whole or not at all, with prompt, seed and parameters inside.

        Raises RequestError for an unknown suffix or an unwritable place, ResourceError on a full disk.
        """
        from .provenance import save_image

        return save_image(self.image, Path(path), self.to_json(), overwrite=overwrite)


def pixels_sha256(image: Any) -> str:
    """Identity of a picture: its mode, size and pixels, whatever file it came from."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    head = f"{picture.mode} {picture.width}x{picture.height} ".encode()
    return hashlib.sha256(head + picture.tobytes()).hexdigest()


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    if value is None:
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.floating))
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        most = f" and at most {high:g}" if high < math.inf else ""
        raise RequestError(f"{name} is {value!r}; it must be a finite number of at least {low:g}{most}")
