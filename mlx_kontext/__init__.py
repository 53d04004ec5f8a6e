"""Edit pictures by written instruction with FLUX.1 Kontext [dev] in MLX.

    from mlx_kontext import KontextPipeline

    pipe = KontextPipeline.from_pretrained("demo")
    pipe(image="cat.jpg", prompt="give it a red scarf").save("scarf.png")

Names load on first use (PEP 562), so that `import mlx_kontext` costs milliseconds and does not load MLX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "KontextPipeline": "pipeline",
    "convert_checkpoint": "convert",
    "EditRequest": "edit",
    "EditResult": "edit",
    "Step": "edit",
    "EditSession": "sessions",
    "KontextError": "errors",
    "RequestError": "errors",
    "ImageError": "errors",
    "CheckpointError": "errors",
    "AdapterError": "errors",
    "ModelNotFound": "errors",
    "ResourceError": "errors",
    "SessionError": "errors",
    "SafetyRefusal": "errors",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .edit import EditRequest, EditResult, Step
    from .errors import (
        AdapterError,
        CheckpointError,
        ImageError,
        KontextError,
        ModelNotFound,
        RequestError,
        ResourceError,
        SafetyRefusal,
        SessionError,
    )
    from .pipeline import KontextPipeline
    from .sessions import EditSession


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_kontext' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
