"""The self-test passes here, fails when something is broken, and its GPU half runs where a GPU is only pretended."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_kontext import backend, doctor
from mlx_kontext.backend import mx
from mlx_kontext.hub import demo_folder


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.diagnose(selftest=True)


def test_this_machine_is_sound(report: doctor.Report) -> None:
    assert report.ok, report.page()
    assert sum(row.seconds for row in report.rows) < 60
    assert {row.device for row in report.rows if row.device} == set(backend.devices())


def test_one_page(report: doctor.Report) -> None:
    lines = report.page().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    assert str(Path.home()) not in report.page() and lines[-1].endswith("all ok")
    assert json.loads(json.dumps(report.to_json()))["checks"][0]["name"] == "noise equals torch's"


def test_without_selftest_it_only_describes() -> None:
    short = doctor.diagnose(selftest=False)
    assert short.ok and short.rows == () and short.about["demo model"] == "present"


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Run the named checks alone; the whole self-test takes seconds, and a minute without OpenBLAS."""
    every = doctor.checks
    monkeypatch.setattr(doctor, "checks", lambda device: (row for row in every(device) if row[0] in names))


def failed(report: doctor.Report) -> set[str]:
    return {row.name for row in report.rows if not row.ok}


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mx.fast.layer_norm
    monkeypatch.setattr(doctor.mx.fast, "layer_norm", lambda x, *rest: right(x, *rest) * 1.001)
    only(monkeypatch, "products and norms, float32", "attention, float32", "demo velocity, float32, as stored")
    report = doctor.diagnose(selftest=True)
    assert not report.ok and "FAIL" in report.page() and report.page().splitlines()[-1].endswith("FAILED")
    assert failed(report) == {"products and norms, float32", "demo velocity, float32, as stored"}


def test_a_kernel_that_raises_or_returns_nan_fails_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[metal::malloc] out of memory\nmore")

    monkeypatch.setattr(doctor.mx, "quantized_matmul", broken)
    right = doctor.noise
    monkeypatch.setattr(doctor, "noise", lambda seed, *size: right(seed, *size) * (np.nan if seed == 0 else 1))
    only(monkeypatch, "noise equals torch's", "quantized products, mxfp4 (1 kinds)", "products and norms, float32")
    rows = {row.name: row for row in doctor.diagnose(selftest=True).rows}
    assert not rows["noise equals torch's"].ok
    assert rows["quantized products, mxfp4 (1 kinds)"].note == "RuntimeError: [metal::malloc] out of memory more"
    assert rows["products and norms, float32"].ok


def test_stored_results_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_folder(), tmp_path / "demo"))
    stored = json.loads((copy / "selftest.json").read_text())
    stored["clip"][5] += 0.01
    (copy / "selftest.json").write_text(json.dumps(stored))
    monkeypatch.setattr(doctor, "demo_folder", lambda: copy)
    only(monkeypatch, "demo t5, float32, as stored", "demo clip, float32, as stored")
    assert failed(doctor.diagnose(selftest=True)) == {"demo clip, float32, as stored"}


def test_stored_results_are_this_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--store` writes what is stored, up to rounding: whoever replaces the demo model runs it."""
    copy = Path(shutil.copytree(demo_folder(), tmp_path / "demo"))
    monkeypatch.setattr(doctor, "demo_folder", lambda: copy)
    doctor.store()
    ours, kept = (json.loads((folder / "selftest.json").read_text()) for folder in (copy, demo_folder()))
    for name, values in kept.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-4 * max(map(abs, values)))


def test_every_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device that is the CPU in disguise: the same rows again, under its name and with a GPU's limits."""
    cpu = backend.devices()["cpu"]
    monkeypatch.setattr(doctor, "devices", lambda: {"cpu": cpu, "metal": cpu})
    monkeypatch.setattr(doctor, "time_product", lambda *_: 1.0)  # sized for a GPU: minutes here
    report = doctor.diagnose(selftest=True)
    rows = {device: [row for row in report.rows if row.device == device] for device in ("cpu", "metal")}
    assert report.ok and [row.name for row in rows["cpu"]] == [row.name for row in rows["metal"]]
    assert all(a.limit is None or a.limit <= b.limit for a, b in zip(*rows.values(), strict=True))
    assert len(report.page().splitlines()) <= 70
