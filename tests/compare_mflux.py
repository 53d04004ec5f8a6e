"""Quantize FLUX.1 Kontext with mflux's own save and with ours, on the same weights: peak memory and time, side by side.

    python tests/compare_mflux.py --mflux-python MFLUX/bin/python

The weights are random, of full width and reduced depth, so that any machine can do it. Each conversion is a process of its
own and they take turns; what is compared are medians. This is a measurement, not a test: it prints and judges nothing.

mflux wants other versions than our tests do, hence an environment of its own. On a Mac `pip install mflux==0.24.0` makes it.
On Linux mflux asks for MLX with CUDA; for the CPU install it with `--no-deps`, then `mlx[cpu]` of the version that we use,
`torch==2.13.0`, `huggingface-hub<2` and the rest of what `pip show mflux` lists. Ours runs in the Python that runs this, which
needs the `test` extra. Where other programs run beside it, trust processor time more than wall time.

What is alike: the files read, bits, group size (64), all four parts and both tokenizers written, the device (MLX's default).
What is not: mflux packs every linear layer and embedding, we leave CLIP, the VAE and the transformer's ends as they are stored.
The packed layers are counted at the end; we have q, k and v of the transformer in one, so ours are fewer and larger. We look
for numbers that are not finite and wait until the disk has the files (fsync), mflux does neither.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("transformer", "text_encoder_2", "text_encoder", "vae")

# What `mflux-save` does. mflux takes the transformer's depth from the files, but its T5 always has 24 blocks: the surplus
# ones, for which there are no weights, are cut off as soon as they are made. MLX is lazy, so they have cost nothing by then.
MFLUX = """
import sys
from mflux.models.common.cli.save import main
from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder

source, target, bits, depth = sys.argv[1:]
build = T5Encoder.__init__

def build_shallow(self, *args, **kwargs):
    build(self, *args, **kwargs)
    del self.t5_blocks[int(depth):]

T5Encoder.__init__ = build_shallow
sys.argv = ["mflux-save", "--model", source, "--base-model", "dev-kontext", "--path", target, "--quantize", bits]
main()
"""
MFLUX_IMPORTS = "import mflux.models.common.cli.save"
OUR_IMPORTS = "import mlx_kontext.cli, mlx_kontext.convert"


@dataclass(frozen=True)
class Cost:
    """What one process took: wall time and processor time in seconds, peak memory (resident) in bytes."""

    seconds: float
    processor: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--mflux-python", metavar="PATH", help="the interpreter that has mflux")
    parser.add_argument("--rounds", type=int, default=3, help="each round is one conversion by mflux and one by us")
    parser.add_argument("--bits", type=int, default=8, choices=(4, 6, 8))
    parser.add_argument("--double", type=int, default=2, help="double blocks of the transformer; the real one has 19")
    parser.add_argument("--single", type=int, default=4, help="single blocks of the transformer; the real one has 38")
    parser.add_argument("--t5", type=int, default=2, help="blocks of T5; the real one has 24")
    parser.add_argument(
        "--folder", type=Path, help="where model and results go for a while; by default a temporary one"
    )
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only write the model there")
    options = parser.parse_args()
    if options.make:
        make_model(options.make, options.double, options.single, options.t5)
        return
    if not options.mflux_python:
        parser.error("--mflux-python is needed; how to make its environment is said at the top of this file")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        compare(options, Path(place))


def compare(options: argparse.Namespace, place: Path) -> None:
    source, log = place / "model", place / "log.txt"
    sizes = [f"--{name}={getattr(options, name)}" for name in ("double", "single", "t5")]
    measure([sys.executable, __file__, "--make", str(source), *sizes], log)
    print(
        f"FLUX.1 Kontext of full width with {options.double} of 19 double blocks, {options.single} of 38 single blocks and "
        f"{options.t5} of T5's 24: {weights(source) / 1e9:.2f} GB in bf16, to {options.bits} bits; {os.cpu_count()} cores"
    )

    theirs, ours = [options.mflux_python, "-c"], [sys.executable, "-m", "mlx_kontext"]
    results = {"mflux": place / "mflux", "ours": place / "ours"}
    commands = {
        "mflux": [*theirs, MFLUX, str(source), str(results["mflux"]), str(options.bits), str(options.t5)],
        "ours": [*ours, "convert", str(source), str(results["ours"]), "-q", f"q{options.bits}"],
    }
    imports = {"mflux": [*theirs, MFLUX_IMPORTS], "ours": [sys.executable, "-c", OUR_IMPORTS]}
    taken, start = defaultdict[str, list[Cost]](list), defaultdict[str, list[Cost]](list)
    row = "{:24} {:>9} {:>9} {:>9}".format
    print(row("", "peak GB", "wall s", "CPU s"), flush=True)
    for i in range(options.rounds):
        for who, command in commands.items():
            shutil.rmtree(results[who], ignore_errors=True)
            start[who].append(measure(imports[who], log))
            taken[who].append(measure(command, log))
            print(row(f"round {i + 1}, {who}", *figures(taken[who][-1])), flush=True)
    for who in commands:
        print(row(f"median, {who}", *figures(middle(taken[who]))))
        print(row("  of it imports", *figures(middle(start[who]))))
    us, them = middle(taken["ours"]), middle(taken["mflux"])
    ratios = (us.peak / them.peak, us.seconds / them.seconds, us.processor / them.processor)
    print(row("ours / mflux", *(f"{ratio:.2f}" for ratio in ratios)))
    for who, folder in results.items():
        packed = ", ".join(f"{part} {packed_layers(folder / part)}" for part in PARTS)
        print(f"{who} wrote {weights(folder) / 1e9:.2f} GB; packed layers (bits x group): {packed}")


def measure(command: list[str], log: Path) -> Cost:
    """Run a command in a process of its own. Ends the program with its last words if it fails.

    Linux counts in a child's peak what this process held at the fork. That is little: whatever is large is done in children.
    """
    os.sync()  # what the last one left to be written is not this one's work
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MFLUX_CACHE_DIR": str(log.parent / "cache")}
    environment["PYTHONPATH"] = str(ROOT)
    with log.open("w") as words:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}\nended with {child.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def middle(costs: list[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(
        median(cost.seconds for cost in costs),
        median(cost.processor for cost in costs),
        int(median(cost.peak for cost in costs)),
    )


def figures(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.peak / 1e9:.2f}", f"{cost.seconds:.1f}", f"{cost.processor:.1f}"


def weights(folder: Path) -> int:
    """Bytes of all weight files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def packed_layers(folder: Path) -> str:
    """How many layers of a part are packed, and how, taking groups to be of 64: "57 (8 x 64)". Read from headers."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    layers = [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]
    # a row has 32 bits in each word and one scale for each group
    kinds = {32 * shapes[f"{layer}.weight"][-1] // shapes[f"{layer}.scales"][-1] for layer in layers}
    return f"{len(layers)} ({', '.join(f'{kind // 64} x 64' for kind in sorted(kinds))})" if layers else "0"


def make_model(folder: Path, double: int, single: int, blocks: int) -> None:
    """Write random bf16 weights as the published model lies on the hub, and the small tokenizers of the parity tests."""
    import reference  # torch, diffusers and transformers: in the child only
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": blocks, "num_heads": 64, "vocab_size": 32128}
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        models: dict[str, Any] = {
            "transformer": FluxTransformer2DModel(guidance_embeds=True, num_layers=double, num_single_layers=single),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **clip)),
            "text_encoder_2": T5EncoderModel(
                T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False, **t5)
            ),
        }
    generator = torch.Generator().manual_seed(1)
    for part, model in models.items():
        states = {}
        for name, value in model.state_dict().items():
            if name == "encoder.embed_tokens.weight" or name.endswith("position_ids"):
                continue  # transformers lists T5's embedding twice
            # the published files have a prefix that transformers 5 has dropped
            name = f"text_model.{name.removeprefix('text_model.')}" if part == "text_encoder" else name
            states[name] = torch.empty(value.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        (folder / part).mkdir(parents=True)
        diffusers_part = part in ("transformer", "vae")
        file = "diffusion_pytorch_model.safetensors" if diffusers_part else "model.safetensors"
        save_file(states, folder / part / file, {"format": "pt"})
        if diffusers_part:
            model.save_config(folder / part)
        else:
            model.config.save_pretrained(folder / part)
    for name, kind, files in (
        ("tokenizer", CLIPTokenizer, reference.clip_tokenizer_files),
        ("tokenizer_2", T5Tokenizer, reference.t5_tokenizer_files),
    ):
        kind.from_pretrained(files(folder.parent / f"{name}_files")).save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))


if __name__ == "__main__":
    main()
