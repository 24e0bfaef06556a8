"""Engines that are forked from a warm interpreter: when they are, when they are not, and what becomes of both.

The Prefect here is a stand-in whose engine runs the code that ENGINE holds; that a fork is like a new interpreter for
the real one is for tests/real/test_fork.py. What ends processes is tested under both ways of starting elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import misbehave
import psutil
import pytest
from commands import fake_prefect

from procworker.errors import SpawnError
from procworker.system import warm, zygote
from procworker.system.child import Child
from procworker.system.files import file_limit, raised_file_limit
from procworker.system.interpreter import Interpreter
from procworker.system.processes import COOKIE, LINUX, find_root
from procworker.system.subreaper import subreaper
from procworker.system.warm import Warm
from procworker.system.zygote import Zygote

pytestmark = pytest.mark.skipif(not LINUX, reason="nothing is forked elsewhere")

ENGINE = "if __name__ == '__main__':\n    import os\n    exec(os.environ['PREFECT__CODE'])\n"
TELL = "import os, sys; print(os.getppid(), os.environ.get('PREFECT__X'), os.getcwd(), sys.path[0], sys.argv[0])"


class Hearth:
    """Zygotes of a stand-in Prefect, and what is started by them."""

    def __init__(self, place: Path, warm: Warm) -> None:
        self.place, self.warm = place, warm
        self.prefect = place / "prefect" / "prefect"
        self.interpreter = Interpreter(sys.executable, "3.8.8")
        self.cookies: list[str] = []

    async def start(self, code: str = "", cwd: Path | None = None, **env: str) -> Child:
        cookie = f"{uuid4()}.{uuid4().hex}"
        self.cookies.append(cookie)
        cwd = cwd or self.place
        full = {
            "PYTHONPATH": str(self.prefect.parent),
            "PREFECT__CODE": code,
            "HOME": str(self.place),
            COOKIE: cookie,
            **env,
        }
        start = await self.warm.starter(self.interpreter, cwd, full)
        # What is spawned is the same engine in a new interpreter.
        argv = [sys.executable, "-m", "prefect.engine"]
        out, err = self.place / cookie, self.place / f"{cookie}.err"
        return await start(argv, cwd=cwd, env=full, stdout=out, stderr=err)

    async def run(self, code: str = "", **how: Any) -> int | None:
        with anyio.fail_after(30):
            return await (await self.start(code, **how)).wait()

    def out(self, number: int) -> Path:
        return self.place / self.cookies[number]

    def said(self, number: int = -1) -> list[str]:
        return self.out(number).read_text().split()

    @property
    def zygotes(self) -> list[int]:
        """Those that live, eldest first."""
        found = []
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # a zombie has no command line
                if zygote.SCRIPT in child.cmdline():
                    found.append(child)
        return [child.pid for child in sorted(found, key=psutil.Process.create_time)]

    async def was_forked(self) -> bool:
        """Is an engine started now the child of a zygote?"""
        assert await self.run(TELL) == 0
        return int(self.said()[0]) in self.zygotes


@pytest.fixture
async def hearth(tmp_path: Path) -> AsyncIterator[Hearth]:
    fake_prefect(tmp_path / "prefect", ENGINE)
    async with Warm(tmp_path / "home") as fire:
        hearth = Hearth(tmp_path, fire)
        yield hearth
    left = {pid for cookie in hearth.cookies for pid in misbehave.survivors(cookie)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not hearth.zygotes, "they leave with their worker"


async def eventually(fact: Callable[[], Any]) -> None:
    with anyio.fail_after(20):
        while not fact():  # noqa: ASYNC110
            await anyio.sleep(0.01)


# What is forked


async def test_an_engine_is_forked_with_its_own_environment_place_and_output(hearth: Hearth, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert await hearth.run(TELL, PREFECT__X="1") == 0
    assert await hearth.run(TELL, cwd=elsewhere, PREFECT__X="2") == 0

    (pid,) = hearth.zygotes
    engine = str(hearth.prefect / "engine.py")
    assert hearth.said(0) == [str(pid), "1", str(tmp_path), str(tmp_path), engine]
    assert hearth.said(1) == [str(pid), "2", str(elsewhere), str(elsewhere), engine]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("raise KeyboardInterrupt", -2),
    ],
)
async def test_its_exit_code_is_that_of_a_new_interpreter(hearth: Hearth, code: str, expected: int) -> None:
    assert await hearth.run(code) == expected
    assert len(hearth.zygotes) == 1


async def test_threads_are_joined_and_atexit_runs(hearth: Hearth) -> None:
    code = """
import atexit, threading, time
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("main")
"""
    assert await hearth.run(code) == 0
    assert hearth.said() == ["main", "thread", "atexit"]


async def test_it_is_marked_leads_a_session_and_handles_signals_as_new(hearth: Hearth) -> None:
    code = """
import os, signal, sys
mark = [v for v in open("/proc/self/environ").read().split(chr(0)) if v.startswith("PROCWORKER_RUN=")]
print(mark[0], os.getsid(0) == os.getpgrp() == os.getpid(), sys.stdin.read() == "")
print([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCHLD)] == [signal.SIG_DFL] * 2)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.pthread_sigmask(0, []) == set())
print(sorted(map(int, os.listdir("/proc/self/fd")))[:3] == [0, 1, 2], len(os.listdir("/proc/self/fd")))
"""
    assert await hearth.run(code) == 0
    assert await hearth.run(code) == 0

    for number in (0, 1):
        said = hearth.said(number)
        assert said[:-1] == [f"{COOKIE}={hearth.cookies[number]}", *["True"] * 6]
        assert int(said[-1]) <= 5, "the three, the file of what is learnt, and the listing"


async def test_forks_at_the_same_time_do_not_mix(hearth: Hearth) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(
                partial(
                    hearth.run,
                    "import os, time; time.sleep(0.3); print(os.environ['PREFECT__X'])",
                    PREFECT__X=str(number),
                )
            )

    assert sorted(hearth.said(number)[0] for number in range(8)) == sorted(map(str, range(8)))
    assert len(hearth.zygotes) == 1


async def test_an_environment_and_a_directory_that_are_no_text_arrive(hearth: Hearth, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"b\xff")
    place.mkdir()
    code = "import os; print(os.environb[b'X'] == b'a\\xff' and os.getcwdb().endswith(b'b\\xff'))"
    assert await hearth.run(code, cwd=place, X=os.fsdecode(b"a\xff")) == 0
    assert hearth.said() == ["True"]


async def test_it_has_the_file_limit_that_its_worker_was_started_with(hearth: Hearth) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    try:
        with raised_file_limit():
            file_limit.make_room()
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000, "nothing needs it"
            with ExitStack() as stack:
                for _ in range(501):
                    stack.enter_context(open(os.devnull))  # noqa: ASYNC230
                file_limit.make_room()
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000
            assert await hearth.run(code) == 0
            assert await hearth.run(code, PREFECT_LOGGING_LEVEL="DEBUG") == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [hearth.said(number) for number in (0, 1)] == [["1000"]] * 2


async def test_a_directory_that_is_not_there_is_named_as_ever(hearth: Hearth, tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="does not exist"):
        await hearth.run(cwd=tmp_path / "gone")


async def test_an_adopter_cannot_take_the_zygotes_environment_for_the_forks(hearth: Hearth) -> None:
    child = await hearth.start("import time; time.sleep(60)", PREFECT_API_KEY="hidden")
    assert "hidden" in psutil.Process(child.pid).environ().values(), "the trap is there"
    assert child.environment() == {}
    os.kill(child.pid, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL


# Of which kind


@pytest.mark.parametrize(
    ("name", "count"),
    [("PREFECT_LOGGING_LEVEL", 2), ("PYTHONOPTIMIZE", 2), ("LC_ALL", 2), ("MINE", 2), ("PREFECT__FLOW_RUN_ID", 1)],
)
async def test_what_acts_at_the_start_makes_another_kind(hearth: Hearth, name: str, count: int) -> None:
    for value in ("1", "2", "1"):
        assert await hearth.run(f"import os; print(os.environ[{name!r}])", **{name: value}) == 0
        assert hearth.said() == [value]

    assert len(hearth.zygotes) == count


@pytest.mark.parametrize(
    ("name", "text"), [(".env", "prefect_x=1"), ("prefect.toml", ""), ("pyproject.toml", "[tool]\nprefect.x=1")]
)
async def test_settings_in_the_directory_are_read_there(hearth: Hearth, tmp_path: Path, name: str, text: str) -> None:
    (hearth.prefect / "__init__.py").write_text(f"import os\nSAW = os.path.exists({name!r})\n")
    place = tmp_path / "place"
    place.mkdir()
    (place / name).write_text(text)
    for cwd, saw in ((tmp_path, "False"), (place, "True"), (tmp_path, "False")):
        assert await hearth.run("import prefect; print(prefect.SAW)", cwd=cwd) == 0
        assert hearth.said() == [saw]

    assert len(hearth.zygotes) == 2


@pytest.mark.parametrize("name", [".env", "pyproject.toml"])
async def test_a_file_without_such_settings_makes_no_other_kind(hearth: Hearth, tmp_path: Path, name: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / name).write_text("[tool.ruff]\nMINE=1\n")
    await hearth.run(cwd=tmp_path)
    await hearth.run(cwd=place)

    assert len(hearth.zygotes) == 1


@pytest.mark.parametrize("files", [7, 9])
async def test_without_the_means_to_fork_it_spawns_and_then_forks_again(hearth: Hearth, files: int) -> None:
    assert await hearth.was_forked()
    (pid,) = hearth.zygotes
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, limits[1]))
    assert not await hearth.was_forked()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    assert await hearth.was_forked()
    assert hearth.zygotes == [pid], "it is as good as it was"


@pytest.mark.parametrize(("home", "place"), [("", ".prefect"), ("~/own", "own"), ("{tmp}/a~b", "a~b")])
async def test_a_changed_profile_is_another_kind(hearth: Hearth, tmp_path: Path, home: str, place: str) -> None:
    profiles = tmp_path / place / "profiles.toml"
    profiles.parent.mkdir()
    given = {"PREFECT_HOME": home.format(tmp=tmp_path)} if home else {}
    (hearth.prefect / "__init__.py").write_text(f"SAW = open({str(profiles)!r}).read()\n")
    for text in ("one", "another"):
        profiles.write_text(text)
        assert await hearth.run("import prefect; print(prefect.SAW)", **given) == 0
        assert hearth.said() == [text]


async def test_there_are_only_so_many(hearth: Hearth) -> None:
    first = None
    for number in range(warm.MOST + 2):
        await hearth.run(PREFECT_X=str(number))
        first = first or hearth.zygotes[0]

    await eventually(lambda: len(hearth.zygotes) == warm.MOST)
    assert first not in hearth.zygotes


async def test_where_all_have_runs_another_kind_is_spawned(hearth: Hearth, caplog: pytest.LogCaptureFixture) -> None:
    children = [await hearth.start("import time; time.sleep(60)", PREFECT_X=str(n)) for n in range(warm.MOST)]
    assert await hearth.run(TELL, PREFECT_X="other") == 0
    assert hearth.said()[0] == str(os.getpid())
    assert "are in use" in caplog.text

    for child in children:
        os.kill(child.pid, signal.SIGTERM)
        assert await child.wait() == -signal.SIGTERM


async def test_another_prefect_on_disk_replaces_it_and_what_runs_goes_on(hearth: Hearth, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    old = await hearth.start(f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nexit(5)")
    (before,) = hearth.zygotes
    (hearth.prefect / "__init__.py").write_text("NEW = True\n")

    assert await hearth.run("import prefect; print(prefect.NEW)") == 0
    assert hearth.said() == ["True"]
    assert before in hearth.zygotes, "it has to tell how its run ends"
    gate.touch()
    assert await old.wait() == 5
    await eventually(lambda: before not in hearth.zygotes)


async def test_one_that_nobody_needs_leaves(hearth: Hearth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "IDLE_SECONDS", 0.1)
    child = await hearth.start("import time; time.sleep(0.5)")
    assert hearth.zygotes
    assert await child.wait() == 0, "not while something runs"
    await eventually(lambda: not hearth.zygotes)

    monkeypatch.undo()
    assert await hearth.was_forked() or await hearth.was_forked()


# What is learnt


async def test_what_a_run_of_prefects_needed_is_there_for_the_next_and_for_the_next_worker(
    hearth: Hearth, tmp_path: Path
) -> None:
    (hearth.prefect / "extra.py").touch()
    (hearth.prefect.parent / "foreign.py").touch()
    code = "import sys; print([name in sys.modules for name in ('prefect.extra', 'foreign')])\n"
    assert await hearth.run(code + "import prefect.extra, foreign") == 0
    assert "True" not in hearth.said()
    await eventually(lambda: [*(tmp_path / "home" / "warm").glob("*.json")])
    library = [*(tmp_path / "home" / "warm").glob("*.json")]
    assert [json.loads(path.read_text()) for path in library] == [["prefect.extra"]]

    assert await hearth.run(code) == 0
    assert hearth.said() == ["[True,", "False]"]
    async with Warm(tmp_path / "home") as hearth.warm:
        assert await hearth.run(code) == 0
        assert hearth.said() == ["[True,", "False]"]


async def test_a_library_that_is_none_is_no_trouble(hearth: Hearth, tmp_path: Path) -> None:
    place = tmp_path / "home" / "warm"
    place.mkdir(parents=True)
    await hearth.run("import json")
    (place / f"prefect-3.8.8-{'0' * 12}.json").write_text("{")
    for path in place.glob("*.json"):
        path.write_text("[1, {")

    assert await hearth.was_forked()


async def test_what_cannot_be_imported_again_is_left_out(hearth: Hearth) -> None:
    (hearth.prefect / "once.py").write_text("import os\nif 'PREFECT__CODE' not in os.environ: raise SystemExit(1)\n")
    assert await hearth.run("import prefect.once") == 0

    assert await hearth.was_forked()


# What goes wrong


async def test_with_another_thread_it_does_not_fork(hearth: Hearth, caplog: pytest.LogCaptureFixture) -> None:
    (hearth.prefect / "__init__.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, name='a-thread', daemon=True).start()\n"
    )
    for _ in range(4):
        assert not await hearth.was_forked()

    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2, "each reason is told once"
    assert "a-thread" in caplog.messages[0]
    assert "tried again later" in caplog.messages[1]


async def test_what_brings_a_thread_or_something_foreign_is_not_learnt(hearth: Hearth) -> None:
    thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    modules = {"one": "", "threading_": thread, "two": "", "foreign_": "import foreign", "three": "import shelve"}
    for name, code in modules.items():
        (hearth.prefect / f"{name}.py").write_text(code)
    (hearth.prefect.parent / "foreign.py").touch()
    assert await hearth.run(f"import {', '.join('prefect.' + name for name in modules)}") == 0
    await eventually(lambda: [*(hearth.place / "home" / "warm").glob("*.json")])

    (library,) = (hearth.place / "home" / "warm").glob("*.json")
    assert json.loads(library.read_text()) == ["prefect.one", "prefect.two", "prefect.three"]
    assert await hearth.was_forked()


async def test_a_prefect_that_cannot_be_imported_warm_is_spawned(
    hearth: Hearth, caplog: pytest.LogCaptureFixture
) -> None:
    (hearth.prefect / "flow_engine.py").write_text("raise ImportError('not today')")

    assert not await hearth.was_forked()
    assert "not today" in caplog.text


async def test_no_python_no_zygote(hearth: Hearth, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hearth.interpreter = Interpreter(str(tmp_path / "python"), "3.8.8")

    assert not await hearth.was_forked()
    assert "No such file" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_zygote_that_dies_takes_no_run_with_it(hearth: Hearth, tmp_path: Path, number: int) -> None:
    gate = tmp_path / "gate"
    child = await hearth.start(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nprint('end')"
    )
    (pid,) = hearth.zygotes
    os.kill(pid, number)
    await eventually(lambda: not hearth.zygotes)
    assert await hearth.was_forked() or await hearth.was_forked(), "there is a new one"

    gate.touch()
    with anyio.fail_after(20):
        assert await child.wait() is None, "nobody can know"
    assert hearth.said(0) == ["end"]


async def test_a_subreaper_learns_the_code_all_the_same(hearth: Hearth, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with subreaper():
        child = await hearth.start(
            f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nraise SystemExit(5)"
        )
        (pid,) = hearth.zygotes
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: pid not in hearth.zygotes)
        gate.touch()
        with anyio.fail_after(20):
            assert await child.wait() == 5


async def test_a_zygote_that_hangs_is_not_waited_for(hearth: Hearth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "REPLY_SECONDS", 0.2)
    monkeypatch.setattr(zygote, "LEAVE_SECONDS", 0.2)
    await hearth.run()
    (pid,) = hearth.zygotes
    os.kill(pid, signal.SIGSTOP)

    assert not await hearth.was_forked()
    await eventually(lambda: not hearth.zygotes)


async def test_one_that_was_forked_without_an_answer_is_found(hearth: Hearth, monkeypatch: pytest.MonkeyPatch) -> None:
    await hearth.run()
    hear = Zygote._hear

    def lose(self: Zygote, said: Any) -> None:
        if "forked" not in said:
            hear(self, said)

    monkeypatch.setattr(Zygote, "_hear", lose)
    monkeypatch.setattr(zygote, "REPLY_SECONDS", 0.5)
    child = await hearth.start("import time; time.sleep(60)")

    assert child.identity == find_root(hearth.cookies[-1])
    os.kill(child.pid, signal.SIGKILL)
    with anyio.fail_after(20):
        assert await child.wait() is None


@pytest.mark.parametrize("name", ["A=B", "", "A\0B"])
async def test_a_variable_that_cannot_be_is_named_and_is_no_trouble_of_others(hearth: Hearth, name: str) -> None:
    with pytest.raises(SpawnError, match="environment variable"):
        await hearth.run(**{name: "1"})

    assert await hearth.was_forked()


async def test_text_that_no_system_takes_is_spawned_and_refused_there(hearth: Hearth) -> None:
    with pytest.raises(SpawnError):
        await hearth.run(X="\ud800")

    assert await hearth.was_forked()


async def test_without_memory_files_others_are_used(hearth: Hearth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert await hearth.was_forked()


async def test_an_engine_that_ended_before_anybody_looked_is_not_started_again(
    hearth: Hearth, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = hearth.place / "ran"
    code = f"import os; os.write(os.open({str(ran)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT), b'x')"
    await hearth.run()
    hear = Zygote._hear
    monkeypatch.setattr(Zygote, "_hear", lambda self, said: None if "forked" in said else hear(self, said))
    monkeypatch.setattr(zygote, "REPLY_SECONDS", 1.0)

    assert await hearth.run(code) is None
    assert ran.read_text() == "x"


async def test_a_zygote_that_hangs_keeps_no_run_from_its_end(hearth: Hearth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "REPLY_SECONDS", 0.2)
    monkeypatch.setattr(zygote, "LOOK_SECONDS", 0.1)
    gate = hearth.place / "gate"
    child = await hearth.start(f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)")
    (pid,) = hearth.zygotes
    os.kill(pid, signal.SIGSTOP)
    gate.touch()

    with anyio.fail_after(20):
        assert await child.wait() is None
    assert pid not in hearth.zygotes


async def test_what_is_slow_to_import_is_not_learnt_and_holds_nobody_up_again(
    hearth: Hearth, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hearth.prefect / "slow.py").write_text("import os, time\nif 'PREFECT__CODE' not in os.environ: time.sleep(60)\n")
    (hearth.prefect / "good.py").touch()
    assert await hearth.run("import prefect.slow, prefect.good") == 0
    with anyio.fail_after(zygote.REPLY_SECONDS):
        assert await hearth.was_forked()
    (pid,) = hearth.zygotes
    assert await hearth.run("import prefect.slow, prefect.good") == 0
    with anyio.fail_after(2):
        assert await hearth.was_forked()
    assert psutil.Process(pid).children() == []


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1}', "[1]", '["prefect", "this", "no.such.module"]'])
async def test_whatever_stands_in_the_library_is_no_trouble(hearth: Hearth, text: str) -> None:
    (hearth.prefect / "extra.py").touch()
    await hearth.run("import prefect.extra")
    await eventually(lambda: [*(hearth.place / "home" / "warm").glob("*.json")])
    (library,) = (hearth.place / "home" / "warm").glob("*.json")
    library.write_text(text)
    async with Warm(hearth.place / "home") as hearth.warm:
        assert await hearth.was_forked()


async def test_two_workers_learn_together(hearth: Hearth) -> None:
    for name in ("one", "two"):
        (hearth.prefect / f"{name}.py").touch()
    own, place = hearth.warm, hearth.place / "home" / "warm"
    async with Warm(hearth.place / "home") as other:
        await hearth.run(PREFECT_X="1")
        hearth.warm = other
        await hearth.run(PREFECT_X="2")
        for hearth.warm, name, kind in ((own, "one", "1"), (other, "two", "2")):
            await hearth.run(f"import prefect.{name}", PREFECT_X=kind)
            names = [json.dumps(f"prefect.{n}") for n in ("one", "two")][: 1 + (name == "two")]
            await eventually(
                lambda names=names: any(all(n in p.read_text() for n in names) for p in place.glob("*.json"))
            )
        hearth.warm = own


async def test_what_a_flow_writes_where_modules_are_named_harms_nobody(hearth: Hearth) -> None:
    code = """
import os
for fd in os.listdir("/proc/self/fd"):
    try:
        if "memfd" in os.readlink(f"/proc/self/fd/{fd}"): os.write(int(fd), b"\\xff \\xfe")
    except OSError: pass
"""
    assert await hearth.run(code) == 0
    (pid,) = hearth.zygotes
    assert await hearth.was_forked()
    assert hearth.zygotes == [pid]


@pytest.mark.parametrize("patience", [5.0, 0.1])
async def test_who_may_still_fork_is_never_replaced(
    hearth: Hearth, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Else the engine would run twice: spawned, and forked a moment later."""
    ran = hearth.place / "ran"
    await hearth.run()
    (pid,) = hearth.zygotes
    (theirs,) = hearth.warm._zygotes.values()
    send = socket.send_fds

    def send_and_retire(*what: Any) -> int:
        os.kill(pid, signal.SIGSTOP)
        sent = send(*what)
        theirs.retire("another kind is wanted")
        return sent

    async def wake() -> None:
        await anyio.sleep(0.5)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    monkeypatch.setattr(socket, "send_fds", send_and_retire)
    monkeypatch.setattr(zygote, "REPLY_SECONDS", patience)
    code = (
        f"import os; os.write(os.open({str(ran)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT), b'x'); print(os.getppid())"
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wake)
        assert await hearth.run(code) in (0, None)
    await eventually(lambda: not theirs.is_in_use and pid not in hearth.zygotes)
    await eventually(lambda: not misbehave.survivors(hearth.cookies[-1]))
    assert ran.read_text() == "x"
    assert (hearth.said() == [str(pid)]) is (patience > 1), "who answers in time has forked it"


async def test_before_and_after_its_life_everything_is_spawned(tmp_path: Path) -> None:
    fake_prefect(tmp_path / "prefect", ENGINE)
    hearth = Hearth(tmp_path, Warm(tmp_path / "home"))

    assert not await hearth.was_forked()
    async with hearth.warm:
        assert await hearth.was_forked()
    assert not await hearth.was_forked()
