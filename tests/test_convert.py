"""Conversion: what comes out, going on after a kill, what is refused; every format is converted in test_sources."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_kontext import CheckpointError, KontextPipeline, RequestError, ResourceError, convert_checkpoint
from mlx_kontext import convert as converting
from mlx_kontext.cli import main
from mlx_kontext.convert import plan_conversion
from mlx_kontext.hub import demo_folder
from mlx_kontext.quantize import Scheme
from mlx_kontext.weights import shards
from mlx_kontext.weights.load import Checkpoint
from tests.full_size_convert import digest

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)


def edited(pipe: KontextPipeline, **options: object) -> np.ndarray:
    return np.array(pipe(image=SAMPLE, prompt="make the circle green", seed=1, num_inference_steps=2, **options).image)


@pytest.mark.parametrize("scheme", ["none", "q8", "q6", "q4", "q4m", Scheme(4, 32, "mxfp4")])
def test_converted_is_what_quantizing_while_loading_gives(tmp_path: Path, scheme: str | Scheme) -> None:
    conversion = plan_conversion("demo", tmp_path / "model", quantize=scheme)
    done: list[int] = []
    folder = conversion.run(done.append)
    assert sum(done) == conversion.source_bytes
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) == pytest.approx(
        conversion.nbytes, rel=0.05
    )
    pipe, direct = KontextPipeline.from_pretrained(folder), KontextPipeline.from_pretrained("demo", quantize=scheme)
    assert np.array_equal(edited(pipe), edited(direct))
    assert pipe.quantization == direct.quantization and pipe.sizes == direct.sizes and pipe.defaults == direct.defaults
    errors = conversion.verify()
    assert errors.keys() == (set() if scheme == "none" else {"transformer", "text_encoder_2"})


def test_modulation_lies_apart(tmp_path: Path) -> None:
    files = Checkpoint.open(convert_checkpoint("demo", tmp_path / "model", quantize="q8")).files("transformer")
    kinds = [{shards.is_modulation(name) for name in mx.load(str(file))} for file in files]
    assert len(files) > 5 and all(len(kind) == 1 for kind in kinds) and {True} in kinds


def test_dtype_is_of_what_is_not_packed(tmp_path: Path) -> None:
    for scheme, dtype in (("none", "float16"), ("q4", "float32")):
        tensors = Checkpoint.open(convert_checkpoint("demo", tmp_path / dtype, quantize=scheme, dtype=dtype)).tensors(
            "transformer"
        )
        kinds = {name.rpartition(".")[2]: value.dtype for name, value in tensors.items() if "linear1" in name}
        assert kinds["bias"] == getattr(mx, dtype)
        assert kinds["weight"] == (mx.float16 if scheme == "none" else mx.uint32)
    with pytest.raises(RequestError, match="float8"):
        convert_checkpoint("demo", tmp_path / "odd", dtype="float8")


def test_lora_is_added_before_packing(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "style.safetensors")
    plain = convert_checkpoint("demo", tmp_path / "plain", loras=[(lora, 0.5)], dtype="float32", verify=True)
    attached = KontextPipeline.from_pretrained("demo")(
        SAMPLE, "make the circle green", seed=1, num_inference_steps=2, loras=[f"{lora}:0.5"]
    )
    fused = KontextPipeline.from_pretrained(plain)(SAMPLE, "make the circle green", seed=1, num_inference_steps=2)
    without = KontextPipeline.from_pretrained("demo")(SAMPLE, "make the circle green", seed=1, num_inference_steps=2)
    assert np.abs(fused.latents - attached.latents).max() < 1e-4
    assert np.abs(fused.latents - without.latents).max() > 1e-2
    packed = convert_checkpoint("demo", tmp_path / "packed", loras=[(lora, 0.5)], quantize="q4")
    direct = KontextPipeline.from_pretrained(plain, quantize="q4")
    assert np.array_equal(edited(KontextPipeline.from_pretrained(packed)), edited(direct))
    with pytest.raises(RequestError, match=r"quantized already and a LoRA.*convert the unquantized model"):
        convert_checkpoint(packed, tmp_path / "again", loras=[lora])


def write_lora(path: Path) -> Path:
    """A LoRA of the demo's size, strong enough to be seen."""
    random = np.random.default_rng(0)
    tensors = {}
    for layer, rows in (("double_blocks.0.img_attn.qkv", 384), ("single_blocks.5.linear1", 896)):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = mx.array(random.normal(size=(4, 128)).astype(np.float32))
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = mx.array(
            0.05 * random.normal(size=(rows, 4)).astype(np.float32)
        )
    mx.save_safetensors(str(path), tensors)
    return path


RUN = """
import sys, time
from mlx_kontext import convert_checkpoint
from mlx_kontext.weights import shards, save
shards.SHARD_BYTES = 300_000
plain = save.write_shard
def slow(*args):
    time.sleep(0.05)
    return plain(*args)
save.write_shard = slow
convert_checkpoint("demo", sys.argv[1], quantize="q4m")
"""


def test_killed_at_random_moments_it_goes_on(tmp_path: Path) -> None:
    """Byte for byte what an uninterrupted run writes, and whole files are not written twice."""
    first = digest(convert_checkpoint("demo", tmp_path / "whole", quantize="q4m"))
    folder, seen = tmp_path / "killed", set()
    for wait in (0.02, 0.3, 0.5):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(folder)])
        begun = len(list(folder.glob("*/model*.safetensors")))
        while len(list(folder.glob("*/model*.safetensors"))) <= begun and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "model_index.json").exists(), "it was through before it was killed"
        with pytest.raises(CheckpointError, match=r"no model_index\.json"):
            Checkpoint.open(folder)
        now = {(path, path.stat().st_mtime_ns) for path in folder.glob("*/model*.safetensors")}
        assert seen < now
        seen = now
    conversion = plan_conversion("demo", folder, quantize="q4m")
    assert conversion.begun and 0 < conversion.left < conversion.nbytes
    conversion.run()
    assert digest(folder) == first and conversion.done and not conversion.begun
    assert seen < {(path, path.stat().st_mtime_ns) for path in folder.glob("*/model*.safetensors")}


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion to q8 that was stopped after four files."""
    from mlx_kontext.weights import save

    plain, written = save.write_shard, []

    def stopping(*args: object) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(plain(*args))  # type: ignore[arg-type, func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint("demo", folder, quantize="q8")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    interrupted(folder, monkeypatch)
    before = digest(folder)
    with pytest.raises(RequestError, match=r"unfinished conversion of something else; remove it"):
        convert_checkpoint("demo", folder, quantize="q4")
    with (folder / "conversion.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match="another process is converting"):
            convert_checkpoint("demo", folder, quantize="q8")
    assert digest(folder) == before
    convert_checkpoint("demo", folder, quantize="q8")
    assert convert_checkpoint("demo", folder, quantize="q8", verify=True) == folder  # finished: left as it is
    with pytest.raises(RequestError, match="not empty"):
        convert_checkpoint("demo", folder, quantize="q4")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        convert_checkpoint("demo", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_room_is_counted_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        converting.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    )
    with pytest.raises(ResourceError, match=r"needs 6\.2 MB more and 1\.0 MB are free; make room"):
        convert_checkpoint("demo", tmp_path / "model", quantize="q8")
    assert not (tmp_path / "model").exists()


def put(model: Path, name: str, value: mx.array) -> None:
    (file,) = [file for file in (model / "transformer").glob("*.safetensors") if name in mx.load(str(file))]
    tensors = mx.load(str(file))
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors | {name: value})


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv.weight", "img_in.bias"])
def test_numbers_that_are_none_stop_it(tmp_path: Path, name: str) -> None:
    model = Path(shutil.copytree(demo_folder(), tmp_path / "model"))
    shape = KontextPipeline.from_pretrained(model).checkpoint.shapes("transformer")[name]
    put(model, name, mx.full(shape, float("nan"), mx.bfloat16))
    with pytest.raises(CheckpointError, match=rf"{name.removesuffix('.weight')}.* not finite"):
        convert_checkpoint(model, tmp_path / "ours", quantize="q8")


def test_shapes_are_checked_before_the_start(tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo_folder(), tmp_path / "model"))
    put(model, "img_in.bias", mx.zeros((7,), mx.bfloat16))
    with pytest.raises(CheckpointError, match=r"1 misshaped \(img_in\.bias"):
        convert_checkpoint(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    conversion = plan_conversion("demo", tmp_path / "model", quantize="q4")
    file = conversion.run() / "transformer" / conversion.planned[0].shards[0].file
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"is not what the source gives; remove the folder and convert again"):
        conversion.verify()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["convert", *words])
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    folder = str(tmp_path / "ours")
    code, out, err = run("demo", folder, "-q", "q4m", "--dry-run")
    assert (code, out) == (0, "") and "48 layers at 4/5/8 bits" in err and "are free; memory about" in err
    assert not os.path.exists(folder)
    assert run("demo", folder, "-q", "q4m", "--verify")[:2] == (0, f"{folder}\n")
    code, out, err = run("demo", folder, "-q", "q4m", "--verify", "--json")
    told = json.loads(out)
    assert code == 0 and "there already" in err and "every number is what the source gives" in err
    assert told["quantization"] == "q4m" and told["bytes_left"] == 0 and told["relative_errors"]["transformer"] < 0.2
    assert run("demo", str(tmp_path / "g32"), "--q-bits", "5", "--q-group-size", "32")[0] == 0
    assert KontextPipeline.from_pretrained(tmp_path / "g32").quantization == "q5-g32"
    assert run("demo", str(tmp_path / "fp"), "--q-mode", "mxfp4")[0] == 0
    for words, said in (
        ((), "Name a source and a new folder"),
        ((folder,), "Without SRC all parts are needed"),
        (("demo", "x", "-q", "q4", "--q-bits", "4"), "give one or the other"),
        (("demo", "x", "--yes"), "belong to --upload-repo"),
        (("demo", "x", "--upload-repo", "me/it"), "pass --yes"),
        (("demo", "x", "--q-bits", "7"), "affine takes bits"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and said in err
    code, _, err = run("demo", folder, "-q", "q8")
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "not empty" in err


def test_a_card_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo_folder(), tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: [open\n---\n")
    (model / "LICENSE.md").write_text("Do as you like.")
    folder = convert_checkpoint(model, tmp_path / "ours")
    assert "library_name: mlx" in (folder / "README.md").read_text()
    assert (folder / "LICENSE.md").read_text() == "Do as you like." and not (folder / "NOTICE.txt").exists()


def test_upload_comes_last_and_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `upload` itself demands and sends is tested in test_upload."""
    asked: list[tuple[object, ...]] = []

    def upload(folder: Path, repo: str, *, ask: Callable[[str], bool], private: bool) -> str | None:
        asked.append((folder, repo, private, (folder / "model_index.json").is_file()))
        return "https://hub/me/it" if ask("what is sent") else None

    monkeypatch.setattr("mlx_kontext.hub.upload", upload)
    command = ["convert", "demo", str(tmp_path / "ours"), "-q", "q8", "--upload-repo", "me/it"]
    with pytest.raises(SystemExit) as left:
        main([*command, "--public", "--yes", "--json"])
    told = capsys.readouterr()
    assert not left.value.code and json.loads(told.out)["address"] == "https://hub/me/it" and "what is sent" in told.err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: False)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 1 and "nothing was uploaded" in capsys.readouterr().err
    assert asked == [(tmp_path / "ours", "me/it", public, True) for public in (False, True)]


def test_convert_py_is_the_same_command() -> None:
    script = Path(__file__).parent.parent / "convert.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "[SRC] DST" in done.stdout


@pytest.mark.slow
def test_a_tenth_of_the_full_size(tmp_path: Path) -> None:
    """True widths, a tenth of the depth: memory, and the same bytes after three kills. Ratios are told, not judged."""
    script = Path(__file__).parent / "full_size_convert.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "--depth", "0.1", "--schemes", "q8", "q4m"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        print(line)
        found = json.loads(line)
        assert found["peak GB"] <= 2 and found["same bytes"]


def test_full_picture_of_a_converted_folder(tmp_path: Path) -> None:
    """A card that names no other licence, tokenizers and the schedule: a folder that stands by itself."""
    folder = convert_checkpoint("demo", tmp_path / "ours", quantize="q8")
    assert {path.name for path in folder.iterdir()} == {
        *PARTS,
        *("tokenizer", "tokenizer_2", "scheduler", "README.md", "model_index.json"),
    }
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert isinstance(
        KontextPipeline.from_pretrained(folder)(prompt="a red circle", seed=1, num_inference_steps=1).image, Image.Image
    )
