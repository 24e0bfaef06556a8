"""The flows of the generations' test, for every Prefect."""

import time

from cancel_flows import HOOKS
from flows import mark, start
from prefect import flow, get_run_logger, task


@task
def double(number: int):
    return 2 * number


@flow(persist_result=True)
def complete(number: int = 21):
    get_run_logger().info("a line of the flow's logger")
    return double(number)


@task(persist_result=True)
def keep():
    return "kept"


@flow(persist_result=True)
def fail():
    keep()
    raise ValueError("boom")


@flow(**HOOKS)
def sleep():
    start("import time; print(flush=True); time.sleep(600)")
    mark("ready")
    time.sleep(600)
