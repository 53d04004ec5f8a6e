"""What a model folder or a LoRA file holds and whether this machine can run it, from headers alone."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import AdapterError
from .hub import local_path
from .lora import read_adapter_header
from .models.flux import FluxConfig
from .pipeline import KontextPipeline
from .plan import Plan, gigabytes
from .quantize import Scheme
from .weights.formats import PARTS
from .weights.lora_names import fit, looks_like_adapter, spell


@dataclass(frozen=True)
class Part:
    """One of the four networks: stored tensors, parameters, bytes on disk and the dtypes they are stored in.

    loaded: bytes in memory, once quantized if it is to be; bits: how many weights have so many bits, of quantized layers.
    """

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    loaded: int
    bits: dict[int, int]


@dataclass(frozen=True)
class Inspection:
    """A model folder, and the plan of one edit at its squarest size."""

    folder: str
    format: str
    quantization: str | None
    parts: dict[str, Part]
    dtype: str
    width: int
    height: int
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "folder": self.folder,
            "format": self.format,
            "quantization": self.quantization,
            "parts": {name: vars(part) for name, part in self.parts.items()},
            "parameters": sum(part.parameters for part in self.parts.values()),
            "edit": {"width": self.width, "height": self.height, "dtype": self.dtype},
            "memory": {
                "text": plan.text,
                "denoise": plan.denoise,
                "decode": plan.decode,
                "budget": plan.budget,
                "fits": plan.fits,
            },
        }

    def page(self) -> str:
        """The same for people."""
        plan = self.plan
        lines = [f"{self.folder}", f"format        {self.format}", f"quantization  {self.quantization or 'none'}", ""]
        for part in self.parts.values():
            dtypes = " ".join(part.dtypes)
            lines.append(
                f"{part.name:18} {part.parameters:>15,} parameters {part.tensors:5} tensors {gigabytes(part.bytes):>9}  {dtypes}"
            )
            if part.bits:
                counts = ", ".join(f"{count:,} at {bits} bits" for bits, count in part.bits.items())
                lines.append(f"{'':18} {counts}; {gigabytes(part.loaded)} in memory")
        lines += [
            "",
            f"an edit at {self.width}x{self.height} in {self.dtype} needs about, by phase:",
            f"  reading the prompt {gigabytes(plan.text)}, denoising {gigabytes(plan.denoise)}, decoding {gigabytes(plan.decode)}",
            f"this machine can give {gigabytes(plan.budget)}: " + _verdict(plan),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class AdapterInspection:
    """A LoRA file. targets: layers it changes, block numbers left out -> how many; text: tensors for text encoders."""

    file: str
    format: str
    ranks: dict[int, int]
    targets: dict[str, int]
    text: int
    parameters: int
    bytes: int
    misfit: str | None
    """Why it does not fit FLUX.1 Kontext [dev], or None."""

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def page(self) -> str:
        """The same for people."""
        ranks = ", ".join(str(rank) for rank in self.ranks)
        lines = [self.file, f"format        LoRA, {self.format}", f"rank          {ranks}"]
        lines += [f"parameters    {self.parameters:,} ({gigabytes(self.bytes)})", ""]
        lines += [f"  {target:38} {count:4}" for target, count in self.targets.items()]
        if self.text:
            lines.append(f"  {self.text} tensors for the text encoders, which are not applied")
        return "\n".join(
            [*lines, "", f"it does not fit: {self.misfit}" if self.misfit else "it fits FLUX.1 Kontext [dev]"]
        )


def is_adapter(path: str) -> bool:
    """Whether this is a file that names itself like a LoRA or its kin, rather than a model."""
    found = local_path(path)
    if found is None or not found.is_file() or found.suffix.lower() != ".safetensors":
        return False
    return looks_like_adapter(read_adapter_header(found))


def inspect_adapter(path: str) -> AdapterInspection:
    """Read a LoRA's names and shapes. Raises AdapterError for a kind we refuse; one that does not fit is described."""
    file = Path(path).expanduser()
    header = read_adapter_header(file)
    spelling = spell(header, path)
    downs = [header.tensors[keys["down"]].shape for keys in spelling.modules.values() if "down" in keys]
    misfit = None
    try:
        fit(spelling, header, FluxConfig(), file.name)
    except AdapterError as error:
        misfit = str(error)
    return AdapterInspection(
        file=path,
        format=spelling.format,
        ranks=dict(Counter(shape[0] for shape in downs if shape).most_common()),
        targets=dict(Counter(re.sub(r"(?<=[._])\d+(?=[._])", "*", module, count=1) for module in spelling.modules)),
        text=len(spelling.text),
        parameters=sum(prod(info.shape) for info in header.tensors.values()),
        bytes=sum(info.nbytes for info in header.tensors.values()),
        misfit=misfit,
    )


def inspect_model(
    model: str, dtype: str | None = None, quantize: str | int | Scheme | None = None, **sources: str | None
) -> Inspection:
    """Read a model's JSON files and headers; with `quantize`, count as if it were quantized so.

    sources: parts from elsewhere, as in `KontextPipeline.from_pretrained`.
    Raises ModelNotFound, CheckpointError, and RequestError for a scheme there is not or a model quantized already.
    """
    pipe = KontextPipeline.from_pretrained(model, dtype=dtype, local_files_only=True, quantize=quantize, **sources)
    width, height = min(pipe.sizes, key=lambda size: abs(size[0] / size[1] - 1))
    plan = pipe.plan(width, height, (width, height), None)
    parts = {}
    for part, name in PARTS.items():
        headers = pipe.checkpoint.headers(part).values()
        layers, shapes = pipe.checkpoint.quantization[part].layers, pipe.checkpoint.plain_shapes(part)
        bits: Counter[int] = Counter()
        for path, packing in layers.items():
            bits[packing.bits] += prod(shapes[f"{path}.weight"])
        parts[part] = Part(
            name=name,
            tensors=len(headers),
            parameters=pipe.checkpoint.parameters(part),
            bytes=sum(info.nbytes for info in headers),
            dtypes=dict(Counter(info.dtype for info in headers).most_common()),
            loaded=plan.weights[part],
            bits=dict(sorted(bits.items())),
        )
    return Inspection(
        folder=str(pipe.checkpoint.folder),
        format=pipe.checkpoint.format.name,
        quantization=pipe.quantization,
        parts=parts,
        dtype=str(pipe.dtype).removeprefix("mlx.core."),
        width=width,
        height=height,
        plan=plan,
    )


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "it fits" + ("" if plan.keep_all else "; text encoders and transformer take turns in memory")
    return "it does not fit well" if plan.peak <= plan.physical else "it does not fit"
