"""Starting a child: what it gets, what it does not get, and what is said when it cannot start."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import anyio.lowlevel
import misbehave
import pytest
from hypothesis import given
from hypothesis import strategies as st

from procworker.errors import ConfigurationError, SpawnError
from procworker.exits import explain_exit
from procworker.system.child import Child, join_command, parse_command, spawn
from procworker.system.files import raised_file_limit
from procworker.system.processes import identify, is_alive
from procworker.system.tree import Family

MISBEHAVE = [sys.executable, "-S", "-E", misbehave.__file__]
MINIMAL = {"PATH": os.defpath}


@dataclass
class Place:
    """A directory to start children in, with their output beside it."""

    cwd: Path
    stdout: Path
    stderr: Path

    async def spawn(self, *argv: str, env: Mapping[str, str] = MINIMAL, **options: Any) -> Child:
        return await spawn(argv, **{"env": env, **vars(self), **options})

    async def run(self, *argv: str, env: Mapping[str, str] = MINIMAL) -> tuple[int, str, str]:
        code = await (await self.spawn(*argv, env=env)).wait()
        return code, self.stdout.read_text(), self.stderr.read_text()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    return Place(cwd, tmp_path / "stdout", tmp_path / "stderr")


def script(path: Path, text: str = "#!/bin/sh\n", mode: int = 0o755) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


# How it ends


@pytest.mark.parametrize("code", [0, 1, 2, 3, 41, 77, 125, 126, 127, 128, 130, 137, 143, 200, 247, 254, 255])
async def test_exit_codes_arrive(place: Place, code: int) -> None:
    assert await place.run("sh", "-c", f"exit {code}") == (code, "", "")


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 11, 13, 14, 15])
async def test_signals_arrive_as_negative_numbers(place: Place, number: int) -> None:
    code, _, _ = await place.run(*MISBEHAVE, "die", str(number))
    assert code == -number


async def test_wait_can_be_called_again_and_by_several(place: Place) -> None:
    child = await place.spawn("sh", "-c", "exit 7")
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await child.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
    assert [*codes, await child.wait()] == [7, 7, 7]


async def test_the_identity_is_that_of_the_process(place: Place) -> None:
    child = await place.spawn(*MISBEHAVE, "sleep")
    assert identify(child.pid) == child.identity
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    assert not is_alive(child.identity)


async def test_a_child_that_ended_at_once_still_has_a_family(place: Place) -> None:
    """Whether it is a zombie or reaped when it is looked at: what it left in its session is found."""
    for _ in range(5):
        child = await place.spawn("sh", "-c", "env -i sleep 600 & echo $!")
        await child.wait()
        left = identify(int(place.stdout.read_text().split()[-1]))
        assert left
        family = Family(child.identity, "no such cookie")
        await family.end(0.0)
        assert family.ended == {left}
        assert not is_alive(left)


# What it gets


async def test_output_goes_to_two_private_files(place: Place) -> None:
    old = os.umask(0)
    try:
        assert await place.run("sh", "-c", "echo out; echo err >&2") == (0, "out\n", "err\n")
    finally:
        os.umask(old)
    for path in (place.stdout, place.stderr):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_output_is_appended(place: Place) -> None:
    place.stdout.write_text("before\n")
    code = "import os; os.write(1, b'a\\n'); os.truncate(1, 0); os.write(1, b'b\\n')"
    assert await place.run("sh", "-c", "echo after") == (0, "before\nafter\n", "")
    assert await place.run(sys.executable, "-S", "-E", "-c", code) == (0, "b\n", "")


async def test_stdin_is_empty(place: Place) -> None:
    ours, write = os.pipe()
    os.write(write, b"not for the child")
    os.close(write)
    saved = os.dup(0)
    os.dup2(ours, 0)
    try:
        assert await place.run("cat") == (0, "", "")
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(ours)


async def test_it_leads_a_session_of_its_own(place: Place) -> None:
    child = await place.spawn(*MISBEHAVE, "exit")
    await child.wait()
    assert place.stdout.read_text() == f"READY {child.pid} {child.pid} {child.pid}\n"
    assert os.getsid(0) != child.pid


async def test_it_starts_in_the_working_directory(place: Place) -> None:
    assert await place.run("pwd") == (0, f"{place.cwd}\n", "")


async def test_it_gets_exactly_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "must not arrive")
    wanted = {"PATH": os.defpath, "EMPTY": "", "LINES": "a\nb", "ÜMLAUT": "☃", "WITH": "equals=sign"}
    await place.run("env", "-0", env=wanted)
    assert dict(v.split("=", 1) for v in place.stdout.read_text().split("\0")[:-1]) == wanted


async def test_the_command_is_looked_for_on_its_own_path(place: Place) -> None:
    folder = place.cwd / "bin"
    folder.mkdir()
    script(folder / "tool", "#!/bin/sh\necho found\n")
    assert await place.run("tool", env={"PATH": f"{folder}:{os.defpath}"}) == (0, "found\n", "")
    with pytest.raises(SpawnError, match="'tool' was not found"):
        await place.spawn("tool")


async def test_arguments_arrive_as_they_are_and_meet_no_shell(place: Place) -> None:
    nasty = ["", " ", "a b", "$HOME", "`id`", "*", ";", "'", '"', "\\", "\n", "☃", "--x=a b"]
    code = "import sys; sys.stdout.buffer.write('\\0'.join(sys.argv[1:]).encode())"
    _, out, _ = await place.run(sys.executable, "-S", "-E", "-X", "utf8", "-c", code, *nasty)
    assert out.split("\0") == nasty


async def test_no_signal_is_blocked_or_ignored(place: Place) -> None:
    """Python itself ignores SIGPIPE: flows written for shells would never end of it."""
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
    _, out, _ = await place.run("cat", "/proc/self/status")
    masks = dict(re.findall(r"^(Sig(?:Blk|Ign)):\s*(\w+)$", out, re.M))
    inherited = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
    ignored = {number for number in range(1, 65) if int(masks["SigIgn"], 16) >> (number - 1) & 1}
    assert int(masks["SigBlk"], 16) == 0
    assert ignored <= inherited - {signal.SIGPIPE, signal.SIGXFSZ}


async def test_it_inherits_no_open_files(place: Place) -> None:
    handle = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(handle, True)
    _, out, _ = await place.run("ls", "/proc/self/fd")
    os.close(handle)
    assert out.split() == ["0", "1", "2", "3"], "the last one is the directory that ls reads"


async def test_we_keep_no_file_open(place: Place) -> None:
    await place.run("true")  # the event loop may open something the first time
    before = sorted(os.listdir("/proc/self/fd"))
    await place.run("true")
    with pytest.raises(SpawnError):
        await place.spawn("/no/such/command")
    assert sorted(os.listdir("/proc/self/fd")) == before


# When it cannot start


async def test_a_missing_command_is_named(place: Place) -> None:
    for name in ("no-such-command", "/no/such/command"):
        with pytest.raises(SpawnError, match=f"^The command '{name}' was not found; check `command`, `python`"):
            await place.spawn(name)


async def test_a_command_that_is_not_executable_is_named(place: Place) -> None:
    for path in (script(place.cwd / "plain", mode=0o644), str(place.cwd)):
        with pytest.raises(SpawnError, match=f"^The command '{path}' is not executable"):
            await place.spawn(path)
    with pytest.raises(SpawnError, match="is not executable"):
        await place.spawn(script(place.cwd / "binary", "\x7fELF no real one"))


async def test_a_missing_working_directory_is_named(place: Place) -> None:
    with pytest.raises(SpawnError, match=r"^The working directory '.*/gone' does not exist\.$"):
        await place.spawn("true", cwd=place.cwd / "gone")
    with pytest.raises(SpawnError, match=r"^The working directory '/x+' does not exist\.$"):
        await place.spawn("true", cwd=Path("/" + "x" * 5000))


async def test_a_file_is_no_working_directory(place: Place) -> None:
    with pytest.raises(SpawnError, match=r"^The working directory '.*/file' is not a directory\.$"):
        await place.spawn("true", cwd=Path(script(place.cwd / "file")))


@pytest.mark.parametrize(
    ("name", "value"),
    [("", "x"), ("A=B", "x"), ("A\0B", "x"), ("A", "secret\0word")],
    ids=["empty", "=", "NUL", "value"],
)
async def test_an_environment_that_cannot_be_names_its_variable(place: Place, name: str, value: str) -> None:
    with pytest.raises(SpawnError, match="has a character that no environment can hold") as caught:
        await place.spawn("true", env={"GOOD": "x", name: value})
    assert repr(name) in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_nul_in_an_argument_is_reported(place: Place) -> None:
    with pytest.raises(SpawnError, match=r"^The command 'echo' could not be started: embedded null byte"):
        await place.spawn("echo", "a\0b")


async def test_an_environment_that_is_too_large_names_its_largest_variables(place: Place) -> None:
    env = {f"V{size}": "secret" * size for size in (1, 2, 3, 4, 40_000)}
    with pytest.raises(SpawnError, match="too large for this system") as caught:
        await place.spawn("true", env={**env, "SMALL": "x"})
    assert "['V40000', 'V4', 'V3', 'V2', 'V1']" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_ten_thousand_variables_are_fine(place: Place) -> None:
    env = {**MINIMAL, **{f"VARIABLE_{number}": "x" * 20 for number in range(10_000)}}
    assert await place.run("sh", "-c", "echo $VARIABLE_9999", env=env) == (0, "x" * 20 + "\n", "")


async def test_an_output_file_that_cannot_be_written_is_named(place: Place) -> None:
    with pytest.raises(SpawnError, match=r"could not be started: .*No such file.*/gone/stdout"):
        await place.spawn("true", stdout=place.cwd / "gone" / "stdout")
    with pytest.raises(SpawnError, match=r"could not be started: .*Is a directory"):
        await place.spawn("true", stderr=place.cwd)


async def test_a_working_directory_that_may_not_be_entered_is_named(place: Place) -> None:
    if os.getuid():
        pytest.skip("needs root")
    place.cwd.chmod(0)
    code = f"""if True:
        import sys
        sys.path[:] = {sys.path!r}
        import anyio, os
        from pathlib import Path
        from procworker.errors import SpawnError
        from procworker.system.child import spawn
        async def main():
            await anyio.sleep(0)
            os.setuid(65534)
            null = Path(os.devnull)
            try:
                await spawn(["/bin/true"], cwd=Path({str(place.cwd)!r}), env={{}}, stdout=null, stderr=null)
            except SpawnError as error:
                print(error)
        anyio.run(main)"""
    for path in place.cwd.parents:
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o111)
    done = await anyio.run_process([sys.executable, "-c", code])
    said = done.stdout.decode()
    assert str(place.cwd) in said
    assert "Permission denied" in said
    assert "not executable" not in said


async def test_no_file_descriptors_left_is_reported(place: Place) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    await place.run("true")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
        with pytest.raises(SpawnError, match="Too many open files"):
            await place.spawn("true")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await place.run("true") == (0, "", "")


# While it is being cancelled


async def test_a_cancelled_caller_still_gets_its_child(place: Place, no_survivors: Any) -> None:
    no_survivors(cookie := uuid4().hex)
    with anyio.CancelScope() as scope:
        scope.cancel()
        child = await place.spawn(*MISBEHAVE, "sleep", env={"COOKIE": cookie})
    assert identify(child.pid) == child.identity
    os.kill(child.pid, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("steps", range(12))
async def test_whenever_it_is_cancelled_no_process_is_lost(place: Place, no_survivors: Any, steps: int) -> None:
    no_survivors(cookie := uuid4().hex)
    got: list[Child] = []

    async def start() -> None:
        got.append(await place.spawn(*MISBEHAVE, "sleep", env={"COOKIE": cookie}))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    for child in got:
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()
    assert len(got) <= 1


# Commands as text


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("python -m prefect.engine", ["python", "-m", "prefect.engine"]),
        ("'my python' -c \"print('a b')\"", ["my python", "-c", "print('a b')"]),
        ("  spaces \t and\nlines ", ["spaces", "and", "lines"]),
        ("a\\ b ''", ["a b", ""]),
        ("echo $HOME && `id` | x > y # z", ["echo", "$HOME", "&&", "`id`", "|", "x", ">", "y", "#", "z"]),
    ],
)
def test_a_command_is_split_like_a_shell_would_but_nothing_is_expanded(command: str, argv: list[str]) -> None:
    assert parse_command(command) == argv


@pytest.mark.parametrize("command", ["", " ", "\n\t "])
def test_a_blank_command_is_refused(command: str) -> None:
    with pytest.raises(ConfigurationError, match="command is blank: leave it out to run the Prefect engine"):
        parse_command(command)


@pytest.mark.parametrize("command", ["echo 'a", 'echo "a', "echo a\\"])
def test_an_open_quote_is_refused(command: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be split into arguments: No"):
        parse_command(command)


@given(st.lists(st.text(), min_size=1))
def test_what_was_joined_is_parsed_again(argv: list[str]) -> None:
    assert parse_command(join_command(argv)) == argv


@pytest.mark.parametrize(
    "argv", [["python", "-m", "prefect.engine"], ["C:\\Program Files\\python.exe", "-m", "x"], ["a", "b c\\d"]]
)
def test_windows_rules_leave_backslashes_alone(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        command = join_command(argv)
        parsed = parse_command(command)
    assert parsed == argv


# What exit codes mean


@pytest.mark.parametrize("code", [-9, -15, 1, 125, 126, 127, 137, 143, 247, 0xC000013A])
def test_known_exit_codes_have_a_meaning_and_a_hint(code: int) -> None:
    assert explain_exit(code) != explain_exit(77)
    assert explain_exit(code).text.endswith(".")
    assert explain_exit(code).hint.endswith(".")


def test_other_exit_codes_are_called_unexpected() -> None:
    assert explain_exit(77).text == "It ended with an unexpected status."
    assert explain_exit(-signal.SIGSEGV).text == "It was ended by SIGSEGV."
    assert explain_exit(-64 * 2).text == "It was ended by signal 128."


async def test_a_child_does_not_inherit_the_raised_file_limit(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    code = "import time, resource; time.sleep(0.2); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    try:
        with raised_file_limit(), ExitStack() as stack:
            for _ in range(501):
                stack.enter_context(open(os.devnull))  # noqa: ASYNC230
            child = await spawn(
                [sys.executable, "-c", code],
                cwd=tmp_path,
                env={},
                stdout=tmp_path / "out",
                stderr=tmp_path / "err",
            )
            assert await child.wait() == 0
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (tmp_path / "out").read_text() == "1000\n"
