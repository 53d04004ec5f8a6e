"""Names become folders, or one line that says what to type; the network is never touched by surprise."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

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


def response_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "message\nof several lines")
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            errors.GatedRepoError,
            rf"gated: accept its licence at https://huggingface\.co/{REPO}, then type: hf auth login",
        ),
        (errors.RepositoryNotFoundError, "the hub knows no"),
        (errors.RevisionNotFoundError, "no revision"),
        (errors.LocalEntryNotFoundError, r"not on this machine \(34 GB\).*hf auth login.*hf download"),
        (errors.OfflineModeIsEnabled, "not on this machine"),
        (errors.HfHubHTTPError, "could not be downloaded: message; try again"),
        (OSError, "could not be downloaded"),
    ],
)
def test_what_the_hub_says_becomes_a_next_step(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise response_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=told) as caught:
        hub.find_model(REPO)
    assert "\n" not in str(caught.value)


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def answer(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert hub.find_model("owner/model", local_files_only=True, revision="abc", token="t") == tmp_path
    assert (asked["name"], asked["local_files_only"], asked["revision"], asked["token"]) == (
        "owner/model",
        True,
        "abc",
        "t",
    )
    patterns = asked["allow_patterns"]
    from fnmatch import fnmatch

    def wanted(path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in patterns)

    assert wanted("transformer/diffusion_pytorch_model-00001-of-00003.safetensors") and wanted(
        "tokenizer_2/spiece.model"
    )
    assert wanted("LICENSE.md") and wanted("tokenizer/merges.txt")
    assert (
        not wanted("flux1-kontext-dev.safetensors") and not wanted("ae.safetensors") and not wanted("transformer/x.bin")
    )


def test_a_downloaded_model_is_found_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real huggingface_hub on a cache laid out as it lays it out: links in snapshots/ into blobs/."""
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
    import functools

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    )
    assert hub.find_model("owner/model", local_files_only=True) == snapshot

    from mlx_kontext import KontextPipeline

    assert KontextPipeline.from_pretrained("owner/model", local_files_only=True)(
        prompt="a red circle", num_inference_steps=1
    )
    with pytest.raises(ModelNotFound, match="owner/other is not on this machine; hf download"):
        hub.find_model("owner/other", local_files_only=True)
