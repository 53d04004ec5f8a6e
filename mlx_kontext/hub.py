"""From a model's name to a folder on this machine. The only module that may touch the network, and only when asked."""

import importlib.util
import os
import re
from pathlib import Path

from .errors import CheckpointError, ModelNotFound

KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# never the single-file copies beside them: they double a 34 GB download
_PATTERNS = [
    "model_index.json",
    "*.md",
    *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "safetensors", "txt", "model")),
]


def find_model(
    model: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of "demo", of a path, or of a hub id (downloaded unless `local_files_only`).

    Raises ModelNotFound, which says what to type, or CheckpointError for a path that is no folder.
    """
    name = os.fspath(model)
    if name == "demo":
        return demo_folder()
    path = local_path(name)
    if path is not None and path.is_dir():
        return path
    if path is not None:
        raise CheckpointError(f"{name} is a file; this version reads model folders (diffusers' layout or our own)")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        raise ModelNotFound(
            f"no model {name[:200]!r}: expected demo, a folder that exists, or a hub id such as {KONTEXT}"
        )
    return _from_hub(name, local_files_only, revision, token)


def local_path(name: str) -> Path | None:
    """The file or folder of that name, `~` expanded; None if there is none or no such name can be."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
        return None


def demo_folder() -> Path:
    """The small trained model that ships with the package."""
    spec = importlib.util.find_spec("mlx_kontext_demo")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    places.append(Path(__file__).parent.parent / "assets" / "demo" / "model")  # a clone that is not installed
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    raise ModelNotFound(
        "the demo model is missing from this installation; type: pip install --force-reinstall mlx-kontext"
    )


def _from_hub(name: str, local_files_only: bool, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    pull = (
        f"hf download {name} "
        + " ".join(f'--include "{part}/*"' for part in PARTS)
        + ' --include "*.json" --include "*.md"'
    )
    try:
        return Path(
            snapshot_download(
                name, revision=revision, token=token, allow_patterns=_PATTERNS, local_files_only=local_files_only
            )
        )
    except GatedRepoError:
        raise ModelNotFound(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then type: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(
            f"{name} has no revision {revision!r}; look at https://huggingface.co/{name}/commits/main"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"the hub knows no {name}, or it is private; check the name, or log in with: hf auth login"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        licence = (
            f"accept its licence at https://huggingface.co/{name}, type hf auth login, then: "
            if name == KONTEXT
            else ""
        )
        size = " (34 GB)" if name == KONTEXT else ""
        raise ModelNotFound(f"{name} is not on this machine{size}; {licence}{pull}") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelNotFound(
            f"{name} could not be downloaded: {str(error).strip().splitlines()[0]}; try again later"
        ) from None
