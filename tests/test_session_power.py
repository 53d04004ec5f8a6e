"""A session keeps what it acknowledged through any loss of power and any failing file operation (model in `power.py`)."""

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest
from power import FOLDER, Memory, Trial, begin, made

from mlx_kontext.errors import ResourceError, SessionError
from mlx_kontext.sessions import EditSession
from mlx_kontext.store import Lock, Store


def test_no_state_after_a_loss_of_power_loses_a_turn() -> None:
    trial = Trial()
    for seed in range(6):
        trial.history(seed)
    assert len(trial.states) >= 500 and not trial.wrong, (len(trial.states), trial.wrong[:5])


@pytest.mark.slow
def test_no_state_of_many_histories_loses_a_turn() -> None:
    trial = Trial()
    for seed in range(100):
        trial.history(seed, actions=12 + seed % 10)
    assert len(trial.states) >= 10_000 and not trial.wrong, (len(trial.states), trial.wrong[:5])


class DataNotSynced(Memory):
    def sync(self, path: Path) -> None:
        self.before()
        self.after()


class FolderNotSynced(Memory):
    def sync_folder(self, folder: Path) -> None:
        self.before()
        self.after()


class TurnBeforeObjects(Store):
    def append(self, number: int, body: dict, objects: Mapping[str, bytes]) -> None:
        super().append(number, body, {})
        self._keep_objects(objects)


class WrittenInPlace(Store):
    def _place(self, path: Path, data: bytes) -> None:
        if self.files.kind(path):
            self.files.remove(path)
        self.files.write(path, data)
        self.files.sync(path)


class OpenedAsFound(Store):
    """Builds on what a killed process left without making it durable."""

    def take_lock(self) -> Lock:
        return Lock(True)


@pytest.mark.parametrize("broken", [DataNotSynced, FolderNotSynced, TurnBeforeObjects, WrittenInPlace, OpenedAsFound])
def test_the_model_catches_a_broken_protocol(broken: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: each of these loses something, and the model must see it."""
    trial = Trial(disk=broken) if issubclass(broken, Memory) else Trial()
    if issubclass(broken, Store):
        monkeypatch.setattr("mlx_kontext.sessions.Store", broken)
    trial.history(8)  # in which a process is killed between a rename and the sync of its folder
    assert trial.wrong


class Failing:
    """Raises at its Nth call, and only there."""

    def __init__(self, number: int, error: int):
        self.left, self.error = number, error

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.error, "it failed")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("error", "kind"), [(errno.ENOSPC, ResourceError), (errno.EIO, SessionError)])
def test_every_failing_operation_is_told_and_costs_nothing(error: int, kind: type, when: str) -> None:
    """The Nth change of the disk fails, for every N of an edit: one line, the session goes on, nothing is damaged."""
    for number in range(1, 100):
        disk = Memory()
        session = begin(disk)
        session.append(made(1))
        setattr(disk, when, Failing(number, error))
        try:
            session.append(made(2))
        except (ResourceError, SessionError) as failure:
            assert (
                type(failure) is kind
                and "\n" not in str(failure)
                and ("full" in str(failure)) == (error == errno.ENOSPC)
            )
        else:
            break
        setattr(disk, when, lambda: None)
        known = len(session.nodes)
        assert known in (2, 3)  # the turn may be there nevertheless
        assert session.append(made(3)).id == known
        session.close()
        again = EditSession.open(FOLDER, files=disk)
        assert len(again.nodes) == known + 1 and not again.damage and again.check().sound
    assert number == 12  # two objects and a turn: write, sync, rename; two folders: sync


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_beginning_can_be_tried_again(when: str) -> None:
    for number in range(1, 100):
        disk = Memory()
        setattr(disk, when, Failing(number, errno.EIO))
        try:
            begin(disk).close()
        except SessionError:
            setattr(disk, when, lambda: None)
            if not Store(FOLDER, disk).numbers():
                begin(disk)
            assert list(EditSession.open(FOLDER, files=disk).nodes) == [0]
        else:
            break
    assert number == 17
