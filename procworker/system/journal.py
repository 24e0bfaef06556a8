"""What runs on this host, on disk: one private directory per flow run, with its record and its output.

    HOME/runs/<flow run id>.<nonce>/   run.json, stdout, stderr
    HOME/workers/<id>                  locked by the worker as long as it lives; in it stands how it is

A record (run.json) is a line of JSON, then a line for each change. It names the worker that owns it. Who can lock a
dead worker's file may take its records over, by writing its own id into them. Whether a process is the one of a record
is never a question of its pid alone, since containers may share a home: a record says in which boot of which host and
in which pid namespace its pids mean something.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil

from procworker.system.records import JSON, ROOM, VERSION, append_line, line_of, read_record, read_told, write_record
from procworker.system.wishes import Wish, take_wish

try:
    import fcntl
except ImportError:  # Windows: nothing is taken over there
    fcntl = None  # type: ignore[assignment]

NEW = ".new-"
"""Begins the name of a directory that has no record yet."""
STALE_SECONDS = 3600.0

logger = logging.getLogger(__name__)


@cache
def here() -> JSON:
    """Name this host, its boot and our pid namespace: elsewhere our pids mean nothing."""
    try:
        host = Path("/etc/machine-id").read_text().strip()  # a laptop's host name follows its network
    except OSError:
        host = ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, namespace = str(int(psutil.boot_time())), 0
    return {"host": host or socket.gethostname(), "boot": boot, "namespace": namespace}


def try_lock(descriptor: int) -> bool:
    """Lock an open file for ourselves, if that is possible at once."""
    if fcntl is None:
        return False
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class Page:
    """The directory of one run."""

    def __init__(self, path: Path, data: JSON, closed: Callable[[Page], None], *, is_at_home: bool, room: int) -> None:
        """A record with no room left is written as a whole before anything is added to it."""
        self.path = path
        self.data = data
        self.stdout = path / "stdout"
        self.stderr = path / "stderr"
        self.kept = self._is_at_home = is_at_home
        """Will it be found when we are dead?"""
        self._room = room
        self._closed = closed

    @property
    def name(self) -> str:
        """The name of the directory, which is the cookie of the run's processes, too."""
        return self.path.name

    @property
    def is_of_this_boot(self) -> bool:
        """Do the pids in the record mean something here and now?"""
        return bool(self.data.get("place") == here())

    def write(self, **changes: Any) -> None:
        """Change fields of the record; where that is impossible it is at least known to us."""
        self.data |= changes
        if "phase" in changes:
            self.data["times"] = {**self.data.get("times", {}), changes["phase"]: time.time()}
            changes["times"] = self.data["times"]
        try:
            self._put_down(changes)
            self.kept = self._is_at_home
        except OSError as error:
            if self.kept:
                text = "%s cannot be written: this run is not safe from our death (%s)"
                logger.warning(text, self.path / "run.json", error.strerror or error)
            self.kept = False

    def _put_down(self, changes: JSON) -> None:
        if len(line := line_of(changes)) <= self._room:
            with suppress(OSError):
                append_line(self.path, line)
                self._room -= len(line)
                return
        self._room = 0  # half a line may have been written
        write_record(self.path, self.data)
        self._room = ROOM

    def remove(self) -> None:
        """The run is over and reported."""
        # Whatever is left of it when we are broken off is cleared away in time.
        gone = self.path.with_name(NEW + self.path.name)
        try:
            self.path.rename(gone)
            for name in os.listdir(gone):
                os.unlink(gone / name)
            gone.rmdir()
        except OSError:
            for path in (gone, self.path):
                shutil.rmtree(path, ignore_errors=True)
        self._closed(self)


class Journal:
    """The pages of one worker. Nothing is made on disk before the first of them."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._pages: dict[str, Page] = {}
        self._lock = -1
        self._complained: set[str] = set()
        self._told: JSON = {}
        self._touched = 0
        self.owner = uuid4().hex

    def page(self, flow_run_id: UUID, **facts: Any) -> Page:
        """Return the run's page; a new one, if need be, with these facts: below home, or in the temporary directory.

        Raises OSError when neither can be written.
        """
        if page := self._pages.get(str(flow_run_id)):
            return page
        own = {"version": VERSION, "owner": self.owner, "place": here(), "flow_run_id": str(flow_run_id)}
        times = {facts["phase"]: time.time()} if "phase" in facts else {}
        name, data, kept = f"{flow_run_id}.{uuid4().hex}", {**facts, **own, "times": times}, True
        try:
            self._hold()
            path = self._home / "runs" / name
            new = path.with_name(NEW + name)
            _make_private(new)
            append_line(new, line_of(data), new=True)
            new.rename(path)
        except OSError as error:
            self._complain("home", "%s cannot be written, runs are not safe from our death: %s", self._home, error)
            path, kept = Path(tempfile.mkdtemp(prefix="procworker-run-")) / name, False
            path.mkdir(mode=0o700)
        page = Page(path, data, self._forget, is_at_home=kept, room=ROOM if kept else 0)
        self._pages[str(flow_run_id)] = page
        return page

    def has(self, flow_run_id: UUID) -> bool:
        return str(flow_run_id) in self._pages

    def introduce(self, **facts: Any) -> None:
        """Remember who we are, for our file to say so as soon as there is one."""
        self._told |= facts

    def tell(self, state: JSON) -> None:
        """Let our file say how we are (plain data, no secrets), beside what was told before; never raises."""
        told = self._told | state
        if self._lock < 0 or told != self._told:
            self._told = told
            with suppress(OSError):  # who writes down the first run will complain
                self._hold()
                self._show()

    def wishes(self) -> list[tuple[UUID, Wish]]:
        """Return what was asked of our runs since the last look; one stat, for who asks touches our file."""
        try:
            touched = os.stat(self._home / "workers" / self.owner).st_mtime_ns
        except OSError:
            return []
        if touched == self._touched:
            return []
        self._touched = touched
        asked = [(page.data, wish) for page in self._pages.values() if (wish := take_wish(page.path))]
        return [(UUID(data["flow_run_id"]), wish) for data, wish in asked if data.get("phase") != "ended"]

    def take_over(self, api: str, pool: str | None) -> list[Page]:
        """Make the pages that dead workers left for this API and pool (or for none) our own.

        What is corrupt, newer, somebody else's or of another place is left alone; each is named once.
        """
        self._sweep()
        return self._take_all(lambda data: data.get("api") == api and data.get("pool") in (pool, None))

    def take_over_from(self, owner: str) -> list[Page]:
        """Make the pages of one dead worker our own, but for those that the next start shall go on with."""
        return self._take_all(lambda data: data["owner"] == owner and data.get("orphans") != "adopt")

    def take_over_run(self, flow_run_id: str, owner: str) -> Page | None:
        """Make the page of one run of a dead worker our own; None when that worker lives, or somebody was faster."""
        pages = self._take_all(lambda data: (data["flow_run_id"], data["owner"]) == (flow_run_id, owner))
        return pages[0] if pages else None

    def _take_all(self, is_wanted: Callable[[JSON], bool]) -> list[Page]:
        """Take everything of a dead worker under one lock: whoever gets it, nothing is overlooked or taken twice."""
        left: dict[str, list[Path]] = {}
        for path, data in self._left_behind():
            if is_wanted(data) and not self._is_of_other_host(path, data):
                left.setdefault(data["owner"], []).append(path)
        pages = []
        for owner, paths in left.items():
            with self._locked(owner) as locked:
                pages += [page for path in paths if locked and (page := self._take(path, owner))]
        return pages

    def is_dead(self, owner: str) -> bool:
        """Has this worker let go of what it owned?"""
        with self._locked(owner) as locked:
            return locked

    def close(self) -> None:
        """Let go: what is left may be taken over."""
        if self._lock >= 0:
            with suppress(OSError):
                os.ftruncate(self._lock, 0)  # our process may go on
            os.close(self._lock)
            self._lock = -1
        if not self._pages:
            with suppress(OSError):
                (self._home / "workers" / self.owner).unlink(missing_ok=True)

    def _hold(self) -> None:
        """Show that we live."""
        place = self._home / "workers" / self.owner
        if self._lock >= 0 and not _is_at(self._lock, place):  # somebody has cleared the state directory away
            os.close(self._lock)
            self._lock = -1
        if self._lock < 0:
            _make_private(place.parent)
            self._lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
            try_lock(self._lock)
            self._show()

    def _show(self) -> None:
        """Write our file anew, in place, since it is locked; as one line, so that half of it is known as such."""
        line = json.dumps({**self._told, "version": VERSION, "owner": self.owner, "place": here()}).encode() + b"\n"
        with suppress(OSError):
            os.lseek(self._lock, 0, os.SEEK_SET)
            os.write(self._lock, line)
            os.ftruncate(self._lock, len(line))

    def _sweep(self) -> None:
        """Clear away the files of workers that died with nothing in hand. An empty one may be about to be locked."""
        with suppress(OSError):
            for place in list((self._home / "workers").iterdir()):
                told = read_told(place)
                if told and place.name != self.owner and told["place"].get("host") == here()["host"]:
                    with self._locked(place.name):
                        pass

    def _forget(self, page: Page) -> None:
        self._pages = {id: other for id, other in self._pages.items() if other is not page}
        if page.path.parent.name.startswith("procworker-run-"):
            shutil.rmtree(page.path.parent, ignore_errors=True)

    def _left_behind(self) -> Iterator[tuple[Path, JSON]]:
        """Look at every record that is not ours."""
        try:
            paths = sorted(path for path in (self._home / "runs").iterdir() if path.is_dir())
        except OSError:
            return
        for path in paths:
            if path.name.startswith(NEW):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                data = read_record(path)
            except FileNotFoundError:
                continue  # its worker has just removed it
            except (OSError, ValueError) as error:
                self._complain(path.name, "%s is left alone: %s", path, error)
            else:
                if data["owner"] != self.owner:
                    yield path, data

    def _take(self, path: Path, owner: str) -> Page | None:
        """Become the owner of a record whose dead owner's lock we hold; None when somebody else was faster."""
        try:
            data = read_record(path)
            # A second record of the same run waits for the next start.
            if data["owner"] != owner or data["flow_run_id"] in self._pages or self._is_in_other_container(path, data):
                return None
            self._hold()
            page = Page(path, data, self._forget, is_at_home=True, room=0)
            page.write(owner=self.owner)
            if read_record(path)["owner"] != self.owner:  # it could not be written
                return None
        except (OSError, ValueError) as error:
            self._complain(path.name, "%s is left alone: %s", path, error)
            return None
        self._pages[data["flow_run_id"]] = page
        self._touched = 0  # what was asked of the dead worker is asked of us
        return page

    def _is_of_other_host(self, path: Path, data: JSON) -> bool:
        """Its lock may mean nothing here: not even touched."""
        if data["place"]["host"] == here()["host"]:
            return False
        self._complain(path.name, "%s is left alone: it belongs to host %r", path, data["place"]["host"])
        return True

    def _is_in_other_container(self, path: Path, data: JSON) -> bool:
        """May its processes live where we cannot see them?"""
        place, now = data["place"], here()
        if place["boot"] != now["boot"] or place["namespace"] == now["namespace"]:
            return False
        # Another container of this host, or an earlier life of our own. What the run started holds its output locked.
        if any(_is_locked(path / stream) for stream in ("stdout", "stderr")):
            self._complain(path.name, "%s is left alone: it runs in another container", path)
            return True
        return False

    @contextmanager
    def _locked(self, owner: str) -> Iterator[bool]:
        """Hold a dead worker's lock, and clear it away when nothing is left to be had with it."""
        place = self._home / "workers" / owner
        try:
            _make_private(place.parent)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self._complain("workers", "Nothing of dead workers can be taken over: %s", error)
            yield False
            return
        try:
            held = try_lock(descriptor)
            yield (held := held and _is_at(descriptor, place))
            if held:
                place.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def _complain(self, about: str, text: str, *values: object) -> None:
        if about not in self._complained:
            self._complained.add(about)
            logger.warning(text, *values)


def _make_private(path: Path) -> None:
    """Make a directory and what is missing above it, for ourselves alone whatever our umask is."""
    with suppress(OSError):
        path.mkdir(mode=0o700)
        return
    missing = [place for place in (path, *path.parents) if not place.exists()]
    for place in reversed(missing):
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)


def _is_at(descriptor: int, place: Path) -> bool:
    """Is the open file still the one that has this name?"""
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except OSError:
        return False


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
