"""Convert a model of FLUX.1 Kontext's true shapes and random numbers: memory, time against its parts, kill -9 and going on.

    python tests/full_size_convert.py FOLDER                    # 34 GB are written there once, 53 GB in all; an hour on two cores
    python tests/full_size_convert.py FOLDER --depth 0.1 --schemes q8

For each scheme one line of JSON: seconds of reading, of the same mx.quantize calls and of synced writing, each alone, and
of the conversion; of which the range search; its peak memory; whether a conversion that was killed at random moments ends in
the same bytes. Outputs are removed, the source stays for the next run.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")

# In a process of its own, so that its peak is its own. The search is timed from outside of it.
CONVERT = """
import sys, time
from mlx_kontext import convert_checkpoint
from mlx_kontext.backend import mx
from mlx_kontext.weights import pack

plain, spent = pack.search, [0.0]
def timed(*args):
    begun = time.perf_counter()
    found = plain(*args)
    mx.eval(found)
    spent[0] += time.perf_counter() - begun
    return found
pack.search = timed
convert_checkpoint(sys.argv[1], sys.argv[2], quantize=sys.argv[3])
print(spent[0])
"""

# Reading, quantizing and writing of the same tensors, one after another and each by its own clock.
ALONE = """
import json, os, sys, time
from mlx_kontext.backend import mx
from mlx_kontext.convert import plan_conversion
from mlx_kontext.weights.save import Stream

source, folder, scheme = sys.argv[1:]
plan = plan_conversion(source, folder, quantize=scheme)
clocks = {"read": 0.0, "quantize": 0.0, "write": 0.0}
def timed(name, do):
    begun = time.perf_counter()
    found = do()
    clocks[name] += time.perf_counter() - begun
    return found
os.mkdir(folder)
for output in plan.planned:
    stream = Stream(plan.checkpoint.pieces(output.part, mx.float32))
    for shard in output.shards:
        with open(f"{folder}/{shard.file}", "wb") as file:
            for name in shard.tensors:
                path, _, suffix = name.rpartition(".")
                packing = output.layers.get(path) if suffix != "bias" else None
                if packing and suffix != "weight":
                    continue
                value = stream.pop(name)
                timed("read", lambda: mx.eval(value))
                made = [value]
                if packing:
                    def quantize():
                        found = mx.quantize(value.astype(mx.float16), packing.group_size, packing.bits, packing.mode)
                        mx.eval(found)
                        return found
                    made = timed("quantize", quantize)
                for array in made:
                    raw = mx.contiguous(array).reshape(-1).view(mx.uint8)
                    mx.eval(raw)
                    timed("write", lambda: file.write(memoryview(raw)))
                del value, made, raw
                mx.clear_cache()
            timed("write", lambda: (file.flush(), os.fsync(file.fileno())))
        os.unlink(f"{folder}/{shard.file}")
os.rmdir(folder)
print(json.dumps(clocks))
"""


def write_source(folder: Path, depth: float) -> None:
    """A folder in diffusers' layout, bf16: names and shapes of diffusers and transformers, numbers of a seed."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from mlx_kontext.backend import mx
    from mlx_kontext.hub import demo_folder
    from mlx_kontext.weights.save import write_json
    from mlx_kontext.weights.shards import into_shards, write_shard

    some = lambda count: max(1, round(depth * count))  # noqa: E731
    flux = {"num_layers": some(19), "num_single_layers": some(38), "guidance_embeds": True}
    levels = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
    }
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
    downs = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": some(24), "num_heads": 64, "vocab_size": 32128}
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        models: dict[str, Any] = {
            "transformer": FluxTransformer2DModel(**flux),
            "vae": AutoencoderKL(**levels, **plain, **downs),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip, vocab_size=49408, max_position_embeddings=77)),
            "text_encoder_2": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
        }
    numbers = (0.02 * mx.random.normal((2**27 + 2**20,), key=mx.random.key(1))).astype(mx.bfloat16)
    offset = 0

    def made(shape: tuple[int, ...]) -> mx.array:
        """Random numbers, from another place of the same row for each tensor: 17 billion would take minutes to draw."""
        nonlocal offset
        offset = (offset + 9973) % 2**20
        return numbers[offset : offset + math.prod(shape)].reshape(shape)

    folder.mkdir(parents=True)
    for part, model in models.items():
        (folder / part).mkdir()
        config = model.config if isinstance(model.config, dict) else model.config.to_dict()
        write_json(folder / part / "config.json", json.loads(json.dumps(dict(config), default=str)))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)
        planned = into_shards(
            {name: (mx.bfloat16, shape) for name, shape in shapes.items() if "position_ids" not in name}
        )
        for shard in planned:
            write_shard(folder / part, shard, lambda name, shapes=shapes: made(shapes[name]))
        if len(planned) > 1:
            where = {name: shard.file for shard in planned for name in shard.tensors}
            write_json(folder / part / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(demo_folder() / name, folder / name)
    write_json(folder / "model_index.json", {"_class_name": "FluxKontextPipeline"})


def child(code: str, *args: Any) -> tuple[str, float, float]:
    """Run Python code; its output, seconds, and peak memory in GB."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the conversion ended with {process.returncode}")
    return output, time.perf_counter() - begun, used.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def digest(folder: Path) -> str:
    """One hash of all files and their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def killed(source: Path, folder: Path, scheme: str, seconds: float, moments: list[float]) -> list[int]:
    """Convert, killed at these shares of the time it takes, then to the end; files that were whole at each kill."""
    whole = []
    for i, moment in enumerate(moments):
        wait = seconds * (moment - (moments[i - 1] if i else 0))
        process = subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(source), str(folder), scheme], stdout=subprocess.DEVNULL
        )
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        whole.append(len(list(folder.glob("*/model*.safetensors"))))
    child(CONVERT, source, folder, scheme)
    return whole


def measure(source: Path, out: Path, scheme: str, kills: int, seed: int) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    alone = json.loads(child(ALONE, source, out, scheme)[0])
    search, seconds, peak = child(CONVERT, source, out, scheme)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    result = {
        "scheme": scheme,
        "GB": size / 1e9,
        "alone": alone,
        "seconds": seconds,
        "search": float(search),
        "ratio": (seconds - float(search)) / sum(alone.values()),
        "peak GB": peak,
    }
    if kills:
        first = digest(out)
        shutil.rmtree(out)
        moments = sorted(random.Random(seed).uniform(0.1, 0.95) for _ in range(kills))
        result["killed after files"] = killed(source, out, scheme, seconds, moments)
        result["same bytes"] = digest(out) == first
    shutil.rmtree(out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=float, default=1.0, help="share of the blocks")
    parser.add_argument("--schemes", nargs="*", default=["q8", "q4m"])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = args.folder / f"kontext-{args.depth:g}"
    if not (source / "model_index.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        # in a process of its own: Linux counts what its parent holds as a child's peak
        writer = multiprocessing.get_context("spawn").Process(target=write_source, args=(source, args.depth))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit(f"the source could not be written ({writer.exitcode})")
    for scheme in args.schemes:
        print(json.dumps(measure(source, args.folder / "out", scheme, args.kills, args.seed)), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
