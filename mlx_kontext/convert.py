"""Any checkpoint to a folder of ours, quantized on the way: planned from headers, streamed, resumed where it stopped.

Nothing is held but the tensor under way, so that a 34 GB model passes through a machine with 8. What one run wrote another
goes on from: shards get their names only when they are whole, and model_index.json comes last.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .backend import mx
from .disk import gigabytes
from .edit import Lora
from .errors import CheckpointError, RequestError, ResourceError
from .lora import Adapters, LoraFiles
from .pipeline import KontextPipeline
from .quantize import Scheme
from .weights.formats import PARTS
from .weights.load import Checkpoint, read_json
from .weights.pack import pack_matrix, relative_error, unpack_matrix
from .weights.save import Output, Progress, Stream, check_new, outputs, stored_as, write_folder

_STATE = "conversion.json"  # while it is under way: what is being converted, and the lock of who does it
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PROGRAM = 150 * 10**6  # bytes of memory before any weight is read


@dataclass(frozen=True)
class Conversion:
    """What a conversion will write, and where; only headers and JSON files have been read. Run it, then verify it.

    planned: the four parts; adapters: added to the weights; notes: what a user should know; fingerprint: of all that
    determines the result, so that only the same conversion goes on in a folder.
    """

    checkpoint: Checkpoint
    folder: Path
    planned: list[Output]
    adapters: Adapters
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def done(self) -> bool:
        """Whether the folder holds this very conversion, finished."""
        index = self.folder / "model_index.json"
        return index.is_file() and read_json(index).get("conversion") == self.fingerprint

    @property
    def begun(self) -> bool:
        """Whether the folder holds this very conversion, unfinished."""
        state = self.folder / _STATE
        return state.is_file() and read_json(state).get("conversion") == self.fingerprint

    @property
    def source_bytes(self) -> int:
        """Of all tensors, as numbers before packing."""
        return sum(sum(output.source.values()) for output in self.planned)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.planned)

    @property
    def left(self) -> int:
        """Bytes still to be written."""
        return sum(
            shard.nbytes
            for output in self.planned
            for shard in output.shards
            if not (self.folder / output.part / shard.file).exists()
        )

    @property
    def memory(self) -> int:
        """Peak in bytes, estimated: the largest tensor as it is read, joined from split ones, decoded and packed."""
        return _PROGRAM + 4 * max(size for output in self.planned for size in output.source.values())

    @property
    def free(self) -> int:
        """Bytes free where the folder will be."""
        path = self.folder.absolute()
        return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free

    def check_room(self) -> None:
        """Raises ResourceError if the disk cannot take what is still to be written."""
        if self.free < self.left:
            raise ResourceError(
                f"{self.folder} needs {gigabytes(self.left)} more and {gigabytes(self.free)} are free; make room, name a folder "
                "on another disk, or choose a smaller scheme (-q q4m)"
            )

    def run(self, progress: Progress = lambda _: None) -> Path:
        """Write the folder, or what it still lacks. progress: gets bytes of the source, as they are done.

        Raises RequestError for a folder that holds something else, ResourceError without room, CheckpointError for
        weights that are not finite.
        """
        if self.done:
            return self.folder
        self.check_room()
        with self._claimed():
            words = {"conversion": self.fingerprint}
            write_folder(self.checkpoint, self.planned, self.folder, self.adapters, progress, words)
            (self.folder / _STATE).unlink()
        return self.folder

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Hold the folder against another conversion, and sweep up what a killed one left unnamed."""
        state = self.folder / _STATE
        begun = self.begun
        if state.is_file() and not begun:
            raise RequestError(
                f"{self.folder} holds an unfinished conversion of something else; remove it, or choose another folder"
            )
        if not begun:
            check_new(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with state.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(f"another process is converting into {self.folder}; wait for it") from None
            if not begun:
                file.write(json.dumps({"conversion": self.fingerprint, "library": __version__}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            for part in PARTS:
                for left in (self.folder / part).glob(".*-*.*"):
                    left.unlink()
            yield

    def verify(self, progress: Progress = lambda _: None) -> dict[str, float]:
        """Read the folder again and compare every number with what the source gives.

        Returns the largest relative error of a packed layer, by part. Raises CheckpointError naming the first tensor that
        differs.
        """
        result = Checkpoint.open(self.folder)
        worst: dict[str, float] = {}
        for output in self.planned:
            part, found = output.part, result.tensors(output.part)
            source = Stream(self.checkpoint.pieces(part, mx.float32), self.adapters)
            kinds = {name: dtype for shard in output.shards for name, (dtype, _) in shard.tensors.items()}
            for name in kinds:
                path, _, suffix = name.rpartition(".")
                packing = output.layers.get(path) if suffix != "bias" else None
                if packing and suffix != "weight":
                    continue  # looked at together with its weight
                value = source.pop(name)
                if packing:
                    wanted = {f"{path}.{key}": x for key, x in pack_matrix(value, packing, path).items()}
                    error = relative_error(
                        unpack_matrix({k.rpartition(".")[2]: x for k, x in wanted.items()}, packing), value
                    )
                    worst[part] = max(worst.get(part, 0.0), error)
                else:
                    wanted = {name: stored_as(value, kinds[name], name)}
                for key, array in wanted.items():
                    read = found.pop(key, None)
                    if read is None or read.dtype != array.dtype or not mx.array_equal(read, array):
                        raise CheckpointError(
                            f"{self.folder / part}: {key} is not what the source gives; remove the folder and convert again"
                        )
                progress(output.source.get(name, 0))
                mx.clear_cache()
            if found:
                raise CheckpointError(f"{self.folder / part} holds {min(found)}, which the source has not")
        return worst

    def to_json(self) -> dict[str, Any]:
        return {
            "source": str(self.checkpoint.folder),
            "format": self.checkpoint.format.name,
            "folder": str(self.folder),
            "quantization": self.checkpoint.scheme.name if self.checkpoint.scheme else None,
            "parts": {
                output.part: {
                    "source_bytes": sum(output.source.values()),
                    "bytes": output.nbytes,
                    "files": len(output.shards),
                    "packed_layers": len(output.layers),
                }
                for output in self.planned
            },
            "source_bytes": self.source_bytes,
            "bytes": self.nbytes,
            "bytes_left": self.left,
            "disk_free": self.free,
            "memory": self.memory,
        }

    def page(self) -> str:
        """The same for people."""
        scheme = self.checkpoint.scheme
        lines = [
            f"{self.checkpoint.folder} ({self.checkpoint.format.name}) -> {self.folder}",
            f"{scheme.name if scheme else 'no change of precision'}" + (", with LoRA" if self.adapters else ""),
        ]
        for output in self.planned:
            bits = sorted({packing.bits for packing in output.layers.values()})
            packed = f"  {len(output.layers)} layers at {'/'.join(map(str, bits))} bits" if bits else ""
            before, after = gigabytes(sum(output.source.values())), gigabytes(output.nbytes)
            lines.append(f"{PARTS[output.part]:18} {before:>9} -> {after:>9} in {len(output.shards)} files{packed}")
        lines.append(f"{'all':18} {gigabytes(self.source_bytes):>9} -> {gigabytes(self.nbytes):>9}")
        left = f", {gigabytes(self.left)} of it still to be written" if self.left != self.nbytes else ""
        lines.append(
            f"disk {gigabytes(self.nbytes)}{left}, {gigabytes(self.free)} are free; memory about {gigabytes(self.memory)}"
        )
        return "\n".join(lines)


def plan_conversion(
    source: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    quantize: str | int | Scheme | None = None,
    dtype: str | None = None,
    loras: Sequence[Any] = (),
    **sources: Any,
) -> Conversion:
    """Read headers and say what a conversion will do; arguments as in `convert_checkpoint`. Nothing is written."""
    if dtype not in (None, *_DTYPES):
        raise RequestError(f"dtype is {dtype!r}; choose {', '.join(_DTYPES)}, or leave it out to keep what is stored")
    pipe = KontextPipeline.from_pretrained(source or "", quantize=quantize, **sources)
    checkpoint, notes = pipe.checkpoint, list(pipe.checkpoint.notices)
    notes += [note for chosen in checkpoint.quantization.values() for note in chosen.notes]
    wanted = [Lora.of(lora) for lora in loras]
    adapters = LoraFiles(checkpoint.config("transformer"), mx.float32).read(wanted, notes)
    planned = outputs(checkpoint, _DTYPES[dtype] if dtype else None)
    for part in PARTS:
        checkpoint.check(part)
    packed = checkpoint.quantization["transformer"].layers if not checkpoint.scheme else {}
    if blocked := [path for adapter, _ in adapters for path in adapter.branches if path in packed]:
        raise RequestError(
            f"{blocked[0]} is quantized already and a LoRA cannot be added to it for good; convert the unquantized model"
        )
    facts = {
        "scheme": dataclasses.asdict(checkpoint.scheme) if checkpoint.scheme else None,
        "outputs": [
            [
                output.part,
                [[s.file, [[n, str(d), *shape] for n, (d, shape) in s.tensors.items()]] for s in output.shards],
            ]
            for output in planned
        ],
        "layers": [[output.part, sorted(output.layers.items())] for output in planned],
        "files": [[path.name, path.stat().st_size] for part in PARTS for path in checkpoint.files(part)],
        "identity": checkpoint.identity,
        "loras": [[adapter.sha256, scale] for adapter, scale in adapters],
        "library": __version__,
    }
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Conversion(checkpoint, Path(folder).expanduser(), planned, adapters, tuple(notes), fingerprint)


def convert_checkpoint(
    source: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    quantize: str | int | Scheme | None = None,
    dtype: str | None = None,
    loras: Sequence[Any] = (),
    verify: bool = False,
    progress: Progress = lambda _: None,
    **sources: Any,
) -> Path:
    """Write any checkpoint we read as a folder of ours, tensor by tensor, and return the folder.

    source: a folder, a single file, a hub id or "demo", or None if all four parts are given; sources: parts from elsewhere
    and how to find a hub id, as in `KontextPipeline.from_pretrained` (transformer, vae, text_encoder, text_encoder_2,
    tokenizers, config, revision, token, local_files_only). quantize: "q8", "q6", "q4m", "q4", a number of bits, or a Scheme.
    dtype: of what is not packed; by default as stored, fp8 and GGUF as bfloat16. loras: added for good, as in `EditRequest`.
    verify: read all of it again.
    An interrupted conversion goes on where it stopped; a finished one is left as it is.

    Raises RequestError, CheckpointError, AdapterError, ModelNotFound, and ResourceError before the start if room is short.
    """
    conversion = plan_conversion(source, folder, quantize=quantize, dtype=dtype, loras=loras, **sources)
    conversion.run(progress)
    if verify:
        conversion.verify()
    return conversion.folder
