"""Schedule and Euler steps against the numbers of the published implementations."""

import numpy as np
import pytest

from mlx_kontext.backend import mx
from mlx_kontext.models.flux import rounded_time
from mlx_kontext.sampling import ScheduleConfig, euler, schedule

# sigmas of diffusers' FlowMatchEulerDiscreteScheduler with FLUX.1's configuration
LEVELS = {
    (8, 4096): [1, 0.9567237, 0.9045308, 0.8403488, 0.7595109, 0.6545668, 0.5128441, 0.3109011, 0],
    (4, 48): [1, 0.8268412, 0.6141503, 0.3466447, 0],
}


@pytest.mark.parametrize(("steps", "tokens"), LEVELS)
def test_levels(steps: int, tokens: int) -> None:
    sigmas = schedule(steps, tokens, ScheduleConfig())
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, LEVELS[steps, tokens], atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 16, 256, 4096, 4150, 16384])
@pytest.mark.parametrize("steps", [1, 2, 28, 50])
def test_levels_equal_diffusers(steps: int, tokens: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    assert np.array_equal(schedule(steps, tokens, ScheduleConfig()), scheduler.sigmas.numpy())


def test_euler_follows_a_straight_line_exactly() -> None:
    """With a constant velocity the flow is a line: one step or many end at the same point, and every target is that point."""
    noise, picture = mx.random.normal((1, 4, 8)), mx.random.normal((1, 4, 8))
    for steps in (1, 5):
        sigmas = schedule(steps, 4, ScheduleConfig())
        *_, (last, x, target) = euler(lambda i, x: noise - picture, noise, sigmas)
        assert last == steps - 1
        assert mx.allclose(x, picture, atol=1e-6) and mx.allclose(target, picture, atol=1e-6)


def test_euler_keeps_fp32_whatever_the_model_computes_in() -> None:
    *_, (_, x, _) = euler(lambda i, x: x.astype(mx.bfloat16), mx.ones((1, 2, 4)), np.array([1, 0.5, 0], np.float32))
    assert x.dtype == mx.float32


def test_time_is_rounded_as_published() -> None:
    """In 16 bits 2500 becomes 2496; in fp32 nothing is rounded away."""
    assert (mx.array([2.5]).astype(mx.bfloat16) * 1000).item() == 2496
    sigma = mx.array([0.8875834], mx.float32)
    assert rounded_time(sigma, mx.float32).item() == pytest.approx(887.5834, abs=1e-3)
    assert rounded_time(sigma, mx.bfloat16).item() == 888
