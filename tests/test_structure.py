"""The house rules that a machine can check: imports go down, the light modules stay light, the public names are these."""

import ast
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_kontext

PACKAGE = Path(mlx_kontext.__file__).parent
# Each layer may import from its own and from those after it.
LAYERS = [
    {"cli", "cli_models", "cli_convert", "cli_sessions", "__main__", "doctor", "inspection"},
    {"pipeline", "convert", "engine", "engine_process", "worker"},
    {"provenance", "sampling", "text", "vocabulary", "image", "photo", "plan", "weights", "config", "lora"}
    | {"quantize", "finite", "hub", "hub_errors", "cached", "card", "messages", "wire", "awake"}
    | {"sessions", "recipes", "upkeep", "log", "history", "kept", "store", "turns"},
    {"models"},
    {"edit", "errors", "disk", "terminal", "backend", "__init__"},
]
UPWARDS = {("edit", "provenance")}  # result.save(): what a user expects on the result, done where files are known
WITHOUT_MLX = ["edit", "errors", "disk", "provenance", "image", "photo", "config", "hub", "cached", "card"]
WITHOUT_MLX += ["sessions", "recipes", "upkeep", "log", "history", "kept", "store", "turns"]
WITHOUT_MLX += ["engine", "engine_process", "worker", "messages", "wire", "awake"]
WITHOUT_MLX += ["cli", "cli_convert", "cli_sessions"]


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def layer(module: str) -> int:
    (found,) = [i for i, names in enumerate(LAYERS) if module.split(".")[0] in names]
    return found


def imports(path: Path, module: str) -> set[str]:
    """Modules of our own that a file imports anywhere, also inside functions, but not for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for node in ast.walk(i)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        if node.level:
            here = module.split(".")[: -node.level]
            name = ".".join([*here, *(node.module or "").split(".")]).strip(".")
            found |= {name} if node.module else {".".join([*here, a.name]) for a in node.names}
        elif (node.module or "").startswith("mlx_kontext"):
            found.add(node.module.removeprefix("mlx_kontext").strip(".") or "__init__")
    return {name if name in modules() or f"{name}.__init__" in modules() else "__init__" for name in found}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    for name in imports(modules()[module], module):
        assert layer(module) <= layer(name) or (module, name) in UPWARDS, f"{module} imports {name}"


def test_models_never_import_each_other() -> None:
    names = [name for name in modules() if name.startswith("models.") and name != "models.__init__"]
    for name in names:
        assert not {other for other in imports(modules()[name], name) if other.startswith("models.")}


def test_mlx_comes_through_one_door() -> None:
    """So that OpenBLAS is in place before MLX is: only backend imports it."""
    for name, path in modules().items():
        if name != "backend":
            assert not re.search(r"^\s*(import|from) mlx\b", path.read_text(), re.MULTILINE), name


def test_nothing_unsafe() -> None:
    forbidden = {"pickle", "marshal", "torch", "yaml", "diffusers", "transformers", "shelve"}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not forbidden & {n.split(".")[0] for n in names}, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "tarfile.open"), f"{name} calls {called}"
                assert not any(k.arg == "shell" for k in node.keywords), name


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["", *(f".{name}" for name in WITHOUT_MLX)])
def test_light_modules_do_not_load_mlx(module: str) -> None:
    heavy = ["mlx", "mlx.core", "huggingface_hub", "torch"]
    assert run_python(f"import sys, mlx_kontext{module}; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_public_names() -> None:
    assert sorted(mlx_kontext.__all__) == sorted(
        [
            "__version__",
            "KontextPipeline",
            "convert_checkpoint",
            "EditRequest",
            "EditResult",
            "Step",
            "EditSession",
            "KontextError",
            "RequestError",
            "ImageError",
            "CheckpointError",
            "AdapterError",
            "ModelNotFound",
            "ResourceError",
            "SessionError",
            "SafetyRefusal",
        ]
    )
    for name in mlx_kontext.__all__:
        assert getattr(mlx_kontext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'KontextPipelin'"):
        _ = mlx_kontext.KontextPipelin


def median_ms(*command: str) -> float:
    """Whole process, median of ten."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=PACKAGE.parent, env=os.environ)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def test_starts_quickly() -> None:
    bare = median_ms(sys.executable, "-c", "pass")
    assert median_ms(sys.executable, "-c", "import mlx_kontext") - bare <= 60
    assert median_ms(sys.executable, "-m", "mlx_kontext", "--help") <= 150
    code = "import sys; from mlx_kontext.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('mlx' in sys.modules)"
    assert run_python(code).endswith("False")
