"""What `pip install .` brings: little, and all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import procworker

ROOT = Path(__file__).parents[1]
INSTALLER = ("pip", "setuptools", "wheel", "_distutils_hack", "distutils-precedence.pth")
DISTRIBUTIONS = """
import json, importlib.metadata
print(json.dumps(sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions())))
"""

pytestmark = [pytest.mark.package, pytest.mark.slow]


@dataclass(frozen=True)
class Installed:
    """A wheel of this tree, and an otherwise empty environment that has it."""

    wheel: Path
    directory: Path

    def run(self, *command: str) -> str:
        program, *arguments = command
        return out_of(self.directory, str(self.directory / "bin" / program), *arguments)

    @property
    def site_packages(self) -> Path:
        (found,) = (self.directory / "lib").glob("python*/site-packages")
        return found


def out_of(place: Path, *command: str) -> str:
    """What a command prints that cannot see this tree."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("package")
    # A copy: building leaves build/ and *.egg-info beside the sources.
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, place / "source", ignore=unwanted)
    venv.create(place / "venv", with_pip=True, symlinks=True)
    pip = [str(place / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    out_of(place, *pip, "wheel", "--no-deps", "--wheel-dir", str(place), str(place / "source"))
    (wheel,) = place.glob("*.whl")
    out_of(place, *pip, "install", str(wheel))
    return Installed(wheel, place / "venv")


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = Path(procworker.__file__).parent
    modules = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}

    assert names == modules | {"procworker/py.typed"}
    assert installed.wheel.name == f"procworker-{procworker.__version__}-py3-none-any.whl"


def test_it_brings_at_most_16_distributions(installed: Installed) -> None:
    names = set(json.loads(installed.run("python", "-c", DISTRIBUTIONS))) - set(INSTALLER)

    assert {"procworker", "anyio", "httpx", "psutil", "pydantic"} <= names
    assert ("tomli" in names) == (sys.version_info < (3, 11))
    assert len(names) <= 16, names


def test_it_takes_at_most_20_megabytes(installed: Installed) -> None:
    files = [
        path
        for entry in installed.site_packages.iterdir()
        if not entry.name.startswith(INSTALLER)
        for path in (entry, *entry.rglob("*"))
        if path.is_file()
    ]
    assert sum(path.stat().st_size for path in files) <= 20_000_000


def test_the_command_works_where_it_is_installed(installed: Installed) -> None:
    assert installed.run("procworker", "--version") == f"procworker {procworker.__version__}\n"
    assert json.loads(installed.run("procworker", "template"))["job_configuration"]["python"] == "{{ python }}"
    assert installed.run("procworker", "server", "status") == "No embedded server is running.\n"


def test_the_process_worker_is_offered_as_an_entry_point(installed: Installed) -> None:
    code = "from procworker import BaseWorker; print(BaseWorker.get_worker_class_from_type('process').__module__)"
    assert installed.run("python", "-c", code) == "procworker.process\n"
    assert str(installed.site_packages) in installed.run("python", "-c", "print(__import__('procworker').__file__)")
