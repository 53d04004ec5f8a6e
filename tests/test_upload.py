"""Nothing of FLUX.1 [dev] leaves this machine without card, licence, notice and a yes; against a server that plays the hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import GOOD, LICENCE, OTHER, FakeHub, client_of
from huggingface_hub import metadata_load

from mlx_kontext import CheckpointError, ModelNotFound, RequestError, card, hub
from mlx_kontext.hub import demo_folder

# huggingface_hub sends files in a way that its HTTP library calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NOTICE = (
    "The FLUX.1 [dev] Model is licensed by Black Forest Labs Inc. under the FLUX.1 [dev] Non-Commercial License. "
    "Copyright Black Forest Labs Inc. IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM ARISING FROM "
    "USE OF THIS MODEL."
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "cache").mkdir()
    with client_of(FakeHub(), tmp_path / "cache", monkeypatch) as fake:
        monkeypatch.setenv("HF_TOKEN", GOOD)
        yield fake


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo as a folder of its own, under its own licence."""
    shutil.copytree(demo_folder(), tmp_path / "demo", ignore=shutil.ignore_patterns("__*"))
    return tmp_path / "demo"


@pytest.fixture
def derived(demo: Path) -> Path:
    """A folder that counts as made from FLUX.1 Kontext [dev]: no card of ours, quantized, the licence beside it."""
    folder = demo.rename(demo.parent / "FLUX.1-Kontext-dev-mlx-4bit")
    (folder / "README.md").write_text("---\nlicense: other\nlibrary_name: diffusers\n---\n# FLUX.1 Kontext [dev]\n")
    (folder / "LICENSE.md").write_text(LICENCE)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


def yes(_: str) -> bool:
    return True


def test_card_licence_and_notice_go_along(fake: FakeHub, derived: Path) -> None:
    asked: list[str] = []

    def ask(question: str) -> bool:
        asked.append(question)
        assert not fake.seen and not (derived / "NOTICE.txt").exists()
        return True

    assert hub.upload(derived, "me/FLUX.1-Kontext-dev-mlx-4bit", ask=ask).endswith("me/FLUX.1-Kontext-dev-mlx-4bit")
    (question,) = asked
    assert "(private)" in question and "Non-Commercial" in question and "NOTICE.txt, README.md" in question
    sent = fake.repos["me/FLUX.1-Kontext-dev-mlx-4bit"]
    assert fake.settings["me/FLUX.1-Kontext-dev-mlx-4bit"] == {"visibility": "private"}
    assert sent["LICENSE.md"].decode() == LICENCE and sent["NOTICE.txt"].decode().startswith(NOTICE + "\n")
    assert "This model has been modified: quantized to 4 bits (group 64)" in sent["NOTICE.txt"].decode()
    fields = metadata_load(derived / "README.md")
    assert sent["README.md"] == (derived / "README.md").read_bytes()
    assert {key: fields[key] for key in ("library_name", "base_model", "base_model_relation")} == {
        "library_name": "mlx",
        "base_model": "black-forest-labs/FLUX.1-Kontext-dev",
        "base_model_relation": "quantized",
    }
    assert (fields["license"], fields["license_name"], fields["license_link"], fields["pipeline_tag"]) == (
        "other",
        "flux-1-dev-non-commercial-license",
        "LICENSE.md",
        "image-to-image",
    )
    text = sent["README.md"].decode()
    for words in ("Not an official product", "non-commercial use", "content filters, or a review", "made by AI"):
        assert words in text
    assert sent["vae/model.safetensors"] == (derived / "vae" / "model.safetensors").read_bytes()
    assert "selftest.json" not in sent
    assert card.papers(derived) == {}  # a second upload changes nothing


def test_public_means_gated(fake: FakeHub, derived: Path) -> None:
    assert hub.upload(derived, "me/kontext-4bit", ask=yes, private=False)
    assert fake.settings["me/kontext-4bit"] == {"visibility": "public", "gated": "auto"}
    order = [path for _, path in fake.seen]
    assert order.index("/api/models/me/kontext-4bit/commit/main") < order.index("/api/models/me/kontext-4bit/settings")
    with pytest.raises(RequestError, match="exists and is public"):
        hub.upload(derived, "me/kontext-4bit", ask=yes)


def test_no_is_no(fake: FakeHub, derived: Path) -> None:
    before = {path: path.read_bytes() for path in derived.rglob("*") if path.is_file()}
    assert hub.upload(derived, "me/kontext", ask=lambda _: False) is None
    assert not fake.seen and before == {path: path.read_bytes() for path in derived.rglob("*") if path.is_file()}


def test_the_demo_keeps_its_own_card(fake: FakeHub, demo: Path) -> None:
    text = (demo / "README.md").read_bytes()
    assert hub.upload(demo, "me/kontext-demo", ask=lambda question: "FLUX.1" not in question)
    sent = fake.repos["me/kontext-demo"]
    assert sent["README.md"] == text and "NOTICE.txt" not in sent and "LICENSE.md" not in sent


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def make_full_size(folder: Path) -> None:
    """Somebody calls the real weights Apache-2.0."""
    (folder / "README.md").write_text("---\nlibrary_name: mlx\nlicense: apache-2.0\n---\n")
    (folder / "LICENSE.md").unlink()
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {
        "num_layers": 19,
        "num_attention_heads": 24,
    }
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


HEADER = "\x40" + "\0" * 7 + '{"__metadata__": {"from": "/home/jane/model"}}'
REFUSED = {
    "no licence": (
        remove("LICENSE.md"),
        "has no LICENSE.md, and these weights may not be passed on without it; copy it",
    ),
    "another licence": (write("LICENSE.md", "MIT License"), "holds no Attribution Notice"),
    "called Apache": (make_full_size, "has no LICENSE.md"),
    "not ours": (write("model_index.json", '{"_class_name": "FluxKontextPipeline"}'), "is no model folder of ours"),
    "half a model": (remove("vae/model.safetensors"), "1 files missing"),
    "odd card": (write("README.md", "---\nlicense: [\n---\n"), "--- lines are not readable"),
    "no card": (write("README.md", "---\nlicense: mit\n---\n"), "needs library_name: mlx and a license"),
    "a token": (write("tokenizer/vocab.txt", f"x {GOOD} y"), "holds an access token or a path of somebody's home"),
    "a path in weights": (write("vae/model.safetensors", HEADER), "holds an access token or a path"),
    "a path": (write("scheduler/x.json", '"/Users/jane/models"'), "holds an access token or a path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_be_passed_on(fake: FakeHub, derived: Path, case: str) -> None:
    spoil, told = REFUSED[case]
    spoil(derived)
    with pytest.raises(CheckpointError, match=told.replace("(", r"\(")) as caught:
        hub.upload(derived, "me/kontext", ask=lambda _: pytest.fail("asked"))
    assert "\n" not in str(caught.value) and not fake.seen


@pytest.mark.parametrize(
    "name", ["black-forest-labs/x", "Black-Forest-Labs/x", "me/kontext-official", "kontext", "a/b/c"]
)
def test_names_that_look_official(fake: FakeHub, derived: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot be the name"):
        hub.upload(derived, name, ask=yes)


def test_a_token_that_may_not_write(fake: FakeHub, derived: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"your token may not upload me/kontext \(403\); a token with write access"):
        hub.upload(derived, "me/kontext", ask=yes, token=OTHER)
