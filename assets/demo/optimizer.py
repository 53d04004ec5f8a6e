"""Muon for matrices and AdamW for the rest, over one flat gradient that ranks add up in one message."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Optimizer:
    """Trains the parameters of `modules` with gradients averaged over all ranks; keeps a slow average of the parameters.

    is_matrix: which parameters Muon orthogonalises (https://kellerjordan.github.io/posts/muon; convolutions as
    [out, in * k * k]), its step scaled to AdamW's usual size. rate: AdamW's learning rate, muon_rate: Muon's; faster: times
    which a parameter of AdamW's learns faster.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        is_matrix: Callable[[str, Tensor], bool],
        rate: float,
        muon_rate: float,
        betas: tuple[float, float] = (0.9, 0.98),
        average: float = 0.998,
        decay: float = 0.01,
        faster: Callable[[str], float] = lambda _: 1.0,
    ):
        named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.rate, self.muon_rate, self.betas, self.average, self.decay = rate, muon_rate, betas, average, decay
        sizes = [p.numel() for p in self.parameters]
        self.gradient = torch.zeros(sum(sizes))
        for p, flat in zip(self.parameters, self.gradient.split(sizes), strict=True):
            p.grad = flat.view_as(p)
        self.matrices: dict[torch.Size, list[Tensor]] = defaultdict(list)  # of one shape, stepped together
        self.others: list[Tensor] = []
        self.faster: list[float] = []
        for name, p in named:
            if is_matrix(name, p):
                self.matrices[p.flatten(1).shape].append(p)
            else:
                self.others.append(p)
                self.faster.append(faster(name))
        self.momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.matrices.items()}
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.others]
        self.slow = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> float:
        """One step with the learning rates times `factor`; returns the gradient's norm before clipping."""
        self.steps += 1
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
            self.gradient /= dist.get_world_size()
        norm = self.gradient.norm()
        self.gradient *= min(1.0, clip / (float(norm) + 1e-6))
        self._muon(factor)
        self._adam(factor)
        mix = max(1 - self.average, 1 / (self.steps + 1))
        torch._foreach_lerp_(self.slow, self.parameters, mix)
        self.gradient.zero_()
        return float(norm)

    def _muon(self, factor: float) -> None:
        """Each rank orthogonalises its share of the matrices; a sum gives everyone all of them."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        rate = self.muon_rate * factor
        updates = torch.zeros(sum(m.numel() for m in self.momentum.values()))
        flats = updates.split([m.numel() for m in self.momentum.values()])
        for (shape, ps), flat in zip(self.matrices.items(), flats, strict=True):
            gradient = torch.stack([p.grad.flatten(1) for p in ps])
            momentum = self.momentum[shape].lerp_(gradient, 0.05)
            mine = slice(rank, None, ranks)
            if len(ps) > rank:
                flat.view_as(momentum)[mine] = orthogonal(gradient.lerp(momentum, 0.95)[mine])
        if ranks > 1:
            dist.all_reduce(updates)
        for (shape, ps), flat in zip(self.matrices.items(), flats, strict=True):
            for p, update in zip(ps, flat.view(len(ps), *shape), strict=True):
                p.mul_(1 - rate * self.decay).sub_(update.view_as(p), alpha=rate * 0.2 * math.sqrt(max(shape)))

    def _adam(self, factor: float) -> None:
        rate, (b1, b2) = self.rate * factor, self.betas
        first, second = [m for m, _ in self.moments], [v for _, v in self.moments]
        gradients = [p.grad for p in self.others]
        torch._foreach_lerp_(first, gradients, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - b2)
        size = torch._foreach_sqrt(second)
        torch._foreach_mul_(size, 1 / math.sqrt(1 - b2**self.steps))
        torch._foreach_add_(size, 1e-8)
        rates = [-rate * faster / (1 - b1**self.steps) for faster in self.faster]
        torch._foreach_addcdiv_(self.others, first, size, rates)

    def state(self) -> dict:
        return {
            "parameters": [p.detach() for p in self.parameters],
            "slow": self.slow,
            "momentum": list(self.momentum.values()),
            "moments": self.moments,
            "steps": self.steps,
        }

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        self.steps = state["steps"]
        torch._foreach_copy_(self.parameters, state["parameters"])
        torch._foreach_copy_(self.slow, state["slow"])
        torch._foreach_copy_(list(self.momentum.values()), state["momentum"])
        for mine, theirs in zip(self.moments, state["moments"], strict=True):
            torch._foreach_copy_(list(mine), list(theirs))

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the slow average in the parameters' place."""
        torch._foreach_copy_(self.parameters, self.slow)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with singular values near 1, by Newton-Schulz in bfloat16. g: [N, rows, columns]."""
    x = g.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()
