"""Flows that are cancelled in every state they can be in, for every Prefect; each hook that runs leaves a mark."""

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx
from flows import mark
from prefect import flow

STEP = 0.02


def on_cancellation(flow, flow_run, state):
    note("on_cancellation")


def on_completion(flow, flow_run, state):
    note("on_completion")


def on_crashed(flow, flow_run, state):
    note("on_crashed")


def on_failure(flow, flow_run, state):
    note("on_failure")


def note(hook):
    """Add a line, so that a hook that runs twice is seen to."""
    with Path(os.environ["MARKS"], os.environ["PREFECT__FLOW_RUN_ID"], "hooks").open("a", encoding="utf-8") as file:
        file.write(f"{hook}\n")


HOOKS = {hook.__name__: [hook] for hook in (on_cancellation, on_completion, on_crashed, on_failure)}

if os.environ.get("IMPORT_SLOWLY"):
    mark("ready")
    time.sleep(600)


@flow(**HOOKS)
def python_loop():
    mark("ready")
    while True:
        time.sleep(STEP)


@flow(**HOOKS)
async def async_sleep():
    mark("ready")
    await asyncio.sleep(600)


@flow(**HOOKS)
def c_sleep():
    mark("ready")
    time.sleep(600)


@flow(**HOOKS)
def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark("ready")
    time.sleep(600)


@flow(**HOOKS)
def finishing():
    """End the moment that the server says Cancelling, and so before the worker has heard of it."""
    auth = os.environ.get("PREFECT_API_AUTH_STRING")
    basic = httpx.BasicAuth(*auth.split(":", 1)) if auth else None
    run = f"{os.environ['PREFECT_API_URL']}/flow_runs/{os.environ['PREFECT__FLOW_RUN_ID']}"
    mark("ready")
    while httpx.get(run, auth=basic, timeout=60).json()["state_type"] != "CANCELLING":
        time.sleep(STEP)


@flow(**HOOKS)
def finishing_on_signal():
    """Take the signal for a wish to be ready soon, and end well."""
    mark("ready")
    with suppress(BaseException):
        time.sleep(600)
