"""Build the wheel, compare its files with the tree, install it into a bare environment and edit a picture with it."""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def expected_files() -> set[str]:
    """Every tracked file that users need, under the name it has once installed."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    names = {name for name in tracked if name.startswith("mlx_kontext/")}
    for folder, package in {"assets/demo/model/": "mlx_kontext_demo/", "tui/": "mlx_kontext_tui/"}.items():
        names |= {name.replace(folder, package, 1) for name in tracked if name.startswith(folder)}
    return names


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL
        )
        (wheel,) = folder.glob("*.whl")
        packed = {file for file in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in file}
        if packed != expected_files():
            sys.exit(f"the wheel and the tree differ: {sorted(packed ^ expected_files())}")

        venv.create(folder / "env", with_pip=True)
        binaries = folder / "env" / "bin"
        subprocess.run([binaries / "pip", "install", "--quiet", wheel], check=True)
        edit = [
            "edit",
            ROOT / "assets" / "sample.png",
            "make the circle green",
            "--model",
            "demo",
            "-o",
            folder / "out.png",
        ]
        subprocess.run([binaries / "mlx-kontext", *edit], check=True, cwd=folder)
        print(f"{wheel.name}: {len(packed)} files, installs and edits")


if __name__ == "__main__":
    main()
