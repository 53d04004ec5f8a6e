"""The schedule and the Euler steps of a rectified flow. Knows no model: velocity is any callable."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .backend import mx


@dataclass(frozen=True)
class ScheduleConfig:
    """As in diffusers' `scheduler/scheduler_config.json`; the defaults are FLUX.1's."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    REQUIRED: ClassVar[dict[str, Any]] = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}

    def __post_init__(self) -> None:
        """Raises ValueError for a line so steep that the exponential of what it gives is no number."""
        if self.max_image_seq_len <= self.base_image_seq_len or not (
            abs(self.slope) < 1e-3 and abs(self.base_shift) < 16
        ):
            raise ValueError(
                f"the shift goes from {self.base_shift} at {self.base_image_seq_len} tokens to {self.max_shift} at "
                f"{self.max_image_seq_len}; FLUX.1's from 0.5 at 256 to 1.15 at 4096"
            )

    @property
    def slope(self) -> float:
        """Shift a token."""
        return (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)


def schedule(steps: int, tokens: int, config: ScheduleConfig) -> np.ndarray:
    """Noise levels from 1 to 0: [steps + 1] fp32.

    More target tokens shift the levels towards noise, since a large picture needs more of it to lose its outlines. Only
    the target counts, not the reference; the line through the two anchors is not clamped outside them.
    """
    mu = tokens * config.slope + config.base_shift - config.slope * config.base_image_seq_len
    even = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / even - 1))
    return np.append(shifted, 0).astype(np.float32)


def euler(
    velocity: Callable[[int, mx.array], mx.array], x: mx.array, sigmas: np.ndarray
) -> Iterator[tuple[int, mx.array, mx.array]]:
    """Integrate from sigmas[0] to sigmas[-1]; x stays fp32. Yields (step, x, the picture x is heading for), evaluated."""
    for i in range(len(sigmas) - 1):
        v = velocity(i, x).astype(mx.float32)
        target = x - float(sigmas[i]) * v
        x = x + float(sigmas[i + 1] - sigmas[i]) * v
        mx.eval(x, target)
        yield i, x, target
