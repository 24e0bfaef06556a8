"""Measure procworker and Prefect's own worker side by side, and print the ratios. Linux only."""

import argparse
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from procworker.errors import ProcworkerError
from scripts.benchmarks import (
    cancel,
    chart,
    cold,
    figures,
    footprint,
    lab,
    latency,
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
SIZES: dict[str, dict[str, float]] = {"cancel": {"runs": 4}, "cold": {"runs": 3}}
"""What `all` asks of a subject, so that all of them take half an hour."""


def main() -> None:
    arguments = parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if arguments.subject == "all":
            arguments.into.mkdir(parents=True, exist_ok=True)
            for name, module in SUBJECTS.items():
                measure(name, module, sized(name, module, arguments))
        else:
            measure(arguments.subject, SUBJECTS[arguments.subject], arguments)
    except ProcworkerError as error:
        sys.exit(f"scripts/bench: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, module in SUBJECTS.items():
        text = str(module.__doc__)
        command = subjects.add_parser(name, description=text, help=text.splitlines()[0])
        for option, (default, what) in module.OPTIONS.items():
            kind = float if default is None else type(default)
            shown = what if default is None else f"{what} ({default:g})"
            command.add_argument(f"--{option}", type=kind, default=default, metavar="N", help=shown)
        command.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file, too")
        command.add_argument("--svg", type=Path, metavar="DIR", help="draw SUBJECT.svg in this directory, too")
    command = subjects.add_parser("all", help="Every subject, in half an hour.")
    command.add_argument("--into", type=Path, default="bench-results", metavar="DIR", help="for SUBJECT.json and .svg")
    for command in subjects.choices.values():
        default = os.environ.get("PROCWORKER_TEST_PREFECT38")
        command.add_argument("--prefect", default=default, metavar="PYTHON", help="the Python that has Prefect")
    return parser.parse_args()


def sized(name: str, module: ModuleType, arguments: argparse.Namespace) -> argparse.Namespace:
    """Return what `all` means for one subject."""
    options = {option.replace("-", "_"): default for option, (default, _) in module.OPTIONS.items()}
    files = {"json": arguments.into / f"{name}.json", "svg": arguments.into}
    return argparse.Namespace(prefect=arguments.prefect, **options | SIZES.get(name, {}) | files)


def measure(name: str, module: ModuleType, arguments: argparse.Namespace) -> None:
    """Measure one subject, and show it in all the ways that are wanted."""
    with nullcontext() if module is scan else lab.opened(arguments.prefect) as bench:
        rows = module.measure(bench, arguments)
    prefect = bench.prefect if bench else "-"
    print(module.__doc__, figures.table(rows, prefect), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"prefect": prefect, "python": sys.version, "rows": rows}))
    if arguments.svg:
        arguments.svg.mkdir(parents=True, exist_ok=True)
        (arguments.svg / f"{name}.svg").write_text(chart.svg(name, rows, prefect))


def interrupt(*_: object) -> None:
    """Stop, and let nothing interrupt the tidying up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(130)


main()
