"""Two `procworker run` at once where there is no server: with a state each, and with one between them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import a_python
from harness import Api, Place

pytestmark = [pytest.mark.real, pytest.mark.slow]

FLOWS = '''
import json
import os
import time
from pathlib import Path

from prefect import flow


@flow(log_prints=True)
def meet(name: str, other: str) -> None:
    """Ends when both run."""
    here = Path(os.environ["MARKS"])
    saw = {"api": os.environ["PREFECT_API_URL"], "id": os.environ["PREFECT__FLOW_RUN_ID"]}
    (here / f".{name}").write_text(json.dumps(saw))
    (here / f".{name}").rename(here / name)
    deadline = time.monotonic() + 120
    while not (here / other).exists():
        assert time.monotonic() < deadline, f"{other} does not run"
        time.sleep(0.05)
    print(f"{name} met {other}")
'''
PAIR = (("ann", "bob"), ("bob", "ann"))


@pytest.mark.parametrize("shared", [False, True], ids=["a state each", "one state"])
def test_two_runs_at_once_do_not_interfere(place: Place, shared: bool) -> None:
    python = a_python("PROCWORKER_TEST_PREFECT38")
    here = place.path / "cwd"
    (here / "flows.py").write_text(FLOWS)
    states = {name: place.path / ("state" if shared else f"state of {name}") for name, _ in PAIR}

    def start(name: str, other: str) -> subprocess.Popen[bytes]:
        environ = place.environment(Api("http://127.0.0.1:9", None), PROCWORKER_HOME=str(states[name]))
        del environ["PREFECT_API_URL"]
        command = [sys.executable, "-m", "procworker", "run", "flows.py:meet", "--python", python, "--no-keep"]
        parameters = ["-p", f"name={name}", "-p", f"other={other}", "--junit", f"{name}.xml"]
        with (here / f"{name}.out").open("wb") as out:
            return subprocess.Popen([*command, *parameters], cwd=here, env=environ, stdout=out, stderr=out)

    runs = [start(*pair) for pair in PAIR]
    try:
        codes = [run.wait(240) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    left = place.clear()
    out = {name: (here / f"{name}.out").read_text(errors="replace") for name, _ in PAIR}

    assert codes == [0, 0], "\n".join(out.values())
    assert not left, "both servers have ended with the commands"
    saw = {name: json.loads((place.path / "marks" / name).read_text()) for name, _ in PAIR}
    assert len({row["id"] for row in saw.values()}) == 2
    assert (saw["ann"]["api"] == saw["bob"]["api"]) is shared, "a state has one server"
    for name, other in PAIR:
        assert f"{name} met {other}" in out[name]
        assert f"{other} met {name}" not in out[name], "each shows its own flow alone"
        suite = ElementTree.parse(here / f"{name}.xml").getroot()[0]
        assert (suite.attrib["failures"], suite.attrib["errors"]) == ("0", "0")
        assert servers(states[name]) == 1
        assert not list(states[name].glob("runs/*/*")), "no record of a run is left"


def servers(state: Path) -> int:
    return len(list(state.glob("servers/*/prefect.db")))
