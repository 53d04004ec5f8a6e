"""The pipeline's behaviour with the demo model: what a request becomes, what comes back, how it stops."""

import dataclasses
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_kontext import (
    AdapterError,
    CheckpointError,
    EditRequest,
    EditResult,
    KontextError,
    KontextPipeline,
    RequestError,
    ResourceError,
)
from mlx_kontext.backend import mx, tree_flatten
from mlx_kontext.finite import not_finite
from mlx_kontext.image import noise, pack
from mlx_kontext.lora import Adapter

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"
PROMPT = "make the circle green"


@pytest.fixture(scope="module")
def pipe() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def test_a_result_repeats_itself(pipe: KontextPipeline) -> None:
    result = pipe(image=SAMPLE, prompt=PROMPT)
    assert isinstance(result, EditResult) and result.images == [result.image]
    assert result.request.seed == result.seed and result.request.num_inference_steps == 8
    again = pipe(result.request)
    assert np.array_equal(result.image, again.image) and np.array_equal(result.latents, again.latents)
    from_json = EditRequest.from_json(result.request.to_json())
    assert np.array_equal(pipe(from_json).image, result.image)


def test_seeds_give_results_equal_to_one_at_a_time(pipe: KontextPipeline) -> None:
    both = pipe(image=SAMPLE, prompt=PROMPT, seed=[3, 4])
    assert [r.seed for r in both] == [3, 4] and [r.request.seed for r in both] == [3, 4]
    assert np.array_equal(both[1].image, pipe(image=SAMPLE, prompt=PROMPT, seed=4).image)
    assert not np.array_equal(both[0].latents, both[1].latents)
    (single,) = pipe(image=SAMPLE, prompt=PROMPT, seed=[3])
    assert isinstance(pipe(image=SAMPLE, prompt=PROMPT, seed=np.int64(3)), EditResult)
    assert np.array_equal(single.image, both[0].image)


def test_steps_tell_progress_and_preview(pipe: KontextPipeline) -> None:
    steps = list(pipe.stream(image=SAMPLE, prompt=PROMPT, seed=[1, 2], num_inference_steps=3))
    assert [(s.index, s.total, s.seed) for s in steps] == [(i, 3, seed) for seed in (1, 2) for i in (1, 2, 3)]
    assert [s.result is not None for s in steps] == [False, False, True] * 2
    assert [s.sigma for s in steps[:3]] == sorted((s.sigma for s in steps[:3]), reverse=True) and steps[2].sigma == 0
    assert steps[-1].eta == 0 and all(s.eta > 0 for s in steps[:-1])
    early, late = (np.array(steps[i].preview(), float) for i in (0, 2))
    assert early.shape == late.shape and np.array_equal(late, steps[2].result.image)
    assert np.abs(early - late).mean() < 60  # already the picture it is heading for, not noise


def test_previews_of_large_pictures_are_small(pipe: KontextPipeline) -> None:
    (step, *_) = pipe.stream(prompt=PROMPT, width=576, height=320, num_inference_steps=1)
    first = dataclasses.replace(step, result=None)
    assert first.preview().size == (288, 160)  # 72 latents wide, so every 2 are averaged


def test_closing_the_stream_cancels(pipe: KontextPipeline) -> None:
    stream = pipe.stream(image=SAMPLE, prompt=PROMPT, num_inference_steps=50)
    assert next(stream).index == 1
    stream.close()
    assert list(stream) == []
    assert pipe(image=SAMPLE, prompt=PROMPT, seed=1).seed == 1  # and nothing is broken


def test_latents_stand_in_for_the_seed(pipe: KontextPipeline) -> None:
    drawn = pack(noise(9, 12, 12, 16))
    seeded = pipe(image=SAMPLE, prompt=PROMPT, seed=9)
    for latents in (drawn, mx.array(drawn)):
        assert np.array_equal(pipe(image=SAMPLE, prompt=PROMPT, latents=latents).image, seeded.image)
    for wrong in (drawn[:, :3], drawn[0], np.full_like(drawn, np.nan)):
        with pytest.raises(RequestError, match=r"expected finite packed noise of shape \(1, 36, 64\)"):
            pipe(image=SAMPLE, prompt=PROMPT, latents=wrong)


def test_an_edit_continues_from_latents_while_they_are_the_picture(
    pipe: KontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pipe(image=SAMPLE, prompt=PROMPT, seed=1)
    encoded = []
    encode = type(pipe.vae).encode
    monkeypatch.setattr(type(pipe.vae), "encode", lambda self, x: encoded.append(1) or encode(self, x))
    pipe(image=first, prompt="remove the square", seed=1)
    assert not encoded
    painted = first.image.copy()
    painted.putpixel((0, 0), (1, 2, 3))
    for changed in (
        dataclasses.replace(first, image=painted),
        dataclasses.replace(first, vae="another"),
        dataclasses.replace(first, image=first.image.resize((80, 80))),
    ):
        encoded.clear()
        pipe(image=changed, prompt="remove the square", seed=1)
        assert encoded


def test_sizes(pipe: KontextPipeline) -> None:
    wide = Image.new("RGB", (150, 101), "white")
    assert pipe(image=wide, prompt=PROMPT, num_inference_steps=1).image.size == (96, 64)  # the nearest of its three
    assert pipe(image=wide, prompt=PROMPT, num_inference_steps=1, auto_resize=False).image.size == (144, 96)
    exact = pipe(image=wide, prompt=PROMPT, num_inference_steps=1, width=96, height=32)
    assert exact.image.size == (96, 32) and "edited at 96x32 (the input is 150x101)" in exact.notices
    assert pipe(prompt=PROMPT, num_inference_steps=1).image.size == (96, 96)
    with pytest.raises(RequestError, match=r"multiples of 16, for example 96x64"):
        pipe(image=wide, prompt=PROMPT, width=100, height=64)


def test_draft_is_a_quarter_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KontextPipeline.from_pretrained("demo")
    pipe.defaults = dataclasses.replace(pipe.defaults, draft_scale=0.5)
    result = pipe(image=SAMPLE, prompt=PROMPT, width=128, height=96, draft=True, seed=5)
    assert result.image.size == (64, 48) and result.request.num_inference_steps == 4
    assert result.to_json()["draft"] is True and result.notices[-1].startswith("draft, a preview at 64x48")
    assert pipe(image=SAMPLE, prompt=PROMPT, draft=True).image.size == (48, 48)
    assert pipe(image=SAMPLE, prompt=PROMPT, draft=True, num_inference_steps=2).request.num_inference_steps == 2


def test_true_cfg_changes_the_picture_and_scale_one_is_refused(pipe: KontextPipeline) -> None:
    plain = pipe(image=SAMPLE, prompt=PROMPT, seed=1)
    guided = pipe(image=SAMPLE, prompt=PROMPT, seed=1, negative_prompt="make the circle blue", true_cfg_scale=2.0)
    assert not np.array_equal(plain.latents, guided.latents)
    for options in ({"negative_prompt": "x"}, {"true_cfg_scale": 2.0}):
        with pytest.raises(RequestError, match="only together"):
            pipe(image=SAMPLE, prompt=PROMPT, **options)


def test_a_long_prompt_is_cut_and_told(pipe: KontextPipeline) -> None:
    result = pipe(image=SAMPLE, prompt="make the circle green " * 2500, num_inference_steps=1)
    assert any("T5 tokens and the model reads 24: its end is cut off" in notice for notice in result.notices)


@pytest.mark.parametrize("number", [np.float32, np.float64, int])
def test_numbers_of_any_kind_do(number: type) -> None:
    """Also in bf16, where MLX takes a numpy scalar for an array of another format."""
    half = KontextPipeline.from_pretrained("demo", dtype="bfloat16")
    options = {
        "guidance_scale": number(2),
        "true_cfg_scale": number(2),
        "negative_prompt": "x",
        "num_inference_steps": 1,
    }
    noise_bf16 = mx.random.normal((1, 36, 64)).astype(mx.bfloat16)
    assert half(image=SAMPLE, prompt=PROMPT, latents=noise_bf16, **options).request.guidance_scale == 2.0


def test_what_is_no_number_is_told(pipe: KontextPipeline) -> None:
    for options in ({"latents": "abc"}, {"latents": [[1], [1, 2]]}, {"negative_prompt": "x", "true_cfg_scale": None}):
        with pytest.raises(RequestError):
            pipe.stream(image=SAMPLE, prompt=PROMPT, **options)  # at once, not at the first step


def test_foreign_keywords_name_ours(pipe: KontextPipeline) -> None:
    for name, told in {
        "generator": "seed=",
        "callback_on_step_end": "stream",
        "num_images_per_prompt": "seed=[",
        "promt": "'prompt'",
    }.items():
        with pytest.raises(TypeError, match=told.replace("[", r"\[")):
            pipe(image=SAMPLE, **{name: 1})


def test_another_thread_is_refused(pipe: KontextPipeline) -> None:
    errors = []
    stream = pipe.stream(image=SAMPLE, prompt=PROMPT)  # made here, used there

    def use() -> None:
        for call in (lambda: pipe(image=SAMPLE, prompt=PROMPT), lambda: next(stream)):
            try:
                call()
            except KontextError as error:
                errors.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(errors) == 2 and all("mlx_kontext.engine.Engine, which any thread may call" in error for error in errors)


def test_the_phase_tells_what_an_edit_is_busy_with(monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    before = KontextPipeline.__setattr__

    def noted(self: KontextPipeline, name: str, value: object) -> None:
        if name == "phase" and value not in phases[-1:]:
            phases.append(str(value))
        before(self, name, value)

    monkeypatch.setattr(KontextPipeline, "__setattr__", noted)
    pipe = KontextPipeline.from_pretrained("demo")
    pipe(image=SAMPLE, prompt=PROMPT, seed=[1, 2], num_inference_steps=1)
    spoken = [phase for phase in phases if not phase.startswith("loading ")]
    once = ["", "reading the picture", "reading the prompt", "encoding the picture", "denoising", "decoding"]
    assert [p for i, p in enumerate(spoken) if p != spoken[i - 1] or not i] == [*once, "denoising", "decoding"]
    loads = {phase for phase in phases if phase.startswith("loading ")}
    assert loads == {"loading T5", "loading CLIP", "loading the VAE", "loading the transformer"}


def test_models_take_turns_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture, and never text encoders and transformer at once."""
    roomy = KontextPipeline.from_pretrained("demo")
    expected = roomy(image=SAMPLE, prompt=PROMPT, seed=1)
    assert set(roomy._parts) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    monkeypatch.setattr("mlx_kontext.plan.memory_budget", lambda: 10**6)
    tight = KontextPipeline.from_pretrained("demo")
    steps = []
    for step in tight.stream(image=SAMPLE, prompt=PROMPT, seed=1):
        assert set(tight._parts) <= {"transformer", "vae"}
        steps.append(step)
    assert np.array_equal(steps[-1].result.image, expected.image)
    assert any("the machine can give 1.0 MB" in notice for notice in steps[0].notices)
    assert not any("the machine can give" in notice for notice in expected.notices)
    tight(image=SAMPLE, prompt="remove the circle", seed=1)
    assert np.array_equal(tight(image=SAMPLE, prompt=PROMPT, seed=1).image, expected.image)
    monkeypatch.setattr("mlx_kontext.plan.physical_memory", lambda: 10**6)
    with pytest.raises(ResourceError, match=r"needs about .* and the machine has 1\.0 MB"):
        tight(image=SAMPLE, prompt=PROMPT)


def test_nothing_big_is_read_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_kontext.weights.load.mx.load", lambda path: pytest.fail(f"{path} was opened"))
    KontextPipeline.from_pretrained("demo")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_agree_with_fp32(pipe: KontextPipeline, dtype: str) -> None:
    """Same noise, so the pictures differ by rounding only; nothing is promoted to fp32 on the way."""
    half = KontextPipeline.from_pretrained("demo", dtype=dtype)
    ours, exact = (p(image=SAMPLE, prompt=PROMPT, seed=2) for p in (half, pipe))
    assert ours.model["dtype"] == dtype
    difference = np.abs(np.array(ours.image, float) - np.array(exact.image, float))
    assert difference.mean() < 4
    conditioning = half.text.encode(PROMPT, 32)
    assert conditioning.txt.dtype == conditioning.vec.dtype == half.dtype
    assert {value.dtype for _, value in tree_flatten(half.flux.parameters())} == {half.dtype}
    modulation = half.flux.modulation(mx.array([0.5]), 2.5, conditioning.vec)
    pe = half.flux.rope(mx.zeros((32 + 16, 3), mx.int32))
    assert half.flux(mx.zeros((1, 16, 64), half.dtype), conditioning.txt, pe, modulation.at(0)).dtype == half.dtype


def test_not_finite_latents_are_an_error_not_a_black_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KontextPipeline.from_pretrained("demo")
    pipe.flux.final_layer.linear.bias = mx.full((64,), float("nan"))
    with pytest.raises(KontextError, match=r"final_layer\.linear\.bias\): the latents of step 1 are not finite"):
        pipe(image=SAMPLE, prompt=PROMPT)


def test_who_is_to_blame_for_no_number() -> None:
    pipe = KontextPipeline.from_pretrained("demo")
    broken, whole = {"vae": pipe.vae}, {"transformer": pipe.flux}
    pipe.vae.decoder.conv_out.bias = mx.full((3,), 1e30)
    lora = (Adapter("style.safetensors", "", "", {}), 0.5)
    for parts, adapters, dtype, error, told in (
        (
            broken,
            [lora],
            mx.float32,
            CheckpointError,
            r"vae: 1 tensors hold .* far too large \(decoder\.conv_out\.bias\)",
        ),
        (
            whole,
            [lora],
            mx.float32,
            AdapterError,
            r"the LoRA style\.safetensors at 0\.5; leave it out or lower its scale",
        ),
        (whole, [], mx.bfloat16, KontextError, r"in bfloat16; try dtype='float32'"),
        (whole, [], mx.float32, CheckpointError, "model: x is not finite, though each weight is"),
    ):
        found = not_finite("x is", pipe.checkpoint, parts, adapters, dtype)
        assert type(found) is error and re.search(told, str(found))
