"""Requests refuse what cannot work, in one line, and survive JSON."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_kontext.edit import EditRequest, EditResult, Step, pixels_sha256
from mlx_kontext.errors import KontextError, RequestError

PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
LATENTS = np.arange(64, dtype=np.float32).reshape(1, 1, 64)


def result(**changes) -> EditResult:
    request = EditRequest("make it snow", image="/home/ann/cat.jpg", seed=7, num_inference_steps=28)
    values = {
        "image": PICTURE,
        "request": request,
        "seed": 7,
        "seconds": 1.5,
        "model": {"name": "demo"},
        "latents": LATENTS,
    }
    return EditResult(**{**values, **changes})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": ["a"]}, "the prompt is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, r"whole number from 0 to 2\*\*64 - 1"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"seed": True}, "seed is True"),
        ({"seed": "7"}, "seed is '7'"),
        ({"seed": [1, "2"]}, "seed is '2'"),
        ({"seed": []}, "seed is an empty list"),
        ({"seed": [3, 3]}, "each seed may appear once"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be a whole number from 1 to 1000"),
        ({"num_inference_steps": 28.0}, "num_inference_steps is 28.0"),
        ({"max_sequence_length": 513}, "from 1 to 512"),
        ({"width": 512}, "width is 512, height is None; give both or neither"),
        ({"height": 512}, "give both or neither"),
        ({"width": 0, "height": 512}, "width is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": -0.5}, "at least 0"),
        ({"guidance_scale": "2.5"}, "guidance_scale is '2.5'"),
        ({"true_cfg_scale": 0.5, "negative_prompt": "x"}, "at least 1"),
        ({"true_cfg_scale": 2.0}, "they work only together"),
        ({"negative_prompt": "blurry"}, "they work only together"),
        ({"negative_prompt": 5, "true_cfg_scale": 2.0}, "negative_prompt is 5; it must be text"),
        ({"draft": "no"}, "draft is 'no'; it must be True or False"),
        ({"auto_resize": 0, "image": "a.png"}, "auto_resize is 0; it must be True or False"),
        ({"auto_resize": False}, "auto_resize=False needs an input image"),
        ({"latents": LATENTS, "seed": [1, 2]}, "give one seed with them"),
    ],
)
def test_what_cannot_work_is_refused(values, words):
    with pytest.raises(RequestError, match=words) as caught:
        EditRequest(**{"prompt": "make it snow", **values})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, KontextError) and isinstance(caught.value, ValueError)


def test_what_can_work_is_accepted():
    EditRequest("x", seed=0)
    EditRequest("x", seed=2**64 - 1, guidance_scale=0, num_inference_steps=1000, max_sequence_length=1)
    EditRequest("x", seed=np.int64(3), width=np.int32(512), height=512, guidance_scale=np.float32(2.5))
    EditRequest("x", negative_prompt="", true_cfg_scale=1.5)
    EditRequest("x", image=PICTURE, auto_resize=False)


def test_seeds():
    assert EditRequest("x").seeds == ()
    assert EditRequest("x", seed=7).seeds == (7,)
    assert EditRequest("x", seed=[3, 1]).seeds == (3, 1)
    assert EditRequest("x", seed=range(3)).seeds == (0, 1, 2)


def test_of_takes_the_words_of_a_call():
    assert EditRequest.of("cat.jpg", "make it snow", seed=7) == EditRequest("make it snow", image="cat.jpg", seed=7)
    request = EditRequest("make it snow")
    assert EditRequest.of(request) is request
    with pytest.raises(RequestError, match="the prompt is empty"):
        EditRequest.of("cat.jpg")
    for again in ({"prompt": "y"}, {"seed": 1}):
        with pytest.raises(TypeError, match=r"use dataclasses\.replace"):
            EditRequest.of(request, **again)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generator", "pass seed=7"),
        ("num_images_per_prompt", r"seed=\[1, 2, 3\]"),
        ("callback_on_step_end", "iterate over"),
        ("steps", "it is called num_inference_steps"),
        ("guidance_scal", "did you mean 'guidance_scale'"),
        ("zebra", "unexpected keyword 'zebra'$"),
    ],
)
def test_of_names_our_word_for_a_foreign_one(name, words):
    with pytest.raises(TypeError, match=words):
        EditRequest.of("cat.jpg", "x", **{name: 1})


def test_every_field_survives_json():
    full = EditRequest(
        prompt='say "hi"\n🙂',
        image="cat.jpg",
        seed=[1, 2**64 - 1],
        num_inference_steps=4,
        guidance_scale=0.1,
        width=512,
        height=768,
        negative_prompt="blurry",
        true_cfg_scale=2.0,
        max_sequence_length=77,
        auto_resize=False,
        draft=True,
        loras=["a.safetensors:0.5", ("b.safetensors", -1)],
    )
    same_as_default = [f.name for f in dataclasses.fields(full) if getattr(full, f.name) == f.default]
    assert same_as_default == ["latents"]  # a new field must be added here
    assert EditRequest.from_json(json.loads(json.dumps(full.to_json()))) == full


def test_defaults_are_left_out_and_paths_become_text():
    assert EditRequest("x").to_json() == {"prompt": "x"}
    assert EditRequest("x", image=Path("a") / "b.png").to_json() == {"prompt": "x", "image": "a/b.png"}
    assert EditRequest("x", seed=(1, 2)).to_json() == {"prompt": "x", "seed": [1, 2]}
    assert EditRequest("x", seed=range(2)).to_json() == {"prompt": "x", "seed": [0, 1]}


def test_numbers_of_numpy_survive_json():
    request = EditRequest("x", seed=[np.int64(3)], width=np.int32(512), height=512, guidance_scale=np.float32(2.5))
    again = EditRequest.from_json(json.loads(json.dumps(request.to_json())))
    assert (again.seed, again.width, again.guidance_scale) == ([3], 512, 2.5)


def test_pictures_and_latents_in_memory_are_asked_for_again():
    request = EditRequest("x", image=PICTURE, latents=LATENTS)
    values = request.to_json()
    assert values["image_sha256"] == pixels_sha256(PICTURE) and len(values["latents_sha256"]) == 64
    assert values == EditRequest("x", image=np.asarray(PICTURE), latents=LATENTS).to_json()
    assert values == EditRequest("x", image=result(), latents=LATENTS).to_json()
    with pytest.raises(RequestError, match="pass them again as latents="):
        EditRequest.from_json(values)
    with pytest.raises(RequestError, match="pass it again as image="):
        EditRequest.from_json(values, latents=LATENTS)
    again = EditRequest.from_json(values, image=PICTURE, latents=LATENTS)
    assert again.image is PICTURE and again.latents is LATENTS and again == request
    assert EditRequest.from_json({"prompt": "x", "image": "a.png"}, image="b.png").image == "b.png"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "incomplete or malformed"),
        ({"prompt": "x", "zebra": 1}, "unknown keys in a stored request: zebra"),
        ({"prompt": 5}, "the prompt is empty"),
        ({"prompt": "x", "seed": {"a": 1}}, "seed is"),
        ({"prompt": "x", "latents": [1]}, "incomplete or malformed"),
        ({"prompt": "x", "draft": "yes"}, "True or False"),
    ],
)
def test_a_stored_request_is_checked(values, words):
    before = dict(values)
    with pytest.raises(RequestError, match=words):
        EditRequest.from_json(values)
    assert values == before


def test_pixels_sha256_tells_pictures_apart():
    reshaped = Image.frombytes("RGB", (32, 8), PICTURE.tobytes())
    assert pixels_sha256(PICTURE) == pixels_sha256(PICTURE.copy()) == pixels_sha256(np.asarray(PICTURE))
    assert len({pixels_sha256(p) for p in (PICTURE, reshaped, PICTURE.convert("L"), PICTURE.rotate(90))}) == 4


def test_a_result_describes_itself_without_folder_names():
    record = result().to_json()
    assert record == {
        "request": {"prompt": "make it snow", "image": "cat.jpg", "seed": 7, "num_inference_steps": 28},
        "width": 16,
        "height": 16,
        "model": {"name": "demo"},
    }
    draft = result(request=EditRequest("x", draft=True))
    assert draft.to_json()["draft"] is True
    assert draft.images == [PICTURE] and (draft.width, draft.height) == (16, 16)


def test_a_result_saves_itself(tmp_path):
    from mlx_kontext.provenance import read_record

    path = result().save(str(tmp_path / "a.png"))
    assert path == tmp_path / "a.png" and read_record(path) == result().to_json()
    result().save(path)
    with pytest.raises(RequestError, match="exists"):
        result().save(path, overwrite=False)


def test_previews():
    values = {"index": 1, "total": 2, "seed": 7, "seconds": 0.1, "eta": 0.1, "sigma": 0.5}
    assert Step(**values, result=result()).preview() is PICTURE
    assert Step(**values, _preview=lambda: PICTURE).preview() is PICTURE
    with pytest.raises(RequestError, match="came without a preview"):
        Step(**values).preview()
