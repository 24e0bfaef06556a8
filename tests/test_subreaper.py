"""Orphans come to a program that is their subreaper: those of a run are ended, all are reaped, no child is stolen.

Each scene is a program of its own, since being a subreaper is a decision for a whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from misbehave import survivors

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")]

PRELUDE = """
import os, signal, subprocess, sys, time
from contextlib import nullcontext
import anyio
from misbehave import COOKIE, SLEEP
from procworker.system import child, processes, tree
from procworker.system.subreaper import adoption, children, subreaper
from procworker.system.processes import identify, is_alive
from procworker.system.tree import Family

MISBEHAVE = [sys.executable, "-S", "-E", "misbehave.py"]

class Flow:
    '''A misbehaving process in a session of its own, as a run is; its outputs are pipes here.'''

    def __init__(self, cookie, *mode):
        self.cookie = cookie
        with adoption.spawning() as own:
            self.popen = subprocess.Popen(
                [*MISBEHAVE, *mode], stdout=subprocess.PIPE, text=True, start_new_session=True,
                env={**os.environ, COOKIE: cookie},
            )
            own.add(self.popen.pid)
        self.children = []
        while not (line := self.popen.stdout.readline()).startswith("READY"):
            self.children.append(identify(int(line.split()[1])))
        self.family = Family(identify(self.popen.pid, dead=True), cookie)

    @property
    def alive(self):
        return [one for one in self.children if is_alive(one)]

async def until(fact):
    with anyio.fail_after(20):
        while not fact():
            await anyio.sleep(0.01)

def parent(process):
    return processes._entry(process.pid).parent

def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
"""


def scene(code: str, *, prelude: str = "", wrapper: tuple[str, ...] = ()) -> str:
    """Run a coroutine's body as a program of its own; return what it prints."""
    body = textwrap.indent(textwrap.dedent(code), "    ")
    program = f"{prelude}\n{PRELUDE}\nasync def main():\n{body}\nanyio.run(main)\n"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", program],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for pid in survivors("SUBREAPER_TEST=1"):
        os.kill(pid, 9)
    return done.stdout.strip()


@pytest.mark.parametrize("on", [True, False])
def test_a_daemon_without_a_mark_is_ended_by_a_subreaper_only(on: bool) -> None:
    out = scene(f"""
        async with subreaper() if {on} else nullcontext():
            flow = Flow("one", "daemon-clean")
            await flow.family.end(0.0)
            flow.popen.wait()
            print(len(flow.children), len(flow.alive))
        for one in flow.alive:
            os.kill(one.pid, 9)
    """)
    assert out == ("1 0" if on else "1 1"), "off, it is the negative control"


def test_while_another_run_could_have_left_it_an_orphan_is_left_alone() -> None:
    out = scene("""
        async with subreaper():
            flow, other = Flow("one", "daemon-clean"), Flow("other", "sleep")
            await flow.family.end(0.0)
            flow.family.close()
            flow.popen.wait()
            print(len(flow.alive))  # it began before the other: nobody else's
            flow = Flow("three", "daemon-clean")
            await flow.family.end(0.0)
            flow.family.close()
            flow.popen.wait()
            print(len(flow.alive))
            await other.family.end(0.0)
            print(len(flow.alive))
    """)
    assert out.split() in (["0", "1", "0"], ["1", "1", "0"]), "the first two may have begun in the same hundredth"


def test_runs_that_end_together_leave_none_to_each_other() -> None:
    out = scene("""
        async with subreaper():
            flows = [Flow(str(i), "daemon-clean") for i in range(4)]
            async with anyio.create_task_group() as tasks:
                for flow in flows:
                    tasks.start_soon(flow.family.end, 0.1)
            print(sum(len(flow.children) for flow in flows), sum(len(flow.alive) for flow in flows))
    """)
    assert out == "4 0"


def test_what_a_run_was_allowed_to_leave_is_spared_by_the_next() -> None:
    out = scene("""
        async with subreaper():
            flow = Flow("one", "daemon-clean")
            os.kill(flow.popen.pid, 9)
            flow.popen.wait()
            await until(lambda: parent(flow.children[0]) == os.getpid())
            flow.family.close()
            other = Flow("other", "sleep")
            other.family.root = flow.family.root  # as old as the first: it could be the parent
            await other.family.end(0.0)
            print(len(flow.alive))
            os.kill(other.popen.pid, 9)
        os.kill(flow.children[0].pid, 9)
    """)
    assert out == "1"


@pytest.mark.parametrize("before", ["a child", "nothing"])
def test_where_orphans_may_be_anybodys_none_is_killed(before: str) -> None:
    starts = "subprocess.Popen(SLEEP, start_new_session=True, env={'SUBREAPER_TEST': '1'})"
    out = scene(f"""
        old = {starts if before == "a child" else None}
        async with subreaper():
            flow = Flow("one", "daemon-clean")
            await flow.family.end(0.0)
            print(len(flow.alive))
        for one in flow.alive:
            os.kill(one.pid, 9)
        if old:
            os.kill(old.pid, 9)
    """)
    assert out == ("1" if before == "a child" else "0")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs a pid namespace")
def test_as_pid_1_it_reaps_but_does_not_kill() -> None:
    if subprocess.run(["unshare", "-p", "-f", "--mount-proc", "true"], capture_output=True).returncode:
        pytest.skip("no pid namespace can be made here")
    out = scene(
        """
        assert os.getpid() == 1
        async with subreaper():
            flow = Flow("one", "daemon-clean")
            await flow.family.end(0.0)
            flow.popen.wait()
            print(len(flow.alive))
            [orphan] = flow.alive
            os.kill(orphan.pid, 9)
            await until(lambda: orphan.pid not in children())
            print("reaped")
        """,
        wrapper=("unshare", "-p", "-f", "--mount-proc"),
    )
    assert out.split() == ["1", "reaped"]


def test_no_orphan_stays_a_zombie_while_a_run_goes_on() -> None:
    out = scene("""
        async with subreaper():
            flow = Flow("one", "daemon")
            [orphan] = flow.children
            await until(lambda: parent(orphan) == os.getpid())
            os.kill(orphan.pid, 9)
            await until(lambda: orphan.pid not in children())
            print(flow.popen.poll())
            await flow.family.end(0.0)
    """)
    assert out == "None"


def test_without_a_reaper_it_would_be_one() -> None:
    """The negative control."""
    out = scene("""
        from procworker.system import subreaper as module
        module.Adoption.reap = lambda self: None
        async with subreaper():
            flow = Flow("one", "daemon")
            [orphan] = flow.children
            await until(lambda: parent(orphan) == os.getpid())
            os.kill(orphan.pid, 9)
            await until(lambda: state(orphan.pid) == "Z")
            await anyio.sleep(0.2)
            print(orphan.pid in children())
            await flow.family.end(0.0)
    """)
    assert out == "True"


def test_exit_codes_of_our_own_children_are_not_stolen() -> None:
    out = scene("""
        from pathlib import Path
        import tempfile

        async def run(code):
            place = Path(tempfile.mkdtemp())
            argv = [sys.executable, "-S", "-E", "-c", f"import os; os._exit({code})"]
            outputs = {"stdout": place / "o", "stderr": place / "e"}
            one = await child.spawn(argv, cwd=place, env={COOKIE: "x"}, **outputs)
            codes[code] = await one.wait()

        codes = {}
        async with subreaper():
            async with anyio.create_task_group() as tasks:
                for code in range(100):
                    tasks.start_soon(run, code)
                probe = await anyio.to_thread.run_sync(lambda: subprocess.run(["sh", "-c", "exit 7"]))
            print(codes == {code: code for code in range(100)}, probe.returncode, len(children()))
            print(len(adoption._own))
    """)
    assert out.split() == ["True", "7", "0", "0"]


def test_an_unregistered_child_would_be_stolen() -> None:
    """The negative control: the register is what keeps exit codes."""
    out = scene("""
        async with subreaper():
            popen = subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=True)
            await until(lambda: popen.pid not in children())
            print(popen.wait())
    """)
    assert out == "0"


def test_afterwards_the_process_is_as_before() -> None:
    out = scene("""
        import ctypes
        def is_subreaper():
            found = ctypes.c_int()
            ctypes.CDLL(None).prctl(37, ctypes.byref(found), 0, 0, 0)
            return found.value

        before = [signal.getsignal(number) for number in signal.valid_signals()]
        async with subreaper():
            print(is_subreaper(), adoption.on)
        print(is_subreaper(), adoption.on, before == [signal.getsignal(n) for n in signal.valid_signals()])
    """)
    assert out.split() == ["1", "True", "0", "False", "True"]


def test_where_there_is_no_such_thing_nothing_changes() -> None:
    out = scene("""
        from procworker.system import subreaper as module
        module.sys = type("sys", (), {"platform": "darwin"})
        async with subreaper():
            print(adoption.on, adoption.may_kill)
    """)
    assert out == "False False"
