"""Frames: what is sent arrives, and whatever is not exactly a message is refused in one way."""

import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_kontext import CheckpointError, EditRequest, EditResult, KontextError, SafetyRefusal
from mlx_kontext.edit import Lora
from mlx_kontext.messages import (
    Beat,
    Cancel,
    Cancelled,
    Done,
    Edit,
    Failed,
    Load,
    Loading,
    ModelInfo,
    Progress,
    Ready,
    Started,
)
from mlx_kontext.photo import Photo
from mlx_kontext.wire import WireError, read_message, to_frame

PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 255, (5, 7, 3), np.uint8))
LATENTS = np.random.RandomState(1).standard_normal((1, 3, 4)).astype(np.float32)
INFO = ModelInfo(
    "m", "q4m", "bfloat16", "metal", ((96, 96), (64, 96)), {"num_inference_steps": 8, "x": 2.5}, {}, {}, 1, 2, True
)
EVERYTHING = EditRequest(
    prompt="caf\u00e9 🍊",
    seed=[1, 2**64 - 1],
    num_inference_steps=3,
    guidance_scale=1.1,
    width=96,
    height=64,
    negative_prompt="\x1b]",
    true_cfg_scale=1.7,
    max_sequence_length=24,
    auto_resize=False,
    draft=True,
    loras=[Lora("a.safetensors", 0.3, "0" * 64)],
    image="/pictures/\udcff.png",
)
RESULT = EditResult(
    PICTURE, dataclasses.replace(EVERYTHING, seed=1), 1, 0.1, {"name": "m"}, LATENTS, ("a", "b"), "v", "p"
)
MESSAGES = [
    Load("demo", "float32", 4, {"vae": "/x"}, None, False),
    Load(quantize="q4m"),
    Edit(1, EVERYTHING, 0.5, 100),
    Cancel(1),
    Loading("demo"),
    Ready(INFO),
    Started(1),
    Progress(None, "loading"),
    Progress(1, "denoising", 1, 2, 2**64 - 1, 0.1, 0.2, 0.3, 4, 5, ("n",), PICTURE),
    Cancelled(1),
    Failed(None, "CheckpointError", "words", 1, "trace"),
    Beat(),
]


def sent(message: Any, request: EditRequest | None = None) -> Any:
    stream = io.BytesIO(b"".join(to_frame(message)))
    arrived = read_message(exactly(stream), request)
    assert stream.read() == b""
    return arrived


def exactly(stream: io.BytesIO) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    return read


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_what_is_sent_arrives(message: Any) -> None:
    assert sent(message) == message


def test_every_field_of_a_request_travels() -> None:
    """A new field that holds more than JSON must be taught to `wire`."""
    plain = {f.name for f in dataclasses.fields(EditRequest) if getattr(EVERYTHING, f.name) == f.default}
    assert plain == {"latents"}
    request = dataclasses.replace(EVERYTHING, seed=np.int64(3), guidance_scale=np.float32(0.1), latents=LATENTS)
    arrived = sent(Edit(1, request)).request
    assert arrived == request and np.array_equal(arrived.latents, LATENTS)


def test_pictures_travel_as_they_are() -> None:
    photo = sent(Edit(1, EditRequest("x", image=Photo(PICTURE, ("turned",))))).request.image
    assert np.array_equal(photo.image, PICTURE) and photo.notices == ("turned",)
    earlier = sent(Edit(1, EditRequest("x", image=RESULT))).request.image
    assert np.array_equal(earlier.image, PICTURE) and np.array_equal(earlier.latents, LATENTS)
    assert (earlier.vae, earlier.pixels) == ("v", "p")
    for mode in ("L", "RGBA"):
        assert sent(Progress(1, "x", preview=PICTURE.convert(mode))).preview == PICTURE.convert(mode)
    assert sent(Progress(1, "x", preview=PICTURE.convert("P"))).preview.mode == "RGB"


def test_a_result_gets_the_data_of_its_request_back() -> None:
    noise = LATENTS + 1
    request = dataclasses.replace(EVERYTHING, seed=1, image=Photo(PICTURE), latents=noise)
    arrived = sent(Done(1, dataclasses.replace(RESULT, request=request), 2), request)
    assert arrived.left == 2 and arrived.result.request.image is request.image
    assert arrived.result.request == request and arrived.result.request.latents is noise
    assert np.array_equal(arrived.result.latents, LATENTS) and np.array_equal(arrived.result.image, PICTURE)
    assert dataclasses.replace(arrived.result, request=request, image=PICTURE) == dataclasses.replace(
        RESULT, request=request
    )
    with pytest.raises(WireError, match="a result and no edit under way"):
        sent(Done(1, RESULT))


def forged(body: Any, blobs: bytes = b"", magic: bytes = b"mkf1") -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack("<4sIII", magic, len(text), zlib.crc32(text), zlib.crc32(blobs)) + text + blobs


@pytest.mark.parametrize(
    "data",
    [
        b"Loading weights: 100%|####|\n",
        forged({}, magic=b"mkf2"),
        forged(b"\xff"),
        forged(b"[" * 100_000),
        forged([]),
        forged({"kind": "Exec", "values": {}, "blobs": []}),
        forged({"kind": "Closed", "values": {}, "blobs": []}),  # the engine's own
        forged({"kind": "Started", "values": {}, "blobs": []}),
        forged({"kind": "Started", "values": {"id": "1"}, "blobs": []}),
        forged({"kind": "Started", "values": {"id": True}, "blobs": []}),
        forged({"kind": "Started", "values": {"id": 1, "more": 2}, "blobs": []}),
        forged({"kind": "Started", "values": {"id": 1}, "blobs": [2**40]}),
        forged({"kind": "Started", "values": {"id": 1}, "blobs": [-1]}),
        forged({"kind": "Started", "values": {"id": 1}, "blobs": [3]}, b"abcd"[:3] + b""),
        forged(b'{"kind": "Started", "values": {"id": NaN}, "blobs": []}'),
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    if b'"blobs": [3]' in data:
        data = data[:-1] + b"x"  # a blob that is not what the checksum says
    with pytest.raises(WireError):
        read_message(exactly(io.BytesIO(data)))


def test_pictures_that_are_too_short_or_of_no_kind_are_refused() -> None:
    text = json.loads(to_frame(MESSAGES[8])[1])
    pixels = PICTURE.tobytes()
    for change in ({"size": [7, 6]}, {"size": [-7, -5]}, {"size": [7]}, {"mode": "F"}, {"blob": 1}, {"more": 1}):
        body = text | {"values": text["values"] | {"preview": text["values"]["preview"] | change}}
        with pytest.raises(WireError):
            read_message(exactly(io.BytesIO(forged(body, pixels))))
    assert read_message(exactly(io.BytesIO(forged(text, pixels)))).preview == PICTURE


def test_damage_is_never_anything_else() -> None:
    """Bits turned, bytes lost, and damage with a matching checksum: refused, or a whole message of a known kind."""
    random = np.random.RandomState(0)
    frames = [to_frame(message) for message in [*MESSAGES, Done(1, RESULT)]]
    outcomes = {"refused": 0, "ended": 0, "read": 0}
    for _ in range(3000):
        head, *rest = frames[random.randint(len(frames))]
        body = bytearray(b"".join(rest))
        for _ in range(random.randint(1, 4)):
            body[random.randint(len(body))] = random.randint(256)
        text, blobs = bytes(body[: len(rest[0])]), bytes(body[len(rest[0]) :])
        data = forged(text, blobs) if random.randint(2) else head + text + blobs
        data = data[: random.randint(len(data))] if random.randint(4) == 0 else data
        try:
            message = read_message(exactly(io.BytesIO(data)), EVERYTHING)
            outcomes["read"] += 1
            assert type(message).__name__ in {type(m).__name__ for m in [*MESSAGES, Done(1, RESULT)]}
        except WireError:
            outcomes["refused"] += 1
        except EOFError:
            outcomes["ended"] += 1
    assert outcomes["refused"] > 1000 and outcomes["ended"] > 200


def test_errors_arrive_with_their_class() -> None:
    assert type(Failed(1, "CheckpointError", "words").error()) is CheckpointError
    refusal = Failed(1, "SafetyRefusal", "prompt refused: a reason", 6).error()
    assert isinstance(refusal, SafetyRefusal) and (refusal.stage, refusal.reason) == ("prompt", "a reason")
    for name in ("KontextError", "ValueError", "os", "__builtins__"):
        assert type(Failed(1, name, "words").error()) is KontextError
