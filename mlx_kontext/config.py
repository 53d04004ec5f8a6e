"""Settings: defaults < user TOML < project TOML < MLX_KONTEXT_* < what is typed."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .errors import RequestError
from .hub import KONTEXT

DEFAULTS = {"model": KONTEXT, "dtype": ""}
ABOUT = {"model": "demo, a folder, or a hub id", "dtype": "float32, float16, bfloat16; empty: what suits this machine"}


@dataclass(frozen=True)
class Setting:
    """A value and the place it comes from."""

    value: str
    origin: str


def user_file() -> Path:
    from platformdirs import user_config_dir  # not needed to print --help

    return Path(user_config_dir("mlx-kontext")) / "config.toml"


def settings() -> dict[str, Setting]:
    """Every setting with its origin. Raises RequestError for a file that is not TOML or names an unknown setting."""
    found = {name: Setting(value, "default") for name, value in DEFAULTS.items()}
    for path in (user_file(), Path("mlx-kontext.toml")):
        for name, value in _read(path).items():
            if name not in DEFAULTS or not isinstance(value, str):
                raise RequestError(
                    f"{path}: {name} = {value!r} is no setting; known are {', '.join(DEFAULTS)}, each a string"
                )
            found[name] = Setting(value, str(path))
    for name in DEFAULTS:
        variable = f"MLX_KONTEXT_{name.upper()}"
        if os.environ.get(variable):
            found[name] = Setting(os.environ[variable], variable)
    return found


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is not readable TOML ({error}); mend or remove it") from None
