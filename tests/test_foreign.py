"""Nothing foreign is touched: pids that were given again, strangers that look like ours, other containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import misbehave
import pytest
from commands import FAST, TEMPLATE, Command

from procworker.system.journal import here
from procworker.system.processes import Process, find_root, identify
from procworker.system.tree import Family
from procworker.testing import Beside, serving

HERE = Path(__file__).parent
PYTHON = [sys.executable, "-S", "-E"]
NAMESPACE = ["unshare", "-p", "-f", "--mount-proc"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")]

REUSE = """
import os, subprocess, sys, time
import anyio
from misbehave import COOKIE, SLEEP
from procworker.system.processes import Process, identify, is_alive
from procworker.system.tree import Family

def start(**env):
    return subprocess.Popen(SLEEP, start_new_session=True, env={**os.environ, **env})

async def main():
    ours = start(**{COOKIE: "ours"})
    root = identify(ours.pid)
    family = Family(root, "ours")
    family.members()
    ours.kill()
    ours.wait()
    time.sleep(0.05)  # start times are counted in hundredths of a second
    while (stranger := start()).pid != root.pid:
        stranger.kill()
        stranger.wait()
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(root.pid - 1))
    child = subprocess.Popen(SLEEP, env={})
    new = identify(stranger.pid)
    assert new.pid == root.pid and new != root
    members = family.members()
    await family.end(0.0)
    print(len(members), stranger.poll(), is_alive(new), is_alive(root))
    family = Family(new, "ours")  # the negative control: it is the start time that saves the stranger
    await family.end(0.0)
    print(stranger.wait())
    child.kill()

anyio.run(main)
"""


REUSE_OF_AN_ELDER = """
import os, subprocess, sys, time
from misbehave import COOKIE, SLEEP
from procworker.system import processes
from procworker.system.processes import identify
from procworker.system.tree import Family

def start(**env):
    return subprocess.Popen(SLEEP, start_new_session=True, env={**os.environ, **env})

elder = start()
time.sleep(0.05)  # start times are counted in hundredths of a second
ours = start(**{COOKIE: "ours"})
family = Family(identify(ours.pid), "ours")
assert family.members() == {family.root}
print(elder.pid in processes._elders)
elder.kill()
elder.wait()
while (left := start(**{COOKIE: "ours"})).pid != elder.pid:
    left.kill()
    left.wait()
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(elder.pid - 1))
print(family.members() == {family.root, identify(left.pid)})
# The negative control: it is the inode that tells one from the other.
processes._elders[left.pid] = os.stat(f"/proc/{left.pid}").st_ino, 0.0
print(family.members() == {family.root})
ours.kill()
left.kill()
"""


def can_unshare() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def told_in_a_namespace(program: str) -> list[str]:
    """The words that a program prints in a pid namespace of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    command, env = [*NAMESPACE, sys.executable, "-c", program], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not can_unshare(), reason="no pid namespace can be made here")
def test_a_pid_that_was_given_again_is_not_taken_for_ours() -> None:
    assert told_in_a_namespace(REUSE) == ["0", "None", "True", "False", "-15"]


@pytest.mark.skipif(not can_unshare(), reason="no pid namespace can be made here")
def test_a_member_with_the_pid_of_an_elder_is_not_overlooked() -> None:
    assert told_in_a_namespace(REUSE_OF_AN_ELDER) == ["True", "True", "True"]


@pytest.fixture
def strangers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that nobody may touch, with environments that resemble those of runs."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        one.kill()
        one.communicate()


def stranger(**env: str) -> subprocess.Popen[bytes]:
    command = [*PYTHON, misbehave.__file__, "sleep"]
    one = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **env}, start_new_session=True)
    assert one.stdout
    assert one.stdout.readline().startswith(b"READY")
    return one


async def test_a_similar_environment_makes_nobody_ours(strangers: list[subprocess.Popen[bytes]]) -> None:
    cookie = f"{uuid4()}.{uuid4().hex}"
    similar = [
        {"PROCWORKER_RUN": cookie + "x"},
        {"PROCWORKER_RUN": cookie[:-1]},
        {"PROCWORKER_RUN": cookie.upper()},
        {"XPROCWORKER_RUN": cookie},
        {"PROCWORKER_RUN_": cookie},
        {"NOTE": f"PROCWORKER_RUN={cookie}"},
        {"PROCWORKER_RUN": ""},
        {"PREFECT__FLOW_RUN_ID": cookie.split(".")[0]},
    ]
    root = stranger(PROCWORKER_RUN=cookie)
    strangers += [root, *(stranger(**env) for env in similar)]
    ours = identify(root.pid)
    assert ours
    assert find_root(cookie) == ours
    await Family(ours, cookie).end(0.0)

    assert root.wait(10) is not None
    assert [one.poll() for one in strangers[1:]] == [None] * len(similar)


# A worker with a forged state directory


@pytest.fixture
def server() -> Iterator[Beside]:  # type: ignore[override]
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        yield server


def record(server: Beside, run: Any, process: Process | None, **fields: Any) -> Path:
    """Leave what a dead worker would leave."""
    path = Path(os.environ["PROCWORKER_HOME"]) / "runs" / f"{run}.{uuid4().hex}"
    path.mkdir(parents=True)
    claim = server.run(run).states[-2].state_details["transition_id"]
    data: dict[str, Any] = {
        "version": 1,
        "owner": uuid4().hex,
        "place": here(),
        "flow_run_id": str(run),
        "flow_run_name": "forged",
        "transition_id": claim,
        "api": server.url,
        "pool": "pool",
        "worker": "dead",
        "phase": "running",
        "infrastructure": {"process": process} if process else {},
    }
    (path / "run.json").write_text(json.dumps({**data, **fields}))
    return path


def running(server: Beside) -> Any:
    run = server.schedule(server.add_deployment())
    server.set_state(run, "PENDING", transition_id=str(uuid4()))
    server.set_state(run, "RUNNING")
    return run


def work(server: Beside, place: Path, until: str) -> str:
    """Have a worker start and stop; return its log."""
    with Command(place, "start", "-p", "pool", PREFECT_API_URL=server.url, **FAST) as worker:
        worker.until_it_says(until)
        worker.send(15)
        assert worker.wait() == 0
        return worker.err


@pytest.mark.parametrize("orphans", ["adopt", "kill"])
def test_a_record_whose_pid_is_a_strangers_now_touches_it_not(
    server: Beside, tmp_path: Path, strangers: list[subprocess.Popen[bytes]], orphans: str
) -> None:
    strangers.append(stranger())
    found = identify(strangers[0].pid)
    assert found
    run = running(server)
    record(server, run, found._replace(start=found.start - 100), orphans=orphans)
    work(server, tmp_path / "worker", "Reported flow run")

    assert strangers[0].poll() is None
    assert server.run(run).state.type == "CRASHED"


def test_a_record_of_the_boot_before_signals_nobody(
    server: Beside, tmp_path: Path, strangers: list[subprocess.Popen[bytes]]
) -> None:
    strangers.append(stranger())
    run = running(server)
    record(server, run, identify(strangers[0].pid), place={**here(), "boot": "the last one"}, orphans="kill")
    work(server, tmp_path / "worker", "Reported flow run")

    assert strangers[0].poll() is None, "pid and start time are the same: it is the boot that tells"
    assert server.run(run).state.type == "CRASHED"


@pytest.mark.parametrize(
    "place",
    [{"host": "another"}, {"host": "another", "boot": "another", "namespace": 1}],
    ids=["host", "host and boot"],
)
def test_a_record_of_another_host_is_no_business_of_ours(
    server: Beside, tmp_path: Path, strangers: list[subprocess.Popen[bytes]], place: dict[str, Any]
) -> None:
    strangers.append(stranger())
    run = running(server)
    path = record(server, run, identify(strangers[0].pid), place={**here(), **place}, orphans="kill")
    err = work(server, tmp_path / "worker", "is left alone")

    assert "belongs to host 'another'" in err
    assert strangers[0].poll() is None
    assert server.run(run).state.type == "RUNNING"
    assert path.exists()


UNTOUCHABLE = """
import os, signal, subprocess, sys
import anyio
from misbehave import SLEEP
from procworker.system.processes import identify
from procworker.system.tree import Family

async def main():
    bystander = subprocess.Popen(SLEEP, start_new_session=True)
    for pid in (1, os.getppid(), os.getpid()):
        family = Family(identify(pid), "cookie")
        await family.end(0.0)
        print(len(family.ended))
    print(bystander.poll())
    family = Family(identify(bystander.pid), "cookie")  # the negative control
    await family.end(0.0)
    print(len(family.ended))

anyio.run(main)
"""


@pytest.mark.skipif(not can_unshare(), reason="no pid namespace can be made here")
def test_neither_init_nor_an_ancestor_nor_anything_below_them_is_ended_as_a_root() -> None:
    """In a namespace of its own, where it could do no harm if it failed."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, UNTOUCHABLE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "0", "None", "1"]
