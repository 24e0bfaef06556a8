"""Make a fork of a warm interpreter what a new interpreter would be. Imported by `_zygote.py` alone, from beside it."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from contextlib import suppress
from types import ModuleType
from typing import Any


def become(order: dict[str, Any], spec: Any, changed: dict[bytes, bytes], known: set[str]) -> Any:
    """Be in this process what a new interpreter would be that was ordered to run a module; return its `__main__`."""
    environment = {name.encode("latin-1"): value.encode("latin-1") for name, value in order["env"].items()}
    environment.update(changed)
    os.environ.clear()
    os.environb.update(environment)
    os.chdir(order["cwd"].encode("latin-1"))
    renew_stdin()
    renew_modules()
    sys.argv = [spec.origin]
    sys.orig_argv = [sys.orig_argv[0], "-m", spec.name]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd()
    importlib.invalidate_caches()
    if hasattr(time, "tzset"):
        time.tzset()
    if order["learning"] is not None:
        learn_at_exit(order["learning"], known)
    main: Any = ModuleType("__main__")
    main.__spec__, main.__file__, main.__cached__ = spec, spec.origin, spec.cached
    main.__loader__, main.__package__ = spec.loader, spec.parent
    for name in ("__main__", "__mp_main__"):
        if name in sys.modules:
            sys.modules[name] = main
    return main


def renew_stdin() -> None:
    """Standard input was a socket."""
    old: Any = sys.stdin
    new: Any = open(0, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
    new.reconfigure(write_through=old.write_through)
    new.buffer.raw.name = old.name
    sys.stdin = sys.__stdin__ = new  # type: ignore[misc]


def renew_modules() -> None:
    """What modules have kept of the process in which they were imported."""
    modules: dict[str, Any] = dict(sys.modules)
    if main_thread := getattr(threading.main_thread(), "_set_native_id", None):
        main_thread()
    if "logging" in modules:
        logging = modules["logging"]
        logging._startTime = time.time_ns() if isinstance(logging._startTime, int) else time.time()
    if "tempfile" in modules:
        modules["tempfile"].tempdir = None
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].ORIGINAL_DIR = os.getcwd()
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    if "numpy.random" in modules:  # the standard library's generator sees to itself
        modules["numpy.random"].seed()
    if "rich" in modules:
        modules["rich"]._IMPORT_CWD = os.getcwd()


def learn_at_exit(file: int, known: set[str]) -> None:
    """Name the modules of this run; of all that is done at exit this is the last."""
    import atexit

    pid, status = os.getpid(), os.fstat(file)

    def tell() -> None:
        try:
            # Another process of the run has nothing to say, and what a flow has closed may be another file now.
            if os.getpid() == pid and os.path.samestat(os.fstat(file), status):
                names = [name for name in list(sys.modules) if isinstance(name, str) and name not in known]
                os.write(file, " ".join(names).encode(errors="replace"))
        except OSError:
            pass

    atexit.register(tell)


def changes() -> dict[bytes, bytes]:
    """What Python and the imports have put into our environment: they would do so again."""
    given = dict(line.split(b"=", 1) for line in environment().split(b"\0") if b"=" in line)
    return {name: value for name, value in os.environb.items() if given.get(name) != value}


def find_mark(mark: str) -> tuple[int, int]:
    """Where in memory the environment that this process was started with has its mark: others look there."""
    import ctypes

    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    name, value = mark.split("=", 1)
    slot = getenv(name.encode()), len(value)
    if slot[0] is None or value.encode() not in environment():
        raise OSError("its environment cannot be found")
    write_mark(slot, f"{name}={value[::-1]}")
    if value[::-1].encode() not in environment():
        raise OSError("its environment cannot be marked")
    write_mark(slot, mark)
    return slot


def environment() -> bytes:
    with open("/proc/self/environ", "rb") as file:
        return file.read()


def write_mark(slot: tuple[int, int], mark: str) -> None:
    import ctypes

    address, length = slot
    value = mark.split("=", 1)[1].encode()
    ctypes.memmove(address, value, length)


def spare(tls: Tls) -> None:
    """Spare Prefect's modules what costs each run most. They alone see these stand-ins."""
    prefects = {name: vars(module) for name, module in list(sys.modules.items()) if name.startswith("prefect.")}
    engine = prefects.get("prefect.flow_engine", {})
    if "_send_heartbeats" in engine and engine.get("time") is time:
        engine["time"] = Clock("time")
    files = [os.environ.get("PREFECT_API_SSL_CERT_FILE"), os.environ.get("SSL_CERT_FILE")]
    if "certifi" in sys.modules:
        files.append(sys.modules["certifi"].where())
    for name, module in prefects.items():
        if module.get("ssl") is sys.modules["ssl"]:
            module["ssl"] = tls
            with suppress(OSError, ValueError, StopIteration):
                tls.context(next(filter(None, files)), name)


class Clock(ModuleType):
    """The module `time`, but one who sleeps until it is time to look at `stop_event` is woken by that.

    Prefect's engine ends with waiting for a thread that looks after each second.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        stop = sys._getframe(1).f_locals.get("stop_event")
        if isinstance(stop, threading.Event):
            stop.wait(seconds)
        else:
            time.sleep(seconds)


class Tls(ModuleType):
    """The module `ssl`, but who asks for the default context of a file of certificates gets the one that is there.

    To read the file takes 25 ms, and Prefect's engine makes five clients that each do; it changes none of the contexts.
    """

    def __init__(self) -> None:
        import ssl

        super().__init__("ssl")
        self._ssl: Any = ssl
        self._contexts: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ssl, name)

    def create_default_context(self, *args: Any, **how: Any) -> Any:
        if args or set(how) != {"cafile"}:
            return self._ssl.create_default_context(*args, **how)
        return self.context(how["cafile"], sys._getframe(1).f_globals.get("__name__"))

    def context(self, file: str, asking: str | None) -> Any:
        """Each module has its own: what HTTP clients negotiate must not get into the context of websockets."""
        status = os.stat(file)
        key = asking, file, status.st_mtime_ns, status.st_size, status.st_ino
        if key not in self._contexts:
            self._contexts[key] = self._ssl.create_default_context(cafile=file)
        return self._contexts[key]
