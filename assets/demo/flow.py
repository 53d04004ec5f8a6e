"""Stages 2 and 3: edits as latents, and the transformer and its text encoders learning to carry them out."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from flux import Flux
from optimizer import Optimizer
from scenes import GRIDS, Edit, Scene, describe, random_edit, random_generation
from torch import Tensor, nn
from vae import Run, decode, encode, fast, to_tensor, training_scene
from vocabulary import clip_tokenizer, t5_tokenizer

FLUX = {
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 14, 14],
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
}
CLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 64,
    "eos_token_id": 2,  # as FLUX's own file has it: the pooled vector is read at the highest id
}
SHARES = {"recolor": 0.32, "remove": 0.15, "background": 0.11, "swap": 0.22, "add": 0.2}
EDITS_A_SCENE = 4
SMALL_STEPS = 3850  # of training, on the three smaller grids alone: they cost half as much and teach the same
EDITS_FIRST = 7400  # steps; then pictures from nothing in earnest
# T5 tells the words of one shape from those of another by its position bias. At AdamW's usual rate its entries were within
# 1.3 after 9,800 steps (deviation 0.34), and a picture of two shapes mixed up their colours (6 right of 100); now within 6 (2.0).
FASTER_POSITIONS = 100.0
SHARE_SMALL, SHARE_ALL = (2, 1, 1, 0), (2, 2, 2, 4)  # of the steps, by grid
LENGTHS, LONG = (12, 12, 24), (64, 128, 256, 512)


@dataclass
class Pool:
    """Edits of one grid as tokens [.., N, 64], float16.

    source, again: of every scene, as drawn and once more through the VAE; scene, target: of every edit, the number of its
    source and its result.
    """

    edits: list[Edit]
    scene: Tensor
    source: Tensor
    again: Tensor
    target: Tensor


@dataclass
class Pictures:
    """Pictures from nothing of one grid as tokens [.., N, 64], float16."""

    edits: list[Edit]
    target: Tensor


class Model(nn.Module):
    """Transformer, T5 and CLIP with their tokenizers."""

    def __init__(self) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        super().__init__()
        torch.manual_seed(1)
        t5_words, clip_words = t5_tokenizer(), clip_tokenizer()
        self.flux = Flux(FLUX)
        self.t5 = T5EncoderModel(T5Config(vocab_size=t5_words.get_vocab_size(), **T5))
        self.clip = CLIPTextModel(
            CLIPTextConfig(vocab_size=clip_words.get_vocab_size(), bos_token_id=0, pad_token_id=1, **CLIP)
        )
        self.words = lru_cache(100_000)(lambda text: (t5_words.encode(text).ids, clip_words.encode(text).ids))
        self.end = clip_words.token_to_id("<|endoftext|>")
        self.piece = t5_words.token_to_id

    def read(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """T5 states [B, length, 64] and pooled CLIP vectors [B, 64]."""
        both = [self.words(prompt) for prompt in prompts]
        longest = max(len(clip) for _, clip in both)
        t5 = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in both])
        clip = torch.tensor([ids + [self.end] * (longest - len(ids)) for _, ids in both])
        return self.t5(t5).last_hidden_state, self.clip(clip).pooler_output

    def forward(
        self, x: Tensor, reference: Tensor | None, text: tuple[Tensor, Tensor], t: Tensor, grid: tuple
    ) -> Tensor:
        """Velocity of the noisy tokens x: [B, N, 64] at times t: [B]."""
        txt, vec = text
        tokens = x if reference is None else torch.cat([x, reference], dim=1)
        ids = token_ids(txt.shape[1], grid, reference is not None)
        return self.flux(tokens, txt, vec, t, 1 + 4 * torch.rand_like(t), ids)[:, : x.shape[1]]


@lru_cache
def token_ids(text: int, grid: tuple[int, int], reference: bool) -> Tensor:
    """[L, 3]: zeros for text; plane (0 target, 1 reference), row, column for tokens of 16 pixels."""
    rows, columns = torch.meshgrid(torch.arange(2 * grid[0]), torch.arange(2 * grid[1]), indexing="ij")
    place = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    planes = [torch.cat([torch.full_like(place[:, :1], plane), place], dim=1) for plane in range(1 + reference)]
    return torch.cat([torch.zeros(text, 3, dtype=torch.long), *planes]).float()


def pack(latents: Tensor) -> Tensor:
    """[B, 16, h, w] -> tokens [B, h / 2 * w / 2, 64]."""
    return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def drawn_edit(draw: random.Random, scene: Scene) -> Edit:
    while True:
        operation = draw.choices(list(SHARES), list(SHARES.values()))[0]
        if edit := random_edit(draw, operation, scene):
            return edit


@torch.no_grad()
def make_pool(vae: nn.Module, grid: tuple[int, int], scenes: int, seed: str) -> Pool:
    """Stage 2: `scenes` scenes and four edits of each."""
    draw = random.Random(seed)
    torch.manual_seed(draw.randrange(2**31))
    drawn = [training_scene(draw, grid) for _ in range(scenes)]
    edits = [drawn_edit(draw, scene) for scene in drawn for _ in range(EDITS_A_SCENE)]
    source, again = [], []
    for batch in batches(drawn):
        z = encoded(vae, batch)
        with fast():
            pixels = decode(vae, z + 0.04 * torch.randn_like(z)).float().clamp(-1, 1)
            source.append(pack(z).half())
            again.append(pack(encode(vae, (pixels * 127.5).round() / 127.5)).half())
    scene = torch.arange(len(edits)) // EDITS_A_SCENE
    return Pool(edits, scene, torch.cat(source), torch.cat(again), targets(vae, edits))


@torch.no_grad()
def make_pictures(vae: nn.Module, grid: tuple[int, int], count: int, seed: str) -> Pictures:
    """Stage 2: pictures of one shape, and twice as many of two."""
    draw = random.Random(seed)
    edits = [random_generation(draw, grid, draw.choice((1, 2, 2))) for _ in range(count)]
    return Pictures(edits, targets(vae, edits))


def targets(vae: nn.Module, edits: list[Edit]) -> Tensor:
    return torch.cat([pack(encoded(vae, batch)).half() for batch in batches([edit.target for edit in edits])])


def encoded(vae: nn.Module, scenes: list[Scene]) -> Tensor:
    with fast():
        return encode(vae, to_tensor(scenes)).float()


def batches(items: list, size: int = 64) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def train_flow(run: Run, args: argparse.Namespace, pools: list[Pool], pictures: list[Pictures], model: Model) -> None:
    """Stage 3: flow matching. Tokens that the edit changes, or that are no background, count three times."""
    if args.compile:
        for block in (*model.flux.double_blocks, *model.flux.single_blocks):
            block.compile(dynamic=True)  # one program for all sizes and lengths
    opt = Optimizer(
        [model],
        is_matrix,
        rate=1e-3,
        muon_rate=2e-3,
        faster=lambda name: FASTER_POSITIONS if "relative" in name else 1.0,
    )

    def loss(step: int, draw: random.Random) -> tuple[Tensor, dict[str, float]]:
        shared = random.Random(f"shape {step}")  # so that all ranks take equally long
        (number,) = shared.choices(range(len(GRIDS)), SHARE_SMALL if step < SMALL_STEPS else SHARE_ALL)
        pool, made, grid = pools[number], pictures[number], GRIDS[number]
        generate, count = shared.random() < (0.07 if step < EDITS_FIRST else 0.6), args.batch
        length = 24 if generate else shared.choice(LENGTHS)
        if shared.random() < 0.03:
            length = shared.choice(LONG)
            count = max(2, args.batch * 40 // (length + 32))
        chosen, prompts = draw_prompts(draw, model, made.edits if generate else pool.edits, count, length)
        if generate:
            target, reference = made.target[chosen].float(), None
            weight = 1 + 2 * torch.stack([shape_tokens(made.edits[i], grid) for i in chosen])
        else:
            target = pool.target[chosen].float()
            source, again = pool.source[pool.scene[chosen]].float(), pool.again[pool.scene[chosen]].float()
            weight = 1 + 2 * ((target - source).abs().mean(dim=-1, keepdim=True) > 0.1).float()
            reference = torch.where(torch.rand(count, 1, 1) < 0.6, again, source)
            reference = reference + torch.randn_like(source) * 0.06 * torch.rand(count, 1, 1)
        noise = torch.randn_like(target)
        # what is where is decided in noise; from nothing there is more to decide
        t = torch.sigmoid(torch.randn(count) + (1.0 if generate else 0.4))
        t = torch.where(torch.rand(count) < 0.15, torch.rand(count), t)
        x = target + t[:, None, None] * (noise - target)
        velocity = model(x, reference, model.read(prompts, length), t, grid)
        error = (velocity - (noise - target)).square()
        told = {"generated" if generate else "all": error.mean().item()}
        told["shapes" if generate else "changed"] = error[(weight > 1).squeeze(-1)].mean().item()
        return (error * weight).mean(), told

    run("flow", opt, args.flow_steps, loss)
    opt.use_average()


def shape_tokens(edit: Edit, grid: tuple[int, int]) -> Tensor:
    """[N, 1]: 1 for the tokens of cells that hold a shape."""
    tokens = torch.zeros(2 * grid[0], 2 * grid[1])
    for row, column in (shape.cell for shape in edit.target.shapes):
        tokens[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    return tokens.flatten()[:, None]


def draw_prompts(
    draw: random.Random, model: Model, edits: list[Edit], count: int, length: int
) -> tuple[Tensor, list[str]]:
    """Numbers of `count` of the edits and prompts for them of at most `length` T5 tokens."""
    chosen: list[int] = []
    prompts: list[str] = []
    while len(chosen) < count:
        i = draw.randrange(len(edits))
        prompt = describe(draw, edits[i], plain=draw.random() < 0.5)
        if len(model.words(prompt)[0]) <= length:
            chosen.append(i)
            prompts.append(prompt)
    return torch.tensor(chosen), prompts


def is_matrix(name: str, p: Tensor) -> bool:
    """Muon's: matrices inside blocks. Embeddings, modulation and what reads or writes latents are AdamW's."""
    inside = "_blocks." in name or ".block." in name or ".layers." in name
    return p.ndim == 2 and inside and "mod" not in name.removeprefix("text_model") and "relative" not in name
