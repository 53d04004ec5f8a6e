"""What a model folder holds and whether this machine can run it, from headers alone."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .pipeline import KontextPipeline
from .plan import Plan, gigabytes
from .weights.formats import PARTS


@dataclass(frozen=True)
class Part:
    """One of the four networks: stored tensors, parameters, bytes on disk and the dtypes they are stored in."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """A model folder, and the plan of one edit at its squarest size."""

    folder: str
    format: str
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
            "quantization": None,
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
        lines = [f"{self.folder}", f"format        {self.format}", "quantization  none", ""]
        for part in self.parts.values():
            dtypes = " ".join(part.dtypes)
            lines.append(
                f"{part.name:18} {part.parameters:>15,} parameters {part.tensors:5} tensors {gigabytes(part.bytes):>9}  {dtypes}"
            )
        lines += [
            "",
            f"an edit at {self.width}x{self.height} in {self.dtype} needs about, by phase:",
            f"  reading the prompt {gigabytes(plan.text)}, denoising {gigabytes(plan.denoise)}, decoding {gigabytes(plan.decode)}",
            f"this machine can give {gigabytes(plan.budget)}: " + _verdict(plan),
        ]
        return "\n".join(lines)


def inspect_model(model: str, dtype: str | None = None, **sources: str | None) -> Inspection:
    """Read a model's JSON files and headers. sources: parts from elsewhere, as in `KontextPipeline.from_pretrained`.

    Raises ModelNotFound or CheckpointError.
    """
    pipe = KontextPipeline.from_pretrained(model, dtype=dtype, local_files_only=True, **sources)
    parts = {}
    for part, name in PARTS.items():
        headers = pipe.checkpoint.headers(part).values()
        parts[part] = Part(
            name=name,
            tensors=len(headers),
            parameters=pipe.checkpoint.parameters(part),
            bytes=sum(info.nbytes for info in headers),
            dtypes=dict(Counter(info.dtype for info in headers).most_common()),
        )
    width, height = min(pipe.sizes, key=lambda size: abs(size[0] / size[1] - 1))
    return Inspection(
        folder=str(pipe.checkpoint.folder),
        format=pipe.checkpoint.format.name,
        parts=parts,
        dtype=str(pipe.dtype).removeprefix("mlx.core."),
        width=width,
        height=height,
        plan=pipe.plan(width, height, (width, height), None),
    )


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "it fits" + ("" if plan.keep_all else "; text encoders and transformer take turns in memory")
    return "it does not fit well" if plan.peak <= plan.physical else "it does not fit"
