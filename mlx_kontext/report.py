"""What quantization costs: a packed model beside its original, layer by layer, in one step, and in the finished picture.

The two models take turns in memory, then their matrices do, one layer at a time: the peak is that of an edit and, at full
size, 0.9 GB for what stays in between: some rows of what every layer of the original was given, its velocities, its picture.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .backend import mx, nn
from .disk import gigabytes
from .edit import EditRequest, EditResult
from .errors import RequestError
from .image import noise, pack, position_ids, psnr, ssim, to_array
from .lora import Adapters, LoraFiles
from .photo import read_photo
from .pipeline import KontextPipeline
from .weights.formats import PARTS
from .weights.pack import Taker, relative_error, unpack_matrix
from .weights.save import Stream, outputs

SIGMAS = (1.0, 0.75, 0.5, 0.25)
PROMPT = "make the circle green"  # for `drawn_picture`
_ROWS = 64  # of a layer's input that are kept each time it is used: 256 after four noise levels, 0.8 GB in bf16 at full size
_NUMBER = re.compile(r"(\d+)")
_BLOCK = re.compile(r"(?<=blocks\.)\d+|(?<=block\.)\d+")


@dataclasses.dataclass(frozen=True)
class LayerError:
    """One packed layer. Errors are relative (L2): of its weights, and of its outputs on inputs recorded in the original.

    bytes_before: as the original stores it, fp8 and GGUF counted as bf16.
    """

    part: str
    path: str
    bits: int
    group_size: int
    weight_error: float
    output_error: float
    bytes: int
    bytes_before: int

    @property
    def kind(self) -> str:
        """The path without the number of its block: "double_blocks.*.img_mlp.2"."""
        return _BLOCK.sub("*", self.path)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A quantized model beside its original, and one edit by both.

    velocities: noise level -> relative error (L2) of one velocity, on the same inputs. psnr: of the finished pictures, in
    dB, None if they are equal; ssim: of the same, 1 if equal. bytes, bytes_before: of the tensors of each part, as stored.
    """

    original: str
    quantized: str
    quantization: str | None
    layers: list[LayerError]
    velocities: dict[float, float]
    psnr: float | None
    ssim: float
    bytes: dict[str, int]
    bytes_before: dict[str, int]
    request: EditRequest
    width: int
    height: int

    def to_json(self) -> dict[str, Any]:
        """Everything, with a row a layer; psnr is null where the pictures are equal, as JSON has no infinity."""
        sizes = {part: {"bytes": self.bytes[part], "bytes_before": self.bytes_before[part]} for part in PARTS}
        return {
            "original": self.original,
            "quantized": self.quantized,
            "quantization": self.quantization,
            "parts": sizes,
            "bytes": sum(self.bytes.values()),
            "bytes_before": sum(self.bytes_before.values()),
            "velocity_errors": {f"{sigma:g}": error for sigma, error in self.velocities.items()},
            "psnr": self.psnr,
            "ssim": self.ssim,
            "edit": self.request.to_json() | {"width": self.width, "height": self.height},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    def page(self) -> str:
        """The same for people: a line for each kind of layer, with the mean and the worst of its errors."""
        kinds: dict[tuple[str, str], list[LayerError]] = {}
        for layer in sorted(self.layers, key=lambda layer: layer.kind):
            kinds.setdefault((layer.part, layer.kind), []).append(layer)
        lines = [f"{self.quantized} ({self.quantization or 'not quantized'}) beside {self.original}", ""]
        if kinds:
            lines += [
                f"{'relative errors, mean and worst':41}layers  bits     weights          outputs            size",
                *(
                    _line(part, kind, kinds[part, kind])
                    for part, kind in sorted(kinds, key=lambda key: key[0] != "transformer")
                ),
                "",
            ]
        for part in PARTS:
            lines.append(
                f"{PARTS[part]:18} {gigabytes(self.bytes_before[part]):>9} -> {gigabytes(self.bytes[part]):>9}"
            )
        before, after = sum(self.bytes_before.values()), sum(self.bytes.values())
        steps = self.request.num_inference_steps
        errors = ", ".join(f"{error:.4f} at {sigma:g}" for sigma, error in self.velocities.items())
        return "\n".join(
            [
                *lines,
                f"{'all':18} {gigabytes(before):>9} -> {gigabytes(after):>9}, {after / before:.0%}",
                "",
                f"velocity of one step, relative error by noise level: {errors}",
                f"picture of {self.width}x{self.height} after {steps} steps, seed {self.request.seed}: "
                + ("equal" if self.psnr is None else f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"),
            ]
        )


def _line(part: str, kind: str, layers: list[LayerError]) -> str:
    bits = "/".join(str(bits) for bits in sorted({layer.bits for layer in layers}))
    told = []
    for errors in ([layer.weight_error for layer in layers], [layer.output_error for layer in layers]):
        told.append(f"{sum(errors) / len(errors):.4f} {max(errors):.4f}")
    name = kind.removeprefix("encoder.")
    name = f"T5 {name}" if part == "text_encoder_2" else name
    after, before = sum(layer.bytes for layer in layers), sum(layer.bytes_before for layer in layers)
    return f"{name:41}{len(layers):6}  {bits:7}  {told[0]}   {told[1]}  {gigabytes(after):>9} {after / before:4.0%}"


def drawn_picture() -> Image.Image:
    """A picture to edit where none is given: a red circle, a blue square and a yellow bar on a pale ground."""
    image = Image.new("RGB", (384, 384), (225, 232, 235))
    draw = ImageDraw.Draw(image)
    draw.ellipse((22, 22, 106, 106), (216, 44, 40))
    draw.rectangle((152, 152, 232, 232), (40, 84, 218))
    draw.rectangle((40, 290, 344, 330), (245, 215, 40))
    return image


def check_original(original: KontextPipeline) -> None:
    """Raises RequestError if the model is quantized itself, ResourceError if this machine cannot hold an edit with it."""
    if original.quantization:
        raise RequestError(f"{original.name} is quantized ({original.quantization}); compare with the original weights")
    size = min(original.sizes, key=lambda size: abs(size[0] / size[1] - 1))
    original.plan(*size, size, None).check()


def check_pair(original: KontextPipeline, quantized: KontextPipeline) -> None:
    """As `check_original`, and raises RequestError if the two are not of one shape; reads headers alone."""
    check_original(original)
    for part, chosen in quantized.checkpoint.quantization.items():
        shapes = [pipe.checkpoint.plain_shapes(part) for pipe in (original, quantized)] if chosen.layers else [{}, {}]
        names = [f"{path}.weight" for path in chosen.layers]
        differ = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
        if not differ and original.checkpoint.config(part) == quantized.checkpoint.config(part):
            continue
        what = f"{differ[0]} differs" if differ else f"config.json of the {PARTS[part]} differs"
        raise RequestError(f"{original.name} and {quantized.name} are not the same model: {what}")


def compare(
    original: KontextPipeline,
    quantized: KontextPipeline,
    image: Any = None,
    prompt: str = PROMPT,
    *,
    seed: int = 0,
    steps: int | None = None,
    loras: Sequence[Any] = (),
    told: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Make one edit with both models and compare the pictures, single steps, and every packed layer.

    image: as for an edit; None draws one that fits the default prompt. steps: the model's default if None. loras: what the
    quantized model has had added for good, to be attached to the original. told: gets a line at each of the three stages.
    Both pipelines let go of their weights. Raises RequestError if the original is quantized itself or is another model.
    """
    check_pair(original, quantized)
    picture = drawn_picture() if image is None else image
    request = EditRequest(prompt, picture, seed=seed, num_inference_steps=steps, loras=loras)
    paths = {part: chosen.layers.keys() for part, chosen in quantized.checkpoint.quantization.items()}

    photo = read_photo(picture).image

    told("editing with the original")
    exact = _edited(original, request)
    adapters = LoraFiles(original.checkpoint.config("transformer"), original.dtype).read(exact.request.loras, [])
    step = _step(original, exact, photo)
    with recorded(original.flux_with(adapters), paths["transformer"]) as inputs:
        before = step.velocities(original, adapters)
    original.release("transformer", "vae", "text_encoder")
    with recorded(original.t5, paths["text_encoder_2"]) as t5_inputs:
        ids, _ = original.text.t5_ids(prompt, exact.request.max_sequence_length or 0)
        mx.eval(original.t5(mx.array([ids])))
    original.release()

    told("editing with the quantized model")
    found = _edited(quantized, dataclasses.replace(exact.request, loras=()))
    after = step.velocities(quantized)
    quantized.release()

    told("comparing layers")
    layers: list[LayerError] = []
    stored = {output.part: output.source for output in outputs(original.checkpoint)}
    for part, rows in (("transformer", inputs), ("text_encoder_2", t5_inputs)):
        errors = layer_errors(original, quantized, part, rows, stored[part], adapters)
        layers += sorted(
            errors, key=lambda layer: [int(word) if word.isdecimal() else word for word in _NUMBER.split(layer.path)]
        )
    return Comparison(
        original=original.name,
        quantized=quantized.name,
        quantization=quantized.quantization,
        layers=layers,
        velocities={s: relative_error(b, a) for s, a, b in zip(SIGMAS, before, after, strict=True)},
        psnr=psnr(exact.image, found.image),
        ssim=ssim(exact.image, found.image),
        bytes={output.part: output.nbytes for output in outputs(quantized.checkpoint)},
        bytes_before={part: sum(sizes.values()) for part, sizes in stored.items()},
        request=exact.request,
        width=exact.width,
        height=exact.height,
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of both transformers starts from: noise and input picture as tokens [1, N, 64], and the original's text.

    A whole edit is chaotic: after 28 steps a tiny error may be another picture just as good. One step is not. The noisy
    picture is sigma noise + (1 - sigma) input.
    """

    noise: mx.array
    picture: mx.array
    txt: mx.array
    vec: mx.array
    ids: mx.array
    guidance: float

    def velocities(self, pipe: KontextPipeline, adapters: Adapters = ()) -> list[mx.array]:
        """The velocity [1, N, 64] at each of SIGMAS, fp32 and evaluated."""
        flux, found = pipe.flux_with(adapters), []
        txt, vec = self.txt.astype(pipe.dtype), self.vec.astype(pipe.dtype)
        modulation = flux.modulation(mx.array(SIGMAS), self.guidance, vec)
        for i, sigma in enumerate(SIGMAS):
            tokens = mx.concatenate([sigma * self.noise + (1 - sigma) * self.picture, self.picture], axis=1)
            v = flux(tokens.astype(pipe.dtype), txt, flux.rope(self.ids), modulation.at(i))
            found.append(v[:, : self.noise.shape[1]].astype(mx.float32))
            mx.eval(found[-1])
        return found


def _edited(pipe: KontextPipeline, request: EditRequest) -> EditResult:
    result = pipe(request)
    assert isinstance(result, EditResult)  # of one seed
    return result


def _step(original: KontextPipeline, exact: EditResult, photo: Image.Image) -> Step:
    """The step of a finished edit of this picture."""
    request, vae = exact.request, original.checkpoint.config("vae")
    rows, columns = (side // (2 * vae.downsampling) for side in (exact.height, exact.width))
    read = original.text.encode(request.prompt, request.max_sequence_length or 0)
    text = np.zeros((read.txt.shape[1], 3), np.int32)
    ids = np.concatenate([text, position_ids(rows, columns, 0), position_ids(rows, columns, 1)])
    step = Step(
        noise=mx.array(pack(noise(exact.seed, 2 * rows, 2 * columns, vae.latent_channels))),
        picture=pack(original.vae.encode(mx.array(to_array(photo, exact.width, exact.height)))),
        txt=read.txt,
        vec=read.vec,
        ids=mx.array(ids),
        guidance=request.guidance_scale or 0.0,
    )
    mx.eval(step.picture)
    return step


@contextmanager
def recorded(model: nn.Module, paths: Collection[str]) -> Iterator[dict[str, list[mx.array]]]:
    """Inside the block keep what the layers at `paths` are given: of each call at most 64 rows, evenly spaced.

    The layers change class meanwhile, not place, as under a LoRA. Of an embedding the rows are ids.
    """
    layers = {id(layer): (path, type(layer), layer) for path, layer in model.named_modules() if path in paths}
    found: dict[str, list[mx.array]] = {path: [] for path in paths}

    def call(self: Any, x: mx.array) -> mx.array:
        path, kind, _ = layers[id(self)]
        rows = x.reshape(-1, x.shape[-1]) if mx.issubdtype(x.dtype, mx.floating) else x.flatten()
        found[path].append(rows[mx.arange(0, len(rows), -(-len(rows) // _ROWS))])
        mx.eval(found[path][-1])  # at once: left for later it would hold on to all rows
        y: mx.array = kind.__call__(self, x)
        return y

    for _, kind, layer in layers.values():
        layer.__class__ = type("Recorded", (kind,), {"__call__": call})
    try:
        yield found
    finally:
        for _, kind, layer in layers.values():
            layer.__class__ = kind


def layer_errors(
    original: KontextPipeline,
    quantized: KontextPipeline,
    part: str,
    inputs: Mapping[str, list[mx.array]],
    stored: Mapping[str, int],
    adapters: Adapters = (),
) -> Iterator[LayerError]:
    """Every packed layer of a part, in the order of the original's tensors; one matrix of each model is in memory.

    inputs: rows by path, as `recorded` keeps them; stored: bytes of the original's tensors by name.
    """
    chosen, scheme = quantized.checkpoint.quantization[part], quantized.checkpoint.scheme
    pieces = original.checkpoint.pieces(part, mx.float32)
    before = Stream(pieces, adapters)
    take = Taker(Stream(quantized.checkpoint.pieces(part, mx.float32)).pop, chosen.layers if scheme else {})
    for name in [name for piece in pieces for name in piece.outline]:
        path, _, suffix = name.rpartition(".")
        packing = chosen.layers.get(path)
        if packing is None or suffix != "weight":
            continue
        exact = before.pop(name).astype(mx.float32)
        packed = {key: take(f"{path}.{key}") for key in packing.tensors(1, packing.group_size)}
        plain, x = unpack_matrix(packed, packing), mx.concatenate(inputs[path])
        yield LayerError(
            part=part,
            path=path,
            bits=packing.bits,
            group_size=packing.group_size,
            weight_error=relative_error(plain, exact),
            output_error=relative_error(_output(x, plain), _output(x, exact)),
            bytes=sum(value.nbytes for value in packed.values()),
            bytes_before=stored[name],
        )
        mx.clear_cache()


def _output(x: mx.array, weight: mx.array) -> mx.array:
    """Of a linear layer without its bias, or of an embedding if `x` are ids."""
    return x.astype(mx.float32) @ weight.T if mx.issubdtype(x.dtype, mx.floating) else weight[x]
