"""Layers whose weights are held in few bits, in MLX's packing, and the one function that puts them into a model.

What is unusual: a layer never multiplies packed weights. It unpacks the whole matrix into the dtype of its input, takes the
dense product and lets the matrix go. At the thousands of rows of an edit the dense product is the faster one on every Mac
before M5; and since the matrix is cast after unpacking, scales may be fp16 in a bf16 run without making anything fp32.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from ..backend import mx, nn
from ..errors import CheckpointError


class Packing(NamedTuple):
    """How a matrix is packed: `group_size` neighbours in a row share scale and bias. mode: MLX's word, "affine" or an fp format."""

    group_size: int
    bits: int
    mode: str = "affine"

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], mx.Dtype]]:
        """Suffix -> shape and dtype of what a matrix [rows, columns] becomes; scales of affine packings may be any float."""
        scales = (rows, columns // self.group_size)
        packed = {"weight": ((rows, columns * self.bits // 32), mx.uint32)}
        if self.mode == "affine":
            return packed | {"scales": (scales, mx.float16), "biases": (scales, mx.float16)}
        return packed | {"scales": (scales, mx.uint8)}

    def nbytes(self, rows: int, columns: int, scale_size: int = 2) -> int:
        """Bytes of a packed matrix whose scales and biases take `scale_size` bytes each (fp formats: always one)."""
        sizes = self.tensors(rows, columns).values()
        return sum(prod(shape) * (scale_size if dtype == mx.float16 else dtype.size) for shape, dtype in sizes)


class Packed(nn.Module):
    """A packed matrix [rows, columns]: `weight`, `scales` and, in affine mode, `biases`."""

    def __init__(self, rows: int, columns: int, packing: Packing):
        super().__init__()
        self.group_size, self.bits, self.mode = packing
        for name, (shape, dtype) in packing.tensors(rows, columns).items():
            self[name] = mx.zeros(shape, dtype)

    def unpacked(self, rows: mx.array | None = None) -> mx.array:
        """The matrix, or some of its rows, in the dtype of its scales (bf16 for fp formats)."""
        names = [name for name in ("weight", "scales", "biases") if name in self]
        packed: dict[str, Any] = {name: self[name] if rows is None else self[name][rows] for name in names}
        weight, scales = packed["weight"], packed["scales"]
        return mx.dequantize(weight, scales, packed.get("biases"), self.group_size, self.bits, self.mode)


class QuantizedLinear(Packed):
    """x W^T + bias with a packed W; `bias` is the layer's own and of full precision."""

    def __init__(self, rows: int, columns: int, packing: Packing, bias: bool):
        super().__init__(rows, columns, packing)
        if bias:
            self.bias = mx.zeros((rows,))

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.unpacked().astype(x.dtype).T
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(Packed):
    """Rows of a packed table. They come in the dtype of the scales: the model casts them to its own."""

    def __call__(self, ids: mx.array) -> mx.array:
        return self.unpacked(ids)


def quantize_layers(model: nn.Module, layers: Mapping[str, Packing | tuple[int, int, str]]) -> None:
    """Put packed layers, still empty, in place of the linear layers and embeddings at these paths ("single_blocks.0.linear1").

    Raises CheckpointError if there is no such layer, or its rows do not divide into groups.
    """
    for path, packing in layers.items():
        *parents, last = path.split(".")
        owner: Any = model
        try:
            for key in parents:
                owner = owner[int(key) if isinstance(owner, list) else key]
            place: Any = int(last) if isinstance(owner, list) else last
            layer = owner[place]
        except (KeyError, IndexError, ValueError, TypeError):
            layer = None
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            raise CheckpointError(
                f"{path} is said to be quantized; the model has no such layer, is this the right model?"
            )
        rows, columns = layer.weight.shape
        packing = Packing(*packing)
        if columns % packing.group_size:
            raise CheckpointError(
                f"{path} is said to be in groups of {packing.group_size}; its rows have {columns} numbers"
            )
        if isinstance(layer, nn.Linear):
            owner[place] = QuantizedLinear(rows, columns, packing, bias="bias" in layer)
        else:
            owner[place] = QuantizedEmbedding(rows, columns, packing)
