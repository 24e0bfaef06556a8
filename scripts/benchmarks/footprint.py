"""What a worker costs while it does nothing: on disk, at start, in memory, on the network.

Ours is what `pip install .` puts into a new environment; disk without pip and its kind; MB are 10^6 bytes.
One worker after the other idles at default settings, and a proxy on the way counts its requests.
"""

import argparse
import shutil
import subprocess
import time
import venv
from collections import Counter
from pathlib import Path

from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import CLEAN, ROOT, Lab
from scripts.benchmarks.proxy import Proxy

OPTIONS = {"seconds": (60.0, "how long each worker idles")}
SETTLE_SECONDS, PAIRS = 5.0, 20
TOOLS = ("pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack")
MOST = {"distributions": 16, "site-packages, MB": 20, "--version / import argparse": 1.5}
IDLE_MOST = {"RSS, MB": 45, "CPU, %": 0.2, "requests a minute": 14}


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Look at a fresh installation from all sides."""
    ours, theirs = install(lab.place), Path(lab.theirs[0]).parent
    lab.ours[:3] = [f"{ours}/procworker"]
    rows = compare([on_disk(ours)], [on_disk(theirs)], MOST) + compare(at_start(ours), [], MOST)
    for host, threads in (("127.0.0.1", 1), ("localhost", 2)):
        one, other = ([idle(lab, side, host, arguments.seconds)] for side in (lab.ours, lab.theirs))
        most = {f"{host}: {name}": most for name, most in {**IDLE_MOST, "threads": threads}.items()}
        rows += compare(one, other, most)
    return rows


def install(place: Path) -> Path:
    """Return the directory of the programs of a new environment that has procworker."""
    print("pip install . into a new environment ...")
    source, home = place / "source", place / "venv"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))  # pip writes there
    venv.create(home, with_pip=True)
    subprocess.run([home / "bin" / "pip", "install", "-qq", source], env=CLEAN, check=True)
    return home / "bin"


def on_disk(programs: Path) -> Sample:
    """Count what is installed, without pip and its kind."""
    (site,) = programs.parent.glob("lib/python3*/site-packages")
    found = [entry for entry in site.iterdir() if entry.name.split("-")[0] not in TOOLS]
    files = [file for entry in found for file in (entry, *entry.rglob("*")) if file.is_file()]
    distributions = sum(entry.suffix == ".dist-info" for entry in found)
    return {"distributions": distributions, "site-packages, MB": sum(file.stat().st_size for file in files) / 1e6}


def at_start(programs: Path) -> list[Sample]:
    """Time `--version` against the same Python that only imports argparse, in pairs."""
    version, bare = [f"{programs}/procworker", "--version"], [f"{programs}/python", "-c", "import argparse"]
    pairs = [(seconds(version), seconds(bare)) for _ in range(PAIRS + 1)][1:]
    return [{"--version, s": a, "import argparse, s": b, "--version / import argparse": a / b} for a, b in pairs]


def seconds(command: list[str]) -> float:
    """Time a command from start to exit."""
    begin = time.perf_counter()
    subprocess.run(command, env=CLEAN, cwd="/", stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def idle(lab: Lab, command: list[str], host: str, window: float) -> Sample:
    """Watch a worker that reaches the server at `host` do nothing for so many seconds."""
    with (
        Proxy(lab.client.base_url) as proxy,
        lab.worker(command, f"idle-{proxy.port}", PREFECT_API_URL=proxy.url(host)) as worker,
    ):
        time.sleep(SETTLE_SECONDS)
        cpu, requests = sum(worker.cpu_times()[:4]), len(proxy.requests)
        time.sleep(window)
        memory, threads = worker.memory_full_info(), worker.num_threads()
        cpu, requests = sum(worker.cpu_times()[:4]) - cpu, len(proxy.requests) - requests
    print(f"{command[0]} at {host} has asked {dict(Counter(request.line for request in proxy.requests))}")
    sample = {"RSS, MB": memory.rss / 1e6, "PSS, MB": memory.pss / 1e6, "threads": threads}
    sample |= {"CPU, %": cpu / window * 100, "requests a minute": requests / window * 60}
    return {f"{host}: {name}": value for name, value in sample.items()}
