"""Finding the Python that runs flows, and keeping our own packages out of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from procworker.errors import ConfigurationError
from procworker.system.interpreter import NO_PREFECT, Interpreter, find_interpreter, inherited, locate, probe

Make = Callable[..., str]


def executable(path: Path, text: str = "#!/bin/sh\nexit 3\n", mode: int = 0o755) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def fake_prefect(folder: Path, version: str = "9.9") -> Path:
    """A directory for PYTHONPATH with a Prefect that must not be imported."""
    (folder / "prefect").mkdir(parents=True)
    (folder / "prefect" / "__init__.py").write_text("raise SystemExit('imported')")
    metadata = folder / f"prefect-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: prefect\nVersion: {version}\n")
    return folder


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a Python without any packages, or with a Prefect of this version only."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def make(name: str, prefect: str | None = None) -> str:
        path = tmp_path / name
        env = f"PYTHONPATH={fake_prefect(tmp_path / f'{name}-packages', prefect)}" if prefect else ""
        return executable(path, f'#!/bin/sh\n{env} exec {sys.executable} -S "$@"\n')

    return make


# Where it is


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = executable(tmp_path / "python3")
    (tmp_path / "link").symlink_to(path)
    assert locate(path) == path
    assert locate(str(tmp_path / "link")) == str(tmp_path / "link"), "a venv's python is a link, its packages are not"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("./python3") == locate("~/python3") == path


def test_a_virtual_environment_is_as_good_as_its_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posix, tox = executable(tmp_path / "venv/bin/python"), executable(tmp_path / ".tox/py311/bin/python")
    windows = executable(tmp_path / "win/Scripts/python.exe")
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path / "venv")) == locate("venv/") == posix
    assert locate(".tox/py311") == tox
    assert locate("win") == windows


def test_a_command_is_looked_for_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = executable(tmp_path / "bin" / "python3.99")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert locate("python3.99") == path


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("no-such-python", "python 'no-such-python' does not exist or is not executable"),
        ("/no/such/python", "python '/no/such/python' does not exist or is not executable"),
        ("~nobody-of-that-name/venv", "python '~nobody-of-that-name/venv' does not exist or is not executable"),
        ("x" * 5000, "does not exist or is not executable"),
        ("\0", "does not exist or is not executable"),
        ("empty", "python 'empty' is a directory without bin/python: not a virtual environment"),
        ("plain", "python 'plain' does not exist or is not executable"),
    ],
    ids=["command", "path", "home", "long", "NUL", "directory", "not executable"],
)
def test_what_is_no_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    executable(tmp_path / "plain", mode=0o644)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        locate(python)
    assert message in str(caught.value)


# What it has


def test_the_version_of_prefect_is_found_without_importing_it(python: Make) -> None:
    assert probe(python("with", "9.9")) == "9.9"


def test_a_python_without_prefect_has_none(python: Make) -> None:
    assert probe(python("bare")) is None


def test_prefect_on_pythonpath_counts(tmp_path: Path, python: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "packages", "2.20.26")))
    assert probe(python("bare")) == "2.20.26"


def test_a_folder_called_prefect_beside_us_is_not_prefect(
    tmp_path: Path, python: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "prefect").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    assert probe(python("bare")) is None
    assert probe(python("with", "9.9")) == "9.9"
    monkeypatch.setenv("PYTHONPATH", ".")
    assert probe(python("other")) is None


def test_the_answer_is_remembered_until_the_python_changes(tmp_path: Path) -> None:
    count = tmp_path / "count"
    path = executable(tmp_path / "python", f"#!/bin/sh\necho x >> {count}\necho 1.0\n")
    assert [probe(path), probe(path)] == ["1.0", "1.0"]
    assert count.read_text() == "x\n"
    executable(Path(path), f"#!/bin/sh\necho x >> {count}\necho 2.0\n")
    os.utime(path, ns=(1, 1))
    assert probe(path) == "2.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\necho one >&2; echo 'no such module' >&2; exit 1\n", "cannot be used: no such module"),
        ("#!/bin/sh\nexit 1\n", "cannot be used: no message"),
        ("\x7fELF", "cannot be run: .*Exec format error"),
        ("#!/no/such/interpreter\n", "cannot be run: "),
    ],
)
def test_a_broken_python_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = executable(tmp_path / "python", text)
    with pytest.raises(ConfigurationError, match=f"python '{path}' {message}"):
        probe(path)


def test_a_python_that_has_gone_says_so() -> None:
    with pytest.raises(ConfigurationError, match="python '/no/such/python' cannot be used: No such file"):
        probe("/no/such/python")


# Which one


def test_the_one_asked_for_is_taken_or_nothing(python: Make) -> None:
    bare, with_prefect = python("bare"), python("with", "9.9")
    assert find_interpreter(with_prefect, {}) == Interpreter(with_prefect, "9.9")
    with pytest.raises(ConfigurationError) as caught:
        find_interpreter(bare, {"VIRTUAL_ENV": with_prefect})
    assert str(caught.value) == f"no Prefect in {bare}: {NO_PREFECT}"


def test_a_broken_one_asked_for_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used: oops"):
        find_interpreter(executable(tmp_path / "python", "#!/bin/sh\necho oops >&2; exit 1\n"), {})


def test_our_own_comes_before_the_virtual_environment_before_path(
    tmp_path: Path, python: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, venv, on_path = (python(name, f"{number}.0") for number, name in enumerate(["own", "venv", "path"], 1))
    bare = python("bare")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(on_path)
    environ = {"VIRTUAL_ENV": venv, "PATH": str(tmp_path / "bin")}

    monkeypatch.setattr(sys, "executable", own)
    assert find_interpreter(None, environ) == Interpreter(own, "1.0")
    monkeypatch.setattr(sys, "executable", bare)
    assert find_interpreter(None, environ) == Interpreter(venv, "2.0")
    assert find_interpreter(None, {**environ, "VIRTUAL_ENV": bare}).prefect_version == "3.0"
    assert find_interpreter(None, {"PATH": environ["PATH"]}).prefect_version == "3.0"


def test_a_broken_one_that_nobody_asked_for_is_passed_over(
    tmp_path: Path, python: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_prefect, shim = python("with", "9.9"), executable(tmp_path / "shim", "#!/bin/sh\nexit 127\n")
    for own in (shim, "/no/such/python"):
        monkeypatch.setattr(sys, "executable", own)
        assert find_interpreter(None, {"VIRTUAL_ENV": with_prefect, "PATH": ""}).path == with_prefect


def test_without_prefect_anywhere_it_is_said_where_and_what_to_type(
    tmp_path: Path, python: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = python("own"), python("other")
    monkeypatch.setattr(sys, "executable", own)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(own)
    environ = {"VIRTUAL_ENV": other, "PATH": str(tmp_path / "bin")}
    with pytest.raises(ConfigurationError) as caught:
        find_interpreter(None, environ)
    places = f"{own} or {other} or {tmp_path / 'bin' / 'python'}"
    assert str(caught.value) == f"no Prefect in {places}: {NO_PREFECT}"
    assert "procworker[prefect]" in NO_PREFECT

    with pytest.raises(ConfigurationError) as caught:
        find_interpreter(None, {"VIRTUAL_ENV": own, "PATH": ""})
    assert str(caught.value) == f"no Prefect in {own}: {NO_PREFECT}", "nowhere is named twice"


# What it inherits

OURS = {
    "PATH": "/own/bin:/usr/bin:/ownership/bin",
    "PYTHONPATH": "/own/lib",
    "VIRTUAL_ENV": "/own",
    "PYTHONHOME": "/own",
    "OTHER": "/own/bin",
}


@pytest.fixture
def own_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/own")
    monkeypatch.setattr(sys, "base_prefix", "/usr")


@pytest.mark.usefixtures("own_venv")
def test_another_python_gets_nothing_of_our_virtual_environment() -> None:
    assert inherited(OURS, "/usr/bin/python") == {"PATH": "/usr/bin:/ownership/bin", "OTHER": "/own/bin"}


@pytest.mark.usefixtures("own_venv")
def test_what_the_user_set_stays() -> None:
    theirs = {"PATH": "/usr/bin::.", "PYTHONPATH": "/own/lib:/theirs:", "VIRTUAL_ENV": "/theirs", "PYTHONHOME": ""}
    assert inherited(theirs, "/usr/bin/python") == {**theirs, "PYTHONPATH": "/theirs:"}
    assert inherited({}, "/usr/bin/python") == {}


@pytest.mark.usefixtures("own_venv")
def test_an_empty_entry_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """It means the current directory, wherever we are."""
    monkeypatch.setattr(sys, "prefix", os.getcwd())
    assert inherited({"PATH": "/usr/bin:"}, "/usr/bin/python") == {"PATH": "/usr/bin:"}


@pytest.mark.usefixtures("own_venv")
@pytest.mark.parametrize("python", ["/own/bin/python", None])
def test_our_own_python_and_a_command_get_everything(python: str | None) -> None:
    assert inherited(OURS, python) == OURS
    assert inherited(OURS, python) is not OURS


def test_without_a_virtual_environment_of_our_own_nothing_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/own")
    monkeypatch.setattr(sys, "base_prefix", "/own")
    assert inherited(OURS, "/usr/bin/python") == OURS


def test_a_probe_sees_what_the_flow_will_see(tmp_path: Path, python: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own packages on PYTHONPATH do not make Prefect present in another Python."""
    own = fake_prefect(tmp_path / "own" / "packages")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "own"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("PYTHONPATH", str(own))
    assert probe(python("other")) is None
