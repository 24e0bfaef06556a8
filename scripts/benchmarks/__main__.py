"""Measure procworker and Prefect's own worker side by side, and print the ratios. Linux only."""

import argparse
import json
import signal
import sys
from contextlib import nullcontext
from types import ModuleType

import httpx
import psutil

from procworker.errors import ProcworkerError
from scripts.benchmarks import (
    cancel,
    chart,
    cold,
    figures,
    footprint,
    lab,
    latency,
    options,
    overhead,
    scale,
    scan,
    throughput,
    warm,
)

SUBJECTS = {
    "cancel": cancel,
    "cold": cold,
    "warm": warm,
    "latency": latency,
    "throughput": throughput,
    "overhead": overhead,
    "scale": scale,
    "footprint": footprint,
    "scan": scan,
}
"""Modules with a docstring, OPTIONS and measure(lab, arguments) -> rows made by figures.compare."""


def main() -> None:
    arguments = options.parse(str(__doc__), SUBJECTS)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    chosen = SUBJECTS if arguments.subject == "all" else {arguments.subject: SUBJECTS[arguments.subject]}
    failed = 0
    for name, module in chosen.items():
        try:
            measure(name, module, options.sized(name, module, arguments))
        except (ProcworkerError, httpx.HTTPError, psutil.Error) as error:  # the other subjects may fare better
            print(f"scripts/bench: {name}: {error}", file=sys.stderr)
            failed = 1
    sys.exit(failed)


def measure(name: str, module: ModuleType, arguments: argparse.Namespace) -> None:
    """Measure one subject, and show it in all the ways that are wanted."""
    with nullcontext() if module is scan else lab.opened(arguments.prefect) as bench:
        rows = module.measure(bench, arguments)
    prefect = bench.prefect if bench else "-"
    print(module.__doc__, figures.table(rows, prefect), sep="\n")
    for path in (arguments.json and arguments.json.parent, arguments.svg):
        if path:
            path.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"prefect": prefect, "python": sys.version, "rows": rows}))
    if arguments.svg:
        (arguments.svg / f"{name}.svg").write_text(chart.svg(name, rows, prefect))


def interrupt(*_: object) -> None:
    """Stop, and let nothing interrupt the tidying up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(130)


main()
