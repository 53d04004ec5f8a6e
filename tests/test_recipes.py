"""Recipes survive TOML, refuse what cannot work, and name files that cannot lead astray."""

import random
import tomllib
from pathlib import Path

import pytest
from power import made, picture

from mlx_kontext import EditRequest, EditSession
from mlx_kontext.edit import Lora
from mlx_kontext.errors import RequestError
from mlx_kontext.recipes import Recipe, fill

STRANGE = [
    'say "hi"',
    "a\\b\\n\\u0041",
    "line\nline\r\n\ttab\b\f",
    "'''three\"\"\"",
    "\x00\x01\x1b]52;c;aGk=\x07\x7f\x85\x9b",
    "\u202eright to left\u2066\u200b\ufeff\u2028",
    "🙂 \U000e0041 日本語 ü é e\u0301",
    "# no comment",
    "[[step]]",
    " leading and trailing ",
]


def test_every_field_survives() -> None:
    requests = [EditRequest(prompt, image=picture(0), seed=2**64 - 1) for prompt in STRANGE]
    requests += [
        EditRequest(
            "x",
            image=picture(0),
            num_inference_steps=4,
            guidance_scale=1e-07,
            width=512,
            height=768,
            negative_prompt=STRANGE[4],
            true_cfg_scale=1e16,
            max_sequence_length=77,
            auto_resize=False,
            draft=True,
            loras=[Lora('a "b".safetensors', -0.5, "0" * 64), "c.safetensors"],
        )
    ]
    steps = tuple({k: v for k, v in r.to_json().items() if k != "image_sha256"} for r in requests)
    text = Recipe(steps, 'mo"del\n').to_toml()
    assert tomllib.loads(text)["step"] == list(steps)
    assert all(c.isprintable() or c == "\n" for c in text)  # `cat` of a stranger's recipe steers no terminal


def test_any_text_survives(tmp_path: Path) -> None:
    draw = random.Random(3)
    for _ in range(300):
        letters = [draw.choice([draw.randrange(1, 128), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])]
        letters += [draw.choice([draw.randrange(1, 300), draw.randrange(0xE000, 0x110000)]) for _ in range(20)]
        prompt = "x" + "".join(map(chr, letters))
        path = Recipe(({"prompt": prompt},)).write(tmp_path / "r.toml", overwrite=True)
        assert Recipe.read(path).steps[0]["prompt"] == prompt


def test_of_a_session(tmp_path: Path) -> None:
    with EditSession.create(tmp_path / "s", picture(0)) as session:
        with pytest.raises(RequestError, match="picture 0 is no edit; a recipe needs one"):
            session.recipe()
        session.append(made(1))
        session.append(made(2))
        recipe = session.recipe()
        assert [step["seed"] for step in recipe.steps] == [1, 2] and recipe.model == "none"
        assert session.recipe(1).steps == recipe.steps[:1]
        path = recipe.write(tmp_path / "r.toml")
        assert Recipe.read(path) == recipe
        with pytest.raises(RequestError, match="exists; choose another name"):
            recipe.write(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "says recipe = None; expected 1"),
        ("recipe = 2", "says recipe = 2; expected 1: is it a recipe, of this version?"),
        ('recipe = "1"', "expected 1"),
        ("recipe = 1", r"has no \[\[step\]\]; expected one or more"),
        ("recipe = 1\nstep = 5", r"has no \[\[step\]\]"),
        ("recipe = 1\nstep = [1]", r"has no \[\[step\]\]"),
        ("recipe = 1\nstep = []", "a recipe of 0 steps"),
        ("recipe = 1\nzebra = 1\n[[step]]\nprompt = 'x'", "unknown key zebra; known are recipe, model"),
        ("recipe = 1\nmodel = 3\n[[step]]\nprompt = 'x'", "model is 3; expected text"),
        ("recipe = 1\n[[step]]", "step 1: a stored request is incomplete or malformed"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\n[[step]]\nprompt = ' '", "step 2: the prompt is empty"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nzebra = 1", "step 1: unknown keys in a stored request: zebra"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nseed = [1, 2]", "step 1: a step has one seed, no image and no latents"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nimage = '/etc/passwd'", "no image"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nlatents = [1.0]", "one seed, no image and no latents|malformed"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nseed = 1979-05-27", "seed is"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nguidance_scale = nan", "guidance_scale is nan"),
        ("recipe = 1\n[[step]]\nprompt = 'x'\nnum_inference_steps = 99999", "num_inference_steps is 99999"),
        ("recipe = 1\n" + "[[step]]\nprompt = 'x'\n" * 1001, "a recipe of 1001 steps; expected 1 to 1000"),
        ("recipe = [", "no readable TOML"),
        ("a = " + "[" * 100_000, "no readable TOML"),
        ("#" + "x" * 2**20, "more than a megabyte"),
        (b"recipe = 1 # \xff", "no readable TOML"),
        ('recipe = 1\n"\\u001b]52;c;aGk=\\u0007" = 1\n[[step]]\nprompt = "x"', "unknown key ·]52"),
    ],
)
def test_a_strangers_recipe_is_checked(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match=words) as caught:
        Recipe.read(path)
    assert str(caught.value).isprintable() and "r.toml" in str(caught.value)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot be read .No such file or directory.; check the path"):
        Recipe.read(tmp_path / "r.toml")
    with pytest.raises(RequestError, match=r"cannot be read .Is a directory"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b\\c", "~root", "x" * 500, *STRANGE]
)
def test_a_name_from_the_disk_never_adds_a_folder(name: str, tmp_path: Path) -> None:
    with EditSession.create(tmp_path / "s", picture(0)) as session:
        node = session.append(made(1))
    for template in ("{name}.png", "{prompt}.png"):
        node.request["prompt"] = name or "x"
        filled = fill(template, node, name)
        assert Path(filled).name == filled and filled.isprintable() and filled[0] not in ".~" and len(filled) <= 64
    assert fill("a/{node}-{seed}-{date}.png", node, name).startswith("a/1-1-20")
