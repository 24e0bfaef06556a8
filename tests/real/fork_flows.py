"""Flows that tell what kind of process they run in, for every Prefect; a test compares what they tell."""

import asyncio
import atexit
import contextvars
import ctypes
import decimal
import fcntl
import gc
import json
import locale
import logging
import multiprocessing
import multiprocessing.process
import multiprocessing.synchronize
import os
import random
import re
import resource
import secrets
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import coolname
import prefect
import prefect.settings
from flows import mark
from prefect import flow, get_run_logger, task

DIRT = contextvars.ContextVar("dirt", default="clean")


def tell(name, what):
    mark(name, json.dumps(what, default=repr))


def name_of(what):
    return getattr(what, "__qualname__", None) or re.sub(" at 0x[0-9a-f]+", "", repr(what))


# What a process is ---------------------------------------------------------------------------------------------------


def interpreter():
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "executable": sys.executable,
        "path": sys.path,
        "flags": str(sys.flags),
        "options": [sys._xoptions, sys.warnoptions],
        "pycache": [sys.dont_write_bytecode, sys.pycache_prefix],
        "hooks": [
            name_of(hook) for hook in (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook)
        ],
        "tracing": [sys.gettrace(), sys.getprofile()],
        "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), threading.stack_size()],
        "finders": [name_of(finder) for finder in (*sys.meta_path, *sys.path_hooks)],
        "module_name": __name__,
        "main": {
            name: name_of(vars(sys.modules["__main__"]).get(name))
            for name in ("__name__", "__file__", "__package__", "__cached__", "__doc__")
        },
        "main_spec": sys.modules["__main__"].__spec__.name,
        "main_loader": type(sys.modules["__main__"].__loader__).__name__,
        "engine_module": "prefect.engine" in sys.modules,
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_debug()],
        "warnings": [str(entry) for entry in warnings.filters],
        "decimal": str(decimal.getcontext()),
        "locale": [locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(False), sys.getfilesystemencoding()],
        "asyncio": name_of(type(asyncio.get_event_loop_policy())),
        "contextvars": sorted(variable.name for variable in contextvars.copy_context()),
    }


def streams():
    found = {}
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        about = [stream.name, stream.mode, stream.encoding, stream.errors, stream.isatty(), stream.seekable()]
        about += [stream.line_buffering, stream.write_through, type(stream.buffer).__name__]
        found[stream.name] = [*about, fcntl.fcntl(stream.fileno(), fcntl.F_GETFL), os.get_inheritable(stream.fileno())]
    found["stdin_target"] = os.readlink("/proc/self/fd/0")
    found["stdin_read"] = sys.stdin.read()
    return found


def handles():
    """What is open beyond the standard streams: number -> (what, identity)."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            status, target = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # that of the listing
            continue
        if fd > 2 and not stat.S_ISCHR(status.st_mode):
            found[fd] = [target.partition(":[")[0], f"{status.st_dev}:{status.st_ino}"]
    return found


def handles_of_parent():
    found = []
    for link in Path(f"/proc/{os.getppid()}/fd").iterdir():
        try:
            status = link.stat()
        except OSError:
            continue
        if not stat.S_ISCHR(status.st_mode):
            found.append(f"{status.st_dev}:{status.st_ino}")
    return found


STATUS = ("SigBlk", "SigIgn", "SigCgt", "ShdPnd", "Cap", "NoNewPrivs", "Seccomp", "THP", "Groups", "Cpus")


def process():
    os.umask(umask := os.umask(0o77))
    own = os.getpid()
    return {
        "signals": {number.name: name_of(signal.getsignal(number)) for number in signal.Signals},
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "timers": [
            signal.getitimer(which) for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
        ],
        "session": [os.getsid(0) == own, os.getpgrp() == own, os.getsid(os.getppid()) == os.getsid(0)],
        "umask": umask,
        "nice": os.nice(0),
        "cpus": sorted(os.sched_getaffinity(0)),
        "rlimits": {
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == "RLIMIT_"
        },
        "user": [os.getuid(), os.geteuid(), os.getgid(), os.getgroups()],
        "no_children": not Path(f"/proc/self/task/{own}/children").read_text(),
        "status": [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(STATUS)],
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "oom": Path("/proc/self/oom_score_adj").read_text(),
        "cwd": os.getcwd(),
        "pwd_is_real": os.path.realpath(".") == os.getcwd(),
    }


def thread():
    main, own = threading.main_thread(), threading.current_thread()
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "count": threading.active_count(),
        "main_thread": [main is own, main.name, main.ident == threading.get_ident(), main.native_id == os.getpid()],
        "multiprocessing": [
            multiprocessing.current_process().name,
            multiprocessing.current_process().pid == os.getpid(),
            repr(multiprocessing.parent_process()),
            multiprocessing.active_children(),
            multiprocessing.get_start_method(allow_none=True),
        ],
        "original_dir": multiprocessing.process.ORIGINAL_DIR,
        "tempdir": tempfile.gettempdir(),
        "clock": [logging._startTime > time.time() - age() - 0.1, time.process_time() < age() * os.cpu_count() + 0.1],
    }


def age():
    """How many seconds ago this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def loggers():
    found = {}
    for name in (None, "prefect", "prefect.flow_runs", "prefect.task_runs", "prefect.engine", "asyncio", "httpx"):
        logger = logging.getLogger(name)
        handlers = [[type(handler).__name__, handler.level] for handler in logger.handlers]
        found[str(name)] = [logger.level, logger.getEffectiveLevel(), logger.propagate, logger.disabled, handlers]
    return {"loggers": found, "levels": logging.getLevelNamesMapping(), "disabled": logging.root.manager.disable}


def environment():
    inherited = subprocess.run(["env", "-0"], stdout=subprocess.PIPE, check=True).stdout
    children = {os.fsdecode(line).partition("=")[::2] for line in inherited.split(b"\0") if line}
    return {"environ": dict(os.environ), "children_see": sorted(set(os.environ.items()) ^ children)}


def settings():
    return {"settings": prefect.settings.get_current_settings().to_environment_variables(exclude_unset=True)}


def own():
    """What no two processes may have in common."""
    found = {
        "pid": os.getpid(),
        "random": random.random(),
        "uuid1": uuid.uuid1().hex,
        "uuid4": uuid.uuid4().hex,
        "secrets": secrets.token_hex(),
        "ssl": ssl.RAND_bytes(16).hex(),
        "tempname": next(tempfile._get_candidate_names()),
        "mktemp": tempfile.mktemp(dir="/"),
        "slug": coolname.generate_slug(3),
        "authkey": bytes(multiprocessing.current_process().authkey).hex(),
        "semaphore": multiprocessing.synchronize.SemLock._make_name(),
    }
    if "numpy" in sys.modules:
        found["numpy"] = float(sys.modules["numpy"].random.random())
    gc.unfreeze()
    generators = [found for found in gc.get_objects() if type(found) is random.Random]
    found |= {f"generator {number}": found.getstate()[1][:9] for number, found in enumerate(generators)}
    return found


PLAIN = (str, bytes, int, float, uuid.UUID, Path)


def state():
    """All plain values that modules, and what is in them, hold."""
    found = {}

    def note(name, what, depth):
        if isinstance(what, PLAIN):
            found[name] = repr(what)[:200]
        elif depth and isinstance(vars_of := getattr(what, "__dict__", None), dict):
            for key, value in list(vars_of.items()):
                if isinstance(key, str):
                    note(f"{name}.{key}", value, depth - 1)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("fork_flows", "flows", "__main__") and module is not None:
            for key, value in list(vars(module).items()):
                if not isinstance(value, type(sys)) and getattr(value, "__module__", name) == name:
                    note(f"{name}:{key}", value, 1)
    return found


def warm():
    """Is this a fork of a warm interpreter? Two facts that nobody can make up."""
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().rstrip(b"\0")
    return parent.endswith(b"/_zygote.py"), b"PROCWORKER_WARM=1" in Path("/proc/self/environ").read_bytes().split(b"\0")


@flow
def look():
    """Tell everything, work, and leave the process dirty."""
    everything = {"warm": warm(), "parent": os.getppid()}
    everything["handles"], everything["parents_handles"] = handles(), handles_of_parent()
    everything["modules"] = sorted(sys.modules)
    everything["state"] = state()
    for part in (interpreter, streams, process, thread, loggers, environment, settings):
        everything |= part()
    everything["own"] = own()
    everything["dirt"] = find_dirt()
    tell("report", everything)
    tell("work", work())
    speak(os.environ["PREFECT__FLOW_RUN_ID"])
    make_dirt()


# What a flow does ----------------------------------------------------------------------------------------------------

FACTORIAL = "import math; print(math.factorial(5))"


@task
def double(number):
    return number * 2


@flow
def subflow(number):
    return double(number) + 1


async def gathered():
    async def one(number):
        await asyncio.sleep(0.01)
        return number

    start = await asyncio.create_subprocess_exec(sys.executable, "-SEc", FACTORIAL, stdout=subprocess.PIPE)
    out, _ = await start.communicate()
    numbers = await asyncio.gather(*(one(number) for number in range(5)))
    return [numbers, await asyncio.to_thread(sum, numbers), out.decode(), start.returncode]


def threaded():
    found = []
    threads = [threading.Thread(target=found.append, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return sorted(found)


def processed(method):
    context = multiprocessing.get_context(method)
    # Its `__exit__` would send SIGTERM, of which Prefect makes a traceback.
    pool = context.Pool(1)
    found = pool.map(abs, [-1, 2, -3])
    pool.close()
    pool.join()
    return found


def waited():
    if (pid := os.fork()) == 0:
        os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def handled():
    got = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, former)
    return got


def encrypted():
    """A TLS handshake in memory that fails for the lack of a certificate, as it should; and a hash."""
    client, server = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ends = socket.socketpair()
    answers = []

    def serve():
        try:
            server.wrap_socket(ends[0], server_side=True)
        except ssl.SSLError as error:
            answers.append(error.reason)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        client.wrap_socket(ends[1], server_hostname="localhost")
    except ssl.SSLError as error:
        answers.append(error.reason)
    serving.join()
    for end in ends:
        end.close()
    return sorted(answers), client.verify_mode.name


def work():
    # What forks comes before what Prefect has threads for: a fork in the middle of their work may inherit a lock.
    pooled, code = processed("fork"), waited()
    with ProcessPoolExecutor(2) as processes:
        numbers = list(processes.map(abs, [-1, -2]))
    with ThreadPoolExecutor(3) as threads:
        squares = list(threads.map(lambda number: number**2, range(4)))
    done = {
        "gather": asyncio.run(gathered()),
        "threads": threaded(),
        "thread pool": squares,
        "process pool": numbers,
        "multiprocessing fork": pooled,
        "multiprocessing spawn": processed("spawn"),
        "subprocess": subprocess.run([sys.executable, "-SEc", FACTORIAL], capture_output=True, text=True).stdout,
        "fork": code,
        "signal": handled(),
        "ssl": encrypted(),
        "stdin of a child": subprocess.run(["cat"], capture_output=True).stdout.decode(),
    }
    futures = [double.submit(number) for number in range(3)]
    return {**done, "subflow": subflow(3), "tasks": [future.result() for future in futures]}


def speak(word):
    """Print in every way there is."""
    print(f"print {word}")
    sys.stderr.write(f"stderr {word}\n")
    os.write(1, f"write {word}\n".encode())
    subprocess.run(["echo", f"echo {word}"])
    get_run_logger().info("run log %s", word)
    atexit.register(print, f"atexit {word}")
    library = ctypes.CDLL(None)
    library.puts(f"puts {word}".encode())
    library.fflush(None)


def make_dirt():
    """Change all that can be changed, after everything else."""
    import builtins

    import prefect.flows

    prefect.flows.Flow.dirt = prefect.flows.dirt = prefect.settings.dirt = builtins.dirt = "dirt"
    prefect.flows.Flow.with_options = None
    sys.modules["dirt"] = sys
    os.environ["DIRT"] = "dirt"
    os.environ["PREFECT_LOGGING_LEVEL"] = "ERROR"
    sys.path.append("/dirt")
    sys.argv.append("dirt")
    DIRT.set("dirt")
    logging.basicConfig(level=logging.ERROR, force=True)
    logging.getLogger("prefect").setLevel(logging.CRITICAL)
    logging.getLogger("prefect").addHandler(logging.NullHandler())
    decimal.getcontext().prec = 3
    random.seed(1)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.umask(0)
    gc.disable()
    warnings.simplefilter("always")
    sys.setrecursionlimit(5000)
    tempfile.tempdir = "/dirt"
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def find_dirt():
    import builtins

    import prefect.flows

    places = (prefect.flows.Flow, prefect.flows, prefect.settings, builtins)
    found = [repr(place) for place in places if hasattr(place, "dirt")]
    found += [name for name in ("DIRT", "dirt") if name in os.environ or name in sys.modules]
    return [*found, DIRT.get(), name_of(prefect.flows.Flow.with_options)]


# How a flow ends -----------------------------------------------------------------------------------------------------


def watch_the_end():
    tell("warm", warm())
    atexit.register(mark, "atexit", "ran")


@flow
def end_well():
    watch_the_end()

    def late():
        threading.main_thread().join()
        mark("thread", "joined")

    threading.Thread(target=late).start()


@flow
def end_with(kind: str, value: int = 0):
    watch_the_end()
    print("last words", flush=True)
    if kind == "raise":
        raise ValueError("boom")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "exit":
        sys.exit(value)
    if kind == "os._exit":
        os._exit(value)
    os.kill(os.getpid(), value)
    time.sleep(60)


@flow
async def end_async():
    watch_the_end()
    tell("work", await gathered())


# What the surroundings of a flow make of it --------------------------------------------------------------------------


@flow
def surroundings(modules: list = (), values: list = ()):
    """Tell of the directory, of modules that are found there, and of `module:attribute` values."""
    import importlib

    found = {"warm": warm(), "cwd": os.getcwd(), "given": os.environ.get("GIVEN"), "tempdir": tempfile.gettempdir()}
    for part in (interpreter, streams, environment, settings, loggers):
        found |= part()
    for name in modules:
        try:
            found[name] = vars(importlib.import_module(name)).get("WHO", "another")
        except Exception as error:
            found[name] = repr(error)
    for value in values:
        module, _, attribute = value.partition(":")
        found[value] = getattr(importlib.import_module(module), attribute, None)
    for level in ("debug", "info", "warning"):
        getattr(get_run_logger(), level)("said at %s", level)
    tell("report", found)
