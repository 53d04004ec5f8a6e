"""How much memory a run takes on this machine, counted from headers before anything is loaded."""

from dataclasses import dataclass
from math import prod

from .backend import accelerator, memory_budget, mx, part_dtype, physical_memory
from .disk import gigabytes as gigabytes
from .errors import ResourceError
from .models.flux import FluxConfig
from .models.vae import VAEConfig
from .weights.formats import PARTS
from .weights.load import Checkpoint

# Peak of a single-stream block in units of one [tokens, hidden] array: measured 2.69 GiB fp32 at 8,704 tokens, D = 3072.
_BLOCK_ARRAYS = 27
# Live full-resolution arrays while the VAE decodes, each as wide as its second level.
_DECODER_ARRAYS = 3
# Matrices of quantized layers that are unpacked at once: MLX prepares a few layers ahead. Measured 28 MB where one has 7.3 MB.
_UNPACKED_LAYERS = 4


@dataclass(frozen=True)
class Plan:
    """Bytes. weights: of each part as computed; text, denoise, decode: peaks of the three phases."""

    weights: dict[str, int]
    text: int
    denoise: int
    decode: int
    keep_all: bool
    """Whether all parts can stay loaded between edits; otherwise text encoders and transformer take turns."""
    budget: int
    physical: int

    @property
    def peak(self) -> int:
        return max(self.text, self.denoise, self.decode)

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget

    def check(self) -> None:
        """Raises ResourceError if the run needs more memory than the machine has, budget or not."""
        if self.peak > self.physical:
            raise ResourceError(
                f"this edit needs about {gigabytes(self.peak)} and the machine has {gigabytes(self.physical)}; "
                "choose a smaller size or dtype='bfloat16'"
            )


def weight_bytes(checkpoint: Checkpoint, dtype: mx.Dtype) -> dict[str, int]:
    """Bytes of each part once loaded, and quantized if the checkpoint has a scheme, for computing in `dtype`."""
    return {part: checkpoint.loaded_bytes(part, part_dtype(part, dtype).size) for part in PARTS}


def unpacked_bytes(checkpoint: Checkpoint, dtype: mx.Dtype) -> int:
    """Bytes that the transformer's quantized layers take while they are unpacked for use; 0 if there are none."""
    layers = checkpoint.quantization["transformer"].layers
    shapes = checkpoint.plain_shapes("transformer") if layers else {}
    return _UNPACKED_LAYERS * dtype.size * max((prod(shapes[f"{path}.weight"]) for path in layers), default=0)


def plan(
    weights: dict[str, int],
    flux: FluxConfig,
    vae: VAEConfig,
    dtype: mx.Dtype,
    *,
    tokens: int,
    pixels: int,
    unpacked: int = 0,
) -> Plan:
    """tokens: text, noise and reference together; pixels: of the larger picture that passes the VAE; unpacked: bytes."""
    block = unpacked + _BLOCK_ARRAYS * tokens * flux.hidden * dtype.size
    if accelerator() == "cpu":  # no fused attention there: the scores are held whole
        block += flux.num_attention_heads * tokens**2 * dtype.size
    pictures = _DECODER_ARRAYS * pixels * max(vae.block_out_channels[:2]) * mx.float32.size
    always = weights["vae"]
    text = always + weights["text_encoder"] + weights["text_encoder_2"]
    budget = memory_budget()
    keep_all = sum(weights.values()) + max(block, pictures) <= budget
    flux_bytes = weights["transformer"]
    kept = text - always if keep_all else 0
    return Plan(
        weights=weights,
        text=text + (flux_bytes if keep_all else 0),
        denoise=always + kept + flux_bytes + block,
        decode=always + kept + flux_bytes + pictures,
        keep_all=keep_all,
        budget=budget,
        physical=max(physical_memory(), budget),
    )
