"""A worker process that makes no pictures and goes wrong on purpose, once: FAULT at STAGE, unless the file MARK exists.

It knows the frames of mlx_kontext.wire but shares no code with it, and starts in a few hundredths of a second.
"""

import json
import os
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

FAULT, STAGE, MARK = sys.argv[1], sys.argv[2], Path(sys.argv[3])
SIDE, STEPS = 8, 4
INFO = {
    "name": "fake",
    "quantization": None,
    "dtype": "float32",
    "device": "cpu",
    "sizes": [[SIDE, SIDE]],
    "defaults": {"num_inference_steps": STEPS, "guidance_scale": 2.5},
    "identity": {"vae": "v"},
    "weights": {"vae": 1},
    "peak": 1,
    "budget": 2,
    "keep_all": True,
}
lock = threading.Lock()
hanging = threading.Event()


def frame(kind: str, *blobs: bytes, **values: object) -> bytes:
    text = json.dumps({"kind": kind, "values": values, "blobs": [len(blob) for blob in blobs]}).encode()
    check = zlib.crc32(b"".join(blobs))
    return struct.pack("<4sIII", b"mkf1", len(text), zlib.crc32(text), check) + text + b"".join(blobs)


def write(data: bytes) -> None:
    with lock:
        os.write(1, data)


def stage(name: str, unfinished: bytes = b"") -> None:
    """Go wrong here if it is the turn of here; unfinished: half of a frame that is on its way."""
    if name != STAGE or MARK.exists():
        return
    MARK.touch()
    time.sleep(0.02)  # so that what was written is read before the end is noticed
    if unfinished:
        write(unfinished)
    print("last words \x1b]52;c;evil\x07 hf_abcdefgh12345", file=sys.stderr, flush=True)
    match FAULT:
        case "SIGABRT" | "SIGSEGV" | "SIGKILL":
            os.kill(os.getpid(), getattr(signal, FAULT))
        case "exit":
            os._exit(0)
        case "hang":
            hanging.set()
        case "garbage":
            write(b"Loading weights: 100%|#########| 24/24\n")
    time.sleep(60)


def beat() -> None:
    while not hanging.wait(0.05):
        write(frame("Beat"))


def read(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        os._exit(0)
    return data


def command() -> tuple[str, dict]:
    _, length, *_ = struct.unpack("<4sIII", read(16))
    body = json.loads(read(length))
    read(sum(body["blobs"]))
    return body["kind"], body["values"]


def progress(number: int, index: int) -> bytes:
    return frame(
        "Progress",
        id=number,
        phase="denoising",
        index=index,
        total=STEPS,
        seed=1,
        seconds=0.1,
        eta=0.5,
        elapsed=0.0,
        memory=1,
        peak=1,
        notices=[],
        preview=None,
    )


def done(number: int, request: dict) -> bytes:
    result = {
        "image": {"mode": "RGB", "size": [SIDE, SIDE], "blob": 0},
        "request": request["words"] | {"seed": 1},
        "seed": 1,
        "seconds": 0.5,
        "model": {"name": "fake"},
        "latents": {"shape": [1, 1, 4], "blob": 1},
        "notices": ["made up"],
        "vae": "v",
        "pixels": "",
    }
    return frame("Done", bytes(range(192)), struct.pack("<4f", 1, 2, 3, 4), id=number, result=result, left=0)


stage("starting")
threading.Thread(target=beat, daemon=True).start()
write(frame("Loading", model=command()[1]["model"]))
stage("loading")
write(frame("Ready", info=INFO))
threading.Timer(0.1, stage, ["idle"]).start() if STAGE == "idle" else None
while True:
    kind, values = command()
    if kind != "Edit":
        continue
    stage("taking")
    write(frame("Started", id=values["id"]))
    stage("started")
    for index in range(1, STEPS + 1):
        write(progress(values["id"], index))
        if index == 2:
            stage("denoising")
    picture = done(values["id"], values["request"])
    stage("sending", picture[: len(picture) // 2])
    write(picture)
