"""What a worker costs while it does nothing: on disk, at start, in memory, on the network.

Ours is what `pip install .` puts into a new environment. Both idle at the same time at default settings;
requests are counted by a proxy on the way. Disk without pip and its kind; MB are 10^6 bytes.
"""

import argparse
import json
import re
import shutil
import socket
import subprocess
import time
import venv
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

import psutil

from procworker.errors import ProcworkerError
from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import ROOT, Lab, clean, note

SETTLE_SECONDS = 5.0
PAIRS, PREFECT_STARTS = 20, 5
MOST = {"RSS, MB": 45, "CPU, %": 0.2, "requests a minute": 14}
RATES = {"CPU, %": 100, "requests a minute": 60}
REQUEST = re.compile(rb"^((?:GET|POST|PUT|PATCH|DELETE) /[^\s?]*)\S* HTTP/1", re.M)
INVENTORY = """
import importlib.metadata, json, os, sysconfig
tools = {"pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack"}
names = {found.name for found in importlib.metadata.distributions()} - tools
size, site = 0, sysconfig.get_path("purelib")
for place, folders, files in os.walk(site):
    folders[:] = [folder for folder in folders if place != site or folder.split("-")[0] not in tools]
    size += sum(os.lstat(os.path.join(place, file)).st_size for file in files)
print(json.dumps({"distributions": len(names), "site-packages, MB": size / 1e6}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="how long to watch (60)")


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Look at a fresh installation from all sides."""
    ours = install(lab.place / "venv", lab.place / "source")
    lab.ours[:3] = [str(ours.with_name("procworker"))]
    rows = on_disk(str(ours), lab.theirs[0]) + at_start(str(ours), lab.theirs[0])
    rows += idle(lab, "127.0.0.1", arguments.seconds, most_threads=1)
    return rows + idle(lab, "localhost", arguments.seconds, most_threads=2)


def install(home: Path, source: Path) -> Path:
    """Return the Python of a new environment that has procworker."""
    note("pip install . into a new environment ...")
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info")
    )  # pip writes there
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    if subprocess.run([python, "-m", "pip", "install", "--quiet", source], env=clean()).returncode:
        raise ProcworkerError("pip install has failed")
    return python


def on_disk(ours: str, theirs: str) -> list[Row]:
    answers = [
        subprocess.check_output([python, "-c", INVENTORY], env=clean(), cwd="/") for python in (ours, theirs)
    ]
    one, other = map(json.loads, answers)
    return compare([one], [other], most={"distributions": 16, "site-packages, MB": 20})


def at_start(ours: str, theirs: str) -> list[Row]:
    """Time `--version` against the same Python that only imports argparse, in pairs."""
    commands = {
        "--version, s": [str(Path(ours).with_name("procworker")), "--version"],
        "import argparse, s": [ours, "-c", "import argparse"],
    }
    prefect = [theirs, "-m", "prefect", "--version"]
    one = [{name: seconds(command) for name, command in commands.items()} for _ in range(PAIRS + 1)][1:]
    other = [{"--version, s": seconds(prefect)} for _ in range(PREFECT_STARTS + 1)][1:]
    ratios = [{"--version / import argparse": version / bare} for version, bare in map(dict.values, one)]
    return compare(one, other) + compare(ratios, [], most={"--version / import argparse": 1.5})


def seconds(command: list[str]) -> float:
    """Time a command from start to exit."""
    begin = time.perf_counter()
    subprocess.run(command, env=clean(), cwd="/", stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def idle(lab: Lab, host: str, window: float, most_threads: int) -> list[Row]:
    """Watch both workers do nothing; they reach the server at `host`."""
    note(f"both workers idle at {host} for {window:g} s ...")
    with ExitStack() as stack:
        watched = []
        for command in (lab.ours, lab.theirs):
            listener, seen = stack.enter_context(socket.create_server(("127.0.0.1", 0))), Counter[str]()
            server, port = (lab.client.base_url.host, lab.client.base_url.port), listener.getsockname()[1]
            Thread(target=forward, args=(listener, server, seen), daemon=True).start()
            worker = lab.worker(command, f"idle-{port}", PREFECT_API_URL=f"http://{host}:{port}/api")
            watched.append((stack.enter_context(worker), seen))
        time.sleep(SETTLE_SECONDS)
        before = [look(*pair) for pair in watched]
        time.sleep(window)
        after = [look(*pair) for pair in watched]
    note("\n".join(f"  since its start it has asked {dict(seen)}" for _, seen in watched))
    for begin, end in zip(before, after, strict=True):
        end |= {name: (end[name] - begin[name]) * scale / window for name, scale in RATES.items()}
    one, other = ({f"{host}: {name}": value for name, value in end.items()} for end in after)
    most = {f"{host}: {name}": limit for name, limit in (MOST | {"threads": most_threads}).items()}
    return compare([one], [other], most)


def look(worker: psutil.Popen, seen: Counter[str]) -> dict[str, float]:
    """Return what a worker holds now, and what it has used so far."""
    memory, cpu = worker.memory_full_info(), sum(worker.cpu_times()[:4])
    now = {"RSS, MB": memory.rss / 1e6, "PSS, MB": memory.pss / 1e6, "threads": worker.num_threads()}
    return {**now, "CPU, %": cpu, "requests a minute": seen.total()}


def forward(listener: socket.socket, server: tuple[str, int], seen: Counter[str]) -> None:
    """Pass connections on to the server, and count the requests."""
    with suppress(OSError):
        while True:
            near, far = listener.accept()[0], socket.create_connection(server)
            Thread(target=pump, args=(near, far, seen), daemon=True).start()
            Thread(target=pump, args=(far, near, Counter()), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket, seen: Counter[str]) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            seen.update(found.decode() for found in REQUEST.findall(data))
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
