"""`procworker run` on a terminal, with a real flow and its task runs on a real server."""

from __future__ import annotations

import re

import pytest
from harness import Place, Prefect
from terminals import OnTerminal

pytestmark = [pytest.mark.real, pytest.mark.slow]

FLOWS = """
import time

from prefect import flow, task


@task
def fine(number: int) -> int:
    return number


@task
def broken() -> None:
    raise ValueError("out of order")


@flow(log_prints=True)
def long(count: int) -> None:
    for number in range(count):
        fine(number)
    broken(return_state=True)
    print("that was all")
    for _ in range(2400):
        time.sleep(0.05)
"""


def test_the_line_counts_the_task_runs_of_a_real_flow(place: Place, prefect38: Prefect) -> None:
    here = place.path / "cwd"
    (here / "flows.py").write_text(FLOWS)
    given = ["--python", prefect38.python, "-p", "count=3", "--name", "counting"]
    environ = place.environment(prefect38.api, CI="")
    with OnTerminal(here, "run", "flows.py:long", *given, columns=120, **environ) as terminal:
        terminal.until(
            r"Running.{0,9} 0:\d\d \| 3 of 4 tasks completed, 1 failed \| \d+% CPU, \d+ MB \| that was all", 120
        )
        terminal.type(b"\x03")
        assert terminal.wait(60) == 130

    text = "".join(terminal.screen)
    receipt = (
        r"Cancelled: flow run 'counting' \(\d+\.\d s, \d+\.\d s CPU, peak \d+ MB, 1 process, exit -?\d+, 1 ended, 0 le"
    )
    assert re.search(receipt, text)
    assert not re.search(r"counting \| (Preparing|Starting|Running|Cancelling)", text)


def test_a_mistake_in_a_parameter_makes_no_run(place: Place, prefect38: Prefect) -> None:
    here = place.path / "cwd"
    (here / "flows.py").write_text(FLOWS)
    before = prefect38.api("POST", "/flow_runs/count", {})
    for given, says in (("cuont=3", "did you mean 'count'?"), ("count=x", "parameter 'count' must be int, not a text")):
        environ = place.environment(prefect38.api)
        with OnTerminal(here, "run", "flows.py:long", "-p", given, "--python", prefect38.python, **environ) as terminal:
            assert terminal.wait(60) == 2
        assert says in "".join(terminal.screen)
    assert prefect38.api("POST", "/flow_runs/count", {}) == before
