"""The turns of one open session: read into a history, appended one by one by whoever holds the lock. No MLX here."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from .errors import KontextError, SessionError
from .history import History
from .store import Lock, Store
from .turns import SCHEMA, Damaged, Newer
from .upkeep import Finding, Report, check


class Log:
    """A store's turns and what they add up to. Threads may share it; each call is whole."""

    def __init__(self, store: Store, lock: Lock):
        self.store, self.lock = store, lock
        self.history = History()
        self.damage: tuple[Finding, ...] = ()
        """Turns that could not be read."""
        self._seen: set[int] = set()
        self._unreadable: set[int] = set()
        self._busy = threading.RLock()

    def check_writable(self) -> None:
        """Raises SessionError if somebody else has the lock, or the session is newer than this program."""
        if not self.lock.held:
            raise SessionError(f"{self.store.folder} is open for reading only: {self.lock.reason}")

    def refresh(self) -> bool:
        """Read the turns that were added since; returns whether there were any."""
        with self._busy:
            try:
                news = sorted(set(self.store.numbers()) - self._seen)
            except OSError as error:
                raise self.store.explain(error, "cannot be read") from error
            if news and news[0] < max(
                self._seen, default=0
            ):  # a listing beside a writer may have skipped one: begin again
                self._forget()
                return self.refresh()
            for number in news:
                self._read(number)
            self._seen.update(news)
            return bool(news)

    def write(self, body: dict[str, Any], objects: Mapping[str, bytes] | None = None) -> int:
        """Append one turn, a picture's if it has objects; durable when this returns its number."""
        from . import __version__

        with self._busy:
            self.check_writable()
            try:
                number = self.store.next_number()
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                head = {"schema": SCHEMA, "turn": number, "at": now, "app": __version__}
                if objects:
                    head["node"] = self._next_node()
                self.store.append(number, head | body, objects or {})
            except BaseException as error:
                with suppress(KontextError):
                    self.refresh()  # the turn may be there nevertheless
                if isinstance(error, OSError):
                    raise self.store.explain(error, "cannot be read") from error
                raise
            self.refresh()
            return number

    def check(self) -> Report:
        """As `upkeep.check`, which may set turns aside; then all is read anew."""
        with self._busy:
            try:
                report = check(self.store, mend=self.lock.held)
            except OSError as error:  # of the disk, or a folder that may not be read: what is damaged is in the report
                raise self.store.explain(error, "cannot be read") from error
            self._forget()
            self.refresh()
            return report

    def close(self) -> None:
        self.lock.release()
        self.lock = Lock(False, "it was closed")

    def _read(self, number: int) -> None:
        name = f"turns/{self.store.turn_path(number).name}"
        try:
            self.history.apply(self.store.turn(number))
        except Newer as trouble:
            self.damage += (Finding(name, "newer", str(trouble)),)
            self.lock.release()
            self.lock = Lock(False, f"turn {number}: {trouble}")
        except Damaged as trouble:
            self.damage += (Finding(name, "damaged", str(trouble)),)
            self._unreadable.add(number)

    def _forget(self) -> None:
        self.history, self._seen, self._unreadable, self.damage = History(), set(), set(), ()

    def _next_node(self) -> int:
        """A lost turn may have been a picture, whose number other turns name: it is not given to another picture."""
        last = max(self.history.nodes.values(), key=lambda node: node.turn, default=None)
        lost = {*self._unreadable, *self.store.lost_numbers()}
        if last is None:
            return len(lost)
        return last.id + 1 + sum(number > last.turn for number in lost)
