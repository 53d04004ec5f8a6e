"""What must go with a model that is passed on: the card, the licence, the notice. Text only, never goes online."""

import re
from pathlib import Path
from typing import Any

from . import __version__
from .cached import json_object, missing
from .errors import CheckpointError

SOURCE = "black-forest-labs/FLUX.1-Kontext-dev"
LICENCE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "LICENSE.md",
}
_CARD = """---
library_name: mlx
pipeline_tag: image-to-image
{licence}
base_model: {source}
{relation}tags: [mlx, flux, kontext, image-editing]
extra_gated_prompt: "By downloading you agree to the FLUX.1 [dev] Non-Commercial License of Black Forest Labs."
---
# {name}

[{source}](https://huggingface.co/{source}) for MLX, {change} with mlx_kontext {version}. Not an official product of Black
Forest Labs, and not endorsed by them.

```sh
mlx-kontext models pull OWNER/{name}
mlx-kontext edit cat.jpg "give it a red scarf" -o scarf.png --model OWNER/{name}
```

## Licence

The weights are a Derivative of FLUX.1 Kontext [dev] and under its licence, the FLUX.1 [dev] Non-Commercial License
(`LICENSE.md`, notice in `NOTICE.txt`). Rights to use them are granted to you directly by Black Forest Labs Inc. under that
licence. It asks of you, among other things: non-commercial use; content filters, or a review of every output before it is
shown or passed on; and disclosure that a picture was made by AI where the law requires it. The text encoders in this
folder are CLIP ViT-L/14 (MIT) and T5 v1.1 XXL (Apache-2.0); the autoencoder's weights are Apache-2.0.
"""
_AS_IS = "converted to MLX at its stored precision"
_NOTICE = """{notice}

This model has been modified: {change} with mlx_kontext {version}. Rights to use the FLUX.1 [dev] Model and this Derivative
are granted directly by Black Forest Labs Inc. under the License (LICENSE.md).
"""


def model_card(name: str, *, change: str, quantized: bool, source: str = SOURCE) -> str:
    """README.md of a model made from FLUX.1 Kontext [dev]; change: what was done, "quantized to 4 bits (group 64)"."""
    return _CARD.format(
        name=name,
        source=source,
        change=change,
        version=__version__,
        licence="\n".join(f"{key}: {value}" for key, value in LICENCE.items()),
        relation="base_model_relation: quantized\n" if quantized else "",
    )


def notice(licence: str, *, change: str) -> str:
    """NOTICE.txt: the Attribution Notice in the words of the licence at hand (versions differ), and that we changed it.

    Raises CheckpointError for a text that holds no such notice.
    """
    words = " ".join(re.sub(r"[\\*]", "", licence).split())
    found = re.search(r"(?:The|This) FLUX.{0,40} Model is licensed by Black Forest Labs.*?USE OF THIS MODEL\.", words)
    if not found:
        raise CheckpointError(
            "LICENSE.md holds no Attribution Notice, so it is not the FLUX.1 [dev] Non-Commercial License; "
            f"take LICENSE.md of {SOURCE}"
        )
    return _NOTICE.format(notice=found[0], change=change, version=__version__)


def papers(folder: Path) -> dict[str, str]:
    """README.md and NOTICE.txt that a folder of FLUX.1 [dev] weights still needs; empty if it has them, or is of others.

    Raises CheckpointError if it is no complete model folder of ours, if its LICENSE.md is missing, or if a card that is kept
    lacks a field.
    """
    _check_folder(folder)
    card, found = folder / "README.md", card_fields(folder / "README.md")
    if not is_flux_dev(folder, found):
        if found.get("library_name") != "mlx" or not found.get("license"):
            raise CheckpointError(f"{card} needs library_name: mlx and a license between its --- lines; write them")
        return {}
    try:
        licence = (folder / "LICENSE.md").read_text("utf-8")
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} has no LICENSE.md, and these weights may not be passed on without it; "
            f"copy it there from {SOURCE} (the licence's text cannot be written for you)"
        ) from None
    scheme = json_object(folder / "transformer" / "config.json").get("quantization")
    change = (
        f"quantized to {scheme.get('bits')} bits (group {scheme.get('group_size')})"
        if isinstance(scheme, dict)
        else _AS_IS
    )
    needed = {"NOTICE.txt": notice(licence, change=change)}
    lines = [line for line in needed["NOTICE.txt"].split("\n\n")[0].splitlines() if line]
    try:
        kept = (folder / "NOTICE.txt").read_text("utf-8")
    except (OSError, ValueError):
        kept = ""
    if all(line in kept for line in lines) and "modified" in kept:
        del needed["NOTICE.txt"]
    wanted = LICENCE | {"library_name": "mlx"}
    if any(found.get(key) != value for key, value in wanted.items()) or not found.get("base_model"):
        needed["README.md"] = model_card(folder.resolve().name, change=change, quantized=bool(scheme))
    return needed


def is_flux_dev(folder: Path, fields: dict[str, Any]) -> bool:
    """Whether the weights are under BFL's licence: unless the card names another one and they are not of that size."""
    config = json_object(folder / "transformer" / "config.json")
    full_size = config.get("num_layers") == 19 and config.get("num_attention_heads") == 24
    return full_size or fields.get("license") in (None, LICENCE["license"]) or "FLUX.1" in str(fields.get("base_model"))


def leaks(folder: Path, files: list[str]) -> list[str]:
    """Which files hold an access token or a path of somebody's home; of weights only the header is read."""
    private = re.compile(rb"\bhf_[A-Za-z0-9]{20,}|/(?:Users|home)/[A-Za-z0-9._-]+/")
    return [name for name in files if private.search(_text(folder / name))]


def _text(path: Path) -> bytes:
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return file.read()
        return file.read(min(int.from_bytes(file.read(8), "little"), 8 * 2**20))


def _check_folder(folder: Path) -> None:
    index = json_object(folder / "model_index.json")
    if index.get("library") != "mlx_kontext":
        raise CheckpointError(
            f"{folder} is no model folder of ours (model_index.json with library mlx_kontext); make one with save_pretrained"
        )
    if lacks := missing(folder):
        raise CheckpointError(f"{folder}: {len(lacks)} files missing ({', '.join(lacks[:3])}); make the folder again")


def card_fields(card: Path) -> dict[str, Any]:
    """The card's fields between its --- lines, empty if there are none."""
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(card) or {}) if card.is_file() else {}
    except Exception as error:  # whatever YAML makes of a stranger's file
        raise CheckpointError(f"{card}: its --- lines are not readable ({str(error).splitlines()[0]})") from None
