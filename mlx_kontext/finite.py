"""Why an edit ended in what is no number. Looked for only then: to look at every weight before would be to read them all twice."""

from collections.abc import Mapping

from .backend import mx, nn, tree_flatten
from .errors import AdapterError, CheckpointError, KontextError
from .lora import Adapters
from .weights.load import Checkpoint

_BEYOND = 1e20  # no weight of a model is that large


def not_finite(
    what: str, checkpoint: Checkpoint, parts: Mapping[str, nn.Module], adapters: Adapters, dtype: mx.Dtype
) -> KontextError:
    """The error for `what` ("the latents are"), which is not finite: it names the file whose numbers are to blame, if one is."""
    for part, model in parts.items():
        names = [name for name, value in dict(tree_flatten(model.parameters())).items() if _is_broken(value)]
        if names:
            return CheckpointError(
                f"{checkpoint.where(part)}: {len(names)} tensors hold numbers that are not finite, or far too large "
                f"({', '.join(names[:3])}): {what} not finite; download it again"
            )
    if adapters:
        used = ", ".join(f"{adapter.name} at {scale:g}" for adapter, scale in adapters)
        return AdapterError(f"{what} not finite with the LoRA {used}; leave it out or lower its scale")
    if dtype != mx.float32:
        return KontextError(f"{what} not finite in {str(dtype).removeprefix('mlx.core.')}; try dtype='float32'")
    return CheckpointError(
        f"{checkpoint.folder}: {what} not finite, though each weight is; is this the right, whole model?"
    )


def _is_broken(value: mx.array) -> bool:
    if not mx.issubdtype(value.dtype, mx.floating) or value.size == 0:
        return False
    return not bool((mx.abs(value).max() < _BEYOND).item())  # no comparison holds for NaN
