"""The engine: the same pictures as from the pipeline, from any thread; what waits, what is cancelled, what is closed."""

import dataclasses
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from watched import PROMPT, SAMPLE, Watched, assert_same, gone

from mlx_kontext import EditRequest, EditResult, ImageError, KontextError, KontextPipeline, RequestError, Step, worker
from mlx_kontext.engine import Engine, Load
from mlx_kontext.messages import (
    Cancelled,
    Closed,
    Done,
    Edit,
    Event,
    Failed,
    Loading,
    Progress,
    Ready,
    Stalled,
    Started,
    Unloaded,
)


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(request.param)
    yield watched
    watched.engine.close()


@pytest.fixture(scope="module")
def pipe() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def test_results_are_the_pipelines(watched: Watched, pipe: KontextPipeline, tmp_path: Path) -> None:
    turned = Image.fromarray(np.random.RandomState(0).randint(0, 255, (70, 100, 4), np.uint8))
    turned.getexif()[0x0112] = 6  # to be turned, and transparent: what is told of it must be told here too
    noise = np.random.RandomState(1).standard_normal((1, 24, 64))
    first = pipe(image=SAMPLE, prompt=PROMPT, seed=1)
    painted = first.image.copy()
    painted.putpixel((0, 0), (1, 2, 3))
    for options in (
        {"image": str(SAMPLE), "prompt": PROMPT, "seed": np.int64(3)},
        {"image": turned, "prompt": "caf\u00e9 🍊", "seed": 2**64 - 1, "auto_resize": False, "guidance_scale": 1.1},
        {"image": np.array(turned)[..., :3], "prompt": PROMPT, "seed": 6, "latents": noise},
        {"prompt": PROMPT, "seed": 4, "negative_prompt": "x", "true_cfg_scale": 1.5, "draft": True},
        {"image": first, "prompt": "remove the square", "seed": 5},
        {"image": dataclasses.replace(first, image=painted), "prompt": "remove the square", "seed": 5},
    ):
        options |= {"num_inference_steps": 2}
        assert_same(watched.engine.edit(**options), pipe(**options))
    both = {"image": SAMPLE, "prompt": PROMPT, "seed": [3, 4], "num_inference_steps": 1}
    for ours, theirs in zip(watched.engine.edit(**both), pipe(**both), strict=True):
        assert_same(ours, theirs)


def test_a_chain_stays_equal_bit_by_bit(watched: Watched, pipe: KontextPipeline) -> None:
    ours = theirs = SAMPLE
    for prompt in (PROMPT, "remove the square", "make the circle red"):
        ours = watched.engine.edit(ours, prompt, seed=7, num_inference_steps=3)
        theirs = pipe(theirs, prompt, seed=7, num_inference_steps=3)
        assert ours.request.image is not None and np.array_equal(ours.latents, theirs.latents)
    assert_same(ours, theirs)


def test_what_is_told_of_an_edit(watched: Watched) -> None:
    before = len(watched.events)
    watched.engine.preview_every, watched.engine.preview_side = 0.0, 40
    number = watched.engine.submit(SAMPLE, PROMPT, seed=[1, 2], num_inference_steps=3)
    watched.until(lambda e: isinstance(e, Done) and e.id == number and not e.left, before)
    watched.engine.preview_every = None
    events = [e for e in watched.events[before:] if getattr(e, "id", None) == number]
    assert isinstance(events[0], Started) and [e.left for e in events if isinstance(e, Done)] == [1, 0]
    steps = [e for e in events if isinstance(e, Progress) and not e.elapsed and e.total]
    assert {(s.seed, s.index) for s in steps} <= {(seed, i) for seed in (1, 2) for i in range(4)}
    assert steps[-1].index == 3 and steps[-1].eta == 0 and steps[-1].memory > 10**6 and steps[-1].seconds > 0
    assert "edited at 96x96" in steps[-1].notices
    for preview in (s.preview for s in steps if s.preview):
        assert max(preview.size) == 40
    assert watched.engine.info and watched.engine.info.sizes == ((96, 96), (96, 64), (64, 96))
    assert watched.engine.info.defaults["num_inference_steps"] == 8 and watched.engine.info.device


def test_cancel_takes_effect_at_the_next_step(watched: Watched) -> None:
    before = len(watched.events)
    long = watched.engine.submit(SAMPLE, PROMPT, num_inference_steps=1000)
    one, two, three = (watched.engine.submit(SAMPLE, PROMPT, num_inference_steps=1, seed=seed) for seed in (1, 2, 3))
    watched.until(lambda e: isinstance(e, Progress) and e.id == long and e.index >= 2, before)
    assert watched.engine.running == long and [number for number, _ in watched.engine.waiting] == [one, two, three]
    watched.engine.move(three, 0)
    assert watched.engine.cancel(one) and not watched.engine.cancel(one)
    assert [(number, request.seed) for number, request in watched.engine.waiting] == [(three, 3), (two, 2)]
    with pytest.raises(RequestError, match=f"edit {one} does not wait"):
        watched.engine.move(one, 0)
    at = next(e.index for e in reversed(watched.events) if isinstance(e, Progress))
    assert watched.engine.cancel(long)
    watched.until(lambda e: isinstance(e, Done) and e.id == two, before)
    ends = [(type(e), e.id) for e in watched.events[before:] if isinstance(e, (Done, Cancelled))]
    assert ends == [(Cancelled, long), (Done, three), (Done, two)]
    last = max(e.index for e in watched.events[before:] if isinstance(e, Progress) and e.id == long)
    assert last <= at + 20  # a few steps of 30 ms were made before the word came through, not a thousand
    assert not watched.engine.cancel(long) and watched.engine.running is None


def test_errors_arrive_as_they_are(watched: Watched, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.png"
    with pytest.raises(ImageError, match=r"nothing\.png does not exist; check the path"):
        watched.engine.edit(missing, PROMPT)
    told = watched.until(lambda e: isinstance(e, Failed))
    assert isinstance(told, Failed) and (told.kind, told.exit_code, told.details) == ("ImageError", 5, "")
    with pytest.raises(RequestError, match="multiples of 16"):
        watched.engine.edit(SAMPLE, PROMPT, width=100, height=64)
    for wrong, error in (
        ({"prompt": ""}, RequestError),
        ({"prompt": PROMPT, "image": np.zeros((3, 3))}, ImageError),
        ({"prompt": PROMPT, "latents": "abc"}, RequestError),
        ({"prompt": PROMPT, "generator": 1}, TypeError),
    ):
        with pytest.raises(error):
            watched.engine.submit(**wrong)  # before it is queued


def test_callers_from_many_threads(watched: Watched, pipe: KontextPipeline) -> None:
    options = {"image": SAMPLE, "prompt": PROMPT, "num_inference_steps": 1}
    results: dict[int, EditResult] = {}

    def call(seed: int) -> None:
        results[seed] = watched.engine.edit(**options, seed=seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        assert np.array_equal(result.image, pipe(**options, seed=seed).image)


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_another_model_takes_the_place_of_the_first(process: bool, tmp_path: Path) -> None:
    watched = Watched(process)
    with watched.engine as engine:
        engine.load()
        watched.until(lambda e: isinstance(e, Ready))
        old = engine._running.worker
        engine.load(Load("demo", dtype="bfloat16"))
        watched.until(lambda e: isinstance(e, Ready) and e.info.dtype == "bfloat16")
        assert not old._thread.is_alive()
        engine.load(os.fspath(tmp_path))
        with pytest.raises(KontextError, match=r"model_index\.json"):
            engine.edit(SAMPLE, PROMPT)
        watched.until(lambda e: isinstance(e, Failed))
        assert engine.held and engine.info is None
        before = len(watched.events)
        waits = engine.submit(SAMPLE, PROMPT, num_inference_steps=1)  # tries again, in vain, and stays
        watched.until(lambda e: isinstance(e, Failed), before)
        assert engine.waiting[0][0] == waits
        engine.load("demo")
        watched.until(lambda e: isinstance(e, Done) and e.id == waits)
        before = len(watched.events)
        engine.unload()
        watched.until(lambda e: isinstance(e, Unloaded), before)
        assert engine.info is None
    names = [type(e) for e in watched.events if not isinstance(e, (Progress, Started, Done, Failed))]
    failed = [type(e) for e in watched.events if isinstance(e, Failed)]
    assert names[:6] == [Loading, Ready, Unloaded] * 2 and names[-4:] == [Loading, Ready, Unloaded, Closed]
    assert set(names[6:-4]) == {Loading, Unloaded} and len(names[6:-4]) == 2 * len(failed)


def test_quantized_and_with_parts_of_its_own() -> None:
    from mlx_kontext.hub import demo_folder

    vae = demo_folder() / "vae"
    with Engine(Load("demo", quantize=8, sources={"vae": vae, "text_encoder": None}), process=True) as engine:
        result = engine.edit(SAMPLE, PROMPT, seed=1, num_inference_steps=1)
        assert result.model["quantization"] == engine.info.quantization == "q8"
    direct = KontextPipeline.from_pretrained("demo", quantize=8, vae=vae)
    assert np.array_equal(result.image, direct(SAMPLE, PROMPT, seed=1, num_inference_steps=1).image)
    with pytest.raises(RequestError, match="a scheme's name or a number of bits"):
        Load("demo", quantize=object())


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_closing(process: bool) -> None:
    watched = Watched(process)
    engine = watched.engine
    running = engine.submit(SAMPLE, PROMPT, num_inference_steps=1000)
    engine.submit(SAMPLE, PROMPT)
    watched.until(lambda e: isinstance(e, Progress) and e.id == running and e.index > 0)
    pid = watched.pid if process else None
    engine.close()
    engine.close()  # again does no harm
    assert watched.events[-3:] == [Cancelled(running), Unloaded(), Closed()] and engine.waiting == ()
    assert pid is None or gone(pid)
    with pytest.raises(KontextError, match="the engine was closed"):
        engine.submit(SAMPLE, PROMPT)
    unused = Watched(process)
    unused.engine.close()
    assert unused.events == [Closed()]


def test_a_slow_step_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """In between steps the heartbeat tells phase and seconds, and nothing is called stalled."""
    from mlx_kontext.models.vae import AutoEncoder

    decode = AutoEncoder.decode
    monkeypatch.setattr(AutoEncoder, "decode", lambda self, x: (time.sleep(1.0), decode(self, x))[1])
    watched = Watched(process=False)
    with watched.engine as engine:
        number = engine.submit(SAMPLE, PROMPT, num_inference_steps=1)
        watched.until(lambda e: isinstance(e, Done))
        beats = [e for e in watched.events if isinstance(e, Progress) and e.id == number and e.phase == "decoding"]
        seconds = [e.elapsed for e in beats if e.elapsed]
        assert len(seconds) >= 2 and seconds == sorted(seconds)
        assert not any(isinstance(e, Stalled) for e in watched.events)


def test_an_idle_engine_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "IDLE_BEAT", 0.01)
    watched = Watched(process=False)
    with watched.engine as engine:
        engine.load()
        watched.until(lambda e: isinstance(e, Ready))
        before = len(watched.events)
        time.sleep(0.2)
        assert watched.events[before:] == []


def test_previews_take_a_twentieth_of_the_time_at_most() -> None:
    calls = 0

    def look() -> Image.Image:
        nonlocal calls
        calls += 1
        time.sleep(0.02)
        return Image.new("RGB", (100, 50))

    step = Step(1, 2, seed=1, seconds=0.1, eta=0.1, sigma=0.5, _preview=look)
    for every, expected in ((None, {0}), (0.0, {2}), (60.0, {1})):
        calls = 0
        preview = worker._previews(Edit(1, EditRequest("x"), every, 40))
        deadline, pictures = time.monotonic() + 0.6, []
        while time.monotonic() < deadline:
            pictures.append(preview(step))
            time.sleep(0.005)
        assert calls in expected and len([p for p in pictures if p]) == calls
        assert all(p.size == (40, 20) for p in pictures if p)


def test_memory_comes_back() -> None:
    from mlx_kontext.backend import mx

    mx.clear_cache()
    before = mx.get_active_memory()
    watched = Watched(process=False)
    with watched.engine as engine:
        engine.edit(SAMPLE, PROMPT, num_inference_steps=1)
        assert mx.get_active_memory() > before + 10 * 2**20
        engine.unload()
        watched.until(lambda e: isinstance(e, Unloaded))
        assert mx.get_active_memory() < before + 2**20 and mx.get_cache_memory() < 2**20


def test_interrupting_a_caller_cancels_his_edit() -> None:
    watched = Watched(process=False)
    with watched.engine as engine:

        def interrupt() -> None:
            watched.until(lambda e: isinstance(e, Progress) and e.index > 0)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            engine.edit(SAMPLE, PROMPT, num_inference_steps=1000)
        thread.join()
        watched.until(lambda e: isinstance(e, Cancelled))


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_closing_from_within_an_event(process: bool) -> None:
    """Also from the heartbeat's: nobody waits for himself."""
    closed = threading.Event()

    def put(event: Event) -> None:
        if isinstance(event, Progress) and event.elapsed:
            engine.close()
        if isinstance(event, Closed):
            closed.set()

    engine = Engine("demo", process=process, on_event=put)
    # large, so that a step takes longer than the heartbeat waits; between quick steps it has nothing to tell
    engine.submit(SAMPLE, PROMPT, num_inference_steps=1000, width=512, height=512)
    assert closed.wait(60)


def test_a_caller_that_fails_does_not_stop_the_work(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise ValueError("the caller's")

    with Engine("demo", process=True, on_event=fail) as engine:
        assert isinstance(engine.edit(SAMPLE, PROMPT, num_inference_steps=1), EditResult)
    assert "on_event failed on a Loading" in caplog.text


def test_overhead(pipe: KontextPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """Milliseconds an edit more than from the pipeline itself; the fastest of seven of each, in turns."""
    options = {"image": SAMPLE, "prompt": PROMPT, "seed": 1, "num_inference_steps": 1}

    def seconds(call: Callable[..., object]) -> float:
        started = time.perf_counter()
        call(**options)
        return time.perf_counter() - started

    with Engine("demo") as thread, Engine("demo", process=True) as process:
        calls = {"pipeline": pipe, "thread": thread.edit, "process": process.edit}
        for call in calls.values():
            call(**options)
        times = {name: [] for name in calls}
        for _ in range(7):
            for name, call in calls.items():
                times[name].append(seconds(call))
    best = {name: 1000 * min(values) for name, values in times.items()}
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    with capsys.disabled():
        print(f"\nms an edit of one step, best {best}, median {median}")
    assert best["process"] < 50 + 2 * best["pipeline"]  # the figures are for people, this for a mistake
