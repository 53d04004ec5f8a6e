"""Train the demo model from nothing: `python assets/demo/train.py`. About three hours on two CPU cores.

Needs the `test` extra (torch, diffusers, transformers) and a C++ compiler. Three stages, each resumed where it stopped and
skipped when it is done; what lies between is kept in `--work`:

  1. the VAE, on rendered scenes (vae.py)
  2. a pool of edits and one of pictures from nothing, as latents (flow.py)
  3. transformer, T5 and CLIP together, on the pool (flow.py)

Each stage is seeded. Ranks, of one thread each, split every batch and add up their gradients. At the end, or at any time with
`--export`, the model folder is written (export.py); `evaluate.py` judges it.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from flow import Model, make_pictures, make_pool, train_flow  # noqa: E402
from optimizer import Optimizer  # noqa: E402
from scenes import GRIDS  # noqa: E402
from torch import Tensor  # noqa: E402
from vae import train_vae  # noqa: E402


def worker(rank: int, args: argparse.Namespace) -> None:
    """All stages, as one of the ranks."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.ranks > 1:
        dist.init_process_group("gloo", f"file://{args.work}/ranks", rank=rank, world_size=args.ranks)
    stage = partial(run, args.work, rank, args.ranks)
    vae = train_vae(stage, args)
    pools, pictures = [], []
    for grid in GRIDS:
        name = f"{grid[0]}x{grid[1]}-{rank}"
        scenes = args.scenes // args.ranks // (2 if grid == (2, 2) else 4)
        pools.append(kept(args.work / f"pool-{name}.pt", partial(make_pool, vae, grid, scenes, f"pool-{name}")))
        made = partial(make_pictures, vae, grid, scenes // 2, f"pictures-{name}")
        pictures.append(kept(args.work / f"pictures-{name}.pt", made))
    model = Model()
    train_flow(stage, args, pools, pictures, model)
    if rank == 0:
        from export import export

        export(vae, model, args.out)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, from the file if an earlier run made it."""
    if not file.exists():
        torch.save(make(), file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)
    return torch.load(file, weights_only=False)


def run(
    work: Path,
    rank: int,
    ranks: int,
    stage: str,
    opt: Optimizer,
    steps: int,
    loss: Callable[[int, random.Random], tuple[Tensor, dict[str, float]]],
) -> None:
    """Train until `steps`, saving twice a minute and resuming from what was saved."""
    file = work / f"{stage}.pt"
    if file.exists():
        opt.restore(torch.load(file))
    sums: dict[str, float] = {}
    saved = begun = time.time()
    first = opt.steps
    while opt.steps < steps:
        step = opt.steps
        torch.manual_seed(step * ranks + rank)
        value, told = loss(step, random.Random(f"{stage} {step} {rank}"))
        value.backward()
        told["norm"] = opt.step(rate_factor(step, steps))
        for name, number in told.items():
            sums[name] = 0.99 * sums.get(name, number) + 0.01 * number
        if rank == 0 and (opt.steps == steps or time.time() - saved > 30):
            saved = time.time()
            torch.save(opt.state(), file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
            pace = (saved - begun) / (opt.steps - first)
            figures = "  ".join(f"{name} {number:.4f}" for name, number in sums.items())
            print(f"{stage} {opt.steps}/{steps}  {figures}  {pace:.3f} s/step", flush=True)


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, flat for two fifths, then down in a straight line."""
    return min(1.0, (step + 1) / 150, (steps - step) / (0.6 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder for what lies between")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="the model folder to write")
    parser.add_argument("--ranks", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--vae-steps", type=int, default=10000)
    parser.add_argument("--vae-batch", type=int, default=4, help="pictures a step and rank")
    parser.add_argument("--scenes", type=int, default=24000, help="scenes in the pool, four edits each")
    parser.add_argument("--flow-steps", type=int, default=13000)
    parser.add_argument("--batch", type=int, default=32, help="edits a step and rank")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="if there is no C++ compiler")
    parser.add_argument("--export", action="store_true", help="write the model as far as it is trained, and stop")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "ranks").unlink(missing_ok=True)
    if args.export:
        from export import export_unfinished

        export_unfinished(args.work, args.out)
    elif args.ranks > 1:
        torch.multiprocessing.spawn(worker, (args,), nprocs=args.ranks)
    else:
        worker(0, args)


if __name__ == "__main__":
    main()
