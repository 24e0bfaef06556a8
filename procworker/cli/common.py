"""What several commands need: logging, signals, the server to talk to, the worker class."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import anyio

from procworker.errors import ConfigurationError, Unreachable
from procworker.redaction import SHORTEST_CREDENTIAL, Mask
from procworker.server.client import Client
from procworker.settings import Settings
from procworker.system.printer import PRINTER, LogStream
from procworker.worker import BaseWorker

T = TypeVar("T")

KEEP_SECONDS = 600.0
SAME_SIGNAL_SECONDS = 1.0
"""Signals closer together count once: Ctrl-C may hit the whole group and be forwarded as well."""


def run_loop(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run a coroutine function to its end in an event loop of its own; Ctrl-C is a KeyboardInterrupt.

    What is printed meanwhile by `say` and by our log waits for no reader; at the end it waits 2 s at most.
    """

    async def run() -> T:
        with _children_watched_by_descriptor():
            async with anyio.create_task_group() as beside:
                beside.start_soon(PRINTER.pump)
                result = await function(*arguments)
                beside.cancel_scope.cancel()
        return result

    try:
        return anyio.run(run)
    except asyncio.CancelledError:  # what comes of Ctrl-C before Python 3.11
        raise KeyboardInterrupt from None
    finally:
        PRINTER.drain()


@contextmanager
def _children_watched_by_descriptor() -> Iterator[None]:
    """Have asyncio wait for children without a thread for each, as it does by itself from Python 3.12 on."""
    if sys.version_info >= (3, 12) or not _has_descriptors_of_processes():
        yield
        return
    watcher = asyncio.PidfdChildWatcher()
    watcher.attach_loop(asyncio.get_running_loop())
    asyncio.set_child_watcher(watcher)
    try:
        yield
    finally:
        asyncio.set_child_watcher(None)  # type: ignore[arg-type]  # the next loop gets the usual one


def _has_descriptors_of_processes() -> bool:
    """Not on an old kernel, nor in a container without them."""
    if not hasattr(os, "pidfd_open"):
        return False
    with suppress(OSError):
        os.close(os.pidfd_open(os.getpid()))
        return True
    return False


def say(line: str, stream: str = "stdout") -> None:
    """Print a line of our own; whether somebody reads it is not our concern."""
    PRINTER.say(line + "\n", stream)


class _MaskingFormatter(logging.Formatter):
    """Shows none of the secrets that our settings hold, whatever was logged."""

    def __init__(self, mask: Mask, *args: Any) -> None:
        super().__init__(*args)
        self._mask = mask

    def format(self, record: logging.LogRecord) -> str:
        return self._mask(super().format(record))


def set_up_logging(settings: Settings, level: str | None = None) -> None:
    """Log our own lines to stderr in Prefect's form; other libraries keep what they had."""
    level, mask = level or settings.logging_level, Mask(settings.secrets(), SHORTEST_CREDENTIAL)
    handler = logging.StreamHandler(LogStream(PRINTER))
    form = "%(asctime)s.%(msecs)03d | %(levelname)-7s | %(name)s - %(message)s"
    handler.setFormatter(_MaskingFormatter(mask, form, "%H:%M:%S"))
    # What libraries without a handler of their own warn of must not wait for a reader either.
    logging.lastResort = logging.StreamHandler(LogStream(PRINTER))
    logging.lastResort.setLevel("WARNING")
    logging.lastResort.setFormatter(_MaskingFormatter(mask))
    for name in ("procworker", "prefect"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def worker_class(name: str) -> type[BaseWorker[Any, Any, Any]]:
    """Raises ConfigurationError that lists the known types."""
    import procworker.process  # noqa: F401  (registers itself, also where no package metadata says so)

    found: type[BaseWorker[Any, Any, Any]] | None = BaseWorker.get_worker_class_from_type(name)
    if found is None:
        known = ", ".join(BaseWorker.get_all_available_worker_types())
        raise ConfigurationError(
            f"unknown worker type {name!r}: known are {known};"
            " install the package that offers it, or choose another pool"
        )
    return found


@asynccontextmanager
async def signals_counted(act: Callable[[int], None]) -> AsyncIterator[list[int]]:
    """Call act for each INT, TERM and HUP (unless HUP is ignored, as under nohup); yields those received."""
    received: list[int] = []
    if os.name == "nt":  # its event loop takes no signals: Ctrl-C stays a KeyboardInterrupt
        yield received
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    async def listen() -> None:
        last = float("-inf")
        async for number in signals:
            if anyio.current_time() - last >= SAME_SIGNAL_SECONDS:
                last = anyio.current_time()
                received.append(int(number))
                act(int(number))

    with anyio.open_signal_receiver(*numbers) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            yield received
            tasks.cancel_scope.cancel()


async def wait_for_server(settings: Settings, seconds: float) -> None:
    """Wait until the server answers at all; raises Unreachable after so many seconds."""
    async with Client(settings) as client:
        give_up = anyio.current_time() + seconds
        while (error := await client.api_healthcheck()) is not None:
            if anyio.current_time() >= give_up or not isinstance(error, Unreachable):
                raise error
            await anyio.sleep(0.5)


@asynccontextmanager
async def embedded(settings: Settings, python: str | None, keep: bool) -> AsyncIterator[Settings]:
    """Settings that point at the embedded server of the chosen interpreter, for as long as the context is open."""
    from procworker.local.server import local_server
    from procworker.system.interpreter import find_interpreter

    interpreter = find_interpreter(python, os.environ)
    keep_seconds = KEEP_SECONDS if keep else 0.0
    async with local_server(
        interpreter.path,
        settings.state_home,
        keep_seconds=keep_seconds,
        say=partial(say, stream="stderr"),
        version=interpreter.prefect_version,
    ) as server:
        yield settings.at_server(server.api_url, server.auth_string, f"embedded {server.version}")
