"""LoRA: small changes of linear layers, read from a file, attached to a model for an edit, or added to weights for good.

W' = W + scale · alpha/r · B A with A [r, in] and B [out, r] (https://arxiv.org/abs/2106.09685). Attached, the change is a
side branch, y += scale · alpha/r · (x Aᵀ) Bᵀ: the weights below are never touched, so taking it off gives them back bit for bit,
and over quantized weights nothing is rounded a second time.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .backend import mx, nn
from .edit import Lora
from .errors import AdapterError, CheckpointError
from .hub import local_path
from .models.flux import Flux, FluxConfig
from .models.quantized import QuantizedLinear
from .weights.formats import Tensors
from .weights.header import Header, read_header
from .weights.lora_names import Pair, fit, spell

_READABLE = ("F32", "F16", "BF16")
_ALPHAS = (*_READABLE, "I32", "I64")


@dataclass(frozen=True, eq=False)
class Branch:
    """The change of one layer. A split projection (q, k, v) has a part for each trained row range; other rows stay as they are.

    a: [R, in], the parts' A one below the other; gain: [R] fp32, alpha/r of each; parts: (first row, B [rows, r]) in order.
    """

    a: mx.array
    gain: mx.array
    parts: tuple[tuple[int, mx.array], ...]
    out: int

    def __call__(self, x: mx.array, scale: float) -> mx.array:
        """x: [..., in] -> [..., out], in x's dtype. B stays split: block-diagonal it would be 3 to 4 times as large."""
        h = (x @ self.a.T.astype(x.dtype)) * (scale * self.gain).astype(x.dtype)
        pieces, row, column = [], 0, 0
        for start, b in self.parts:
            rows, rank = b.shape
            if start > row:
                pieces.append(mx.zeros((*x.shape[:-1], start - row), x.dtype))
            pieces.append(h[..., column : column + rank] @ b.T.astype(x.dtype))
            row, column = start + rows, column + rank
        if row < self.out:
            pieces.append(mx.zeros((*x.shape[:-1], self.out - row), x.dtype))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)

    def delta(self, scale: float) -> mx.array:
        """scale · alpha/r · B A as [out, in] fp32."""
        a = self.a.astype(mx.float32) * (scale * self.gain)[:, None]
        pieces, row, column = [], 0, 0
        for start, b in self.parts:
            rows, rank = b.shape
            pieces += [mx.zeros((start - row, a.shape[1])), b.astype(mx.float32) @ a[column : column + rank]]
            row, column = start + rows, column + rank
        return mx.concatenate([*pieces, mx.zeros((self.out - row, a.shape[1]))])


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file, read. branches: canonical layer name -> its change; notices: what of the file is not applied."""

    name: str
    sha256: str
    format: str
    branches: dict[str, Branch]
    notices: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory it takes while attached."""
        return sum(b.a.nbytes + sum(up.nbytes for _, up in b.parts) for b in self.branches.values())


Adapters = Sequence[tuple[Adapter, float]]
"""Adapters with their scales; they add up."""


def read_adapter(path: Path, config: FluxConfig, dtype: mx.Dtype | None = None) -> Adapter:
    """Read a LoRA for a transformer of these sizes, in `dtype` (default: as stored).

    Raises AdapterError in one line: a damaged file, another kind of adapter, modules this transformer does not have or of
    other shapes, values that are not finite.
    """
    header = read_adapter_header(path)
    spelling = spell(header, str(path))
    pairs = fit(spelling, header, config, str(path))
    for key in (key for pair in pairs for key in (pair.down, pair.up)):
        if header.tensors[key].dtype not in _READABLE:
            raise AdapterError(
                f"{path}: {key} is {header.tensors[key].dtype}; expected {', '.join(_READABLE)}, take that version of it"
            )
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        branches = _branches(mx.load(str(path), format="safetensors"), pairs, header, dtype, path)
    except (OSError, RuntimeError) as error:  # MLX's word for one
        raise AdapterError(f"{path} cannot be read ({str(error).splitlines()[0]}); download it again") from None
    notices = []
    if spelling.text:
        notices.append(
            f"{path.name}: {len(spelling.text)} tensors for the text encoders are left out; the rest is applied"
        )
    return Adapter(path.name, sha256, spelling.format, branches, tuple(notices))


def read_adapter_header(path: Path) -> Header:
    """The checked header of a LoRA file. Raises AdapterError for what is no sound safetensors file."""
    try:
        return read_header(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def _branches(tensors: Any, pairs: list[Pair], header: Header, dtype: mx.Dtype | None, path: Path) -> dict[str, Branch]:
    """Put the pairs of each layer together, and look at every value once: NaN in a weight is a black picture later."""
    grouped: dict[str, list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault(pair.place.target, []).append(pair)
    branches, looked = {}, []
    for target, members in grouped.items():
        downs, ups, gains = [], [], []
        for pair in members:
            down, up = (tensors[key].astype(dtype or tensors[key].dtype) for key in (pair.down, pair.up))
            if pair.place.swapped:  # diffusers holds scale above shift, the original shift above scale
                scale, shift = mx.split(up, 2)
                up = mx.concatenate([shift, scale])
            downs.append(down)
            ups.append((pair.place.start, up))
            gains.append(mx.full((pair.rank,), _gain(tensors, pair, header, path)))
        a = downs[0] if len(downs) == 1 else mx.concatenate(downs)
        branch = Branch(a, mx.concatenate(gains), tuple(ups), members[0].place.out)
        arrays = [branch.a, branch.gain, *(up for _, up in ups)]
        looked.append((target, mx.stack([mx.isfinite(array).all() for array in arrays]).all()))
        mx.eval(
            arrays, looked[-1][1]
        )  # layer by layer: the stored values and the cast ones of all would be twice the file
        branches[target] = branch
    broken = [target for target, finite in looked if not finite.item()]
    if broken:
        raise AdapterError(
            f"{path}: {len(broken)} layers hold values that are not finite ({', '.join(broken[:3])}); download it again"
        )
    return branches


def _gain(tensors: Any, pair: Pair, header: Header, path: Path) -> float:
    """alpha / r: alpha's tensor counts before the metadata; with neither alpha was r, as PEFT's trainers mean it."""
    if pair.alpha is None:
        return 1.0 if pair.gain is None else pair.gain
    info = header.tensors[pair.alpha]
    alpha = float("nan")
    if info.dtype in _ALPHAS and math.prod(info.shape) == 1:
        alpha = float(tensors[pair.alpha].astype(mx.float32).item())
    if not math.isfinite(alpha):
        raise AdapterError(f"{path}: {pair.alpha} is {info.dtype} {info.shape} ({alpha}); expected one finite number")
    return alpha / pair.rank


class LoraFiles:
    """The LoRA files of the latest edit, kept read: the next edit often wants the same ones."""

    def __init__(self, config: FluxConfig, dtype: mx.Dtype):
        self._config, self._dtype = config, dtype
        self._read: dict[tuple[str, int, int], Adapter] = {}

    def read(self, loras: Sequence[Lora], notices: list[str]) -> Adapters:
        """The adapters of one edit, and into `notices` what a user should know of them; all others are let go.

        Raises AdapterError, also for a file that is not the one whose sha256 was recorded.
        """
        before, self._read = self._read, {}
        adapters = []
        for lora in loras:
            found = local_path(lora.path)
            if lora.sha256 and found is None:
                raise AdapterError(
                    f"this edit was made with the LoRA {lora.path}, which is not there; give its present path"
                )
            path = found or Path(lora.path)  # for `read_adapter` to say that it is not there
            about = path.stat() if found else None
            key = (os.path.abspath(path), about.st_mtime_ns, about.st_size) if about else ("", 0, 0)
            adapter = self._read.get(key) or before.get(key) or read_adapter(path, self._config, self._dtype)
            if lora.sha256 not in (None, adapter.sha256):
                raise AdapterError(
                    f"{path} is not the LoRA this edit was made with (another sha256); give the path of that one"
                )
            self._read[key] = adapter
            adapters.append((adapter, lora.scale))
            notices.extend(adapter.notices)
            if "hyper-flux" in adapter.name.lower() and lora.scale > 0.5:
                notices.append(
                    f"{adapter.name}: Hyper-FLUX is made for scale 0.125 and 8 or 16 steps; this is {lora.scale:g}"
                )
        return tuple(adapters)


class Side:
    """What a layer adds to its own output. A plain object, so that MLX does not take its arrays for parameters."""

    def __init__(self, branches: list[tuple[Branch, float]]):
        self.branches = branches

    def __call__(self, x: mx.array) -> mx.array:
        first, *rest = (branch(x, scale) for branch, scale in self.branches)
        return sum(rest, first)


class _Adapted:
    """Mixed into a layer's class while it has a side branch: its arrays and their names stay what they were."""

    side: Side

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + self.side(x)  # type: ignore[misc]  # the layer's own


class AdaptedLinear(_Adapted, nn.Linear):
    """nn.Linear with a side branch."""


class AdaptedQuantizedLinear(_Adapted, QuantizedLinear):
    """QuantizedLinear with a side branch in full precision."""


_ADAPTED: dict[type, type] = {nn.Linear: AdaptedLinear, QuantizedLinear: AdaptedQuantizedLinear}


def attach(flux: Flux, adapters: Adapters) -> None:
    """Let the transformer compute with exactly these adapters (in place of any before) until `detach`.

    The layers change class, not place: parameters, their names, strict loading and saving are as before. A function that
    `mx.compile` made earlier does not see the change: compile after attaching. Quantize before attaching.
    Raises AdapterError for a layer the transformer does not have, or one of another kind.
    """
    detach(flux)
    layers: dict[str, nn.Module] = dict(flux.named_modules())
    wanted: dict[str, list[tuple[Branch, float]]] = {}
    for adapter, scale in adapters:
        for target, branch in adapter.branches.items():
            if type(layers.get(target)) not in _ADAPTED:
                raise AdapterError(
                    f"{adapter.name}: {target} is no linear layer of this transformer; read it for this model"
                )
            wanted.setdefault(target, []).append((branch, scale))
    for target, branches in wanted.items():
        layers[target].side = Side(branches)
        layers[target].__class__ = _ADAPTED[type(layers[target])]


def detach(flux: Flux) -> None:
    """Take every adapter off; the weights were never touched."""
    plain = {adapted: layer for layer, adapted in _ADAPTED.items()}
    for layer in flux.modules():
        if type(layer) in plain:
            layer.__class__ = plain[type(layer)]
            del layer.side


def delta(adapters: Adapters, name: str) -> mx.array | None:
    """What the adapters add to the canonical tensor `name`: [out, in] fp32, or None if nothing."""
    target = name.removesuffix(".weight")
    found = [adapter.branches[target].delta(scale) for adapter, scale in adapters if target in adapter.branches]
    return sum(found[1:], found[0]) if found and target != name else None


def fuse(tensors: Tensors, adapters: Adapters) -> Tensors:
    """The canonical tensors with the adapters added, in fp32, lazily, and each back in its own dtype.

    Raises AdapterError for weights that are quantized already: add first, quantize then.
    """
    fused = dict(tensors)
    for name, value in tensors.items():
        change = delta(adapters, name)
        if change is None:
            continue
        if not mx.issubdtype(value.dtype, mx.floating):
            raise AdapterError(f"{name} is quantized ({value.dtype}); add a LoRA to the model before it is quantized")
        fused[name] = (value.astype(mx.float32) + change).astype(value.dtype)
    return fused
