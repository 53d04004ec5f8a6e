"""KontextPipeline: from a picture and an instruction to an edited picture. `_story` is one edit, top to bottom."""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .backend import compute_dtype, mx, part_dtype
from .edit import EditRequest, EditResult, Step, pixels_sha256
from .errors import CheckpointError, KontextError, ModelNotFound, RequestError
from .finite import not_finite
from .hub import find_model, local_path
from .image import KONTEXT_SIZES, nearest_size, noise, pack, position_ids, to_array, to_image, unpack
from .lora import Adapters, LoraFiles, attach
from .models.flux import Flux, Modulation
from .models.vae import AutoEncoder
from .photo import read_photo
from .plan import Plan, gigabytes, plan, unpacked_bytes, weight_bytes
from .quantize import Scheme, told
from .sampling import euler, schedule
from .text import Conditioning, TextEncoders, clip_tokenizer, t5_tokenizer
from .weights.assemble import assemble
from .weights.formats import PARTS
from .weights.load import Checkpoint
from .weights.save import save_checkpoint
from .weights.sizes import check_parts

_TEXT_PARTS = ("text_encoder", "text_encoder_2")
_SPOKEN = {"transformer": "the transformer", "vae": "the VAE", "text_encoder": "CLIP", "text_encoder_2": "T5"}
_TARGET, _REFERENCE = 0, 1  # first position axis: the planes the model was trained with
_PREVIEW_LATENTS = 64  # a preview decodes at most so many a side, 512 pixels


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing; a model may carry its own in `model_index.json`."""

    num_inference_steps: int = 28
    guidance_scale: float = 2.5
    max_sequence_length: int = 512
    draft_steps: int = 10
    draft_scale: float = 0.5
    """Of each side: half of it is a quarter of the pixels."""


class KontextPipeline:
    """A model ready to edit. Belongs to the thread that made it, as MLX's arrays do.

    pipe = KontextPipeline.from_pretrained("demo")
    result = pipe(image="cat.jpg", prompt="give it a red scarf", seed=7)
    result.save("scarf.png")
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: str | None = None, name: str | None = None):
        self.checkpoint = checkpoint
        self.dtype = compute_dtype(dtype)
        self.name = name or checkpoint.folder.name
        self.defaults = _defaults(checkpoint)
        check_parts(checkpoint)
        self.sizes = _sizes(checkpoint)
        self._schedule = checkpoint.schedule_config()
        self._flux_config, self._vae_config = checkpoint.config("transformer"), checkpoint.config("vae")
        self._weights = weight_bytes(checkpoint, self.dtype)  # reads every header, so damage shows before work starts
        self._unpacked = unpacked_bytes(checkpoint, self.dtype)
        self.quantization = told(checkpoint.quantization, checkpoint.scheme, checkpoint.index.get("quantization"))
        self._parts: dict[str, Any] = {}
        self._loras = LoraFiles(self._flux_config, self.dtype)
        self._attached: Adapters = ()
        self.phase = ""
        """What the edit under way is busy with, in words; any thread may read it, as the engine's heartbeat does."""
        vocabulary = checkpoint.t5_vocabulary()
        t5 = checkpoint.where("text_encoder_2") if vocabulary else checkpoint.tokenizer("tokenizer_2")
        clip_ids = clip_tokenizer(checkpoint.tokenizer("tokenizer"), checkpoint.config("text_encoder").vocab_size)
        t5_ids = t5_tokenizer(t5, vocabulary, checkpoint.config("text_encoder_2").vocab_size)
        self.text = TextEncoders(clip_ids, t5_ids, self._part, self.dtype)
        self._thread = threading.get_ident()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "black-forest-labs/FLUX.1-Kontext-dev",
        *,
        transformer: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        text_encoder_2: str | os.PathLike[str] | None = None,
        tokenizers: str | os.PathLike[str] | None = None,
        config: str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        quantize: str | int | Scheme | None = None,
    ) -> KontextPipeline:
        """Open "demo", a folder, a single file or a hub id. Weights are read when they are first needed.

        transformer, vae, text_encoder (CLIP), text_encoder_2 (T5): a file or folder for that part alone, in place of the
        model's; with all four, no model is needed. Safetensors under diffusers', BFL's, ComfyUI's or mflux' names, plain,
        fp8 or quantized by MLX; GGUF for transformer and T5.
        tokenizers: a folder with tokenizer/ and tokenizer_2/. config: one with config.json files in diffusers' folders, for
        models of other sizes than FLUX.1's; without it sizes are read from the tensors.
        dtype: "float32", "float16" or "bfloat16"; by default bfloat16 on Metal and CUDA, float32 on CPU.
        quantize: pack weights as they are loaded, "q8", "q6", "q4m", "q4", a number of bits, or a Scheme; about one layer
        more than the packed model is in memory meanwhile. RequestError for other words and for a model quantized already.
        Raises ModelNotFound (missing, gated, offline) or CheckpointError (damaged, incomplete, another model).
        """
        scheme = Scheme.of(quantize)
        given = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        parts = {part: _existing(path, part) for part, path in given.items() if path is not None}
        words = _existing(tokenizers, "tokenizers") if tokenizers else None
        configs = _existing(config, "config") if config else None
        if len(parts) == len(PARTS):  # nothing of a model is needed
            checkpoint = assemble(None, parts, words, configs, scheme)
            return cls(checkpoint, dtype=dtype, name=parts["transformer"].name)
        path = None if os.fspath(model) == "demo" else local_path(os.fspath(model))
        if path is None or path.is_dir():
            found = find_model(model, local_files_only=local_files_only, revision=revision, token=token)
        else:
            found = path
        name = os.fspath(model) if path is None else found.resolve().name
        return cls(assemble(found, parts, words, configs, scheme), dtype=dtype, name=name)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as our own folder, as stored or as `quantize` says. Raises RequestError if `folder` is not empty."""
        save_checkpoint(self.checkpoint, Path(folder))

    @property
    def flux(self) -> Flux:
        """The transformer without adapters, loaded when first asked for."""
        return self._flux_with(())

    @property
    def vae(self) -> AutoEncoder:
        """The autoencoder, loaded when first asked for."""
        model: AutoEncoder = self._part("vae")
        return model

    def __call__(self, image: Any = None, prompt: str | None = None, **options: Any) -> EditResult | list[EditResult]:
        """Edit `image` as `prompt` says, or make a picture from the prompt alone; keywords as in EditRequest.

        One result, or a list of results if `seed` is a list. Raises a KontextError subclass for everything foreseeable.
        """
        request = EditRequest.of(image, prompt, **options)
        results = [step.result for step in self.stream(request) if step.result is not None]
        return results if isinstance(request.seed, Sequence) else results[0]

    def stream(self, image: Any = None, prompt: str | None = None, **options: Any) -> Generator[Step]:
        """The same edit as a generator of Steps, the last of each seed carrying `.result`; close it to cancel.

        The request is checked here, before the first step is asked for.
        """
        self._check_thread()
        return self._story(self._resolve(EditRequest.of(image, prompt, **options)))

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise KontextError(
                "this pipeline was made on another thread and MLX's arrays cannot change threads; make it and call it on "
                "one thread, or use mlx_kontext.engine.Engine, which any thread may call"
            )

    def _story(self, request: EditRequest) -> Generator[Step]:
        """One edit: the picture, the prompt, the schedule, the loop, the picture."""
        self._check_thread()  # again, now that the first step is asked for
        started = time.perf_counter()
        notices = list(self.checkpoint.notices)
        notices += [note for chosen in self.checkpoint.quantization.values() for note in chosen.notes]
        photo = self._photo(request, notices)
        width, height = self._size(request, photo)
        reference_size = self._reference_size(request, photo) if photo else None
        grid = self._grid(width, height)
        notices.append(_told_size(request, photo, width, height))
        adapters = self._loras.read(request.loras, notices)
        used = zip(request.loras, adapters, strict=True)
        request = dataclasses.replace(
            request, loras=[dataclasses.replace(lora, sha256=a.sha256) for lora, (a, _) in used]
        )
        budget = self.plan(width, height, reference_size, request.max_sequence_length, adapters)
        budget.check()
        if not budget.fits:
            notices.append(
                f"this edit needs about {gigabytes(budget.peak)} and the machine can give {gigabytes(budget.budget)}: expect "
                "it to be slow; choose a smaller size"
            )

        positive = self._read_prompt(request.prompt, request, budget, notices)
        negative = None
        if request.negative_prompt is not None:
            negative = self._read_prompt(request.negative_prompt, request, budget, notices)
        if not budget.keep_all:
            self._release(*_TEXT_PARTS)  # 10 GB at full size that denoising has better use for

        reference = self._reference(request, photo, reference_size) if photo and reference_size else None
        sigmas = schedule(request.num_inference_steps or 0, grid[0] * grid[1], self._schedule)
        passes = [
            self._pass(c, sigmas, request, grid, reference_size, adapters)
            for c in (positive, negative)
            if c is not None
        ]

        def velocity(i: int, x: mx.array) -> mx.array:
            """[1, N, 64] of the target tokens; the reference only looks on."""
            self.phase = "denoising"
            tokens = (x if reference is None else mx.concatenate([x, reference], axis=1)).astype(self.dtype)
            flux = self._flux_with(adapters)  # at each step: another edit may run between two steps of this one
            wanted, *unwanted = (
                flux(tokens, text, pe, modulation.at(i))[:, : x.shape[1]] for text, pe, modulation in passes
            )
            return unwanted[0] + request.true_cfg_scale * (wanted - unwanted[0]) if unwanted else wanted

        for number, seed in enumerate(request.seeds):
            paces: list[float] = []
            before = time.perf_counter()
            for i, x, target in euler(velocity, self._start(request, seed, grid), sigmas):
                if not mx.isfinite(x).all().item():
                    raise self._not_finite(f"the latents of step {i + 1} are", adapters)
                total, now = len(sigmas) - 1, time.perf_counter()
                paces.append(now - before)
                pace = sum(paces[1:]) / len(paces[1:]) if paces[1:] else paces[0]  # the first step also loads weights
                left = (total - i - 1) + total * (len(request.seeds) - number - 1)
                step = Step(
                    index=i + 1,
                    total=total,
                    seed=seed,
                    seconds=now - before,
                    eta=pace * left,
                    sigma=float(sigmas[i + 1]),
                    notices=tuple(notices),
                    _preview=partial(self._preview, target, grid),
                )
                if i + 1 == total:
                    mine = dataclasses.replace(request, seed=seed)
                    result = self._finish(mine, seed, x, grid, time.perf_counter() - started, tuple(notices))
                    step = dataclasses.replace(step, result=result)
                    started = time.perf_counter()
                yield step
                before = time.perf_counter()

    def plan(
        self,
        width: int,
        height: int,
        reference: tuple[int, int] | None,
        text_tokens: int | None,
        adapters: Adapters = (),
    ) -> Plan:
        """Memory of an edit of this size; reference: (width, height) of the input as the model sees it, if there is one."""
        transformer = self._weights["transformer"] + sum(adapter.nbytes for adapter, _ in adapters)
        sizes = [(width, height), *([reference] if reference else [])]
        multiple = self._vae_config.downsampling * 2
        tokens = sum((w // multiple) * (h // multiple) for w, h in sizes)
        return plan(
            self._weights | {"transformer": transformer},
            self._flux_config,
            self._vae_config,
            self.dtype,
            tokens=tokens + (text_tokens or self.defaults.max_sequence_length),
            pixels=max(w * h for w, h in sizes),
            unpacked=self._unpacked,
        )

    # --- the chapters of the story, in order ---

    def _resolve(self, request: EditRequest) -> EditRequest:
        """Fill in the model's defaults and draw a seed, so that the request repeats exactly."""
        steps = self.defaults.draft_steps if request.draft else self.defaults.num_inference_steps
        return dataclasses.replace(
            request,
            seed=request.seed if request.seed is not None else secrets.randbelow(2**32),
            num_inference_steps=request.num_inference_steps or steps,
            # plain numbers: MLX takes numpy's for arrays, and would promote or refuse them in 16 bits
            guidance_scale=float(
                self.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
            ),
            true_cfg_scale=float(request.true_cfg_scale),
            latents=_plain(request.latents),
            max_sequence_length=request.max_sequence_length or self.defaults.max_sequence_length,
        )

    def _photo(self, request: EditRequest, notices: list[str]) -> Image.Image | None:
        """The input picture upright, sRGB and opaque."""
        self.phase = "reading the picture"
        if request.image is None:
            return None
        if isinstance(request.image, EditResult):
            return request.image.image
        photo = read_photo(request.image)
        notices.extend(photo.notices)
        return photo.image

    def _size(self, request: EditRequest, photo: Image.Image | None) -> tuple[int, int]:
        """(width, height) of the result: as asked, else the bucket nearest to the input's shape."""
        if request.width and request.height:
            width, height = request.width, request.height
            multiple = self._vae_config.downsampling * 2
            if width % multiple or height % multiple:
                near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
                raise RequestError(
                    f"size is {width}x{height}; both must be multiples of {multiple}, for example {near[0]}x{near[1]}"
                )
        elif photo is None:
            width, height = nearest_size(1, 1, self.sizes, 1)
        else:
            width, height = self._bucket(request, photo)
        return self._drafted(request, width, height)

    def _reference_size(self, request: EditRequest, photo: Image.Image) -> tuple[int, int]:
        """(width, height) at which the model sees the input; independent of the size asked for."""
        return self._drafted(request, *self._bucket(request, photo))

    def _bucket(self, request: EditRequest, photo: Image.Image) -> tuple[int, int]:
        multiple = self._vae_config.downsampling * 2
        if request.auto_resize:
            return nearest_size(photo.width, photo.height, self.sizes, multiple)
        return max(photo.width // multiple, 1) * multiple, max(photo.height // multiple, 1) * multiple

    def _drafted(self, request: EditRequest, width: int, height: int) -> tuple[int, int]:
        if not request.draft:
            return width, height
        multiple, scale = self._vae_config.downsampling * 2, self.defaults.draft_scale
        return max(int(width * scale) // multiple, 1) * multiple, max(int(height * scale) // multiple, 1) * multiple

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tokens; a token is 2x2 latents."""
        multiple = self._vae_config.downsampling * 2
        return height // multiple, width // multiple

    def _read_prompt(self, prompt: str, request: EditRequest, budget: Plan, notices: list[str]) -> Conditioning:
        self.phase = "reading the prompt"
        length = request.max_sequence_length or 0
        if not budget.keep_all and not self.text.knows(prompt, length):
            self._release("transformer")
        conditioning = self.text.encode(prompt, length)
        if not (mx.isfinite(conditioning.txt).all() & mx.isfinite(conditioning.vec).all()).item():
            raise self._not_finite("what the text encoders make of the prompt is")
        if conditioning.tokens > length:
            notices.append(
                f"the prompt has {conditioning.tokens:,} T5 tokens and the model reads {length:,}: its end is cut off"
            )
        return conditioning

    def _reference(self, request: EditRequest, photo: Image.Image, size: tuple[int, int]) -> mx.array:
        """The input as tokens [1, N, 64]: an earlier result's own latents if they still are that picture, else encoded."""
        self.phase = "encoding the picture"
        earlier = request.image
        if (
            isinstance(earlier, EditResult)
            and earlier.vae == self.checkpoint.identity["vae"]
            and (earlier.width, earlier.height) == size
            and earlier.pixels == pixels_sha256(earlier.image)
        ):
            return mx.array(earlier.latents)
        tokens = pack(self.vae.encode(mx.array(to_array(photo, *size))))
        mx.eval(tokens)
        return tokens

    def _pass(
        self,
        conditioning: Conditioning,
        sigmas: np.ndarray,
        request: EditRequest,
        grid: tuple[int, int],
        reference_size: tuple[int, int] | None,
        adapters: Adapters,
    ) -> tuple[mx.array, mx.array, Modulation]:
        """All that one prompt fixes for the whole schedule: text states, rotations, modulation tables."""
        ids = [np.zeros((conditioning.txt.shape[1], 3), np.int32), position_ids(*grid, _TARGET)]
        if reference_size:
            ids.append(position_ids(*self._grid(*reference_size), _REFERENCE))
        flux = self._flux_with(adapters)
        pe = flux.rope(mx.array(np.concatenate(ids)))
        modulation = flux.modulation(mx.array(sigmas[:-1]), request.guidance_scale or 0.0, conditioning.vec)
        mx.eval(pe, modulation.arrays())
        return conditioning.txt, pe, modulation

    def _start(self, request: EditRequest, seed: int, grid: tuple[int, int]) -> mx.array:
        """Packed noise [1, N, 64] fp32: the caller's, or the one torch's CPU generator draws from this seed."""
        channels = self._vae_config.latent_channels
        if request.latents is None:
            return mx.array(pack(noise(seed, 2 * grid[0], 2 * grid[1], channels)))
        latents: np.ndarray = request.latents
        expected = (1, grid[0] * grid[1], 4 * channels)
        if latents.shape != expected or not np.isfinite(latents).all():
            raise RequestError(f"latents are {latents.shape}; expected finite packed noise of shape {expected}")
        return mx.array(latents)

    def _preview(self, target: mx.array, grid: tuple[int, int]) -> Image.Image:
        latents = unpack(target, 2 * grid[0], 2 * grid[1])
        shrink = -(-max(latents.shape[1:3]) // _PREVIEW_LATENTS)
        if shrink > 1:  # neighbouring latents averaged are close to the latents of the picture made smaller
            _, h, w, c = latents.shape
            latents = latents[:, : h // shrink * shrink, : w // shrink * shrink]
            latents = latents.reshape(1, h // shrink, shrink, w // shrink, shrink, c).mean(axis=(2, 4))
        return to_image(np.array(self.vae.decode(latents)))

    def _finish(
        self,
        request: EditRequest,
        seed: int,
        x: mx.array,
        grid: tuple[int, int],
        seconds: float,
        notices: tuple[str, ...],
    ) -> EditResult:
        self.phase = "decoding"
        decoded = self.vae.decode(unpack(x, 2 * grid[0], 2 * grid[1]))
        mx.eval(decoded)
        pixels = np.array(decoded)
        if not np.isfinite(pixels).all():
            raise self._not_finite("the decoded picture is")
        image = to_image(pixels)
        return EditResult(
            image=image,
            request=request,
            seed=seed,
            seconds=seconds,
            model={
                "name": self.name,
                "transformer": self.checkpoint.identity["transformer"],
                "dtype": str(self.dtype).removeprefix("mlx.core."),
                **({"quantization": self.quantization} if self.quantization else {}),
            },
            latents=np.array(x),
            notices=notices,
            vae=self.checkpoint.identity["vae"],
            pixels=pixels_sha256(image),
        )

    # --- parts come and go ---

    def _flux_with(self, adapters: Adapters) -> Flux:
        """The transformer with exactly these adapters attached; they stay until another set, or none, is asked for."""
        model: Flux = self._part("transformer")
        if self._attached != adapters:
            attach(model, adapters)
            self._attached = adapters
        return model

    def _part(self, part: str) -> Any:
        if part not in self._parts:
            before, self.phase = self.phase, f"loading {_SPOKEN[part]}"
            self._parts[part] = self.checkpoint.model(part, part_dtype(part, self.dtype))
            self.phase = before
            if part == "transformer":
                self._attached = ()
        return self._parts[part]

    def _not_finite(self, what: str, adapters: Adapters = ()) -> KontextError:
        return not_finite(what, self.checkpoint, self._parts, adapters, self.dtype)

    def _release(self, *parts: str) -> None:
        for part in parts:
            self._parts.pop(part, None)
        mx.clear_cache()


def _existing(path: str | os.PathLike[str], word: str) -> Path:
    found = local_path(os.fspath(path))
    if found is None:
        raise ModelNotFound(f"{word} is {os.fspath(path)[:200]!r} and there is no such file or folder; check the path")
    return found


def _plain(latents: Any) -> np.ndarray | None:
    """The caller's latents as fp32 numpy, from numpy or from an mx.array of any float format."""
    if latents is None:
        return None
    try:
        return np.array(latents.astype(mx.float32) if isinstance(latents, mx.array) else latents, np.float32)
    except (ValueError, TypeError) as error:
        raise RequestError(f"latents are no array of numbers ({error}); expected packed noise [1, N, 64]") from None


def _told_size(request: EditRequest, photo: Image.Image | None, width: int, height: int) -> str:
    what = "draft, a preview" if request.draft else "edited" if photo else "made"
    source = f" (the input is {photo.width}x{photo.height})" if photo and photo.size != (width, height) else ""
    return f"{what} at {width}x{height}{source}"


def _defaults(checkpoint: Checkpoint) -> Defaults:
    values = checkpoint.index.get("defaults", {})
    where = checkpoint.folder / "model_index.json"
    known = {field.name for field in dataclasses.fields(Defaults)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise CheckpointError(
            f"{where}: defaults is {str(values)[:80]!r}; expected an object with some of {', '.join(sorted(known))}"
        )
    for field in dataclasses.fields(Defaults):
        value, example = values.get(field.name, field.default), field.default
        kinds = (int,) if isinstance(example, int) else (int, float)
        if type(value) not in kinds or not 0 < value <= (1 if field.name == "draft_scale" else 1000):
            raise CheckpointError(
                f"{where}: defaults.{field.name} is {str(value)[:80]!r}; expected a number like {example}"
            )
    return Defaults(**values)


def _sizes(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    values = checkpoint.index.get("resolutions", KONTEXT_SIZES)
    multiple = checkpoint.config("vae").downsampling * 2
    good = isinstance(values, (list, tuple)) and len(values) > 0
    for size in values if good else ():
        good = good and isinstance(size, (list, tuple)) and len(size) == 2
        good = good and all(type(side) is int and 0 < side <= 2**15 and side % multiple == 0 for side in size)
    if not good:
        raise CheckpointError(
            f"{checkpoint.folder / 'model_index.json'}: resolutions is {str(values)[:80]}; expected a list of [width, height] "
            f"in multiples of {multiple}"
        )
    return tuple((width, height) for width, height in values)
