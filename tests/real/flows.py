"""The flows of the real-server tests, for every Prefect; they leave marks, from which a test reads what happened."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from prefect import flow, get_run_logger, task

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
attempts = 0


def mark(name: str, text: object = "") -> None:
    """Leave a fact about this flow run, whole or not at all."""
    place = Path(os.environ["MARKS"], os.environ["PREFECT__FLOW_RUN_ID"])
    place.mkdir(exist_ok=True)
    new = place / f".{name}"
    new.write_text(str(text), encoding="utf-8")
    new.replace(place / name)


def mark_process(name: str, pid: int) -> None:
    """Mark a process by pid and start time, so that no later owner of its pid is taken for it."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    mark(name, f"{pid} {stat[19]}")


def start(code: str) -> None:
    """Start a process that outlives us and wait until it does what its code says."""
    child = subprocess.Popen([sys.executable, "-S", "-E", "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    mark_process("child", child.pid)


mark_process("engine", os.getpid())
mark("inherited", os.environ.get("INHERITED"))


@flow
def answer():
    get_run_logger().info("a line of the flow's logger")
    print("a printed line")
    return 42


@flow
def fail():
    raise ValueError("boom")


@flow
def leave(code: int):
    sys.exit(code)


@flow
def vanish(code: int):
    print("last words")
    sys.stdout.flush()
    os._exit(code)


@flow
def die(number: int):
    print("last words")
    sys.stdout.flush()
    os.kill(os.getpid(), number)
    time.sleep(60)


@flow
async def answer_async():
    await asyncio.sleep(0.01)
    return 42


@flow
def child_flow(number: int):
    return number + 1


@flow
def parent_flow():
    assert child_flow(1) == 2


@task(retries=2, retry_delay_seconds=0)
def third_time_lucky():
    global attempts
    attempts += 1
    if attempts < 3:
        raise ValueError(f"attempt {attempts}")


@flow
def tasks():
    third_time_lucky()
    mark("attempts", attempts)


@flow(retries=1, retry_delay_seconds=0)
def second_time_lucky():
    global attempts
    attempts += 1
    mark("attempts", attempts)
    if attempts < 2:
        raise ValueError("not yet")


@flow
def fail_in_finally():
    try:
        raise ValueError("first")
    finally:
        raise RuntimeError("second")


@flow
def echo(text: str):
    mark("text", text)


@flow
def measure(text: str):
    mark("size", len(text))
    mark("hash", hashlib.sha256(text.encode()).hexdigest())


@flow
def typed(number: int):
    mark("number", number)


@flow
def look_around():
    mark("given", os.environ.get("GIVEN"))


@flow
def sleep():
    mark("running")
    time.sleep(600)


@flow
async def sleep_async():
    mark("running")
    await asyncio.sleep(600)


@flow
def ignore_term():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start(DEAF)
    mark("running")
    time.sleep(600)


@flow
def parent_of_deaf():
    start(DEAF)
    mark("running")
    time.sleep(600)


@flow
def leave_behind():
    start("import time; print(flush=True); time.sleep(600)")


@flow
def suspend():
    from prefect.flow_runs import suspend_flow_run

    mark("suspending")
    suspend_flow_run(timeout=300)
    mark("resumed")
