"""Write what was trained as a model folder of ours, in bfloat16."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from flow import CLIP, FLUX, T5, Model
from torch import Tensor, nn
from vae import CONFIG, new_vae, normalise
from vocabulary import cases, words, write_tokenizers

from mlx_kontext.backend import mx
from mlx_kontext.weights.formats import vae_from_diffusers
from mlx_kontext.weights.save import save_tensors

INDEX = {
    "_class_name": "KontextPipeline",
    "library": "mlx_kontext",
    "version": "0.1.0",
    "resolutions": [[96, 96], [96, 64], [64, 96]],
    "defaults": {"num_inference_steps": 8, "max_sequence_length": 24, "draft_steps": 4, "draft_scale": 1},
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def export(vae: nn.Module, model: Model, folder: Path) -> None:
    """Replace the weights, tokenizers and configs in `folder`; a model card there stays as it is."""
    parts = {
        "transformer": (
            as_mlx(model.flux.state_dict()),
            {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **FLUX},
        ),
        "vae": (vae_from_diffusers(as_mlx(vae.state_dict())), {"_class_name": "AutoencoderKL", **CONFIG}),
        "text_encoder": (as_mlx(with_prefix(model.clip.state_dict())), model.clip.config.to_diff_dict() | CLIP),
        "text_encoder_2": (as_mlx(t5_with_cases(model)), model.t5.config.to_diff_dict() | T5),
    }
    for name, (tensors, config) in parts.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        save_tensors(tensors, folder / name)
        write(folder / name / "config.json", config)
    write_tokenizers(folder)
    (folder / "scheduler").mkdir(exist_ok=True)
    write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write(folder / "model_index.json", INDEX)
    print(f"wrote {folder}: {sum(f.stat().st_size for f in folder.rglob('*.safetensors')) / 1e6:.2f} MB", flush=True)


def export_unfinished(work: Path, folder: Path) -> None:
    """Write what the newest checkpoints in `work` hold."""
    vae, model = new_vae(), Model()
    with torch.no_grad():
        for stage, part in (("vae", vae), ("flow", model)):
            torch._foreach_copy_(list(part.parameters()), torch.load(work / f"{stage}.pt")["slow"])
    normalise(vae)
    export(vae, model, folder)


def as_mlx(state: dict[str, Tensor]) -> dict[str, mx.array]:
    return {name: mx.array(p.float().numpy()).astype(mx.bfloat16) for name, p in state.items()}


def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors under the names of published files."""
    return {
        f"text_model.{name.removeprefix('text_model.')}": p for name, p in state.items() if "position_ids" not in name
    }


def t5_with_cases(model: Model) -> dict[str, Tensor]:
    """T5's tensors; a word in capitals gets the embedding of the word: training reads lower case alone."""
    state = {name: p for name, p in model.t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    table = state["shared.weight"].clone()
    for word in words():
        ids = [model.piece("▁" + form) for form in cases(word)]
        table[ids] = table[ids[0]].clone()
    return state | {"shared.weight": table}


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
