"""The process worker's `run` and `kill_infrastructure`, with real processes; a server only where it matters."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import anyio.lowlevel
import misbehave
import pytest
from anyio.abc import Process as AnyProcess
from commands import fake_prefect
from pydantic import ValidationError
from workers import settings_for

from procworker import process
from procworker.errors import ConfigurationError, InfrastructureNotAvailable, InfrastructureNotFound, SpawnError
from procworker.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult
from procworker.server.models import FlowRun
from procworker.settings import Settings
from procworker.system import tree
from procworker.system.child import join_command
from procworker.system.processes import COOKIE, Entry, Process, identify, is_alive, scan
from procworker.system.tree import Family
from procworker.testing.api import PrefectApi

MISBEHAVE = (sys.executable, "-S", "-E", misbehave.__file__)
HOST = socket.gethostname()
NOBODY = 2**22  # the first pid that Linux cannot give


class Bench:
    """A worker without a server, one flow run on it, and what is seen of both."""

    def __init__(self, home: Path, **environ: str) -> None:
        self.forking = False
        self.settings = Settings.load({"HOME": str(home), "PROCWORKER_HOME": str(home / "state"), **environ})
        self.worker = ProcessWorker(None, settings=self.settings, sink=self._print)
        self.flow_run = FlowRun(id=uuid4(), name="keen-owl")
        self.printed: list[tuple[str, str]] = []
        self.pid = 0
        self._started, self._moved = anyio.Event(), anyio.Event()

    def _print(self, stream: str, line: str) -> None:
        self.printed.append((stream, line))
        self._moved.set()

    def started(self, value: Any) -> None:
        """What `task_status` calls."""
        self.pid = value
        self._started.set()

    def configure(self, *command: str, **fields: Any) -> ProcessJobConfiguration:
        """The configuration as a run gets it; a single word (with its arguments) is a mode of misbehave.py."""
        if len(command) == 1:
            command = (*MISBEHAVE, *command[0].split())
        if command and self.forking:
            fields = {"start_method": "fork", "python": sys.executable, **fields}
            fields["env"] = {**fields.get("env", {}), "COMMAND": json.dumps(command)}
            command = ()
        configuration = ProcessJobConfiguration(command=join_command(command) if command else None, **fields)
        configuration._inherited = self.worker._inherited_environment(configuration)
        configuration.prepare(self.flow_run, None, None, None, self.worker.name, None)
        return configuration

    async def run(self, *command: str, **fields: Any) -> ProcessWorkerResult:
        with anyio.fail_after(30):
            return await self.worker.run(self.flow_run, self.configure(*command, **fields), self)  # type: ignore[arg-type]

    async def begin(self, tasks: Any, *command: str, **fields: Any) -> None:
        """Run beside the test, and return when the process has been started."""
        tasks.start_soon(partial(self.run, *command, **fields))
        await self._started.wait()

    async def until_printed(self, start: str) -> str:
        """Wait for a line that starts so, and return the rest of it."""
        with anyio.fail_after(20):
            while not (found := [line for line in self.lines if line.startswith(start)]):
                self._moved = anyio.Event()
                await self._moved.wait()
        return found[0].removeprefix(start).strip()

    async def kill(self, grace: float = 0.0, pid: str = "") -> None:
        await self.worker.kill_infrastructure(pid or str(self.pid), ProcessJobConfiguration(), grace)

    @property
    def lines(self) -> list[str]:
        return [line.removeprefix("keen-owl | ") for _, line in self.printed]

    @property
    def directories(self) -> list[Path]:
        """The directories that runs have now."""
        return [*self.settings.state_home.glob("runs/*"), *Path(os.environ["TMPDIR"]).iterdir()]


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Make benches with these variables in the environment of their settings; at the end nothing may run on them."""
    benches: list[Bench] = []

    def make_bench(**environ: str) -> Bench:
        benches.append(Bench(tmp_path, **environ))
        return benches[-1]

    yield make_bench
    left = {pid: what for bench in benches for pid, what in misbehave.survivors(str(bench.flow_run.id)).items()}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"still running: {left}"


ENGINE = f"""
if __name__ == "__main__":
    import json, os, runpy, sys
    command = json.loads(os.environ.pop("COMMAND"))
    if command[0] != sys.executable:
        os.execvp(command[0], command)
    sys.argv = command[3:]
    runpy.run_path({misbehave.__file__!r}, run_name="__main__")
"""
"""Does in a fork what a command does that is spawned."""


@pytest.fixture(params=["spawn", "fork"])
async def bench(
    make_bench: MakeBench, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """A bench whose commands are spawned, or run by an engine that is forked."""
    bench = make_bench()
    if request.param == "fork":
        bench.forking = True
        monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect", ENGINE)))
    async with bench.worker._warm:
        yield bench


@asynccontextmanager
async def another_process() -> AsyncIterator[AnyProcess]:
    async with await anyio.open_process([*MISBEHAVE, "sleep"], stdout=None) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a flow leaves behind gets little time."""
    monkeypatch.setattr(process, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(process, "LEFTOVER_GRACE_SECONDS", 0.1)


def python_with_prefect(folder: Path) -> str:
    """A Python with a Prefect whose engine only says where it runs."""
    package, metadata = folder / "packages" / "prefect", folder / "packages" / "prefect-9.9.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text("")
    (package / "engine.py").write_text("import os, sys; print('engine of', os.environ['PREFECT__FLOW_RUN_ID'])")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: prefect\nVersion: 9.9\n")
    path = folder / "a python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


# The straight line


async def test_a_run_tells_pid_and_exit_code(bench: Bench) -> None:
    result = await bench.run("exit")

    assert result
    assert result.status_code == 0
    assert result.remarks == []
    assert result.identifier == str(bench.pid)
    assert bench.lines == [f"READY {bench.pid} {bench.pid} {bench.pid}"]


async def test_nobody_needs_to_want_the_pid(bench: Bench) -> None:
    result = await bench.worker.run(bench.flow_run, bench.configure("exit"))

    assert int(result.identifier) > 1


async def test_without_a_command_the_engine_runs(bench: Bench, tmp_path: Path) -> None:
    result = await bench.run(python=python_with_prefect(tmp_path))

    assert result.status_code == 0
    assert bench.lines == [f"engine of {bench.flow_run.id}"]


async def test_the_workers_own_choice_of_python_is_the_default(bench: Bench, tmp_path: Path) -> None:
    bench.worker._python = python_with_prefect(tmp_path)
    await bench.run()

    assert bench.lines == [f"engine of {bench.flow_run.id}"]
    with pytest.raises(ConfigurationError, match="'/no/such' does not exist"):
        await bench.run(python="/no/such")


async def test_before_a_python_was_chosen_the_command_names_none() -> None:
    assert ProcessJobConfiguration()._base_flow_run_command() == "python -m prefect.engine"


async def test_a_failure_is_explained_with_a_hint(bench: Bench) -> None:
    result = await bench.run("exit 127")

    assert not result
    assert result.status_code == 127
    assert result.explanation == "The command was not found. Check PATH and whether the command is installed."


async def test_a_signal_is_explained(bench: Bench) -> None:
    result = await bench.run("die 9")

    assert result.status_code == -9
    assert "SIGKILL" in result.explanation


@pytest.mark.parametrize("command", ["'unclosed", "no-such-command"])
async def test_what_cannot_start_leaves_no_directories(bench: Bench, command: str) -> None:
    with pytest.raises((ConfigurationError, SpawnError)):
        await bench.worker.run(bench.flow_run, ProcessJobConfiguration(command=command), bench)  # type: ignore[arg-type]

    assert bench.directories == []
    assert bench.pid == 0


async def test_runs_beside_each_other_do_not_meet(make_bench: MakeBench) -> None:
    benches = [make_bench() for _ in range(5)]
    results: dict[int, int] = {}

    async def run(code: int) -> None:
        results[code] = (await benches[code].run(f"exit {code}")).status_code

    async with anyio.create_task_group() as tasks:
        for code in range(5):
            tasks.start_soon(run, code)
    assert results == {code: code for code in range(5)}


# Where it runs


async def test_by_default_it_runs_in_a_temporary_directory_that_goes_afterwards(bench: Bench) -> None:
    await bench.run("sh", "-c", "pwd; touch file; mkdir -m 0 closed")

    assert Path(bench.lines[0]).parent == Path(os.environ["TMPDIR"])
    assert bench.directories == []


async def test_a_given_working_directory_stays(bench: Bench, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    await bench.run("sh", "-c", "pwd; touch file", working_dir=given)

    assert bench.lines == [str(given)]
    assert (given / "file").exists()
    assert bench.directories == []


async def test_a_working_directory_may_lie_below_home(bench: Bench) -> None:
    await bench.run("pwd", "-P", working_dir="~")
    assert bench.lines == [os.environ["HOME"]]

    with pytest.raises(SpawnError, match=r"'~nobody-of-that-name/x' does not exist"):
        await bench.run("pwd", "-P", working_dir="~nobody-of-that-name/x")


async def test_a_missing_working_directory_is_said(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="/gone' does not exist"):
        await bench.run("exit", working_dir=tmp_path / "gone")

    assert bench.directories == []


async def test_output_finds_a_place_where_home_cannot_be_written(bench: Bench) -> None:
    bench.settings.state_home.write_text("a file")
    result = await bench.run("lines 2")

    assert result.tail[1:] == ["out 0", "out 1", "err 0", "err 1"]
    assert bench.directories == []


# What it gets


async def environment_of(bench: Bench, **env: str | None) -> dict[str, str]:
    await bench.run("env", "-u", "NOTHING", env=env)
    return dict(line.split("=", 1) for line in bench.lines if "=" in line)


async def test_it_gets_our_environment_the_settings_and_its_own(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "1")
    monkeypatch.setenv("GONE", "1")
    bench = make_bench(PREFECT_LOGGING_LEVEL="DEBUG")
    env = await environment_of(bench, OWN="2", GONE=None)

    assert (env["OURS"], env["OWN"], env["PREFECT_LOGGING_LEVEL"]) == ("1", "2", "DEBUG")
    assert "GONE" not in env
    assert env["PREFECT__FLOW_RUN_ID"] == str(bench.flow_run.id)


async def test_output_is_unbuffered_unless_somebody_says_otherwise(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert bench.configure("exit").env["PYTHONUNBUFFERED"] == "1"
    assert (await environment_of(bench))["PYTHONUNBUFFERED"] == "1"
    assert "PYTHONUNBUFFERED" not in bench.configure("exit", env={"PYTHONUNBUFFERED": None}).env
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    assert bench.configure("exit").env["PYTHONUNBUFFERED"] == ""


async def test_it_carries_a_cookie_of_its_own(bench: Bench) -> None:
    first = (await environment_of(bench, **{COOKIE: "forged"}))[COOKIE]
    bench.printed.clear()
    second = (await environment_of(bench))[COOKIE]

    assert first != second
    for cookie in (first, second):
        assert cookie.startswith(f"{bench.flow_run.id}.")


async def test_null_in_the_environment_means_not_there(bench: Bench) -> None:
    configuration = ProcessJobConfiguration(command="env", env={"A": "b", "GONE": None})
    await bench.worker.run(bench.flow_run, configuration)

    assert sorted(line.split("=")[0] for line in bench.lines) == ["A", COOKIE]


async def test_another_python_gets_nothing_of_our_virtual_environment(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "own"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert "VIRTUAL_ENV" in bench.configure("exit").env
    assert "VIRTUAL_ENV" not in bench.configure("exit", python=sys.executable).env


# What it says


async def test_output_is_printed_with_the_name_of_the_run(bench: Bench) -> None:
    await bench.run("sh", "-c", "echo out; echo err >&2")

    assert sorted(bench.printed) == [("stderr", "keen-owl | err"), ("stdout", "keen-owl | out")]


async def test_by_default_it_is_printed_where_we_print(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench()
    bench.worker = ProcessWorker(None, settings=bench.settings)
    await bench.run("sh", "-c", "echo out; echo err >&2")

    assert capsys.readouterr() == ("keen-owl | out\n", "keen-owl | err\n")


async def test_without_stream_output_nothing_is_printed_but_the_tail_is_kept(bench: Bench) -> None:
    result = await bench.run("sh", "-c", "echo out", stream_output=False)

    assert bench.printed == []
    assert result.tail == ["out"]


async def test_secrets_are_masked_in_print_and_tail(make_bench: MakeBench) -> None:
    bench = make_bench(PREFECT_API_KEY="pnu_secret_key", PREFECT_CLIENT_CUSTOM_HEADERS='{"X-Auth": "in-header"}')
    padding = "x" * 1990
    show = "echo key $PREFECT_API_KEY; echo token $MY_TOKEN; echo url $DB; echo plain $OTHER; echo in-header"
    env = {"MY_TOKEN": "a.token.(x", "DB": "http://me:hunter22@db", "OTHER": "visible"}
    result = await bench.run("sh", "-c", f"{show}; echo {padding}$PREFECT_API_KEY", env=env)

    shown = ["key ***", "token ***", "url http://me:***@db", "plain visible", "***"]
    assert bench.lines == [*shown, f"{padding}***"]
    assert result.tail == [*shown, f"{padding}***"]


async def test_the_tail_is_short_and_narrow(bench: Bench) -> None:
    result = await bench.run("sh", "-c", "seq 100; head -c 5000 /dev/zero | tr '\\0' x")

    assert result.tail[:-1] == [str(number) for number in range(82, 101)]
    assert result.tail[-1] == "x" * 2000
    assert "seq" not in repr(result)


async def test_a_closed_pipe_of_ours_does_not_end_the_run(bench: Bench) -> None:
    def closed(stream: str, line: str) -> None:
        raise BrokenPipeError

    bench.worker._sink = closed
    assert await bench.run("lines 3")


async def test_a_run_that_closes_its_output_is_waited_for(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "close-stdout")
        await bench.until_printed("READY")
        await bench.kill()

    assert bench.directories == []


# What it leaves behind


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mode", ["keep-stdout 0", "daemon-exit 0", "nohup"])
async def test_what_a_run_leaves_behind_is_ended(bench: Bench, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    result = await bench.run(mode)

    assert result.status_code == 0
    assert "Processes left behind by the flow run were ended: 1" in caplog.text
    assert misbehave.survivors(str(bench.flow_run.id)) == {}


@pytest.mark.usefixtures("impatient")
async def test_a_failed_run_leaves_nothing_behind_either(bench: Bench) -> None:
    assert (await bench.run("keep-stdout 3")).status_code == 3


async def test_nothing_left_behind_is_not_worth_a_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.run("exit")

    assert "left behind" not in caplog.text


async def test_what_leaves_by_itself_is_given_the_time(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    result = await bench.run("sh", "-c", "(sleep 0.1; echo late) &")

    assert result.tail == ["late"]
    assert "left behind" not in caplog.text


async def test_leftovers_can_be_allowed(make_bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    bench = make_bench()
    result = await bench.run("keep-stdout 0", leftovers="allow")
    left = identify(int(await bench.until_printed("CHILD")))

    assert left is not None
    await Family(left, "no cookie").end(0.0)
    assert result.status_code == 0
    assert "left behind" not in caplog.text
    assert bench.directories == []


async def test_allowed_leftovers_of_a_cancelled_run_are_ended_all_the_same(bench: Bench) -> None:
    """The run is over when the last of them has gone, not when its first process has."""
    async with anyio.create_task_group() as tasks:

        async def cancel() -> None:
            await bench.until_printed("READY")
            await bench.kill(1.0)

        tasks.start_soon(cancel)
        await bench.run("deaf-child", leftovers="allow")
        deaf = int(await bench.until_printed("CHILD"))
        assert identify(deaf) is None


async def test_what_a_run_links_to_is_left_as_it_was(bench: Bench, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    await bench.run("sh", "-c", f"ln -s {other} link; mkdir closed; ln -s {other} closed/link; chmod 0 closed")

    assert other.stat().st_mode & 0o777 == 0o755
    assert bench.directories == []


async def test_what_could_not_be_waited_for_is_ended(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.12 asyncio waits for a child in a thread, which may be one too many."""
    bench = make_bench()
    spawn = process.spawn

    async def spawn_and_fail(*args: Any, **options: Any) -> Any:
        await spawn(*args, **options)
        raise SpawnError("can't start new thread")

    monkeypatch.setattr(process, "spawn", spawn_and_fail)
    with pytest.raises(SpawnError):
        await bench.run("ignore-term")

    with anyio.fail_after(20):
        while misbehave.survivors(str(bench.flow_run.id)):  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_what_cannot_be_killed_is_named_in_the_remarks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    immortal = Entry(Process(NOBODY, 1.0), 1, 0, False)

    class Cursed(Family):
        def _is_ours(self, pid: int, entry: Entry, *seen: Any) -> bool:
            return entry is immortal or super()._is_ours(pid, entry, *seen)

    monkeypatch.setattr(process, "Family", partial(Cursed, scan=lambda: [*scan(), immortal]))
    monkeypatch.setattr(process, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(process, "LEFTOVER_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(tree, "KILL_SECONDS", 0.05)
    result = await bench.run("exit")

    assert result.remarks == [f"Could not be killed: {NOBODY}."]


# Ending it


async def test_to_kill_a_run_ends_its_whole_tree(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "daemon")
        await bench.until_printed("READY")
        daemon = identify(int(await bench.until_printed("CHILD")))
        assert daemon
        await bench.kill(30.0)

    assert not is_alive(daemon)
    assert bench.directories == []


async def test_the_grace_is_kept(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "slow-term 0.3")
        await bench.until_printed("READY")
        await bench.kill(30.0)

    assert bench.lines[-2:] == ["TERM", "TIDY"]


@pytest.mark.usefixtures("impatient")
async def test_the_grace_is_for_the_whole_tree_not_only_the_root(bench: Bench) -> None:
    """That the root has ended is no reason to end the others as leftovers, which get less time."""
    slow = join_command([*MISBEHAVE, "slow-term", "0.5"])
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "sh", "-c", f"{slow} & wait")
        await bench.until_printed("READY")
        await bench.kill(30.0)

    assert bench.lines[-2:] == ["TERM", "TIDY"]


async def test_there_is_no_scan_while_nothing_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = itertools.count()

    def counted() -> Any:
        next(scans)
        return scan()

    monkeypatch.setattr(tree, "_lookout", tree.Lookout(counted))
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "sleep 1")
        await bench.until_printed("READY")
        await anyio.sleep(0.5)
        assert next(scans) == 0
    assert 2 <= next(scans) - 1 <= 3


async def test_a_second_kill_shortens_the_grace(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "slow-term 600")
        await bench.until_printed("READY")
        tasks.start_soon(bench.kill, 600.0)
        await bench.until_printed("TERM")
        await bench.kill(0.0)

    assert "TIDY" not in bench.lines


async def test_what_a_kill_ended_was_not_left_behind(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    results: list[ProcessWorkerResult] = []

    async def run() -> None:
        results.append(await bench.run("tree 2"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await bench.until_printed("READY")
        await bench.kill(30.0)

    assert results[0].status_code == -signal.SIGTERM
    assert "left behind" not in caplog.text


async def test_only_living_runs_of_our_own_can_be_killed(bench: Bench) -> None:
    async with another_process() as stranger, anyio.create_task_group() as tasks:
        for pid in (str(stranger.pid), f"{HOST}:{stranger.pid}", "1", str(NOBODY), "", "nonsense"):
            with pytest.raises(InfrastructureNotFound, match="was not started by this worker, or has ended"):
                await bench.kill(pid=pid or ":")
        with pytest.raises(InfrastructureNotAvailable, match=f"runs on host 'elsewhere', not on '{HOST}'"):
            await bench.kill(pid=f"elsewhere:{stranger.pid}")
        assert stranger.returncode is None

        await bench.begin(tasks, "ignore-term")
        await bench.kill(pid=f"{HOST}:{bench.pid}")
    with pytest.raises(InfrastructureNotFound):
        await bench.kill()


# Cancelling what surrounds it


@pytest.mark.parametrize("steps", range(25))
async def test_whenever_run_is_cancelled_nothing_is_left(bench: Bench, steps: int) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.run, "setsid")
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()

    assert bench.directories == []
    assert misbehave.survivors(str(bench.flow_run.id)) == {}


@pytest.mark.parametrize("mode", ["ignore-term", "daemon", "sh-wait", "stop-itself"])
async def test_a_cancelled_run_ends_its_whole_tree(bench: Bench, mode: str) -> None:
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, mode)
        await bench.until_printed("READY")
        assert misbehave.survivors(str(bench.flow_run.id))
        tasks.cancel_scope.cancel()

    assert bench.directories == []
    assert misbehave.survivors(str(bench.flow_run.id)) == {}
    assert bench.worker._live == {}


async def test_a_run_cancelled_while_it_ends_leftovers_ends_them_at_once(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        await bench.begin(tasks, "nohup")
        await bench.until_printed("READY")
        while identify(bench.pid):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()

    assert misbehave.survivors(str(bench.flow_run.id)) == {}


async def test_a_cancelled_asyncio_task_ends_its_tree(bench: Bench) -> None:
    task = asyncio.ensure_future(bench.run("daemon"))
    await bench.until_printed("READY")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert bench.directories == []
    assert misbehave.survivors(str(bench.flow_run.id)) == {}


def test_a_loop_that_closes_after_a_cancel_gets_no_complaints(make_bench: MakeBench) -> None:
    """The child is waited for, so no watcher speaks of it when nobody listens any more."""

    async def main() -> None:
        bench = make_bench()
        async with anyio.create_task_group() as tasks:
            await bench.begin(tasks, "sleep")
            tasks.cancel_scope.cancel()
        assert identify(bench.pid, dead=True) is None

    for _ in range(5):
        anyio.run(main)


async def test_a_fault_while_following_ends_the_tree(bench: Bench) -> None:
    def broken(stream: str, line: str) -> None:
        raise LookupError("a bug in a sink")

    bench.worker._sink = broken
    with pytest.raises(Exception, match="unhandled errors in a TaskGroup") as caught:
        await bench.run("daemon")

    assert isinstance(caught.value.exceptions[0], LookupError)  # type: ignore[attr-defined]
    assert misbehave.survivors(str(bench.flow_run.id)) == {}


# What a job may say


@pytest.mark.parametrize(
    "fields", [{"timeout_seconds": 0}, {"grace_seconds": -1}, {"leftovers": "warn"}, {"stream_output": "maybe"}]
)
def test_a_wrong_value_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        ProcessJobConfiguration(**fields)


def test_the_template_of_a_new_pool_offers_every_field() -> None:
    template = ProcessWorker.get_default_base_job_template()
    assert set(template["job_configuration"]) == set(template["variables"]["properties"])
    assert ProcessWorker.extra_variables < set(template["job_configuration"])
    for name, schema in template["variables"]["properties"].items():
        assert schema.get("description") or schema.get("title"), name


# With a server


async def test_a_failed_run_is_reported_with_its_last_words(server: PrefectApi) -> None:
    server.add_pool("pool", base_job_template=ProcessWorker.get_default_base_job_template())
    command = join_command([*MISBEHAVE, "lines", "2"]) + " no-number"
    id = server.schedule(work_pool_name="pool", job_variables={"command": command, "env": {"X_TOKEN": "no-number"}})
    worker = ProcessWorker("pool", settings=settings_for(server), sink=lambda stream, line: None)
    await worker.start(run_once=True, printer=lambda *line: None)

    state = server.runs[id].state
    assert state.type == "CRASHED"
    assert "It ended with a general error." in str(state.message)
    assert server.runs[id].infrastructure_pid
    logged = "\n".join(record["message"] for record in server.logs)
    assert "ValueError: could not convert string to float: '***'" in logged
    assert "no-number" not in logged
