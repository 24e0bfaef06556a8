"""The README's tox matrix: cells that run at once on a machine without a server, and know nothing of each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import PYTHONS, a_python
from misbehave import survivors

import procworker

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(procworker.__file__).parents[1]
EXAMPLE = ROOT / "tests" / "example_tox"
FACTORS = {"prefect38": "38", "prefect30": "30", "prefect220": "220"}
INSTALL = '''
"""In place of pip: lend a cell the packages of an environment that exists already."""

import json
import os
import sys
import sysconfig
from pathlib import Path

places = json.loads(Path(__file__).with_suffix(".json").read_text())
packages = places[os.environ["TOX_ENV_NAME"].rpartition("-")[2]]
Path(sysconfig.get_path("purelib"), "lent.pth").write_text("\\n".join([*packages, *places["procworker"]]) + "\\n")
script = Path(sysconfig.get_path("scripts"), "procworker")
script.write_text(f"#!{sys.executable}\\nimport sys\\nfrom procworker.cli import main\\nsys.exit(main())\\n")
script.chmod(0o755)
'''
"""The cells then differ in their Prefect, as they do for a user, and no package index is needed."""


def site_packages(python: str) -> str:
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def test_cells_at_once_are_all_green_and_leave_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tox")
    versions = {factor: f"PROCWORKER_TEST_PREFECT{version}" for factor, version in FACTORS.items()}
    pythons = {factor: a_python(variable) for factor, variable in versions.items() if PYTHONS[variable]}
    if len(pythons) < 2:
        pytest.skip("a matrix needs two Prefects")
    project, home = tmp_path / "project", tmp_path / "home"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    packages = {factor: [site_packages(python)] for factor, python in pythons.items()}
    packages["procworker"] = [str(ROOT), site_packages(sys.executable)]
    (tmp_path / "install.json").write_text(json.dumps(packages))
    (tmp_path / "install.py").write_text(INSTALL)
    cells = [f"py{sys.version_info[0]}{sys.version_info[1]}-{factor}" for factor in pythons]
    install = f"testenv.install_command=python {tmp_path / 'install.py'} {{packages}}"
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}

    done = subprocess.run(
        [sys.executable, "-m", "tox", "-p", "4", "-e", ",".join(cells), "-x", install],
        cwd=project,
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    left = survivors(f"TOX_ENV_DIR={project}")
    for pid in left:
        os.kill(pid, 9)
    logs = [log.read_text(errors="replace")[-3000:] for log in project.glob(".tox/*/.procworker/servers/*/server.log")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    assert not left
    saw = {}
    for cell in cells:
        lines = (project / ".tox" / cell / "saw.txt").read_text().splitlines()
        saw[cell] = dict(line.split("=", 1) for line in lines)
        suite = ElementTree.parse(project / "reports" / f"{cell}.xml").getroot()[0]
        assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == ("1", "0", "0")
        servers = project / ".tox" / cell / ".procworker" / "servers"
        assert [server.name for server in servers.iterdir()] == [saw[cell]["prefect"]], "a server of its own"
        assert not list((project / ".tox" / cell / ".procworker").glob("runs/*")), "no record of a run is left"
    assert {row["greeting"] for row in saw.values()} == {"Hello data team"}
    assert {row["directory"] for row in saw.values()} == {str(project)}
    for different in ("prefect", "api"):
        assert len({row[different] for row in saw.values()}) == len(cells), different
    assert not [place for place in (".prefect", ".local/state") if (home / place).exists()], "nothing of the user's"
