"""Names become folders, or one line that says what to type; the network is never touched by surprise."""

from pathlib import Path

import huggingface_hub
import pytest

from mlx_kontext import CheckpointError, ModelNotFound, hub

REPO = hub.KONTEXT


def test_demo_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (hub.find_model("demo") / "model_index.json").is_file()
    assert hub.find_model(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert hub.find_model(f"~/{tmp_path.name}") == tmp_path
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # a clone that is not installed
    assert hub.demo_folder().parts[-3:] == ("assets", "demo", "model")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nosuch",
        "./nosuch",
        "/no/such/folder",
        "a/b/c",
        "../x/y",
        "owner/na me",
        "owner/",
        "~nosuch/x",
        "x" * 5000,
        "a\0b",
    ],
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(ModelNotFound, match="expected demo, a folder that exists, or a hub id"):
        hub.find_model(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        hub.find_model(tmp_path / "model.safetensors")


def test_a_model_that_is_not_here_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelNotFound, match=rf"not on this machine \(34 GB\).*hf auth login, then: .*models pull {REPO}$"
    ):
        hub.find_model(REPO, local_files_only=True)
    with pytest.raises(ModelNotFound, match=r"type: mlx-kontext models pull owner/other --revision v2$"):
        hub.find_model("owner/other", local_files_only=True, revision="v2")
    with pytest.raises(ModelNotFound, match="is not on this machine"):
        hub.find_model("owner/other", local_files_only=True, revision="../../../etc")


def test_a_downloaded_model_is_found_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache laid out as huggingface_hub lays it out: links in snapshots/ into blobs/."""
    commit = "0" * 40
    repo = tmp_path / "models--owner--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir()
    for i, path in enumerate(p for p in hub.demo_folder().rglob("*") if p.is_file()):
        (repo / "blobs" / str(i)).write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(hub.demo_folder())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repo / "blobs" / str(i))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.find_model("owner/model", local_files_only=True) == snapshot
    assert hub.find_model("owner/model", local_files_only=True, revision=commit) == snapshot

    from mlx_kontext import KontextPipeline

    assert KontextPipeline.from_pretrained("owner/model", local_files_only=True)(
        prompt="a red circle", num_inference_steps=1
    )
    (snapshot / "vae" / "config.json").unlink()
    with pytest.raises(
        ModelNotFound, match=r"only in part \(1 missing: vae/config.json\); type: mlx-kontext models pull"
    ):
        hub.find_model("owner/model", local_files_only=True)
