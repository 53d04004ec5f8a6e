"""What differs between machines is decided in one file; each decision is tested by pretending to be the machine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlx_kontext import RequestError, backend
from mlx_kontext.backend import mx


@pytest.mark.parametrize(
    ("system", "machine", "version", "told"),
    [
        ("darwin", "x86_64", "14.5", "needs a Mac with Apple silicon"),
        ("darwin", "arm64", "13.6.1", "needs macOS 14 or newer; this is 13.6.1"),
        ("darwin", "arm64", "15.0", "pip install --force-reinstall mlx"),
        ("linux", "x86_64", "", 'pip install "mlx[cpu]"'),
        ("win32", "AMD64", "", "on Windows use WSL"),
    ],
)
def test_a_machine_without_mlx_is_told_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, version: str, told: str
) -> None:
    monkeypatch.setattr(backend.sys, "platform", system)
    monkeypatch.setattr(backend.platform, "machine", lambda: machine)
    monkeypatch.setattr(backend.platform, "mac_ver", lambda: (version, ("", "", ""), machine))
    line = backend.why_no_mlx(ImportError("no module named mlx"))
    assert told in line and "\n" not in line


def test_the_command_line_says_it_in_one_line_too() -> None:
    code = (
        "import sys; sys.modules['mlx.core'] = None; from mlx_kontext.cli import main\n"
        "main(['edit', 'assets/sample.png', 'x', '--model', 'demo', '-o', '-'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: MLX cannot be loaded")


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", mx.float32), ("metal", mx.bfloat16), ("cuda", mx.bfloat16)])
def test_number_format_follows_the_machine(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: mx.Dtype) -> None:
    monkeypatch.setattr(backend, "accelerator", lambda: kind)
    assert backend.compute_dtype() == dtype
    assert backend.compute_dtype("float16") == mx.float16
    with pytest.raises(RequestError, match="float32, float16, bfloat16"):
        backend.compute_dtype("int8")


def test_some_parts_never_compute_in_fp16() -> None:
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    formats = {p: [backend.part_dtype(p, d) for d in (mx.float16, mx.bfloat16, mx.float32)] for p in parts}
    assert formats["transformer"] == formats["text_encoder"] == [mx.float16, mx.bfloat16, mx.float32]
    assert formats["text_encoder_2"] == [mx.bfloat16, mx.bfloat16, mx.float32]
    assert formats["vae"] == [mx.float32] * 3


def test_memory_budget_is_the_gpus_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.memory_budget() <= backend.physical_memory()
    monkeypatch.setattr(backend, "accelerator", lambda: "metal")
    monkeypatch.setattr(backend.mx, "device_info", lambda: {"max_recommended_working_set_size": 22_906_503_168})
    assert backend.memory_budget() == 22_906_503_168
    monkeypatch.setattr(backend, "accelerator", lambda: "cuda")
    monkeypatch.setattr(backend.mx, "device_info", lambda: {"total_memory": 150_000_000_000})
    assert backend.memory_budget() == 150_000_000_000


def test_accelerators_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    for metal, name in ((True, "metal"), (False, "cuda")):
        monkeypatch.setattr(backend.mx, "metal", SimpleNamespace(is_available=lambda metal=metal: metal))
        assert backend.accelerator() == name


def test_openblas_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    assert backend.preload_openblas() is False
    monkeypatch.setattr(backend.sys, "platform", "darwin")
    assert backend.preload_openblas() is False
