"""`mlx-kontext models`, and what it does to the hub's cache, against a server that plays the hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import COMMIT, GOOD, OTHER, UNWANTED, FakeHub, client_of, kontext_repo, sha256

from mlx_kontext import KontextPipeline, cached, cli, hub
from mlx_kontext.errors import ModelNotFound, ResourceError

REPO = hub.KONTEXT
SHARD = "transformer/model-00001-of-00002.safetensors"


@dataclass
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)  # a second before it is tried again
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 65536
    )  # its 10 MB are more than our files have
    with client_of(FakeHub(repos={REPO: kontext_repo()}), cache, monkeypatch) as fake:
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_kontext.config.user_file", lambda: tmp_path / "config.toml")

    def call(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as exited:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return Ran(exited.value.code, captured.out, captured.err)

    return call


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pull_takes_exactly_one_copy_of_everything(fake: FakeHub, cache: Path, run: Run) -> None:
    ran = run("models", "pull")
    folder = Path(ran.out.strip())
    assert ran.code == 0 and folder == cache / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
    assert tree(folder) == set(fake.repos[REPO]) - set(UNWANTED)
    assert all((folder / name).read_bytes() == fake.repos[REPO][name] for name in tree(folder))
    assert not fake.leaked  # no token goes where the hub redirects to
    assert KontextPipeline.from_pretrained(REPO, local_files_only=True)(prompt="a red circle", num_inference_steps=1)

    fake.ranges.clear()
    again = run("models", "pull", REPO, "--json")
    report = json.loads(again.out)
    assert (report["path"], report["commit"], report["revision"]) == (str(folder), COMMIT, "main")
    assert not fake.ranges and "of it here already" in again.err


def test_a_repository_of_single_files(fake: FakeHub, run: Run) -> None:
    fake.repos["me/kontext-single"] = {"flux1-kontext-dev.safetensors": b"1", "ae.safetensors": b"22", "x.gguf": b"3"}
    assert tree(Path(run("models", "pull", "me/kontext-single").out.strip())) == {
        "flux1-kontext-dev.safetensors",
        "ae.safetensors",
    }
    fake.repos["me/pictures"] = {"README.md": b"", "cat.png": b""}
    assert "holds no weights we read" in run("models", "pull", "me/pictures").err


def test_folders_without_an_index_are_whole_if_the_hub_says_so(fake: FakeHub, run: Run) -> None:
    """As mflux saves them: nothing in the folder itself tells what belongs to it."""
    fake.repos["me/kontext-mflux"] = {
        "transformer/0.safetensors": b"1",
        "vae/0.safetensors": b"2",
        "x.safetensors": b"3",
    }
    folder = Path(run("models", "pull", "me/kontext-mflux").out.strip())
    assert tree(folder) == {"transformer/0.safetensors", "vae/0.safetensors"}
    assert hub.find_model("me/kontext-mflux", local_files_only=True) == folder
    (folder / "vae" / "0.safetensors").unlink()
    assert "incomplete, 1 missing" in run("models", "list").out


def test_dry_run_downloads_nothing(fake: FakeHub, cache: Path, run: Run) -> None:
    ran = run("models", "pull", "--dry-run")
    assert ran.code == 0 and SHARD in ran.out and "nothing was downloaded" in ran.err
    assert not set(UNWANTED) & set(ran.out.split())
    report = json.loads(run("models", "pull", "--dry-run", "--json").out)
    wanted = {name: len(data) for name, data in fake.repos[REPO].items() if name not in UNWANTED}
    assert {file["path"]: file["bytes"] for file in report["files"]} == wanted
    assert report["bytes"] == sum(wanted.values()) and report["here"] == 0
    assert not list(cache.iterdir()) and all(path.startswith("/api/") for path in fake.paths())


def test_disk_is_checked_before_the_start(
    fake: FakeHub, cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_kontext.hub.shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    ran = run("models", "pull")
    assert ran.code == 4 and not list(cache.iterdir()) and not fake.ranges
    assert f"needs 9.4 MB more in {cache}, where 1.0 MB are free" in ran.err
    with pytest.raises(ResourceError):
        hub.pull(hub.look_up(REPO))


def test_a_broken_line_is_taken_up_again(fake: FakeHub, run: Run) -> None:
    fake.cut[SHARD] = 1_000_000
    assert run("models", "pull").code == 0
    assert [wanted for path, wanted in fake.ranges if path == SHARD] == ["bytes=0-", "bytes=1000000-"]


def test_a_dead_line_is_given_up(fake: FakeHub, cache: Path, run: Run) -> None:
    fake.dead = True
    ran = run("models", "pull")
    assert ran.code == 3 and "the connection broke" in ran.err and f"type: mlx-kontext models pull {REPO}" in ran.err
    assert len(fake.ranges) == 6
    fake.dead = False
    assert run("models", "pull").code == 0


def test_a_server_without_ranges(fake: FakeHub, cache: Path, run: Run) -> None:
    data = fake.repos[REPO][SHARD]
    partial = cache / f"models--{REPO.replace('/', '--')}/blobs/{sha256(data)}.mlx-kontext.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:1000])
    fake.no_ranges = True
    assert run("models", "pull").code == 0 and run("models", "verify").code == 0


def environment(fake: FakeHub, cache: Path) -> dict[str, str]:
    values = {"HF_ENDPOINT": fake.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": GOOD}
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | values


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_pull_goes_on_where_it_stopped(fake: FakeHub, cache: Path, run: Run, how: int) -> None:
    fake.cut[SHARD], fake.slow = 2_000_000, 20
    pull = subprocess.Popen(
        [sys.executable, "-m", "mlx_kontext", "models", "pull"],
        env=environment(fake, cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = (
        cache / f"models--{REPO.replace('/', '--')}/blobs/{sha256(fake.repos[REPO][SHARD])}.mlx-kontext.incomplete"
    )
    late = time.monotonic() + 60
    while not (partial.is_file() and partial.stat().st_size > 1_900_000) and time.monotonic() < late:
        threading.Event().wait(0.05)  # time.sleep is patched
    pull.send_signal(how)
    out, err = pull.communicate(timeout=30)
    assert pull.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL) and out == ""
    assert "Traceback" not in err and (how == signal.SIGKILL or "type the same command again to go on" in err)
    kept = partial.stat().st_size
    row = json.loads(run("models", "list", "--json").out.splitlines()[1])
    assert (row["model"], row["complete"]) == (REPO, False) and row["bytes"] >= kept
    with pytest.raises(ModelNotFound):
        hub.find_model(REPO, local_files_only=True)

    done = [path for path, _ in fake.ranges if path != SHARD]
    fake.ranges.clear()
    ran = run("models", "pull")
    assert ran.code == 0 and dict(fake.ranges)[SHARD] == f"bytes={kept}-" and kept > 1_900_000
    assert not set(done) & {path for path, _ in fake.ranges} and not partial.exists()
    assert run("models", "verify").code == 0


def test_what_came_damaged_is_not_kept(fake: FakeHub, cache: Path, run: Run) -> None:
    data = fake.repos[REPO][SHARD]
    partial = cache / f"models--{REPO.replace('/', '--')}/blobs/{sha256(data)}.mlx-kontext.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * 1000)  # what a bad disk or line would leave
    ran = run("models", "pull")
    assert ran.code == 3 and "came damaged (wrong sha256)" in ran.err and not partial.exists()
    assert run("models", "pull").code == 0
    assert (hub.find_model(REPO, local_files_only=True) / SHARD).read_bytes() == data


def test_one_pull_at_a_time(fake: FakeHub, cache: Path, run: Run) -> None:
    import fcntl

    partial = (
        cache / f"models--{REPO.replace('/', '--')}/blobs/{sha256(fake.repos[REPO][SHARD])}.mlx-kontext.incomplete"
    )
    partial.parent.mkdir(parents=True)
    with open(partial, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ran = run("models", "pull")
    assert ran.code == 3 and "is being downloaded by another process" in ran.err


TOLD = {
    "nobody logged in": (
        None,
        "is gated and you are not logged in (401): accept its licence at https://huggingface.co/",
    ),
    "no access": (OTHER, "your account has no access yet (403): accept its licence"),
    "bad token": (
        "hf_expired",
        "the hub refuses your token (401: wrong or expired); type hf auth login, then: mlx-kontext",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_gates_tell_401_from_403(fake: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    token, told = TOLD[case]
    fake.gated.add(REPO)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    ran = run("models", "pull")
    assert ran.code == 3 and ran.out == ""
    *_, last = ran.err.strip().splitlines()
    assert last.startswith("error: ") and told in last and f"models pull {REPO}" in last
    assert ("fine-grained token" in last) == (case == "no access") and "hf_" not in last
    monkeypatch.setenv("HF_TOKEN", GOOD)
    assert run("models", "pull").code == 0 and not fake.leaked
    monkeypatch.setenv("HF_TOKEN", "hf_ran_out")
    assert hub.find_model(REPO).is_dir()  # for what is here whole nobody needs a token


def test_wrong_names_and_a_sick_hub(fake: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", GOOD):
        monkeypatch.setenv("HF_TOKEN", token)
        ran = run("models", "pull", "nobody/nothing")
        assert ran.code == 3 and "the hub knows no nobody/nothing" in ran.err
    ran = run("models", "pull", "--revision", "v9")
    assert ran.code == 3 and "has no revision 'v9'" in ran.err
    assert run("models", "pull", "../etc").code == 3 and run("models", "pull", "no/such/name").code == 3
    fake.broken = 503
    ran = run("models", "pull")
    assert ran.code == 3 and f"the hub answers 503 for {REPO}; try again later with: mlx-kontext models pull" in ran.err


def test_offline(fake: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ran = run("models", "pull")
    assert ran.code == 3 and "HF_HUB_OFFLINE is set, so nothing goes online; type: HF_HUB_OFFLINE=0 mlx-k" in ran.err
    assert not fake.seen
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert run("models", "pull").code == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.find_model(REPO) == hub.find_model(REPO, local_files_only=True)  # what is here is enough
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert hub.find_model(REPO).is_dir()
    ran = run("models", "pull", "me/other")
    assert ran.code == 3 and "could not be reached" in ran.err


def test_only_pull_downloads(fake: FakeHub, run: Run) -> None:
    """`edit` with the name of a model that is not here asks nobody; Python's from_pretrained downloads."""
    sample = str(Path(__file__).parent.parent / "assets" / "sample.png")
    ran = run("edit", sample, "make the circle green", "-o", "out.png")
    assert ran.code == 3 and f"models pull {REPO}" in ran.err
    assert run("inspect", REPO).code == 3 and run("models", "list").code == 0
    assert run("models", "verify").code == 3 and run("models", "rm", REPO, "--yes").code == 3
    assert not fake.seen
    assert KontextPipeline.from_pretrained(REPO).sizes and fake.ranges


def test_list_and_rm(fake: FakeHub, cache: Path, run: Run, tmp_path: Path) -> None:
    run("models", "pull")
    (cache / "models--bert--base" / "snapshots" / COMMIT).mkdir(parents=True)
    outside = tmp_path / "precious.safetensors"
    outside.write_bytes(b"precious")
    place = cache / f"models--{REPO.replace('/', '--')}"
    (place / "snapshots" / COMMIT / "mine.safetensors").symlink_to(outside)
    (cache / "models--me--linked-kontext").symlink_to(tmp_path / "elsewhere")

    ran = run("models", "list")
    assert [line.split()[0] for line in ran.out.splitlines()] == ["demo", REPO] and "complete" in ran.out
    demo, real = [json.loads(line) for line in run("models", "list", "--json").out.splitlines()]
    assert demo["complete"] and demo["commit"] == ""
    assert (real["revision"], real["commit"], real["missing"]) == ("main", COMMIT, [])
    (place / "snapshots" / COMMIT / SHARD).unlink()
    assert json.loads(run("models", "list", "--json").out.splitlines()[1])["missing"] == [SHARD]
    assert "incomplete, 1 missing" in run("models", "list").out

    assert run("models", "rm", REPO).code == 2 and place.exists()  # no terminal to ask on
    for other, code in (("bert/base", 2), ("demo", 2), (str(tmp_path), 2), ("me/linked-kontext", 3), ("../x", 3)):
        assert run("models", "rm", other, "--yes").code == code, other
    freed = int(run("models", "rm", REPO, "--yes").out)
    blobs = sum(len(data) for name, data in fake.repos[REPO].items() if name not in UNWANTED)
    assert blobs <= freed < blobs + 50_000 and not place.exists()  # and a few notes of huggingface_hub
    assert outside.read_bytes() == b"precious" and (cache / "models--bert--base").exists()
    assert run("models", "rm", REPO, "--yes").code == 3


def test_rm_asks(fake: FakeHub, cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("models", "pull")
    monkeypatch.setattr(sys.stdin.__class__, "isatty", lambda _: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: "Remove" in question and answer)
    answer = False
    ran = run("models", "rm", REPO)
    assert ran.code == 1 and "nothing was removed" in ran.err and any(cache.glob("models--*"))
    answer = True
    assert run("models", "rm", REPO).code == 0 and not any(cache.glob("models--*"))


def test_verify_finds_a_flipped_byte_and_pull_mends_it(fake: FakeHub, cache: Path, run: Run) -> None:
    folder = Path(run("models", "pull").out.strip())
    ran = run("models", "verify")
    assert (ran.code, ran.out) == (0, "") and "all sound" in ran.err
    for name in (SHARD, "scheduler/scheduler_config.json"):
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).resolve().write_bytes(data)
    (folder / "vae" / "config.json").resolve().unlink()
    (folder / "text_encoder" / "config.json").unlink()
    damaged = ["scheduler/scheduler_config.json", SHARD, "vae/config.json", "text_encoder/config.json"]
    ran = run("models", "verify")
    assert ran.code == 1 and ran.out.split() == damaged and "4 of 18 files are damaged or missing" in ran.err
    rows = [json.loads(line) for line in run("models", "verify", "--json").out.splitlines()]
    assert [row["path"] for row in rows if row["sound"] is False] == damaged
    assert (
        run("models", "pull").code == 0 and run("models", "verify").code == 1
    )  # the size is right, so it is taken as whole

    assert run("models", "verify", "--discard").code == 1
    fake.ranges.clear()
    assert run("models", "pull").code == 0 and [path for path, _ in fake.ranges] == [SHARD]
    assert run("models", "verify").code == 0


def test_verify_without_links(fake: FakeHub, run: Run) -> None:
    """Where a disk has no links the snapshot holds files, and the hub's list, kept beside it, tells their checksums."""
    folder = Path(run("models", "pull").out.strip())
    path = folder / SHARD
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert run("models", "verify").code == 0
    path.write_bytes(data[:-1] + b"!")
    assert run("models", "verify").out.split() == [SHARD]
    shutil.rmtree(folder.parent.parent / "trees")
    assert "1 without a known checksum" in run("models", "verify").err


def test_progress_counts_every_byte(fake: FakeHub) -> None:
    counts: list[int] = []
    listing = hub.look_up(REPO)
    hub.pull(listing, progress=counts.append)
    assert sum(counts) == sum(file.bytes for file in listing.files if file.large)
    assert {model.model: model.missing for model in cached.cached_models()} == {REPO: ()}
