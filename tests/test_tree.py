"""Finding and ending a process tree: every way to hide, and every stranger that must not be touched."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import misbehave
import psutil
import pytest

from procworker.system import processes, tree
from procworker.system.processes import (
    COOKIE,
    Entry,
    Process,
    age,
    describe,
    find_root,
    identify,
    is_alive,
    mark,
    scan,
    send,
)
from procworker.system.tree import Family, Scan

PYTHON = [sys.executable, "-S", "-E"]
MISBEHAVE = [*PYTHON, misbehave.__file__]
NOBODY = 2**22  # the first pid that Linux cannot give

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


class Started:
    """A process that a test started as the root of a run, and what it said."""

    def __init__(self, command: list[str], cookie: str) -> None:
        self.cookie = cookie
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, COOKIE: cookie}
        )
        root = identify(self.popen.pid, dead=True)
        assert root
        self.root = root
        self.children: list[Process] = []

    def says(self, word: str, times: int = 1) -> None:
        """Wait until it has said the word; children that it names meanwhile are remembered."""
        assert self.popen.stdout
        while times:
            said, *rest = self.popen.stdout.readline().decode().split() or [None]
            assert said, "it ended too early"
            if said == "CHILD":
                child = identify(int(rest[0]))
                self.children += [child] if child else []
            times -= said == word

    def becomes(self, what: int) -> None:
        """Wait until it has ended or stopped, and leave the zombie where it is."""
        os.waitid(os.P_PID, self.popen.pid, what | os.WNOWAIT)

    def family(self, *, cookie: str | None = None, scan: Scan = scan) -> Family:
        return Family(self.root, cookie or self.cookie, scan=scan)

    @property
    def everything(self) -> set[Process]:
        return {self.root, *self.children}

    @property
    def alive(self) -> set[Process]:
        return {process for process in self.everything if is_alive(process)}

    def clean_up(self) -> None:
        for process in set(self.children):
            send(process, signal.SIGKILL)
        self.popen.kill()
        while left := misbehave.survivors(self.cookie):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.popen.wait()
        assert self.popen.stdout
        self.popen.stdout.close()


Start = Callable[..., Started]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a mode of misbehave.py (or a command, as a list) and wait until it says READY, and CHILD so often."""
    started: list[Started] = []

    def start(mode: str | list[str], *arguments: str, children: int = 0) -> Started:
        command = [*MISBEHAVE, mode, *arguments] if isinstance(mode, str) else mode
        one = Started(command, uuid4().hex)
        started.append(one)
        one.says("READY")
        if missing := children - len(one.children):
            one.says("CHILD", missing)
        return one

    yield start
    for one in started:
        one.clean_up()


@pytest.fixture(params=["linux", "portable"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with what Linux offers, and again with what there is everywhere."""
    if request.param == "portable":
        monkeypatch.setattr(processes, "LINUX", False)
        monkeypatch.setattr(tree, "LINUX", False)
        monkeypatch.setattr(processes, "_entry", processes._portable_entry)
        monkeypatch.delattr(os, "pidfd_open")
    return str(request.param)


def other_start(process: Process) -> Process:
    """The same pid in another life."""
    return process._replace(start=process.start + 1)


# Identity


@pytest.mark.usefixtures("platform")
def test_a_process_is_named_by_pid_and_start_time(start: Start) -> None:
    one, other = start("sleep"), start("sleep")

    assert one.root != other.root
    assert identify(one.popen.pid) == one.root
    assert is_alive(one.root)


@pytest.mark.usefixtures("platform")
def test_what_has_no_pid_has_no_name() -> None:
    assert identify(NOBODY) is None
    assert not is_alive(Process(NOBODY, 1.0))


@pytest.mark.usefixtures("platform")
def test_a_zombie_is_dead(start: Start) -> None:
    one = start("exit")
    one.becomes(os.WEXITED)

    assert identify(one.popen.pid) is None
    assert not is_alive(one.root)
    assert one.family().members() == set()
    assert identify(one.popen.pid, dead=True) == one.root


def test_a_process_whose_first_thread_has_ended_is_alive(start: Start) -> None:
    code = """if True:
        import ctypes, threading, time
        threading.Thread(target=lambda: time.sleep(600)).start()
        print("READY", flush=True)
        ctypes.CDLL(None).syscall(60, 0)"""
    one = start([*PYTHON, "-c", code])
    status = Path(f"/proc/{one.popen.pid}/stat")
    while status.read_bytes().split()[2] != b"Z":
        time.sleep(0.001)

    assert is_alive(one.root)
    assert send(one.root, signal.SIGKILL)
    assert one.popen.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["plain", "a) b", ") Z 1 2 3 (", "R\n) S"])
def test_any_command_name_can_be_read(start: Start, name: str) -> None:
    code = f"import time; open('/proc/self/comm', 'w').write({name!r}); print('READY', flush=True); time.sleep(600)"
    one = start([*PYTHON, "-c", code])
    entry = processes._linux_entry(one.popen.pid)

    assert entry == Entry(one.root, os.getpid(), one.popen.pid, False)


def test_both_ways_to_look_at_a_process_agree(start: Start) -> None:
    living, dead = start("sleep"), start("exit")
    dead.becomes(os.WEXITED)

    for pid in (living.popen.pid, dead.popen.pid):
        one, other = processes._linux_entry(pid), processes._portable_entry(pid)
        assert one
        assert other
        assert one[1:] == other[1:]
        assert other.process == Process(pid, psutil.Process(pid).create_time())


@pytest.mark.usefixtures("platform")
def test_a_scan_lists_every_process_of_the_host(start: Start) -> None:
    one = start("setsid", children=1)
    seen = {entry.process: entry for entry in scan()}

    assert one.everything <= set(seen)
    assert seen[one.children[0]].parent == one.popen.pid
    assert seen[one.children[0]].session == one.children[0].pid
    assert {1, os.getpid()} <= {process.pid for process in seen}


# Signals


@pytest.mark.usefixtures("platform")
def test_a_signal_reaches_its_process(start: Start) -> None:
    one = start("sleep")

    assert send(one.root, signal.SIGTERM)
    assert one.popen.wait(10) == -signal.SIGTERM
    assert not send(one.root, signal.SIGTERM)


@pytest.mark.usefixtures("platform")
async def test_a_reused_pid_is_never_signalled(start: Start) -> None:
    stranger = start("sleep")
    forged = other_start(stranger.root)

    assert not is_alive(forged)
    assert not send(forged, signal.SIGKILL)
    family = Family(forged, "a cookie of ours")
    assert family.members() == set()
    await family.end(0.0)
    assert stranger.alive == {stranger.root}
    assert family.ended == set()


@pytest.mark.usefixtures("platform")
def test_init_and_ourselves_are_never_signalled() -> None:
    assert not send(Process(-1, 0.0), 0)
    for pid in (0, 1, os.getpid()):
        assert not send(identify(pid) or Process(pid, 0.0), 0)


def test_what_belongs_to_others_is_not_signalled(start: Start) -> None:
    one = start("sleep")
    code = f"""if True:
        import os, sys
        sys.path[:] = {sys.path!r}
        from procworker.system.processes import Process, identify, mark, send
        os.setuid(65534)
        assert not send(identify({one.popen.pid}), 9)
        assert mark({one.popen.pid}) is None
        print("both")"""
    if os.getuid():
        pytest.skip("needs root")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout == "both\n", done.stderr
    assert processes.mark(one.popen.pid) == one.cookie
    assert one.alive


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), PermissionError(1, "Not permitted")])
def test_where_pidfds_are_refused_signals_still_arrive(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(pid: int) -> int:
        raise error

    one = start("sleep")
    monkeypatch.setattr(os, "pidfd_open", refuse)

    assert not send(other_start(one.root), signal.SIGKILL)
    assert send(one.root, signal.SIGKILL)
    assert one.popen.wait(10) == -signal.SIGKILL


@pytest.mark.usefixtures("platform")
def test_a_signal_that_there_is_not_is_not_sent(start: Start) -> None:
    assert not send(start("sleep").root, 1000)


def test_a_signal_leaves_no_descriptor_open(start: Start) -> None:
    one = start("sleep")
    before = os.listdir("/proc/self/fd")
    for process in (one.root, other_start(one.root), Process(NOBODY, 1.0)):
        send(process, 0)

    assert os.listdir("/proc/self/fd") == before


def test_ourselves_and_our_ancestors_are_no_members(start: Start) -> None:
    one = start("sleep")
    ancestors = {process.pid for process in psutil.Process().parents()}
    line = {0, 1, os.getpid(), one.popen.pid} | ancestors

    def all_in_one_session() -> Iterable[Entry]:
        return (e._replace(session=one.popen.pid) for e in scan() if e.process.pid in line)

    assert len(ancestors) >= 1
    assert one.family(scan=all_in_one_session).members() == {one.root}


# The three layers: each finds what only it can find, and is missed when it is blind


def in_session(start: Start) -> Started:
    """An orphan without a cookie, in the run's session."""
    code = f"import subprocess; print('CHILD', subprocess.Popen({misbehave.SLEEP!r}, env={{}}).pid, flush=True)"
    one = start(["sh", "-c", '"$@"; echo READY; exec sleep 600', "sh", *PYTHON, "-c", code], children=1)
    assert psutil.Process(one.children[0].pid).ppid() != one.popen.pid
    return one


def descendant(start: Start) -> Started:
    """A child without a cookie, in a session of its own."""
    how = "start_new_session=True, env={}"
    code = f"import subprocess; p = subprocess.Popen({misbehave.SLEEP!r}, {how}); print('CHILD', p.pid)"
    return start([*PYTHON, "-c", f"{code}; print('READY', flush=True); import time; time.sleep(600)"], children=1)


def with_cookie(start: Start) -> Started:
    """A daemon: an orphan in a session of its own."""
    return start("daemon", children=1)


def without_sessions() -> Iterable[Entry]:
    return (entry._replace(session=0) for entry in scan())


def without_parents() -> Iterable[Entry]:
    return (entry._replace(parent=0) for entry in scan())


LAYERS = [
    pytest.param(in_session, {"scan": without_sessions}, id="session"),
    pytest.param(descendant, {"scan": without_parents}, id="descendants"),
    pytest.param(with_cookie, {"cookie": "another"}, id="cookie"),
]


@pytest.mark.parametrize(("hide", "blind"), LAYERS)
async def test_each_layer_finds_what_only_it_can_find(
    start: Start, hide: Callable[[Start], Started], blind: dict[str, object]
) -> None:
    one, other = hide(start), hide(start)
    assert one.family().members() == one.everything
    assert one.family(**blind).members() == {one.root}

    await one.family().end(0.0)
    await other.family(**blind).end(0.0)
    assert one.alive == set()
    assert other.alive == set(other.children), "the negative control"


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("hide", [in_session, descendant, with_cookie])
async def test_wherever_a_process_hides_it_is_ended(start: Start, hide: Callable[[Start], Started]) -> None:
    one = hide(start)
    family = one.family()
    await family.end(5.0)

    assert one.alive == set()
    assert family.ended == one.everything
    assert family.survivors == set()
    assert one.popen.wait(10) == -signal.SIGTERM


async def test_a_daemon_that_clears_its_environment_must_be_seen_before_it_is_an_orphan(start: Start) -> None:
    one = start("daemon-clean", children=1)
    await one.family().end(0.0)

    assert one.alive == set(one.children), "documented: it is out of reach"


async def test_who_was_seen_once_is_known_for_good(start: Start) -> None:
    one = descendant(start)
    family = one.family()
    family.members()
    send(one.root, signal.SIGKILL)
    one.popen.wait(10)

    assert one.family().members() == set(), "the negative control"
    assert family.members() == set(one.children)
    await family.end(0.0)
    assert one.alive == set()


@pytest.mark.parametrize("mine", ["", "mine"])
async def test_a_changed_or_emptied_cookie_opts_out(start: Start, mine: str) -> None:
    how = f"start_new_session=True, env={{{COOKIE!r}: {mine!r}}}"
    daemon = f"import subprocess; p = subprocess.Popen({misbehave.SLEEP!r}, {how}); print('CHILD', p.pid, flush=True)"
    one = start(["sh", "-c", '"$@"; echo READY; exec sleep 600', "sh", *PYTHON, "-c", daemon], children=1)
    await one.family().end(0.0)

    assert one.alive == set(one.children)


async def test_who_opted_out_is_left_alone_as_a_child_too_and_so_are_its_children(start: Start) -> None:
    one = start(["env", "KEEP=1", *MISBEHAVE, "opt-out"], children=2)
    family = one.family()
    assert family.members() == {one.root}
    await family.end(0.0)

    assert one.alive == set(one.children)
    assert one.family(cookie=misbehave.OPTED_OUT).members() >= set(one.children), "the negative control"


async def test_a_root_cannot_opt_out(start: Start) -> None:
    one = start(["env", f"{COOKIE}=", *MISBEHAVE, "sleep"])
    await one.family().end(0.0)

    assert one.alive == set()


@pytest.mark.usefixtures("platform")
def test_a_root_is_found_by_its_cookie(start: Start) -> None:
    one = start("tree", "2", children=2)

    assert find_root(one.cookie) == one.root
    assert find_root(uuid4().hex) is None


@pytest.mark.usefixtures("platform")
def test_the_age_of_a_process_is_the_time_since_its_start(start: Start) -> None:
    one = start("sleep")

    assert 0 <= age(one.root) + 0.02 < 10
    assert age(processes.identify(os.getpid())) > age(one.root)


@pytest.mark.usefixtures("platform")
def test_a_mark_is_read_as_it_was_at_the_start(start: Start) -> None:
    one = start("sleep")
    env = {"A": f"{COOKIE}=no", f"X{COOKIE}": "no", COOKIE: "the one", "Z": "no"}
    ready = [*PYTHON, "-c", "import os, time; os.environ.clear(); print('READY', flush=True); time.sleep(600)"]
    emptied, absent, other = (
        start(["env", "-i", *(f"{k}={v}" for k, v in given.items()), *ready])
        for given in ({COOKIE: ""}, {f"X{COOKIE}": "no", "A": f"{COOKIE}=no"}, env)
    )

    assert processes.mark(one.popen.pid) == one.cookie
    assert processes.mark(emptied.popen.pid) == ""
    assert processes.mark(absent.popen.pid) is None
    assert processes.mark(other.popen.pid) == "the one"


@pytest.mark.usefixtures("platform")
def test_there_is_no_mark_where_there_is_nobody() -> None:
    assert processes.mark(NOBODY) is None


# Sessions whose number got a new owner (scripted: Linux would need a full turn of its pids for each)

ROOT = Process(NOBODY, 100.0)
MEMBER = Entry(Process(NOBODY + 1, 101.0), 1, NOBODY, False)
STRANGER = Entry(Process(NOBODY + 2, 900.0), 1, NOBODY, False)
LEADER = Entry(ROOT, 1, NOBODY, False)
OTHER_LEADER = Entry(other_start(ROOT), 1, NOBODY, False)


def members_of(*scans: list[Entry]) -> list[set[Process]]:
    """The members that a family finds in these scans, one after the other."""
    turns = iter(scans)
    family = Family(ROOT, "cookie", scan=lambda: next(turns))
    return [family.members() for _ in scans]


def test_a_session_is_ours_while_one_of_ours_is_in_it() -> None:
    alone = [MEMBER, STRANGER]
    assert members_of([LEADER, MEMBER], alone) == [{ROOT, MEMBER.process}, {MEMBER.process, STRANGER.process}]
    assert members_of([LEADER._replace(dead=True), MEMBER]) == [{MEMBER.process}]


def test_a_session_that_was_empty_once_is_not_ours_any_more() -> None:
    assert members_of([LEADER], [], [STRANGER]) == [{ROOT}, set(), set()]


def test_a_session_led_by_a_stranger_is_not_ours() -> None:
    assert members_of([LEADER], [OTHER_LEADER, STRANGER], [STRANGER]) == [{ROOT}, set(), set()]


def test_children_of_a_stranger_with_a_known_pid_are_not_ours() -> None:
    child = Entry(Process(NOBODY + 9, 950.0), MEMBER.process.pid, 1, False)
    reused = MEMBER._replace(process=other_start(MEMBER.process), session=1)
    assert members_of([LEADER, MEMBER, child]) == [{ROOT, MEMBER.process, child.process}]
    assert members_of([LEADER, MEMBER], [LEADER, reused, child]) == [{ROOT, MEMBER.process}, {ROOT}]


def test_members_are_found_at_any_depth(start: Start) -> None:
    one = start("tree", "4", children=4)

    assert one.family(scan=without_sessions).members() == one.everything


def test_a_process_that_vanishes_during_a_scan_is_passed_over(start: Start) -> None:
    one = start("sleep")
    vanished = [MEMBER._replace(session=0), Entry(Process(NOBODY + 3, 1.0), NOBODY + 4, 0, False)]

    assert one.family(scan=lambda: [*vanished, *scan()]).members() == {one.root}


# Ending


@pytest.mark.usefixtures("platform")
async def test_who_obeys_term_ends_by_it(start: Start) -> None:
    one = start("sleep")
    family = one.family()
    await family.end(60.0)

    assert one.popen.wait(10) == -signal.SIGTERM
    assert family.ended == {one.root}


async def test_who_ignores_term_is_killed_after_the_grace(start: Start) -> None:
    one = start("ignore-term")
    began = time.monotonic()
    await one.family().end(0.3)

    assert time.monotonic() - began >= 0.3
    assert one.popen.wait(10) == -signal.SIGKILL


async def test_who_is_slow_to_obey_is_not_killed_within_the_grace(start: Start) -> None:
    one, other = start("slow-term", "0.3"), start("slow-term", "600")
    await one.family().end(60.0)
    await other.family().end(0.2)

    assert one.popen.communicate()[0] == b"TERM\nTIDY\n"
    assert one.popen.returncode == 0
    assert other.popen.wait(10) == -signal.SIGKILL, "the negative control"


@pytest.mark.parametrize(
    ("mode", "children"),
    [("sh-wait", 2), ("setsid", 1), ("daemon", 1), ("daemon-exit", 1), ("keep-stdout", 1), ("tree", 3)],
)
async def test_nothing_is_left_of_a_tree(start: Start, mode: str, children: int) -> None:
    one = start(mode, children=children)
    assert one.alive >= set(one.children)
    family = one.family()
    await family.end(5.0)

    assert one.alive == set()
    assert set(one.children) <= family.ended
    assert misbehave.survivors(one.cookie) == {}


async def test_to_signal_only_the_root_leaves_its_children(start: Start) -> None:
    one = start("sh-wait", children=2)
    send(one.root, signal.SIGTERM)
    one.popen.wait(10)

    assert one.alive == set(one.children), "the negative control of the test above"


async def test_one_deaf_member_does_not_keep_the_others_from_ending_politely(start: Start) -> None:
    one = start("nohup", children=1)
    one.popen.wait(10)
    family = one.family()
    await family.end(0.2)

    assert one.alive == set()
    assert family.ended == set(one.children)


@pytest.mark.usefixtures("platform")
async def test_a_stopped_process_is_woken_to_obey(start: Start) -> None:
    one = start("stop-itself")
    one.becomes(os.WSTOPPED)
    await one.family().end(60.0)

    assert one.popen.wait(10) == -signal.SIGTERM


async def test_where_nothing_can_be_stopped_a_tree_is_ended_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_STOP", None)
    monkeypatch.setattr(tree, "_CONT", None)
    one = start("sh-wait", children=2)
    await one.family().end(0.0)

    assert one.alive == set()


async def test_a_fork_storm_is_ended_within_five_seconds(start: Start) -> None:
    one = start("forker", "0.005", children=20)
    with anyio.fail_after(5):
        await one.family().end(0.2)

    assert one.popen.wait(10) == -signal.SIGKILL
    assert misbehave.survivors(one.cookie) == {}


async def test_to_kill_a_fork_storm_once_is_not_enough(start: Start) -> None:
    one = start("forker", "0.005", children=20)
    for process in one.family().members() - {one.root}:
        send(process, signal.SIGKILL)
    one.says("CHILD", 5)

    assert len(misbehave.survivors(one.cookie)) > 1, "the negative control of the test above"


async def test_to_end_what_has_ended_is_fine(start: Start) -> None:
    one = start("exit")
    one.popen.wait(10)
    family = one.family()
    with anyio.fail_after(5):
        await family.end(60.0, 60.0)

    assert family.ended == family.survivors == set()


async def test_who_leaves_by_himself_while_things_settle_gets_no_signal(start: Start) -> None:
    one = start("sleep", "0.3")
    family = one.family()
    await family.end(60.0, settle=60.0)
    assert one.popen.wait(10) == 0
    assert family.ended == set()

    other = start("sleep", "60")
    await other.family().end(60.0, settle=0.1)
    assert other.popen.wait(10) == -signal.SIGTERM, "the negative control"


@pytest.mark.parametrize("settle", [0.0, 60.0])
async def test_a_second_call_hurries_the_first(start: Start, settle: float) -> None:
    one = start("slow-term", "600")
    family = one.family()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(family.end, 60.0, settle)
            await anyio.wait_all_tasks_blocked() if settle else await anyio.to_thread.run_sync(one.says, "TERM")
            await family.end(0.0)

    assert one.popen.wait(10) == -signal.SIGKILL or settle
    assert one.alive == set()
    assert family.ended == {one.root}


async def test_a_second_call_with_a_longer_grace_changes_nothing(start: Start) -> None:
    one = start("ignore-term")
    family = one.family()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(family.end, 0.2)
            tasks.start_soon(family.end, 60.0)

    assert one.popen.wait(10) == -signal.SIGKILL


async def test_a_patient_second_call_waits_for_the_first(start: Start) -> None:
    one = start("slow-term", "0.5")
    family = one.family()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(family.end, 60.0)
        await anyio.to_thread.run_sync(one.says, "TERM")
        await family.end(0.0, hurry=False)

    assert one.popen.communicate()[0] == b"TIDY\n"
    assert one.popen.returncode == 0


async def test_a_call_after_another_one_has_its_own_grace(start: Start) -> None:
    one, other = start("exit"), start("slow-term", "0.3")
    one.popen.wait(10)
    family = Family(one.root, other.cookie, scan=lambda: scan() if later else ())
    later = False
    await family.end(0.0)
    later = True
    await family.end(60.0)

    assert other.popen.wait(10) == 0


async def test_a_cancelled_end_can_be_called_again(start: Start) -> None:
    one = start("ignore-term")
    family = one.family()
    with anyio.move_on_after(0.05) as scope:
        await family.end(60.0)
    assert scope.cancelled_caught
    await family.end(0.0)

    assert one.popen.wait(10) == -signal.SIGKILL


async def test_what_cannot_be_killed_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "KILL_SECONDS", 0.2)
    one = start("sleep")
    immortal = Entry(Process(NOBODY, float("inf")), 1, one.popen.pid, False)
    family = one.family(scan=lambda: [*scan(), immortal])
    with anyio.fail_after(10):
        await family.end(0.0)

    assert family.survivors == {immortal.process}
    assert not family.given_up
    assert one.popen.wait(10) in (-signal.SIGTERM, -signal.SIGKILL)


async def test_one_scan_that_finds_nobody_proves_nothing(start: Start) -> None:
    one, turns = start("ignore-term"), itertools.count()
    await one.family(scan=lambda: () if next(turns) == 1 else scan()).end(0.0)

    assert one.alive == set()


async def test_what_forks_is_stopped_before_it_is_killed(start: Start) -> None:
    """So that a child born between the scan and the signal is found by the look after the stop."""
    one, turns, deadline = start("ignore-term"), itertools.count(), time.monotonic() + 5
    seen = None

    def watched() -> Iterable[Entry]:
        nonlocal seen
        if next(turns) == 2:
            while not seen and time.monotonic() < deadline:
                seen = os.waitid(os.P_PID, one.popen.pid, os.WSTOPPED | os.WNOWAIT | os.WNOHANG)
        return scan()

    await one.family(scan=watched).end(0.0)

    assert seen
    assert one.popen.wait(10) == -signal.SIGKILL


async def test_who_is_born_during_the_killing_counts_as_ended(start: Start) -> None:
    one, turns = start("ignore-term"), itertools.count()
    other = start(["env", "-u", COOKIE, *MISBEHAVE, "sleep"])
    late = Entry(other.root, 1, one.popen.pid, False)
    family = one.family(scan=lambda: [*scan(), *([late] if next(turns) and is_alive(other.root) else [])])
    await family.end(0.0)

    assert family.ended == {one.root, other.root}
    assert other.alive == set()


async def test_a_survivor_that_has_gone_is_forgotten(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "KILL_SECONDS", 0.0)
    one, stubborn = start("sleep"), [Entry(Process(NOBODY, float("inf")), 1, 0, False)]
    family = one.family(scan=lambda: [*scan(), *(e._replace(session=one.popen.pid) for e in stubborn)])
    await family.end(0.0)
    assert family.survivors
    stubborn.clear()
    await family.end(0.0)

    assert family.survivors == set()


async def test_waiting_costs_no_scans(start: Start) -> None:
    counter = itertools.count()

    def counted() -> Iterable[Entry]:
        next(counter)
        return scan()

    one = start("slow-term", "1")
    await one.family(scan=counted).end(60.0)

    assert one.popen.wait(10) == 0
    assert next(counter) <= 6


async def test_only_who_is_younger_than_the_run_is_asked_for_a_mark_and_only_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tree, "mark", lambda pid: asked.append(pid) or mark(pid))
    one = start("tree", "2", children=2)
    one.family().members()

    assert set(asked) >= {child.pid for child in one.children}
    assert len(asked) == len(set(asked))
    assert not {os.getpid(), os.getppid(), 1} & set(asked)


async def test_families_that_end_together_share_their_scans(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = itertools.count()

    def counted() -> Iterable[Entry]:
        next(scans)
        return scan()

    monkeypatch.setattr(tree, "_lookout", tree.Lookout(counted))
    some = [start("exit") for _ in range(5)]
    for one in some:
        one.popen.wait(10)
    async with anyio.create_task_group() as tasks:
        for one in some:
            tasks.start_soon(Family(one.root, one.cookie).end, 0.0)

    assert next(scans) == 2


async def test_a_shared_scan_never_began_before_it_was_asked_for() -> None:
    scans = itertools.count()
    lookout = tree.Lookout(lambda: [Entry(Process(next(scans), 1.0), 1, 1, False)])

    async def look() -> int:
        return next(iter((await lookout.look()).entries))

    assert [await look(), await look()] == [0, 1]


async def test_who_asks_and_is_cancelled_takes_nothing_from_the_others() -> None:
    lookout = tree.Lookout(scan)
    seen = []

    async def look() -> None:
        seen.append(await lookout.look())

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await lookout.look()
        tasks.start_soon(look)
        tasks.start_soon(look)
    assert len(seen) == 2
    assert seen[0] is seen[1]


async def test_two_families_beside_each_other_do_not_touch(start: Start) -> None:
    one, other = start("daemon", children=1), start("daemon", children=1)
    await one.family().end(5.0)

    assert one.alive == set()
    assert other.alive == other.everything


# Names for people


def test_a_process_is_described_without_its_arguments(start: Start) -> None:
    one = start(["sh", "-c", "echo READY; sleep 600 # secret"])

    assert describe(one.root) == f"{one.popen.pid} (sh)"
    assert describe(Process(NOBODY, 1.0)) == str(NOBODY)


# When we cannot look


def out_of_descriptors(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    real, left = os.open, itertools.count()

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if str(path).startswith("/proc") and next(left) < times:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)


async def test_without_a_free_descriptor_nobody_is_taken_for_dead(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = start("sleep")
    out_of_descriptors(monkeypatch, 2)

    assert is_alive(one.root)
    assert not send(one.root, signal.SIGTERM), "who cannot be verified is not signalled"
    assert is_alive(one.root)


async def test_a_scan_waits_for_a_free_descriptor(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    one = start("daemon", children=1)
    out_of_descriptors(monkeypatch, 5)
    await one.family().end(0.0)

    assert one.alive == set()
